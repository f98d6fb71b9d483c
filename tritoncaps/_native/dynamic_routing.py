"""Routing by agreement of prediction vectors in memory."""

from torch import Tensor

from tritoncaps import _torch_path
from tritoncaps._native import _dynamic


def dynamic_routing_fwd(
    u_hat: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    iterations: int,
    leaky: bool,
    output: str,
    return_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """v or s (B, J, D), the last coupling (B, I, J) or an empty tensor, all s⁽ᵗ⁾ (r, B, J, D)."""
    options = (prior, pose_bias, iterations, leaky, output, return_coupling)
    if u_hat.numel() == 0:
        return _torch_path.dynamic_routing_fwd(u_hat, *options)
    return _dynamic.forward("dynamic_routing", u_hat, None, *options)


def dynamic_routing_bwd(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u_hat: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    sums: Tensor,
    leaky: bool,
    gradient: str,
    output: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of u_hat, (B, I, J, D), of the prior, (I, J), and of the pose bias, (J, D)."""
    options = (prior, pose_bias, sums, leaky, gradient, output)
    if u_hat.numel() == 0:
        return _torch_path.dynamic_routing_bwd(grad_v, grad_coupling, u_hat, *options)
    grads = _dynamic.backward("dynamic_routing", grad_v, grad_coupling, u_hat, None, *options)
    return grads[0], *grads[2:]
