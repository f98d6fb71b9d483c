"""How the operators behave under `torch.func.vmap` and `torch.utils.flop_counter`.

vmap folds its axis into the batch where the batch alone is mapped, which costs nothing; where the
weight or the prior is mapped too, each slice is a call of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tritoncaps import _operators

# vmap ---------------------------------------------------------------------------------------------


def _loop(operator: Callable[..., Any], info: Any, in_dims: Any, args: Any) -> tuple[Any, Any]:
    """Call the operator once a slice and stack the results."""
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


def _register_elementwise(operator: Any) -> None:
    """An operator over the last axis alone: whatever stands before it is batch."""

    def rule(info: Any, in_dims: Any, *args: Tensor) -> tuple[Tensor, int]:
        moved = (
            arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            for arg, dim in zip(args, in_dims, strict=True)
        )
        return operator(*moved), 0

    operator.register_vmap(rule)


def _register_batched(operator: Any) -> None:
    """An operator whose first argument alone carries the batch, in its first axis."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
            return _loop(operator, info, in_dims, args)
        first = args[0].movedim(in_dims[0], 0)
        sizes = first.shape[:2]
        result = operator(first.flatten(0, 1), *args[1:])
        if isinstance(result, Tensor):
            return result.unflatten(0, sizes), 0
        v, coupling, sums = result
        has_coupling = coupling.ndim == 3
        return (
            v.unflatten(0, sizes),
            coupling.unflatten(0, sizes) if has_coupling else coupling,
            sums.unflatten(1, sizes),
        ), (0, 0 if has_coupling else None, 1)

    operator.register_vmap(rule)


def _register_looped(operator: Any) -> None:
    """An operator that sums over the batch: a gradient of the weight for each slice."""
    operator.register_vmap(lambda info, in_dims, *args: _loop(operator, info, in_dims, args))


_register_elementwise(_operators.squash)
_register_elementwise(_operators.squash_backward)
for _operator in (
    _operators.prediction_vectors,
    _operators.dynamic_routing,
    _operators.fused_dynamic_routing,
):
    _register_batched(_operator)
for _operator in (
    _operators.prediction_vectors_backward,
    _operators.dynamic_routing_backward,
    _operators.fused_dynamic_routing_backward,
):
    _register_looped(_operator)


# floating-point operations ------------------------------------------------------------------------
#
# Of the products alone, two an element, as torch counts them: what the mathematics takes, with the
# prediction vectors computed once. What a backend recomputes to save memory is not counted.


def _votes_flops(u_shape: Any, weight_shape: Any) -> int:
    B, I, P = u_shape
    _, _, J, D = weight_shape
    return 2 * B * I * P * J * D


def _loop_flops(u_hat_shape: Any, iterations: int) -> int:
    """A weighted sum in each iteration, an agreement between two."""
    B, I, J, D = u_hat_shape
    return 2 * B * I * J * D * (2 * iterations - 1)


def _loop_backward_flops(u_hat_shape: Any, prior_shape: Any, iterations: int, full: bool) -> int:
    """Each forward product twice, but for the constant coupling of an iteration without logits."""
    B, I, J, D = u_hat_shape
    product = 2 * B * I * J * D
    if not full:
        return product
    return 2 * _loop_flops(u_hat_shape, iterations) - (product if prior_shape is None else 0)


def _votes_shape(u_shape: Any, weight_shape: Any) -> tuple[int, ...]:
    return (*u_shape[:2], *weight_shape[2:])


@register_flop_formula(torch.ops.tritoncaps.prediction_vectors)
def _(u_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _votes_flops(u_shape, weight_shape)


@register_flop_formula(torch.ops.tritoncaps.prediction_vectors_backward)
def _(grad_shape: Any, u_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _votes_flops(u_shape, weight_shape)


@register_flop_formula(torch.ops.tritoncaps.dynamic_routing)
def _(u_hat_shape: Any, prior_shape: Any, iterations: int, *args: Any, **kwargs: Any) -> int:
    return _loop_flops(u_hat_shape, iterations)


@register_flop_formula(torch.ops.tritoncaps.dynamic_routing_backward)
def _(
    grad_v_shape: Any,
    grad_coupling_shape: Any,
    u_hat_shape: Any,
    prior_shape: Any,
    sums_shape: Any,
    full: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _loop_backward_flops(u_hat_shape, prior_shape, sums_shape[0], full)


@register_flop_formula(torch.ops.tritoncaps.fused_dynamic_routing)
def _(
    u_shape: Any, weight_shape: Any, prior_shape: Any, iterations: int, *args: Any, **kwargs: Any
) -> int:
    votes = _votes_shape(u_shape, weight_shape)
    return _votes_flops(u_shape, weight_shape) + _loop_flops(votes, iterations)


@register_flop_formula(torch.ops.tritoncaps.fused_dynamic_routing_backward)
def _(
    grad_v_shape: Any,
    grad_coupling_shape: Any,
    u_shape: Any,
    weight_shape: Any,
    prior_shape: Any,
    sums_shape: Any,
    full: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    votes = _votes_shape(u_shape, weight_shape)
    loop = _loop_backward_flops(votes, prior_shape, sums_shape[0], full)
    return 2 * _votes_flops(u_shape, weight_shape) + loop
