"""Binding of `tritoncaps_fused_dynamic_routing_*`. The algorithm is in dynamic.h."""

import torch
from torch import Tensor

from tritoncaps import _torch_path
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


def fused_dynamic_routing_fwd(
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    iterations: int,
    leaky: bool,
    output: str,
    return_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """v or s (B, J, D), the last coupling (B, I, J) or an empty tensor, all s⁽ᵗ⁾ (r, B, J, D)."""
    (B, I, P), (_, _, J, D) = u.shape, weight.shape
    if 0 in (B, I, P, J, D):
        return _torch_path.fused_dynamic_routing_fwd(
            u, weight, prior, pose_bias, iterations, leaky, output, return_coupling
        )
    u, weight, prior, pose_bias = (
        u.contiguous(),
        weight.contiguous(),
        raised(prior),
        raised(pose_bias),
    )
    v = u.new_empty((B, J, D))
    coupling = u.new_empty((B, I, J) if return_coupling else (0,))
    sums = u.new_empty((iterations, B, J, D), dtype=torch.float32)
    done = function("fused_dynamic_routing_fwd", u.dtype, "pppppiipppi")(
        u.data_ptr(),
        weight.data_ptr(),
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
    check(done, "fused_dynamic_routing")
    return v, coupling, sums


def fused_dynamic_routing_bwd(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    sums: Tensor,
    leaky: bool,
    gradient: str,
    output: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of u, (B, I, P), the weight, (I, P, J, D), the prior, (I, J), and the pose bias."""
    (B, I, P), (_, _, J, D) = u.shape, weight.shape
    if 0 in (B, I, P, J, D):
        return _torch_path.fused_dynamic_routing_bwd(
            grad_v, grad_coupling, u, weight, prior, pose_bias, sums, leaky, gradient, output
        )
    iterations, is_full = len(sums), gradient == "full"
    u, weight, sums = u.contiguous(), weight.contiguous(), sums.contiguous()
    grad_v, grad_coupling = grad_v.float().contiguous(), raised(grad_coupling)
    prior, pose_bias = raised(prior), raised(pose_bias)
    grad_u, grad_weight = torch.empty_like(u), u.new_empty(weight.shape, dtype=torch.float32)
    grad_prior, grad_pose_bias = empty_like_float(prior), empty_like_float(pose_bias)
    done = function("fused_dynamic_routing_bwd", u.dtype, "ppppppppiiippppi")(
        grad_v.data_ptr(),
        pointer(grad_coupling),
        u.data_ptr(),
        weight.data_ptr(),
        pointer(prior),
        pointer(pose_bias),
        sums.data_ptr(),
        sizes(B, I, P, J, D, iterations),
        leaky,
        output == "v",
        is_full,
        grad_u.data_ptr(),
        grad_weight.data_ptr(),
        pointer(grad_prior),
        pointer(grad_pose_bias),
        workers(3 * B * I * J * D * (P + 2 * iterations)),
    )
    check(done, "fused_dynamic_routing")
    return (
        grad_u,
        grad_weight.to(u.dtype),
        lowered(grad_prior, u.dtype),
        lowered(grad_pose_bias, u.dtype),
    )
