"""Everything that torch needs to know about an operator, derived from one declaration.

Each operator is opaque to the compiler: one node in a graph and one boundary per call, whatever
happens inside. `register` gives it a schema, a fake (shapes and dtypes only), an autograd formula
whose backward is an operator too, an autocast rule, a vmap rule and FLOP counts.

First derivatives in reverse mode come from the backward. All others are those of the operator's
reference formula: torch differentiates it, as often as asked.

Axes are written as in "B I P". A name that ends in "?" is optional: such an input may be None, and
such an output is an empty tensor of shape (0,) if it was not asked for.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tritoncaps._operators._autograd import has_tangent, in_forward_mode, set_autograd
from tritoncaps._torch_path import accumulation_dtype

Axes = Mapping[str, str]
# Counts FLOPs, given the sizes of the axes and the arguments of the call, with shapes for tensors.
Flops = Callable[[dict[str, int], dict[str, Any]], int]


@dataclass(frozen=True)
class Registered:
    """An operator that torch knows: its declaration, and its forward and backward functions.

    `formula` is the forward in torch's own operations, with the same arguments and results.
    """

    inputs: Axes
    outputs: Axes
    forward: Any
    backward: Any
    formula: Callable[..., Any]


def register(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    reference: Callable[..., Any],
    inputs: Axes,
    outputs: Axes,
    flops: Flops | None = None,
    backward_flops: Flops | None = None,
) -> Registered:
    """Register `tritoncaps::<name>` and `tritoncaps::<name>_backward`.

    Args:
        name: the operator's name throughout the package.
        forward: takes the inputs, in the order of `inputs`, then the options. Returns the outputs.
        backward: its parameter names say what it needs: `grad_<output>` for a gradient (None if the
            loss did not use an optional output), or an input, an output or an option of the
            forward. It returns a gradient for each input, or None if the input is None. With a
            single input it returns the gradient itself.
        reference: the forward in torch's own operations, called with the inputs and options by
            name. It returns the first outputs, as many as it has, without those not asked for.
        inputs: axes by name. "B", if present, comes first. "..." stands for any axes that the
            operator treats alike.
        outputs: axes by name. An output with the axis "r" (iterations) is in the accumulation type.
        flops: counts the products of a call, two operations for each multiply-add.
        backward_flops: the same for the backward. Its arguments have the backward's names.
    """
    formulas = _Formulas(forward, backward, reference, inputs, outputs)
    operator = torch.library.custom_op(f"tritoncaps::{name}", forward, mutates_args=())
    gradient_of = torch.library.custom_op(
        f"tritoncaps::{name}_backward", formulas.filled_backward(), mutates_args=()
    )
    operator.register_fake(formulas.fake)
    gradient_of.register_fake(formulas.fake_backward)
    first = formulas.gradient(gradient_of)
    set_autograd(operator, formulas.save, first, formulas.with_tangents)
    set_autograd(gradient_of, formulas.save_backward, formulas.second, _refuse_tangents(name))
    _set_autocast(operator)
    if formulas.is_elementwise:
        operator.register_vmap(_elementwise(operator))
        gradient_of.register_vmap(_elementwise(gradient_of))
    else:
        operator.register_vmap(_batched(operator, formulas))
        # It sums over the batch, so each slice has its own gradient of the weight.
        gradient_of.register_vmap(
            lambda info, in_dims, *args: _loop(gradient_of, info, in_dims, args)
        )
    if flops is not None:
        _set_flops(operator, formulas.parameters, formulas.inputs, flops)
    if backward_flops is not None:
        _set_flops(gradient_of, formulas.taken, formulas.inputs, backward_flops)
    return Registered(inputs, outputs, operator, gradient_of, formulas.forward_by_reference)


class _Formulas:
    """The shapes and the chain rule of one operator, by the names of its tensors.

    `parameters` are the arguments of the forward, `needed` those of the backward. The operator of
    the backward has `taken`: also the options that only its own derivative needs.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        reference: Callable[..., Any],
        inputs: Axes,
        outputs: Axes,
    ) -> None:
        self.forward = forward
        self.backward = backward
        self.reference = reference
        self.parameters = list(inspect.signature(forward).parameters)
        self.needed = list(inspect.signature(backward).parameters)
        self.inputs = {name.removesuffix("?"): axes for name, axes in inputs.items()}
        self.outputs = {name.removesuffix("?"): axes for name, axes in outputs.items()}
        options = [name for name in self.parameters if name not in self.inputs]
        self.taken = self.needed + [name for name in options if name not in self.needed]
        self.optional = {name.removesuffix("?") for name in outputs if name.endswith("?")}
        if missing := [name for name in self.inputs if name not in self.needed]:
            raise TypeError(f"register: the backward has no parameter {missing[0]!r}")

    @property
    def is_elementwise(self) -> bool:
        """Whether the operator treats all axes but the last alike."""
        return any("..." in axes for axes in self.inputs.values())

    def was_asked_for(self, output: str, given: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments returns this output, or an empty tensor for it."""
        return output not in self.optional or bool(given[f"return_{output}"])

    def fake(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        """Results without values."""
        given = dict(zip(self.parameters, args, strict=True))
        first = args[0]
        if self.is_elementwise:
            return _contiguous_like(first)
        sizes = _sizes(self.inputs, given, lambda tensor: tensor.shape)
        sizes["r"] = given.get("iterations", 1)
        made = []
        for name, axes in self.outputs.items():
            is_given = self.was_asked_for(name, given)
            shape = [sizes[axis] for axis in axes.split()] if is_given else [0]
            dtype = accumulation_dtype(first.dtype) if "r" in axes.split() else first.dtype
            made.append(first.new_empty(shape, dtype=dtype))
        return made[0] if len(made) == 1 else tuple(made)

    def fake_backward(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        """Gradients without values."""
        given = dict(zip(self.taken, args, strict=True))
        grads = tuple(
            args[0].new_empty(0) if given[name] is None else _contiguous_like(given[name])
            for name in self.inputs
        )
        return grads[0] if len(grads) == 1 else grads

    def filled_backward(self) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """The backward with empty tensors in place of None, which a schema cannot express.

        It also takes the options that it does not need.
        """

        def backward(*args: Any) -> Any:
            grads = self.backward(*args[: len(self.needed)])
            if isinstance(grads, Tensor):
                return grads
            return tuple(args[0].new_empty(0) if grad is None else grad for grad in grads)

        count = len(self.inputs)
        annotation: Any = Tensor if count == 1 else tuple[(Tensor,) * count]  # type: ignore[misc]
        declared = {
            **inspect.signature(self.forward).parameters,
            **inspect.signature(self.backward).parameters,
        }
        backward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [declared[name] for name in self.taken], return_annotation=annotation
        )
        return backward

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what the backward needs."""
        made = (output,) if isinstance(output, Tensor) else output
        given = dict(zip([*self.parameters, *self.outputs], [*inputs, *made], strict=True))
        tensors = [name for name in self.needed if name in self.inputs or name in self.outputs]
        ctx.save_for_backward(*(given[name] for name in tensors))
        ctx.saved_names = tensors
        ctx.options = {n: given[n] for n in self.taken if n in given and n not in tensors}
        # The outputs whose gradients the backward reads.
        ctx.shapes = {
            name: given[name].shape
            for name in self.outputs
            if f"grad_{name}" in self.needed and self.was_asked_for(name, given)
        }
        ctx.set_materialize_grads(False)

    def gradient(self, gradient_of: Callable[..., Any]) -> Callable[..., Any]:
        """The autograd formula: call the backward operator with the arguments that it takes."""

        def formula(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            # Read once: a checkpoint hands its tensors out a single time.
            saved = dict(zip(ctx.saved_names, ctx.saved_tensors, strict=True))
            given = {**saved, **ctx.options}
            like = next(tensor for tensor in saved.values() if tensor is not None)
            for name, grad in zip(self.outputs, grads, strict=True):
                if name not in ctx.shapes:
                    grad = None
                elif grad is None and name not in self.optional:
                    grad = like.new_zeros(ctx.shapes[name])
                given[f"grad_{name}"] = grad
            tensors = [value for value in given.values() if isinstance(value, Tensor)]
            # Below a transform of `torch.func`, tensors may hide their tangents.
            if in_forward_mode() and (
                torch._C._are_functorch_transforms_active() or any(map(has_tangent, tensors))
            ):
                by_name = self.backward_by_reference(given)
            else:
                found = _listed(gradient_of(*(given[name] for name in self.taken)))
                by_name = dict(zip(self.inputs, found, strict=True))
            return tuple(
                by_name[name] if given[name] is not None and name in by_name else None
                for name in self.parameters
            )

        return formula

    def evaluate(
        self, given: Mapping[str, Any], precision: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The results of the reference by name, computed in `precision`.

        The default is that in which the operator adds up.
        """
        dtype = next(given[name].dtype for name in self.inputs if given[name] is not None)
        precision = precision or accumulation_dtype(dtype)
        raised = {
            name: given[name].to(precision)
            if name in self.inputs and given[name] is not None
            else given[name]
            for name in self.parameters
        }
        made = _listed(self.reference(**raised))
        names = [name for name in self.outputs if self.was_asked_for(name, given)]
        return {name: result.to(dtype) for name, result in zip(names, made, strict=False)}

    def with_tangents(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        """The forward by the reference, which torch differentiates in forward mode."""
        # `torch.func` switches autocast on again for what is called in here, even inside a block
        # that has it off. It spares float64. A device without float64 (mps) refuses this.
        precision = torch.float64 if _is_under_autocast() else None
        return self.forward_by_reference(*args, precision=precision)

    def forward_by_reference(
        self, *args: Any, precision: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """The forward in torch's own operations.

        Outputs that the reference lacks are zero. Only the backward would read them, and that one
        is then computed from the reference too.
        """
        given = dict(zip(self.parameters, args, strict=True))
        made = self.evaluate(given, precision)
        shapes = dict(zip(self.outputs, _listed(self.fake(*args)), strict=True))
        results = tuple(
            made[name] if name in made else torch.zeros_like(empty)
            for name, empty in shapes.items()
        )
        return results[0] if len(results) == 1 else results

    def backward_by_reference(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """The gradients of the inputs that are given, by name, in torch's own operations."""
        inputs = {name: given[name] for name in self.inputs if given[name] is not None}
        grads = {name: given.get(f"grad_{name}") for name in self.outputs}
        grads = {name: grad for name, grad in grads.items() if grad is not None}

        def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
            made = self.evaluate({**given, **dict(zip(inputs, tensors, strict=True))})
            return tuple(made[name] for name in grads)

        with _autocast_off(next(iter(inputs.values()))):
            pull: Any = torch.func.vjp(outputs, *inputs.values())[1]
            return dict(zip(inputs, pull(tuple(grads.values())), strict=True))

    def save_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the arguments of the backward, except what it has from the forward's outputs."""
        given = {n: x for n, x in zip(self.taken, inputs, strict=True) if n not in self.outputs}
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        ctx.save_for_backward(*tensors.values())
        ctx.saved_names = list(tensors)
        ctx.rest = {name: x for name, x in given.items() if name not in tensors}

    def second(self, ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The autograd formula of the backward: differentiate that of the reference."""
        saved = dict(zip(ctx.saved_names, ctx.saved_tensors, strict=True))
        given = {**saved, **ctx.rest}

        def gradients(*tensors: Tensor) -> dict[str, Tensor]:
            return self.backward_by_reference({**given, **dict(zip(saved, tensors, strict=True))})

        by_name = dict(zip(self.inputs, cotangents, strict=True))
        with _autocast_off(cotangents[0]):
            pull: Any = torch.func.vjp(gradients, *saved.values())[1]
            found = pull({name: by_name[name] for name in self.inputs if name in saved})
        grads = dict(zip(saved, found, strict=True))
        return tuple(grads.get(name) for name in self.taken)


def _listed(result: Any) -> tuple[Any, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _autocast_off(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast has cast the operator's inputs, and must not lower the products of its formula."""
    device_type = tensor.device.type
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _is_under_autocast() -> bool:
    """Whether the operator was called under autocast, which is off once its rule has run."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth > 1


def _refuse_tangents(name: str) -> Callable[..., Any]:
    """Stand in for a backward whose arguments have forward-mode tangents.

    `_Formulas.gradient` looks out for them. Only a call by hand, or by a traced graph, ends here.
    """

    def refuse(*args: Any) -> Any:
        raise NotImplementedError(
            f"tritoncaps::{name}_backward: an argument has a forward-mode tangent, but only "
            f"tritoncaps::{name} has a forward-mode derivative; differentiate that one instead"
        )

    return refuse


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
    """Raise 16-bit inputs to float32: agreement adds up, and half precision would lose it."""
    for device_type in ("cpu", "cuda", "mps", "xpu"):
        if torch.amp.is_autocast_available(device_type):
            # Before torch 2.13 there were rules only for "cpu" and "cuda".
            with suppress(ValueError):
                operator.register_autocast(device_type, torch.float32)


def _set_flops(operator: Any, names: list[str], tensors: Axes, formula: Flops) -> None:
    namespace, _, name = operator._qualname.partition("::")

    def count(*shapes: Any, **kwargs: Any) -> int:
        given = dict(zip(names, shapes, strict=False))
        return formula(_sizes(tensors, given, tuple), given)

    register_flop_formula(getattr(getattr(torch.ops, namespace), name))(count)


# vmap ---------------------------------------------------------------------------------------------


def _loop(operator: Callable[..., Any], info: Any, in_dims: Any, args: Any) -> tuple[Any, Any]:
    """Call the operator for each slice and stack the results."""
    if info.batch_size == 0:
        # A slice of zeros tells the shapes of the results; none of it is returned.
        args = [
            arg if dim is None else arg.new_zeros(_to_front(arg, dim, 0).shape[1:]).unsqueeze(dim)
            for arg, dim in zip(args, in_dims, strict=True)
        ]
    results = [
        operator(
            *(
                arg if dim is None else arg.select(dim, index)
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for index in range(max(1, info.batch_size))
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)[: info.batch_size], 0
    stacked = tuple(torch.stack(column)[: info.batch_size] for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _to_front(arg: Any, dim: int | None, count: int) -> Any:
    """A tensor with the mapped axis first. One that is not mapped is repeated along it."""
    if not isinstance(arg, Tensor):
        return arg
    return arg.expand(count, *arg.shape) if dim is None else arg.movedim(dim, 0)


def _elementwise(operator: Any) -> Callable[..., Any]:
    """The rule for an operator along the last axis: all axes before it are batch."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        result = operator(
            *(_to_front(a, dim, info.batch_size) for a, dim in zip(args, in_dims, strict=True))
        )
        return result, 0 if isinstance(result, Tensor) else (0,) * len(result)

    return rule


def _batched(operator: Any, formulas: _Formulas) -> Callable[..., Any]:
    """The rule for an operator with a batch: the mapped axis becomes part of it.

    If an input without a batch is mapped too, such as the weight, each slice is a separate call.
    """

    def has_batch(name: str) -> bool:
        return "B" in formulas.inputs.get(name, "").split()

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        named = list(zip(formulas.parameters, args, in_dims, strict=True))
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
        given = {name: arg for name, arg, _ in named}
        for output, (name, axes) in zip(_listed(made), formulas.outputs.items(), strict=True):
            axis = axes.split().index("B")
            is_given = formulas.was_asked_for(name, given)
            outputs.append(output.unflatten(axis, sizes) if is_given else output)
            dims.append(axis if is_given else None)
        if isinstance(made, Tensor):
            return outputs[0], dims[0]
        return tuple(outputs), tuple(dims)

    return rule
