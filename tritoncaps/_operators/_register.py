"""What torch has to be told of an operator, derived from one declaration.

Each operator is opaque to the compiler: one node in a graph, one boundary a call, whatever happens
inside. `register` gives it a schema, a fake (shapes and dtypes alone), an autograd formula whose
backward is an operator too, an autocast rule, a vmap rule and FLOP counts.

Axes are written as in "B I P". A name that ends in "?" is optional: an input may be None, an output
that was not asked for is an empty tensor of shape (0,).
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tritoncaps._torch_path import accumulation_dtype

Axes = Mapping[str, str]
# FLOPs from the sizes of the axes and from the call's arguments, where a tensor is its shape.
Flops = Callable[[dict[str, int], dict[str, Any]], int]


@dataclass(frozen=True)
class Registered:
    """An operator that torch knows: its declaration, and what is called forward and backward."""

    inputs: Axes
    outputs: Axes
    forward: Any
    backward: Any


def register(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    inputs: Axes,
    outputs: Axes,
    flops: Flops | None = None,
    backward_flops: Flops | None = None,
) -> Registered:
    """Register `tritoncaps::<name>` and `tritoncaps::<name>_backward`.

    Args:
        name: the operator's name on every floor.
        forward: takes the inputs, in the order of `inputs`, then options; returns the outputs.
        backward: its parameters say what it needs, by name: `grad_<output>` for a gradient (None
            where the loss did not use an optional output), an input, an output or an option of the
            forward. It returns a gradient for each input, or None where the input is None; for a
            single input the gradient itself.
        inputs: axes by name. Where "B" is among them it comes first. "..." stands for any axes
            that the operator treats alike.
        outputs: axes by name; an output with the axis "r" (iterations) is in the accumulation type.
        flops: counts the products of a call, two operations for each multiply-add.
        backward_flops: the same of the backward; its arguments have the backward's names.
    """
    tensors = {key.removesuffix("?"): axes for key, axes in inputs.items()}
    results = {key.removesuffix("?"): axes for key, axes in outputs.items()}
    optional = {key.removesuffix("?") for key in outputs if key.endswith("?")}
    parameters = list(inspect.signature(forward).parameters)
    needed = list(inspect.signature(backward).parameters)

    operator = torch.library.custom_op(f"tritoncaps::{name}", forward, mutates_args=())

    def filled_backward(*args: Any) -> Tensor | tuple[Tensor, ...]:
        grads = backward(*args)
        if isinstance(grads, Tensor):
            return grads
        return tuple(args[0].new_empty(0) if grad is None else grad for grad in grads)

    filled_backward.__signature__ = _backward_signature(backward, len(tensors))  # type: ignore[attr-defined]
    gradient_of = torch.library.custom_op(
        f"tritoncaps::{name}_backward", filled_backward, mutates_args=()
    )

    def fake(*args: Any) -> Tensor | tuple[Tensor, ...]:
        given = dict(zip(parameters, args, strict=True))
        first = args[0]
        if "..." in tensors[parameters[0]]:
            return _contiguous_like(first)
        sizes = _sizes(tensors, given, lambda tensor: tensor.shape)
        sizes["r"] = given.get("iterations", 1)
        made = []
        for output, axes in results.items():
            asked_for = output not in optional or given[f"return_{output}"]
            shape = [sizes[axis] for axis in axes.split()] if asked_for else [0]
            dtype = accumulation_dtype(first.dtype) if "r" in axes.split() else first.dtype
            made.append(first.new_empty(shape, dtype=dtype))
        return made[0] if len(made) == 1 else tuple(made)

    def fake_backward(*args: Any) -> Tensor | tuple[Tensor, ...]:
        given = dict(zip(needed, args, strict=True))
        grads = tuple(
            args[0].new_empty(0) if given[key] is None else _contiguous_like(given[key])
            for key in tensors
        )
        return grads[0] if len(grads) == 1 else grads

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        made = (output,) if isinstance(output, Tensor) else output
        given = dict(zip([*parameters, *results], [*inputs, *made], strict=True))
        ctx.shapes = {key: given[key].shape for key in results}
        saved = [key for key in needed if key in tensors or key in results]
        ctx.save_for_backward(*(given[key] for key in saved))
        ctx.saved = saved
        ctx.options = {key: given[key] for key in needed if key in given and key not in saved}
        ctx.set_materialize_grads(False)

    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = {**dict(zip(ctx.saved, ctx.saved_tensors, strict=True)), **ctx.options}
        like = given[next(iter(tensors))]
        for output, grad in zip(results, grads, strict=True):
            if output in optional and len(ctx.shapes[output]) == 1:
                grad = None  # not asked for
            elif grad is None and output not in optional:
                grad = like.new_zeros(ctx.shapes[output])
            given[f"grad_{output}"] = grad
        found = gradient_of(*(given[key] for key in needed))
        found = (found,) if isinstance(found, Tensor) else found
        by_name = dict(zip(tensors, found, strict=True))
        return tuple(
            by_name[key] if key in by_name and given[key] is not None else None
            for key in parameters
        )

    operator.register_fake(fake)
    gradient_of.register_fake(fake_backward)
    operator.register_autograd(gradient, setup_context=save)
    _set_autocast(operator)
    if any("..." in axes for axes in tensors.values()):
        operator.register_vmap(_elementwise(operator))
        gradient_of.register_vmap(_elementwise(gradient_of))
    else:
        operator.register_vmap(_batched(operator, parameters, tensors, results))
        # It sums over the batch, so each slice has a gradient of the weight of its own.
        gradient_of.register_vmap(
            lambda info, in_dims, *args: _loop(gradient_of, info, in_dims, args)
        )
    for registered, names, formula in (
        (operator, parameters, flops),
        (gradient_of, needed, backward_flops),
    ):
        if formula is not None:
            _set_flops(registered, names, tensors, formula)
    return Registered(inputs, outputs, operator, gradient_of)


def _backward_signature(backward: Callable[..., Any], count: int) -> inspect.Signature:
    """That of `backward`, but returning tensors alone: a schema cannot say None."""
    annotation: Any = Tensor if count == 1 else tuple[(Tensor,) * count]  # type: ignore[misc]
    return inspect.signature(backward).replace(return_annotation=annotation)


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _sizes(
    tensors: Axes, given: Mapping[str, Any], shape_of: Callable[[Any], Any]
) -> dict[str, int]:
    """The size of each axis of the inputs that are given."""
    return {
        axis: size
        for name, axes in tensors.items()
        if given[name] is not None
        for axis, size in zip(axes.split(), shape_of(given[name]), strict=True)
    }


def _set_autocast(operator: Any) -> None:
    """16-bit inputs are raised: agreement adds up over iterations, and half precision loses it."""
    for device_type in ("cpu", "cuda", "mps", "xpu"):
        if torch.amp.is_autocast_available(device_type):
            # Before torch 2.13 there were rules for "cpu" and "cuda" alone.
            with suppress(ValueError):
                operator.register_autocast(device_type, torch.float32)


def _set_flops(operator: Any, names: list[str], tensors: Axes, formula: Flops) -> None:
    namespace, _, name = operator._qualname.partition("::")

    @register_flop_formula(getattr(getattr(torch.ops, namespace), name))
    def _(*shapes: Any, **kwargs: Any) -> int:
        given = dict(zip(names, shapes, strict=False))
        return formula(_sizes(tensors, given, tuple), given)


# vmap ---------------------------------------------------------------------------------------------


def _loop(operator: Callable[..., Any], info: Any, in_dims: Any, args: Any) -> tuple[Any, Any]:
    """Call the operator for each slice and stack the results."""
    if info.batch_size == 0:
        raise ValueError(f"vmap of {operator}: the mapped axis has 0 slices, but needs >= 1")
    results = [
        operator(
            *(
                arg if dim is None else arg.select(dim, index)
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for index in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _to_front(arg: Any, dim: int | None, count: int) -> Any:
    """A tensor with the mapped axis first; one that is not mapped is repeated along it."""
    if not isinstance(arg, Tensor):
        return arg
    return arg.expand(count, *arg.shape) if dim is None else arg.movedim(dim, 0)


def _elementwise(operator: Any) -> Callable[..., Any]:
    """The rule of an operator along the last axis: whatever stands before it is batch."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        result = operator(
            *(_to_front(a, dim, info.batch_size) for a, dim in zip(args, in_dims, strict=True))
        )
        return result, 0 if isinstance(result, Tensor) else (0,) * len(result)

    return rule


def _batched(
    operator: Any, parameters: list[str], tensors: Axes, results: Axes
) -> Callable[..., Any]:
    """The rule of an operator with a batch: the mapped axis becomes part of it.

    Where an input without a batch is mapped too, such as the weight, each slice is a call.
    """

    def has_batch(name: str) -> bool:
        return "B" in tensors.get(name, "").split()

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        named = list(zip(parameters, args, in_dims, strict=True))
        if not all(dim is None or has_batch(name) for name, _, dim in named):
            return _loop(operator, info, in_dims, args)
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
        listed = (made,) if isinstance(made, Tensor) else made
        for output, axes in zip(listed, results.values(), strict=True):
            axis = axes.split().index("B")
            is_empty = output.ndim < len(axes.split())  # not asked for
            outputs.append(output if is_empty else output.unflatten(axis, sizes))
            dims.append(None if is_empty else axis)
        if isinstance(made, Tensor):
            return outputs[0], dims[0]
        return tuple(outputs), tuple(dims)

    return rule
