"""What the compiled einsum form moves at least: the rival's traffic, counted without running it.

`torch.compile` fuses everything but the products, and leaves those to the vendor's library. So each
product reads its operands from memory and writes its result. A value that a product reads and that
no product has written was written once, by a fused kernel. Changes of layout and everything else
count nothing, so this is a floor: the compiled form moves at least this much.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tritoncaps.testing import Operator

_PRODUCTS = {"bmm", "mm", "addmm", "baddbmm"}
# What only changes the layout has its source's memory, for the count.
_COPIES = {"clone", "_to_copy", "contiguous", "copy_", "_unsafe_view", "view", "expand"}


class _Products(TorchDispatchMode):
    """Adds up the bytes of products."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.nbytes = 0
        self._written = {tensor.untyped_storage()._cdata for tensor in inputs}
        self._source: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no storage's identity is used twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not isinstance(result, Tensor):
            return result
        self._kept.append(result)
        if name in _COPIES:
            self._source[result.untyped_storage()._cdata] = self._memory(args[0])
        elif name in _PRODUCTS and 1 not in (args[-2].shape[-1], args[-1].shape[-2]):
            for operand in args[-2:]:
                memory = self._memory(operand)
                if memory not in self._written:
                    self.nbytes += operand.nbytes
                    self._written.add(memory)
                self.nbytes += operand.nbytes
            self.nbytes += result.nbytes
            self._written.add(result.untyped_storage()._cdata)
        return result

    def _memory(self, tensor: Tensor) -> int:
        memory = tensor.untyped_storage()._cdata
        while memory in self._source and self._source[memory] != memory:
            memory = self._source[memory]
        return memory


def rival_bytes(
    operator: Operator, sizes: dict[str, int], dtype: torch.dtype, *, backward: bool
) -> int:
    """The bytes that the compiled reference moves at least, forward or forward + backward."""
    inputs = {
        name: torch.empty(
            [sizes[axis] for axis in axes.split()], dtype=dtype, device="meta", requires_grad=True
        )
        for name, axes in operator.axes.items()
        if name not in operator.optional
    }
    leaves = list(inputs.values())
    with _Products(leaves) as products:
        outputs = operator.call(inputs, operator.defaults, operator.reference)
        if backward:
            torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])
    return products.nbytes


def matrices_bytes(
    operator: Operator, sizes: Mapping[str, int], dtype: torch.dtype, *, backward: bool
) -> tuple[int, int]:
    """The bytes of inputs and results of EM routing with T = 3, and of votes in memory.

    The votes are written once. A mean, a variance and the distances each need the one before, so
    they read the votes again: 3 T - 1 times. The backward reads them as often, and writes their
    gradient, which two products read.
    """

    def elements(axes: Mapping[str, str], names: list[str]) -> int:
        return sum(math.prod(sizes[axis] for axis in axes[name].split()) for name in names)

    inputs = elements(operator.axes, [n for n in operator.axes if n not in operator.optional])
    results = elements(operator.outputs, operator.output_names({}))
    votes = math.prod(sizes[axis] for axis in "BIJRQ")
    times = 1 + 8
    if backward:
        inputs, results, times = 3 * inputs, 2 * results, times + 8 + 3
    return (inputs + results) * dtype.itemsize, times * votes * dtype.itemsize
