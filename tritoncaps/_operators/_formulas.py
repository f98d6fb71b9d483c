"""The shapes and derivatives of an operator, derived from its declaration."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor

from tritoncaps._operators._autograd import has_tangent, in_forward_mode
from tritoncaps._torch_path import accumulation_dtype

Axes = Mapping[str, str]


class Formulas:
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
        sizes: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.forward = forward
        self.backward = backward
        self.reference = reference
        self.more_sizes = sizes
        self.parameters = list(inspect.signature(forward).parameters)
        self.needed = list(inspect.signature(backward).parameters)
        self.inputs = {name.removesuffix("?"): axes for name, axes in inputs.items()}
        self.outputs = {name.removesuffix("?"): axes for name, axes in outputs.items()}
        options = [name for name in self.parameters if name not in self.inputs]
        self.taken = self.needed + [name for name in options if name not in self.needed]
        self.optional = {name.removesuffix("?") for name in outputs if name.endswith("?")}
        # The gradients that the backward can do without, as it says by their annotation.
        self.may_be_none = {
            name
            for name, parameter in inspect.signature(backward).parameters.items()
            if type(None) in get_args(parameter.annotation)
        }
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
        sizes = sizes_of(self.inputs, given, lambda tensor: tensor.shape)
        sizes["r"] = given.get("iterations", 1)
        if self.more_sizes is not None:
            sizes |= self.more_sizes(sizes, given)
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
                elif grad is None and f"grad_{name}" not in self.may_be_none:
                    grad = like.new_zeros(ctx.shapes[name])
                given[f"grad_{name}"] = grad
            tensors = [value for value in given.values() if isinstance(value, Tensor)]
            # Below a transform of `torch.func`, tensors may hide their tangents.
            if in_forward_mode() and (
                torch._C._are_functorch_transforms_active() or any(map(has_tangent, tensors))
            ):
                by_name = self.backward_by_reference(given)
            else:
                found = listed(gradient_of(*(given[name] for name in self.taken)))
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
        made = listed(self.reference(**raised))
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
        shapes = dict(zip(self.outputs, listed(self.fake(*args)), strict=True))
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


def listed(result: Any) -> tuple[Any, ...]:
    """The results of an operator as a tuple, also if it has only one."""
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


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def sizes_of(
    tensors: Axes, given: Mapping[str, Any], shape_of: Callable[[Any], Any]
) -> dict[str, int]:
    """The size of each axis of the inputs that are given."""
    return {
        axis: size
        for name, axes in tensors.items()
        if given[name] is not None
        for axis, size in zip(axes.split(), shape_of(given[name]), strict=True)
    }
