"""Routing by agreement of poses and their weight."""

from torch import Tensor

from tritoncaps import _torch_path
from tritoncaps._native import _dynamic


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
    options = (prior, pose_bias, iterations, leaky, output, return_coupling)
    if u.numel() == 0 or weight.numel() == 0:
        return _torch_path.fused_dynamic_routing_fwd(u, weight, *options)
    return _dynamic.forward("fused_dynamic_routing", u, weight, *options)


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
    options = (prior, pose_bias, sums, leaky, gradient, output)
    if u.numel() == 0 or weight.numel() == 0:
        return _torch_path.fused_dynamic_routing_bwd(grad_v, grad_coupling, u, weight, *options)
    grad_u, grad_weight, grad_prior, grad_pose_bias = _dynamic.backward(
        "fused_dynamic_routing", grad_v, grad_coupling, u, weight, *options
    )
    assert grad_weight is not None
    return grad_u, grad_weight, grad_prior, grad_pose_bias
