"""Prediction vectors and routing in one: no more than a few û exist at a time."""

from torch import Tensor

from tritoncaps._torch_path._loop import route, route_backward
from tritoncaps._torch_path._passes import Passes
from tritoncaps._torch_path._precision import accumulation_dtype
from tritoncaps._torch_path.prediction_vectors import Projection


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
    votes = Projection(u, weight, accumulation_dtype(u.dtype))
    passes = Passes(votes.write, votes.shape, prior, leaky, votes.u)
    return route(passes, pose_bias, iterations, output, return_coupling, u.dtype)


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
    votes = Projection(u, weight, sums.dtype, backward=True)
    passes = Passes(votes.write, votes.shape, prior, leaky, sums, len(sums))
    options = (sums, gradient, output, votes.contract, prior, pose_bias)
    grad_prior, grad_pose_bias = route_backward(passes, grad_v, grad_coupling, *options)
    return *votes.gradients(), grad_prior, grad_pose_bias
