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
    empty = u.numel() == 0 or weight.numel() == 0
    forward = _torch_path.fused_dynamic_routing_fwd if empty else _dynamic.forward
    return forward(u, weight, prior, pose_bias, iterations, leaky, output, return_coupling)


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
    empty = u.numel() == 0 or weight.numel() == 0
    backward = _torch_path.fused_dynamic_routing_bwd if empty else _dynamic.backward
    inputs = (u, weight, prior, pose_bias)
    return backward(grad_v, grad_coupling, *inputs, sums, leaky, gradient, output)
