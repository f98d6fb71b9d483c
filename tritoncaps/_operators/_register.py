"""Everything that torch needs to know about an operator, derived from one declaration.

Each operator is opaque to the compiler: one node in a graph and one boundary per call, whatever
happens inside. `register` gives it a schema, a fake (shapes and dtypes only), an autograd formula
whose backward is an operator too, an autocast rule, a vmap rule and FLOP counts.

First derivatives in reverse mode come from the backward. All others are those of the operator's
reference formula: torch differentiates it, as often as asked.

Axes are written as in "B I P". A name that ends in "?" is optional: such an input may be None, and
such an output is an empty tensor of shape (0,) if it was not asked for.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from tritoncaps._operators._autograd import set_autograd
from tritoncaps._operators._formulas import Axes, Formulas, sizes_of
from tritoncaps._operators._vmap import batched, elementwise, one_by_one

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
    sizes: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None,
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
        sizes: the axes of the outputs that no input has, from the sizes of the inputs' axes and the
            arguments of the call.
        flops: counts the products of a call, two operations for each multiply-add.
        backward_flops: the same for the backward. Its arguments have the backward's names.
    """
    formulas = Formulas(forward, backward, reference, inputs, outputs, sizes)
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
        operator.register_vmap(elementwise(operator))
        gradient_of.register_vmap(elementwise(gradient_of))
    else:
        operator.register_vmap(batched(operator, formulas))
        # It sums over the batch, so each slice has its own gradient of the weight.
        gradient_of.register_vmap(one_by_one(gradient_of))
    if flops is not None:
        _set_flops(operator, formulas.parameters, formulas.inputs, flops)
    if backward_flops is not None:
        _set_flops(gradient_of, formulas.taken, formulas.inputs, backward_flops)
    return Registered(inputs, outputs, operator, gradient_of, formulas.forward_by_reference)


def _refuse_tangents(name: str) -> Callable[..., Any]:
    """Stand in for a backward whose arguments have forward-mode tangents.

    `Formulas.gradient` looks out for them. Only a call by hand, or by a traced graph, ends here.
    """

    def refuse(*args: Any) -> Any:
        raise NotImplementedError(
            f"tritoncaps::{name}_backward: an argument has a forward-mode tangent, but only "
            f"tritoncaps::{name} has a forward-mode derivative; differentiate that one instead"
        )

    return refuse


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
        return formula(sizes_of(tensors, given, tuple), given)

    register_flop_formula(getattr(getattr(torch.ops, namespace), name))(count)
