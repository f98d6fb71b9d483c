"""Calls of the launchers, and tools that watch them: allocations, guard bands, launches."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tools.gpu_model.launches import ON_VECTORS
from tritoncaps import kernels, reference, testing

# Matrices and grids have axes of their own, and files: test_em_kernels.py and test_patches.py.
EVERY = ON_VECTORS
ROUTINGS = [name for name in EVERY if "coupling?" in testing.OPERATORS[name].outputs]
SIZES = {"B": 3, "I": 19, "P": 3, "J": 4, "D": 5}
Call = dict[str, Tensor]


def draw(
    name: str,
    device: torch.device,
    sizes: Mapping[str, int] = SIZES,
    *,
    dtype: torch.dtype = torch.float64,
    optional: tuple[str, ...] | None = None,
) -> Call:
    """The inputs of a call by name, with the gradients of its output and of its coupling."""
    operator = testing.OPERATORS[name]
    # The weight is divided by √P, so P = 0 is made by cutting P = 1.
    drawn = {**sizes, "P": max(sizes["P"], 1)}
    call = testing.draw_inputs(operator, drawn, dtype=dtype, device=device, optional=optional)
    for key, tensor in call.items():
        axes = operator.axes[key].split()
        if "P" in axes:
            call[key] = tensor.narrow(axes.index("P"), 0, sizes["P"]).contiguous()
    for seed, (output, axes) in enumerate(operator.outputs.items(), start=1):
        shape = [sizes[axis] for axis in axes.split()]
        grad = testing.normal(*shape, seed=seed, dtype=dtype).to(device)
        call["grad_coupling" if output == "coupling?" else "grad"] = grad
    return call


def run(
    name: str,
    call: Call,
    *,
    iterations: int = 3,
    leaky: bool = False,
    gradient: str = "full",
    output: str = "v",
    with_coupling: bool = True,
    form: str = "quadratic",
    with_gradients: bool = True,
) -> Call:
    """Results of both launchers by name. Names of the inputs' gradients begin with "d_"."""
    operator = testing.OPERATORS[name]
    given: dict[str, Any] = {key: call.get(key) for key in operator.axes}
    inputs = list(given)
    given |= {"iterations": iterations, "leaky": leaky, "gradient": gradient}
    given |= {"output": output, "form": form}
    given["return_coupling"] = with_coupling
    given["grad_coupling"] = call.get("grad_coupling") if with_coupling else None
    outputs = [output.removesuffix("?") for output in operator.registered.outputs]
    given[f"grad_{outputs[0]}"] = call["grad"]
    if operator.is_elementwise:
        for key in (*inputs, f"grad_{outputs[0]}"):
            given[key] = given[key].flatten(0, -2)

    def launch(way: str) -> tuple[Tensor, ...]:
        launcher = getattr(kernels, f"{name}_{way}")
        made = launcher(*(given[key] for key in inspect.signature(launcher).parameters))
        return (made,) if isinstance(made, Tensor) else made

    results = dict(zip(outputs, launch("fwd"), strict=True))
    given |= results
    if not with_gradients:
        return results
    for key, grad in zip(inputs, launch("bwd"), strict=True):
        assert (grad is None) == (given[key] is None)
        if grad is not None:
            results[f"d_{key}"] = grad
    return results


def exact(
    name: str,
    call: Call,
    *,
    iterations: int = 3,
    leaky: bool = False,
    gradient: str = "full",
    output: str = "v",
    with_coupling: bool = True,
    form: str = "quadratic",
    dtype: torch.dtype = torch.float64,
) -> Call:
    """The reference's results and gradients, from autograd of the einsum form in `dtype`."""
    operator = testing.OPERATORS[name]
    leaves = {
        key: call[key].to(dtype).detach().requires_grad_() for key in operator.axes if key in call
    }
    options: dict[str, Any] = {}
    if name == "squash":
        options = {"form": form}
    elif name in ROUTINGS:
        options = {"leaky": leaky, "return_coupling": True}
        if name != "routing_pass":
            options |= {"iterations": iterations, "gradient": gradient, "output": output}
    outputs = operator.call(leaves, options, getattr(reference, name))
    loss = (outputs[0] * call["grad"].to(dtype)).sum()
    if name in ROUTINGS and with_coupling and gradient == "full":
        loss = loss + (outputs[1] * call["grad_coupling"].to(dtype)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    names = [key.removesuffix("?") for key in operator.outputs]
    results = {key: output.detach() for key, output in zip(names, outputs, strict=True)}
    if not with_coupling:
        results.pop("coupling", None)
    for (key, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[f"d_{key}"] = torch.zeros_like(leaf) if grad is None else grad
    if name == "squash":
        results = {key: result.flatten(0, -2) for key, result in results.items()}
    return results


def assert_exact(actual: Call, expected: Call) -> None:
    """Compare float64 results of `run` with those of `exact`."""
    assert expected.keys() <= actual.keys()
    for key, exactly in expected.items():
        assert actual[key].is_contiguous()
        torch.testing.assert_close(
            actual[key], exactly, rtol=1e-10, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )


def assert_same_bits(actual: Call, expected: Call) -> None:
    """Compare every result to the last bit."""
    assert actual.keys() == expected.keys()
    for key, bits in expected.items():
        assert torch.equal(actual[key], bits), key


class Allocations(TorchDispatchMode):
    """Give every new tensor guard bands on both sides and NaN inside, and count matrix products."""

    BAND = 64
    SENTINEL = 12345.0

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[Tensor] = []
        self.shapes: list[torch.Size] = []
        self.products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace what an allocating operator returns."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "mm":
            self.products += 1
        # Tensors that are not floating-point are the interpreter's own copies, as bytes.
        if isinstance(result, Tensor) and not func.is_view and result.is_floating_point():
            self.shapes.append(result.shape)
        is_empty = name in ("empty", "empty_like", "new_empty")
        if not (is_empty or name == "new_zeros") or not result.is_floating_point():
            return result
        size = result.numel()
        storage = result.new_full((size + 2 * self.BAND,), self.SENTINEL)
        self.storages.append(storage)
        inside = storage[self.BAND : self.BAND + size]
        return inside.fill_(float("nan") if is_empty else 0.0).view(result.shape)

    def assert_bands_untouched(self) -> None:
        """Assert that no kernel wrote outside a tensor."""
        assert self.storages
        for storage in self.storages:
            bands = torch.cat([storage[: self.BAND], storage[-self.BAND :]])
            assert (bands == self.SENTINEL).all()


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """Collect the names of the kernels that are launched inside, interpreted or compiled."""
    launched: list[str] = []
    kernel_type = type(kernels.squash._squash_fwd_kernel)
    run: Callable[..., Any] = kernel_type.run

    def counting(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(kernel.fn.__name__)
        return run(kernel, *args, **kwargs)

    assert issubclass(kernel_type, triton.runtime.KernelInterface)
    with mock.patch.object(kernel_type, "run", counting):
        yield launched
