"""One pass of routing with a given pose."""

import torch
from torch import Tensor

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
    s = passes.weighted_sum(pose, bias, coupling if return_coupling else None)
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
    passes = Passes(votes.write, votes.shape, prior, leaky, votes.u, 1)
    grad_pose = passes.like.new_zeros(pose.shape)
    grad_prior, grad_bias = (
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (prior, bias)
    )
    passes.backward(
        [pose],
        [grad_s],
        grad_coupling,
        votes.contract,
        bias=bias,
        grad_pose=grad_pose,
        grad_prior=grad_prior,
        grad_bias=grad_bias,
    )
    return *votes.gradients(), grad_pose.to(pose.dtype), grad_prior, grad_bias
