"""Binding of `tritoncaps_routing_pass_*`. The algorithm is in pass.h."""

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


def routing_pass_fwd(
    u: Tensor,
    weight: Tensor,
    pose: Tensor,
    prior: Tensor | None,
    bias: Tensor | None,
    leaky: bool,
    return_coupling: bool,
) -> tuple[Tensor, Tensor]:
    """s (B, J, D), and the coupling (B, I, J) or an empty tensor."""
    (B, I, P), (_, _, J, D) = u.shape, weight.shape
    if 0 in (B, I, P, J, D):
        return _torch_path.routing_pass_fwd(u, weight, pose, prior, bias, leaky, return_coupling)
    u, weight, pose = u.contiguous(), weight.contiguous(), pose.contiguous()
    prior, bias = raised(prior), raised(bias)
    s = u.new_empty((B, J, D))
    coupling = u.new_empty((B, I, J) if return_coupling else (0,))
    done = function("routing_pass_fwd", u.dtype, "ppppppippi")(
        u.data_ptr(),
        weight.data_ptr(),
        pose.data_ptr(),
        pointer(prior),
        pointer(bias),
        sizes(B, I, P, J, D, 1),
        leaky,
        s.data_ptr(),
        coupling.data_ptr() if return_coupling else None,
        workers(B * I * J * D * (P + 2)),
    )
    check(done, "routing_pass")
    return s, coupling


def routing_pass_bwd(
    grad_s: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
    weight: Tensor,
    pose: Tensor,
    prior: Tensor | None,
    bias: Tensor | None,
    leaky: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of u, weight, pose, prior and bias. Each is None if its input is None."""
    (B, I, P), (_, _, J, D) = u.shape, weight.shape
    if 0 in (B, I, P, J, D):
        return _torch_path.routing_pass_bwd(
            grad_s, grad_coupling, u, weight, pose, prior, bias, leaky
        )
    u, weight, pose = u.contiguous(), weight.contiguous(), pose.contiguous()
    grad_s, grad_coupling = grad_s.float().contiguous(), raised(grad_coupling)
    prior, bias = raised(prior), raised(bias)
    grad_u, grad_pose = torch.empty_like(u), torch.empty_like(pose)
    grad_weight = u.new_empty(weight.shape, dtype=torch.float32)
    grad_prior, grad_bias = empty_like_float(prior), empty_like_float(bias)
    done = function("routing_pass_bwd", u.dtype, "ppppppppipppppi")(
        grad_s.data_ptr(),
        pointer(grad_coupling),
        u.data_ptr(),
        weight.data_ptr(),
        pose.data_ptr(),
        pointer(prior),
        pointer(bias),
        sizes(B, I, P, J, D, 1),
        leaky,
        grad_u.data_ptr(),
        grad_weight.data_ptr(),
        grad_pose.data_ptr(),
        pointer(grad_prior),
        pointer(grad_bias),
        workers(3 * B * I * J * D * (P + 2)),
    )
    check(done, "routing_pass")
    return (
        grad_u,
        grad_weight.to(u.dtype),
        grad_pose,
        lowered(grad_prior, u.dtype),
        lowered(grad_bias, u.dtype),
    )
