"""Binding of `tritoncaps_fused_dynamic_routing_*`. The algorithm is in dynamic.h.

Two operators are made of it. Without a weight, `u` is û itself, (B, I, J, D). `name` is the
operator, for errors.
"""

import torch
from torch import Tensor

from tritoncaps._native._call import (
    check,
    empty_like_float,
    function,
    lowered,
    pointer,
    raised,
    sizes,
    workers,
)


def forward(
    name: str,
    u: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    iterations: int,
    leaky: bool,
    output: str,
    return_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """v or s (B, J, D), the last coupling (B, I, J) or an empty tensor, all s⁽ᵗ⁾ (r, B, J, D)."""
    B, I, P, J, D = _axes(u, weight)
    u, weight = u.contiguous(), None if weight is None else weight.contiguous()
    prior, pose_bias = raised(prior), raised(pose_bias)
    v = u.new_empty((B, J, D))
    coupling = u.new_empty((B, I, J) if return_coupling else (0,))
    sums = u.new_empty((iterations, B, J, D), dtype=torch.float32)
    done = function("fused_dynamic_routing_fwd", u.dtype, "pppppiipppi")(
        u.data_ptr(),
        pointer(weight),
        pointer(prior),
        pointer(pose_bias),
        sizes(B, I, P, J, D, iterations),
        leaky,
        output == "v",
        v.data_ptr(),
        coupling.data_ptr() if return_coupling else None,
        sums.data_ptr(),
        workers(B * I * J * D * (P + 2 * iterations)),
    )
    check(done, name)
    return v, coupling, sums


def backward(
    name: str,
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    sums: Tensor,
    leaky: bool,
    gradient: str,
    output: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of u, the weight, (I, P, J, D), the prior, (I, J), and the pose bias, (J, D)."""
    B, I, P, J, D = _axes(u, weight)
    iterations, is_full = len(sums), gradient == "full"
    u, weight = u.contiguous(), None if weight is None else weight.contiguous()
    sums, prior, pose_bias = sums.contiguous(), raised(prior), raised(pose_bias)
    grad_v, grad_coupling = grad_v.float().contiguous(), raised(grad_coupling)
    grad_u, grad_weight = torch.empty_like(u), empty_like_float(weight)
    grad_prior, grad_pose_bias = empty_like_float(prior), empty_like_float(pose_bias)
    done = function("fused_dynamic_routing_bwd", u.dtype, "ppppppppiiippppi")(
        grad_v.data_ptr(),
        pointer(grad_coupling),
        u.data_ptr(),
        pointer(weight),
        pointer(prior),
        pointer(pose_bias),
        sums.data_ptr(),
        sizes(B, I, P, J, D, iterations),
        leaky,
        output == "v",
        is_full,
        grad_u.data_ptr(),
        pointer(grad_weight),
        pointer(grad_prior),
        pointer(grad_pose_bias),
        workers(3 * B * I * J * D * (P + 2 * iterations)),
    )
    check(done, name)
    dtype = u.dtype
    return (
        grad_u,
        lowered(grad_weight, dtype),
        lowered(grad_prior, dtype),
        lowered(grad_pose_bias, dtype),
    )


def _axes(u: Tensor, weight: Tensor | None) -> tuple[int, int, int, int, int]:
    """B, I, P, J, D. Without a weight, P = 0."""
    if weight is None:
        B, I, J, D = u.shape
        return B, I, 0, J, D
    (B, I, P), (_, _, J, D) = u.shape, weight.shape
    return B, I, P, J, D
