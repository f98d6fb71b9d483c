"""Routing by agreement of prediction vectors in memory."""

import torch
from torch import Tensor

from tritoncaps._torch_path._loop import route, route_backward
from tritoncaps._torch_path._passes import Passes
from tritoncaps._torch_path._precision import accumulation_dtype


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
    like = u_hat.new_empty(0, dtype=accumulation_dtype(u_hat.dtype))

    def copy(capsules: slice, out: Tensor) -> None:
        out.copy_(u_hat[:, capsules].transpose(0, 1))

    passes = Passes(copy, u_hat.shape, prior, leaky, like)
    return route(passes, pose_bias, iterations, output, return_coupling, u_hat.dtype)


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
    grad_u_hat = torch.empty_like(u_hat, memory_format=torch.contiguous_format)

    def copy(capsules: slice, out: Tensor) -> None:
        out.copy_(u_hat[:, capsules].transpose(0, 1))

    def keep(capsules: slice, part: Tensor) -> None:
        grad_u_hat[:, capsules] = part.transpose(0, 1)

    passes = Passes(copy, u_hat.shape, prior, leaky, sums, len(sums))
    options = (sums, gradient, output, keep, prior, pose_bias)
    return grad_u_hat, *route_backward(passes, grad_v, grad_coupling, *options)
