"""Arbitrary arguments, which must give a documented result or a documented error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritoncaps.testing._cases import LAYOUTS
from tritoncaps.testing._table import Operator

if TYPE_CHECKING:
    from hypothesis import strategies as st

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_COMPLEX = (torch.complex64, torch.complex128)
_SCALES = (1.0, 0.0, 1e-20, 1e30, math.inf, math.nan)


@dataclass(frozen=True)
class Array:
    """A tensor described by data that prints. `build` makes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layout: str = "contiguous"
    requires_grad: bool = False
    scale: float = 1.0
    largest: int = 1  # of integers

    def build(self) -> Tensor:
        """Make the tensor, a view of a buffer with the given layout."""
        shape = self.shape
        if self.dtype not in (*_FLOATING, *_INTEGERS, *_COMPLEX):
            with warnings.catch_warnings():  # torch has no views of quantised types
                warnings.simplefilter("ignore")
                return torch.empty(shape, dtype=self.dtype, device=self.device)
        if self.layout == "transposed":
            tensor = self._buffer(shape[::-1]).permute(tuple(range(len(shape))[::-1]))
        elif self.layout == "strided":
            tensor = self._buffer((*shape, 2))[..., 0]
        elif self.layout == "offset":
            tensor = self._buffer((math.prod(shape) + 3,))[3:].view(shape)
        elif self.layout == "expanded" and shape and shape[0] > 0:
            tensor = self._buffer((1, *shape[1:])).expand(shape)
        else:
            tensor = self._buffer(shape)
            if self.layout == "sparse" and self.dtype in _FLOATING and self.device == "cpu":
                tensor = tensor.to_sparse()
        if self.requires_grad and (tensor.is_floating_point() or tensor.is_complex()):
            tensor = tensor.detach().requires_grad_()
        return tensor

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        generator = torch.Generator().manual_seed(sum(shape))
        if self.dtype in _INTEGERS:
            drawn = torch.randint(self.largest + 1, shape, generator=generator)
        else:
            drawn = torch.randn(shape, generator=generator) * self.scale
        return drawn.to(self.dtype)


_JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1.5, math.nan, math.inf, 1j, "3", "full", b"x"),
    *(2**31, 2**63, 2**70, -(2**70), 10**400, [], [3], (2, 3), (2, 3, 4), "abc", {}, object),
    *(Array(()), Array((2,)), Array((2, 2), torch.int64)),
)


@dataclass(frozen=True)
class Call:
    """A call with arguments by name. `meant` is false once it may be wrong."""

    name: str
    arguments: Mapping[str, Any]
    meant: bool = True

    def build(self) -> dict[str, Any]:
        """Return the arguments, with the tensors made."""
        return {k: v.build() if isinstance(v, Array) else v for k, v in self.arguments.items()}


def fuzzed_calls(operator: Operator) -> st.SearchStrategy[Call]:
    """Draw calls of an operator, both right and spoilt."""
    from hypothesis import strategies as st

    @st.composite
    def calls(draw: st.DrawFn) -> Call:
        axes = {axis for named in operator.axes.values() for axis in named.split()}
        sizes = {a: draw(st.integers(0 if a == "B" else 1, 4)) for a in sorted(axes)}
        dtype = draw(st.sampled_from(_FLOATING))
        device = draw(st.sampled_from(("cpu", "cpu", "cpu", "meta")))
        arguments: dict[str, Any] = {}
        for name, named in operator.axes.items():
            if name in operator.optional and draw(st.booleans()):
                continue
            arguments[name] = Array(
                tuple(sizes[axis] for axis in named.split()),
                dtype,
                device,
                draw(st.sampled_from(LAYOUTS)),
                draw(st.booleans()),
                draw(st.sampled_from(_SCALES)),
            )
        for name, values in operator.options.items():
            arguments[name] = draw(st.sampled_from(values))
        # A kernel may be larger than its grid.
        fits = all(size(sizes, arguments) >= 1 for size in operator.sizes.values())
        return draw(spoilt(Call(operator.name, arguments, meant=fits)))

    return calls()


def spoilt(call: Call) -> st.SearchStrategy[Call]:
    """Replace up to two arguments, or none."""
    from hypothesis import strategies as st

    @st.composite
    def calls(draw: st.DrawFn, call: Call) -> Call:
        for _ in range(draw(st.sampled_from((0, 0, 1, 1, 1, 2)))):
            name = draw(st.sampled_from(sorted(call.arguments)))
            value: Any = call.arguments[name]
            how = draw(st.sampled_from(("junk", "dtype", "device", "axis", "rank", "sparse")))
            if not isinstance(value, Array) or how == "junk":
                value = draw(st.sampled_from(_JUNK))
            elif how == "dtype":
                value = replace(value, dtype=draw(st.sampled_from(_creatable_dtypes())))
            elif how == "device":
                value = replace(value, device="meta" if value.device == "cpu" else "cpu")
            elif how == "axis" and value.shape:
                axis = draw(st.integers(0, len(value.shape) - 1))
                size = draw(st.integers(0, 5))
                shape = (*value.shape[:axis], size, *value.shape[axis + 1 :])
                value = replace(value, shape=shape)
            elif how == "sparse":
                value = replace(value, layout="sparse")
            else:
                value = replace(value, shape=draw(st.sampled_from(((), (3,), (2,) * 5))))
            call = Call(call.name, {**call.arguments, name: value}, meant=False)
        return call

    return calls(call)


def check_call(
    operator: Operator,
    call: Call,
    shapes: Callable[[Mapping[str, Any]], Sequence[tuple[int, ...]]] | None = None,
) -> None:
    """Assert that results and gradients have the documented shapes, dtype and device.

    A spoilt call may raise TypeError or ValueError instead, with a message that names the function.

    Args:
        operator: the operator to call.
        call: its arguments.
        shapes: computes the shapes of the results from the arguments, if the axes do not give them.

    Raises:
        AssertionError: a result or a gradient is not as documented.
    """
    arguments = call.build()
    try:
        result = operator.function(**arguments)
    except (TypeError, ValueError) as error:
        if call.meant or not str(error).startswith(f"{call.name}: "):
            raise
        return
    inputs = {
        name: arguments[name] for name in operator.axes if isinstance(arguments.get(name), Tensor)
    }
    results = (result,) if isinstance(result, Tensor) else result
    if shapes is not None:
        expected = list(shapes(arguments))
    elif operator.is_elementwise:
        expected = [tuple(tensor.shape) for tensor in inputs.values()]
    else:
        expected = list(operator.output_shapes(inputs, arguments).values())
    first = next(iter(inputs.values()))
    assert [tuple(r.shape) for r in results] == expected
    assert all(r.dtype == first.dtype and r.device == first.device for r in results)
    leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]
    with_gradient = [result.sum() for result in results if result.requires_grad]
    assert bool(leaves) == bool(with_gradient)
    if not leaves:
        return
    grads = torch.autograd.grad(with_gradient, leaves, allow_unused=True)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert grad is None or (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


@cache
def _creatable_dtypes() -> list[torch.dtype]:
    """Every dtype of torch that a tensor can have."""
    found: list[torch.dtype] = []
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
