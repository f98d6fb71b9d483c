"""One pass of routing with a given pose."""

import torch
from torch import Tensor

from tritoncaps._torch_path._loop import zeros_like
from tritoncaps._torch_path._passes import Passes
from tritoncaps._torch_path._precision import accumulation_dtype
from tritoncaps._torch_path.prediction_vectors import Projection


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
    votes = Projection(u, weight, accumulation_dtype(u.dtype))
    passes = Passes(votes.write, votes.shape, prior, leaky, votes.u)
    coupling = u.new_empty((*u.shape[:2], weight.shape[2]) if return_coupling else (0,))
    s = votes.u.new_zeros(pose.shape)
    passes.add_weighted_sum(s, pose, bias, coupling if return_coupling else None)
    return s.to(u.dtype), coupling


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
    votes = Projection(u, weight, accumulation_dtype(u.dtype), backward=True)
    passes = Passes(votes.write, votes.shape, prior, leaky, votes.u)
    vectors = torch.stack([pose, grad_s], dim=2).to(votes.u.dtype)
    grad_pose = votes.u.new_zeros(pose.shape)
    grad_prior, grad_bias = (None if x is None else zeros_like(x) for x in (prior, bias))
    passes.backward(
        vectors,
        1,
        grad_coupling,
        votes.contract,
        bias=bias,
        grad_pose=grad_pose,
        grad_prior=grad_prior,
        grad_bias=grad_bias,
    )
    return *votes.gradients(), grad_pose.to(pose.dtype), grad_prior, grad_bias
