"""Arguments and files that nobody meant to give: a result as documented or a documented error.

Cases are drawn by hypothesis from consecutive seeds until the time of --fuzz-seconds is over, so
that the same cases come first on every run, and their number is printed at the end. A case that
ends the process is left in the file `case` of the test's temporary directory.

    pytest tests/test_fuzz.py --fuzz-seconds 120 --fuzz-seed 1000

Checkpoints are in tests/reliability/test_fuzz_files.py.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from conftest import Fuzz
from hypothesis import strategies as st
from torch import Tensor

from tritoncaps import (
    CapsuleLoss,
    MarginLoss,
    PrimaryCapsules,
    ReconstructionDecoder,
    RoutedCapsules,
    ops,
)
from tritoncaps.models import CapsNet, DeepCapsNet, create_model

# arguments ----------------------------------------------------------------------------------------


def creatable_dtypes() -> list[torch.dtype]:
    """Every dtype of torch of which there can be a tensor."""
    found = []
    for value in vars(torch).values():
        if isinstance(value, torch.dtype) and value not in found:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    torch.empty(2, dtype=value)
                except (RuntimeError, TypeError):
                    continue
            found.append(value)
    return found


FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
COMPLEX = (torch.complex64, torch.complex128)
ANY_DTYPE = creatable_dtypes()
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")
SCALES = (1.0, 0.0, 1e-20, 1e30, float("inf"), float("nan"))


@dataclass(frozen=True)
class Array:
    """A tensor as data."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layout: str = "contiguous"
    requires_grad: bool = False
    scale: float = 1.0
    largest: int = 1  # of integers

    def build(self) -> Tensor:
        """Make the tensor: a view of a buffer in which it lies as its layout says."""
        shape = self.shape
        if self.dtype not in (*FLOATING, *INTEGERS, *COMPLEX):
            # Of quantised types torch can make no view.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.empty(shape, dtype=self.dtype, device=self.device)
        if self.layout == "transposed":
            tensor = self._buffer(shape[::-1]).permute(tuple(range(len(shape))[::-1]))
        elif self.layout == "strided":
            tensor = self._buffer((*shape, 2))[..., 0]
        elif self.layout == "offset":
            size = functools.reduce(lambda a, b: a * b, shape, 1)
            tensor = self._buffer((size + 3,))[3:].view(shape)
        elif self.layout == "expanded" and shape and shape[0] > 0:
            tensor = self._buffer((1, *shape[1:])).expand(shape)
        else:
            tensor = self._buffer(shape)
            if self.layout == "sparse" and self.dtype in FLOATING and self.device == "cpu":
                tensor = tensor.to_sparse()
        if self.requires_grad and (tensor.is_floating_point() or tensor.is_complex()):
            tensor = tensor.detach().requires_grad_()
        return tensor

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        generator = torch.Generator().manual_seed(sum(shape))
        if self.dtype in INTEGERS:
            drawn = torch.randint(self.largest + 1, shape, generator=generator)
        else:
            drawn = torch.randn(shape, generator=generator) * self.scale
        return drawn.to(self.dtype)


def built(value: Any) -> Any:
    """The argument that a drawn value stands for."""
    return value.build() if isinstance(value, Array) else value


JUNK = (
    *(None, True, False, 0, 1, -1, 2, 1.5, float("nan"), float("inf"), 1j, "3", "full", b"x"),
    *(2**31, 2**63, 2**70, -(2**70), 10**400, [], [3], (2, 3), (2, 3, 4), "abc", {}, object),
    *(Array(()), Array((2,)), Array((2, 2), torch.int64)),
)
junk = st.sampled_from(JUNK)


@dataclass(frozen=True)
class Call:
    """A call by name; `meant` is false once an argument was replaced by something else."""

    name: str
    arguments: dict[str, Any]
    meant: bool = True


@st.composite
def arrays(draw: st.DrawFn, shape: tuple[int, ...], **fields: Any) -> Array:
    """Right tensors of a shape."""
    return Array(
        shape,
        layout=draw(st.sampled_from(LAYOUTS)),
        requires_grad=draw(st.booleans()),
        scale=draw(st.sampled_from(SCALES)),
        **fields,
    )


@st.composite
def spoilt(draw: st.DrawFn, call: Call) -> Call:
    """The call with up to two arguments replaced, or as it is."""
    for _ in range(draw(st.sampled_from((0, 0, 1, 1, 1, 2)))):
        name = draw(st.sampled_from(sorted(call.arguments)))
        value: Any = call.arguments[name]
        how = draw(st.sampled_from(("junk", "dtype", "device", "axis", "rank", "sparse")))
        if not isinstance(value, Array) or how == "junk":
            value = draw(junk)
        elif how == "dtype":
            value = replace(value, dtype=draw(st.sampled_from(ANY_DTYPE)))
        elif how == "device":
            value = replace(value, device="meta" if value.device == "cpu" else "cpu")
        elif how == "axis" and value.shape:
            axis = draw(st.integers(0, len(value.shape) - 1))
            size = draw(st.integers(0, 5))
            value = replace(value, shape=(*value.shape[:axis], size, *value.shape[axis + 1 :]))
        elif how == "sparse":
            value = replace(value, layout="sparse")
        else:
            value = replace(value, shape=draw(st.sampled_from(((), (3,), (2, 2, 2, 2, 2)))))
        call = Call(call.name, {**call.arguments, name: value}, False)
    return call


@st.composite
def operator_calls(draw: st.DrawFn) -> Call:
    """Calls of the functions of `tritoncaps.ops`."""
    B, (I, P, J, D) = draw(st.integers(0, 3)), draw(st.tuples(*[st.integers(1, 4)] * 4))
    kind = {
        "dtype": draw(st.sampled_from(FLOATING)),
        "device": draw(st.sampled_from(("cpu", "cpu", "cpu", "meta"))),
    }
    name = draw(st.sampled_from(ops.__all__))
    arguments: dict[str, Any] = {}
    if name == "squash":
        shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple))
        arguments = {
            "s": draw(arrays(shape, **kind)),
            "dim": draw(st.integers(-len(shape), len(shape) - 1)),
        }
    elif name == "margin_loss":
        multi_hot = draw(st.booleans())
        dtype = draw(st.sampled_from((torch.bool, torch.uint8, torch.int64)))
        target = Array((B, J), dtype) if multi_hot else Array((B,), torch.int64, largest=J - 1)
        arguments = {
            "activations": draw(arrays((B, J), **kind)),
            "target": replace(target, device=kind["device"]),
            "m_pos": draw(st.floats(0, 1)),
            "m_neg": draw(st.floats(0, 1)),
            "down_weight": draw(st.sampled_from((0, 0.5, 1))),
            "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        }
    else:
        if name == "dynamic_routing":
            arguments = {"u_hat": draw(arrays((B, I, J, D), **kind))}
        else:
            arguments = {
                "u": draw(arrays((B, I, P), **kind)),
                "weight": draw(arrays((I, P, J, D), **kind)),
            }
        if name != "prediction_vectors":
            prior = st.none() | arrays((I, J), **kind)
            arguments |= {
                "iterations": draw(st.integers(1, 3)),
                "prior": draw(prior),
                "gradient": draw(st.sampled_from(("full", "last"))),
                "return_coupling": draw(st.booleans()),
            }
    return draw(spoilt(Call(name, arguments)))


def documented_results(name: str, arguments: dict[str, Any]) -> list[tuple[int, ...]]:
    """The shapes that a call of an operator returns."""
    if name == "squash":
        return [tuple(arguments["s"].shape)]
    if name == "margin_loss":
        return [(len(arguments["activations"]),) if arguments["reduction"] == "none" else ()]
    if name == "dynamic_routing":
        B, I, J, D = arguments["u_hat"].shape
    else:
        B, I, J, D = (*arguments["u"].shape[:2], *arguments["weight"].shape[2:])
    if name == "prediction_vectors":
        return [(B, I, J, D)]
    return [(B, J, D), (B, I, J)][: 1 + arguments["return_coupling"]]


def outcome(function: Callable[..., Any], call: Call, arguments: dict[str, Any]) -> Any:
    """What the call returns, or None after a documented error; anything else is passed on."""
    try:
        return function(**arguments)
    except (TypeError, ValueError) as error:
        if call.meant or not str(error).startswith(f"{call.name}: "):
            raise
        return None


def check_operator(call: Call) -> None:
    """The result has the documented shapes, dtype and device, and so have the gradients."""
    arguments = {name: built(value) for name, value in call.arguments.items()}
    results = outcome(getattr(ops, call.name), call, arguments)
    if results is None:
        return
    first = next(iter(arguments.values()))
    results = results if isinstance(results, tuple) else (results,)
    assert [tuple(r.shape) for r in results] == documented_results(call.name, arguments)
    assert all(r.dtype == first.dtype and r.device == first.device for r in results)
    leaves = [a for a in arguments.values() if isinstance(a, Tensor) and a.requires_grad]
    with_gradient = [result.sum() for result in results if result.requires_grad]
    assert bool(leaves) == bool(with_gradient)
    if leaves:
        for leaf, grad in zip(
            leaves, torch.autograd.grad(with_gradient, leaves, allow_unused=True), strict=True
        ):
            assert grad is None or (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


def test_operators(fuzz: Fuzz) -> None:
    fuzz(operator_calls(), check_operator)


MODULES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    # name: constructor, right arguments
    "PrimaryCapsules": (
        PrimaryCapsules,
        {"in_channels": 2, "capsule_types": 3, "dim": 4, "kernel_size": 3, "stride": 2},
    ),
    "RoutedCapsules": (
        RoutedCapsules,
        {
            **{"in_capsules": 3, "in_dim": 4, "out_capsules": 2, "out_dim": 5, "iterations": 2},
            **{"gradient": "last", "learned_prior": True, "input_length": 0.5},
        },
    ),
    "ReconstructionDecoder": (
        ReconstructionDecoder,
        {"num_classes": 3, "dim": 2, "image_shape": (1, 4, 5), "hidden": (3, 4)},
    ),
    "MarginLoss": (
        MarginLoss,
        {"m_pos": 0.9, "m_neg": 0.1, "down_weight": 0.5, "reduction": "sum"},
    ),
    "CapsuleLoss": (CapsuleLoss, {"reconstruction_weight": 0.1}),
    "CapsNet": (
        CapsNet,
        {
            **{"num_classes": 2, "in_channels": 1, "image_size": 18, "iterations": 1},
            **{"channels": 2, "capsule_types": 1, "class_dim": 3, "gradient": "full"},
            "reconstruction": False,
        },
    ),
    "DeepCapsNet": (
        DeepCapsNet,
        {
            **{"num_classes": 2, "in_channels": 1, "image_size": (17, 19), "channels": (2, 3)},
            **{"hidden_capsules": 2, "hidden_dim": 3, "primary_iterations": 1},
            **{"secondary_iterations": 2, "capsule_types": 1, "class_dim": 3},
            **{"gradient": "full", "reconstruction": False},
        },
    ),
    "create_model": (create_model, {"name": "capsnet"}),
}


@st.composite
def module_calls(draw: st.DrawFn) -> Call:
    """Calls of the constructors."""
    name = draw(st.sampled_from(sorted(MODULES)))
    return draw(spoilt(Call(name, MODULES[name][1])))


def check_module(call: Call) -> None:
    """What is built keeps its arguments, and runs on what it was built for."""
    arguments = {name: built(value) for name, value in call.arguments.items()}
    if call.name == "create_model":  # the default networks are large
        with torch.device("meta"):
            assert outcome(create_model, call, arguments) is None or call.meant
        return
    module = outcome(MODULES[call.name][0], call, arguments)
    if module is None:
        return
    for name, value in arguments.items():
        kept = getattr(module, name, value)
        assert kept is value or kept == value or value != value or name == "reconstruction"
    a = arguments
    if call.name == "PrimaryCapsules":
        size = a["kernel_size"]
        capsules = module(torch.ones(2, a["in_channels"], size, size))
        assert capsules.shape == (2, a["capsule_types"], a["dim"])
    elif call.name == "RoutedCapsules":
        v = module(torch.ones(2, a["in_capsules"], a["in_dim"]))
        assert v.shape == (2, a["out_capsules"], a["out_dim"])
    elif call.name == "ReconstructionDecoder":
        images = module(torch.ones(2, a["num_classes"], a["dim"]))
        assert images.shape == (2, *a["image_shape"])
    elif call.name in ("CapsNet", "DeepCapsNet"):
        output = module(torch.ones(2, *module.image_shape))
        assert output.poses.shape == (2, a["num_classes"], a["class_dim"])
        assert (output.reconstruction is not None) == a["reconstruction"]
    elif call.name == "MarginLoss":
        loss = module(torch.ones(2, 3), torch.tensor([0, 2]))
        assert loss.shape == ((2,) if a["reduction"] == "none" else ())
    else:
        images = torch.ones(2, 1, 3, 3)
        assert module(torch.ones(2, 3), torch.tensor([0, 2]), images, images).shape == ()


def test_modules(fuzz: Fuzz) -> None:
    fuzz(module_calls(), check_module)
