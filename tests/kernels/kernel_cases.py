"""Calls of the launchers, and what watches them: allocations, guard bands, launches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tritoncaps import kernels, reference

ROUTINGS = ("dynamic_routing", "fused_dynamic_routing")


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal values from a seed and the shape."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def routing_inputs(
    name: str,
    shape: tuple[int, int, int, int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """u and weight, or u_hat; then a prior, grad_v and grad_coupling, for (B, I, P, J, D)."""
    B, I, P, J, D = shape
    if name == "fused_dynamic_routing":
        inputs = [random(B, I, P, dtype=dtype), random(I, P, J, D, dtype=dtype) / max(P, 1) ** 0.5]
    else:
        inputs = [random(B, I, J, D, dtype=dtype)]
    inputs += [
        random(I, J, dtype=dtype),
        random(B, J, D, dtype=dtype),
        random(B, I, J, dtype=dtype),
    ]
    return [tensor.to(device) for tensor in inputs]


def run_routing(
    name: str,
    inputs: list[Tensor],
    *,
    iterations: int = 3,
    full: bool = True,
    with_prior: bool = True,
    with_coupling: bool = True,
) -> list[Tensor]:
    """Results of both launchers: v, coupling, sums, then the gradients of the inputs."""
    *tensors, prior, grad_v, grad_coupling = inputs
    forward, backward = (getattr(kernels, f"{name}_{way}") for way in ("fwd", "bwd"))
    prior = prior if with_prior else None
    v, coupling, sums = forward(*tensors, prior, iterations, with_coupling)
    grad_coupling = grad_coupling if with_coupling else None
    grads = backward(grad_v, grad_coupling, *tensors, prior, sums, full)
    return [v, coupling, sums, *(grad for grad in grads if grad is not None)]


def exact_routing(
    name: str,
    inputs: list[Tensor],
    *,
    iterations: int = 3,
    full: bool = True,
    with_prior: bool = True,
    with_coupling: bool = True,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """The reference's v, coupling and gradients, by autograd of the einsum form in `dtype`."""
    *tensors, prior, grad_v, grad_coupling = (tensor.to(dtype) for tensor in inputs)
    leaves = [tensor.detach().requires_grad_() for tensor in [*tensors, prior]]
    v, coupling = getattr(reference, name)(
        *leaves[:-1],
        iterations,
        prior=leaves[-1] if with_prior else None,
        gradient="full" if full else "last",
        return_coupling=True,
    )
    loss = (v * grad_v).sum()
    if with_coupling and full:
        loss = loss + (coupling * grad_coupling).sum()
    wanted = leaves if with_prior else leaves[:-1]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted, strict=True)]
    return [v.detach(), coupling.detach(), *filled]


class Allocations(TorchDispatchMode):
    """Gives every new tensor a guard band on both sides and NaN inside; counts matrix products."""

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
        # What is not floating-point are the interpreter's own copies, made of bytes.
        if isinstance(result, Tensor) and not func.is_view and result.is_floating_point():
            self.shapes.append(result.shape)
        if name not in ("empty", "empty_like", "new_empty") or not result.is_floating_point():
            return result
        size = result.numel()
        storage = result.new_full((size + 2 * self.BAND,), self.SENTINEL)
        self.storages.append(storage)
        return storage[self.BAND : self.BAND + size].fill_(float("nan")).view(result.shape)

    def assert_bands_untouched(self) -> None:
        """No kernel wrote beside a tensor."""
        assert self.storages
        for storage in self.storages:
            bands = torch.cat([storage[: self.BAND], storage[-self.BAND :]])
            assert (bands == self.SENTINEL).all()


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """The names of the kernels that are launched inside, interpreted or compiled."""
    launched: list[str] = []
    kernel_type = type(kernels.squash._squash_fwd_kernel)
    run: Callable[..., Any] = kernel_type.run

    def counting(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(kernel.fn.__name__)
        return run(kernel, *args, **kwargs)

    assert issubclass(kernel_type, triton.runtime.KernelInterface)
    with mock.patch.object(kernel_type, "run", counting):
        yield launched
