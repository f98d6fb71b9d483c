"""What `torch.func.vmap` makes of an operator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritoncaps._operators._formulas import Formulas, listed


def elementwise(operator: Any) -> Callable[..., Any]:
    """The rule for an operator along the last axis: all axes before it are batch."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        result = operator(
            *(_to_front(a, dim, info.batch_size) for a, dim in zip(args, in_dims, strict=True))
        )
        return result, 0 if isinstance(result, Tensor) else (0,) * len(result)

    return rule


def batched(operator: Any, formulas: Formulas) -> Callable[..., Any]:
    """The rule for an operator with a batch: the mapped axis becomes part of it.

    If an input without a batch is mapped too, such as the weight, each slice is a separate call.
    """

    def has_batch(name: str) -> bool:
        return "B" in formulas.inputs.get(name, "").split()

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        in_dims = _dims_of_tensors(args, in_dims)
        named = list(zip(formulas.parameters, args, in_dims, strict=True))
        if not all(dim is None or has_batch(name) for name, _, dim in named):
            return one_by_one(operator)(info, in_dims, *args)
        sizes = (info.batch_size, 0)
        folded = []
        for name, arg, dim in named:
            if has_batch(name):
                arg = _to_front(arg, dim, info.batch_size)
                sizes = arg.shape[:2]
                arg = arg.flatten(0, 1)
            folded.append(arg)
        made = operator(*folded)
        outputs, dims = [], []
        given = {name: arg for name, arg, _ in named}
        for output, (name, axes) in zip(listed(made), formulas.outputs.items(), strict=True):
            axis = axes.split().index("B")
            is_given = formulas.was_asked_for(name, given)
            outputs.append(output.unflatten(axis, sizes) if is_given else output)
            dims.append(axis if is_given else None)
        if isinstance(made, Tensor):
            return outputs[0], dims[0]
        return tuple(outputs), tuple(dims)

    return rule


def one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for any operator: each slice is a call of its own."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        count = info.batch_size
        in_dims = _dims_of_tensors(args, in_dims)
        if count == 0:
            # A slice of zeros tells the shapes of the results; none of it is returned.
            args = tuple(
                arg
                if dim is None
                else arg.new_zeros(_to_front(arg, dim, count).shape[1:]).unsqueeze(dim)
                for arg, dim in zip(args, in_dims, strict=True)
            )
        results = [
            operator(
                *(
                    arg if dim is None else arg.select(dim, index)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for index in range(max(1, count))
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[:count], 0
        stacked = tuple(torch.stack(column)[:count] for column in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _dims_of_tensors(args: Any, in_dims: Any) -> list[int | None]:
    """The mapped axis of each argument. torch gives one for each item of a list of numbers."""
    return [
        dim if isinstance(arg, Tensor) else None for arg, dim in zip(args, in_dims, strict=True)
    ]


def _to_front(arg: Any, dim: int | None, count: int) -> Any:
    """A tensor with the mapped axis first. One that is not mapped is repeated along it."""
    if not isinstance(arg, Tensor):
        return arg
    return arg.expand(count, *arg.shape) if dim is None else arg.movedim(dim, 0)
