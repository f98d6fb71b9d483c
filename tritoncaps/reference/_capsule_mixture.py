"""The likelihood of parts under the votes of object capsules."""

import math

import torch
from einops import einsum, reduce
from torch import Tensor


def capsule_mixture_log_prob(
    x: Tensor,
    votes: Tensor,
    scales: Tensor,
    mixing_logits: Tensor,
    presence: Tensor | None = None,
    *,
    normalize: bool = True,
    dummy_logit: float = -2 * math.log(10),
    dummy_log_prob: float = -2 * math.log(10),
    return_posterior: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Σ_i presence_i log(Σ_j π_ij N(x_i; V_ij, s_ij²) + π_i0 p_0) (Kosiorek 2019, 5).

    `x` is (B, I, D), `votes` (B, I, J, D), `scales` and `mixing_logits` (B, I, J), and `presence`
    (B, I). π is the softmax of the logits, that of the dummy component, 0, included. Without
    `normalize` it is their exponential. The posterior is (B, I, J), without the dummy component.
    """
    D = x.shape[2]
    distance = reduce((x[:, :, None] - votes) ** 2, "B I J D -> B I J", "sum")
    log_density = -distance / (2 * scales**2) - D * torch.log(math.sqrt(2 * math.pi) * scales)
    dummy = torch.full_like(scales[:, :, :1], dummy_logit)
    log_pi = torch.cat([mixing_logits, dummy], dim=2)
    if normalize:
        log_pi = torch.log_softmax(log_pi, dim=2)
    dummy_density = torch.full_like(dummy, dummy_log_prob)
    joint = log_pi + torch.cat([log_density, dummy_density], dim=2)
    log_prob = torch.logsumexp(joint, dim=2)
    if presence is None:
        presence = torch.ones_like(log_prob)
    total = einsum(log_prob, presence, "B I, B I -> B")
    return (total, torch.softmax(joint, dim=2)[:, :, :-1]) if return_posterior else total
