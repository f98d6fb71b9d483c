"""`capsule_mixture_log_prob`."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from tritoncaps import _checks
from tritoncaps._tracing import one_node

_AXES = {
    "x": "B I D",
    "votes": "B I J D",
    "scales": "B I J",
    "mixing_logits": "B I J",
    "presence?": "B I",
}
# The weight and the density that the authors' code gives to a part that no capsule explains.
_DUMMY = -2 * math.log(10)


@overload
def capsule_mixture_log_prob(
    x: Tensor,
    votes: Tensor,
    scales: Tensor,
    mixing_logits: Tensor,
    presence: Tensor | None = ...,
    *,
    normalize: bool = ...,
    dummy_logit: float = ...,
    dummy_log_prob: float = ...,
    return_posterior: Literal[False] = ...,
) -> Tensor: ...
@overload
def capsule_mixture_log_prob(
    x: Tensor,
    votes: Tensor,
    scales: Tensor,
    mixing_logits: Tensor,
    presence: Tensor | None = ...,
    *,
    normalize: bool = ...,
    dummy_logit: float = ...,
    dummy_log_prob: float = ...,
    return_posterior: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def capsule_mixture_log_prob(
    x: Tensor,
    votes: Tensor,
    scales: Tensor,
    mixing_logits: Tensor,
    presence: Tensor | None = ...,
    *,
    normalize: bool = ...,
    dummy_logit: float = ...,
    dummy_log_prob: float = ...,
    return_posterior: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
@one_node
def capsule_mixture_log_prob(
    x: Tensor,
    votes: Tensor,
    scales: Tensor,
    mixing_logits: Tensor,
    presence: Tensor | None = None,
    *,
    normalize: bool = True,
    dummy_logit: float = _DUMMY,
    dummy_log_prob: float = _DUMMY,
    return_posterior: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-likelihood of part poses under the votes of object capsules.

    Each part has a mixture of Gaussians, one around each vote for it, and a dummy component for
    parts that no capsule explains:

        log p = Σ_i presence_i · log(Σ_j π_ij N(x_i; V_ij, s_ij²) + π_i0 p_0)

    with π = softmax over j and the dummy of `mixing_logits` and `dummy_logit`.

    Args:
        x: poses of the parts, shape (B, I, D).
        votes: the pose that each object capsule j predicts for part i, shape (B, I, J, D). If
            nobody knows which part a vote is for, as with points in any order, expand all votes
            over I.
        scales: standard deviations, > 0, shape (B, I, J). One for all D dimensions of a vote.
        mixing_logits: logarithms of the votes' weights, shape (B, I, J). −inf switches a vote off,
            but the vote must be finite and its scale > 0. In the paper they are
            log a_j + log a_ij, with the presence of the capsule and of the vote.
        presence: how much each part counts, in [0, 1], shape (B, I). None counts all as 1. A part
            with 0 counts nothing, but its pose must be finite.
        normalize: divide the weights by their sum, so that the likelihood is a density, as in the
            paper. The authors' code for images does not.
        dummy_logit: logarithm of the dummy component's weight.
        dummy_log_prob: logarithm of its density, which is the same everywhere.
        return_posterior: also return how much of each part each vote explains.

    Returns:
        log p, shape (B,). With `return_posterior`, the pair (log p, posterior), where the posterior
        has shape (B, I, J). Its sum over j is less than 1: the dummy component has the rest.

    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ.
        ValueError: wrong rank, axes that do not match, an empty axis other than B, two devices, a
            dummy logit or density that is not finite.

    Example:
        >>> import torch
        >>> x, scales = torch.zeros(1, 1, 2), torch.ones(1, 1, 3)
        >>> votes = torch.tensor([0.0, 1.0, 9.0]).view(1, 1, 3, 1).expand(1, 1, 3, 2)
        >>> log_prob, posterior = capsule_mixture_log_prob(
        ...     x, votes, scales, torch.zeros(1, 1, 3), return_posterior=True
        ... )
        >>> log_prob, posterior.round(decimals=4)
        (tensor([-2.6261]), tensor([[[0.7307, 0.2688, 0.0000]]]))

    Kosiorek, Sabour, Teh, Hinton: Stacked Capsule Autoencoders (2019), equations 4 and 5. The dummy
    component is that of the authors' code.
    """
    name = "capsule_mixture_log_prob"
    _checks.check_inputs(
        name,
        _AXES,
        x=x,
        votes=votes,
        scales=scales,
        mixing_logits=mixing_logits,
        presence=presence,
    )
    _checks.check_flag(name, "normalize", normalize)
    _checks.check_finite(name, "dummy_logit", dummy_logit)
    _checks.check_finite(name, "dummy_log_prob", dummy_log_prob)
    _checks.check_flag(name, "return_posterior", return_posterior)
    result = _checks.routed_dtype(x)
    exact = torch.float64 if result == torch.float64 else torch.float32
    x, votes, scales, logits = (t.to(exact) for t in (x, votes, scales, mixing_logits))
    deviation = (x.unsqueeze(2) - votes) / scales.unsqueeze(3)
    constant = x.shape[2] * math.log(2 * math.pi) / 2
    log_density = -deviation.square().sum(dim=3) / 2 - x.shape[2] * scales.log() - constant
    dummy = torch.zeros_like(logits[..., :1])
    logits = torch.cat([logits, dummy + dummy_logit], dim=2)
    if normalize:
        logits = logits.log_softmax(dim=2)
    joint = logits + torch.cat([log_density, dummy + dummy_log_prob], dim=2)  # (B, I, J + 1)
    log_prob = joint.logsumexp(dim=2)
    if presence is not None:
        log_prob = log_prob * presence.to(exact)
    total = log_prob.sum(dim=1).to(result)
    if not return_posterior:
        return total
    return total, joint.softmax(dim=2)[..., :-1].to(result)
