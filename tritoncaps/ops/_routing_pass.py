"""`routing_pass`, the primitive."""

from typing import Literal, overload

from torch import Tensor

from tritoncaps import _checks
from tritoncaps._operators.routing_pass import routing_pass as _registered
from tritoncaps._tracing import one_node


@overload
def routing_pass(
    u: Tensor,
    weight: Tensor,
    pose: Tensor,
    *,
    prior: Tensor | None = ...,
    bias: Tensor | None = ...,
    leaky: bool = ...,
    return_coupling: Literal[False] = ...,
) -> Tensor: ...
@overload
def routing_pass(
    u: Tensor,
    weight: Tensor,
    pose: Tensor,
    *,
    prior: Tensor | None = ...,
    bias: Tensor | None = ...,
    leaky: bool = ...,
    return_coupling: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def routing_pass(
    u: Tensor,
    weight: Tensor,
    pose: Tensor,
    *,
    prior: Tensor | None = ...,
    bias: Tensor | None = ...,
    leaky: bool = ...,
    return_coupling: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
@one_node
def routing_pass(
    u: Tensor,
    weight: Tensor,
    pose: Tensor,
    *,
    prior: Tensor | None = None,
    bias: Tensor | None = None,
    leaky: bool = False,
    return_coupling: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Add up the prediction vectors, weighted by their agreement with given poses.

    c = softmax_j(û·pose + prior) + bias and s_j = Σ_i c_ij û_{j|i}, with û_{j|i} = W_ij u_i. All
    routings share this step. They differ in the pose that they compare with, and in what they do
    with s. The prediction vectors of a batch never exist in memory.

    Args:
        u: input capsules, shape (B, I, P).
        weight: one P×D matrix per pair of capsules, shape (I, P, J, D).
        pose: what the prediction vectors are compared with, shape (B, J, D).
        prior: added to the logits, shape (I, J). May be learned.
        bias: added to the coupling after the softmax, shape (I, J). May be learned.
        leaky: let an orphan class with logit 0 take part in the softmax, so that an input capsule
            may belong to no output capsule: c_ij = exp b_ij / (1 + Σ_j exp b_ij) + bias_ij.
        return_coupling: also return the coupling c.

    Returns:
        s, shape (B, J, D). With `return_coupling`, the pair (s, c), where c has shape (B, I, J).

    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ.
        ValueError: wrong rank, axes that do not match, an empty axis other than B, two devices.

    Example:
        Two iterations of routing by agreement, each from the poses of the ones before:

        >>> import torch
        >>> from tritoncaps.ops import fused_dynamic_routing, squash
        >>> u, weight = torch.randn(2, 1152, 8), torch.randn(1152, 8, 10, 16) * 0.1
        >>> pose = torch.zeros(2, 10, 16)  # no agreement yet: every coupling is 1/J
        >>> pose = pose + squash(routing_pass(u, weight, pose))
        >>> v = squash(routing_pass(u, weight, pose))
        >>> torch.allclose(v, fused_dynamic_routing(u, weight, iterations=2), atol=1e-5)
        True

    Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (2017), procedure 1, lines 4 and 5.
    """
    name = "routing_pass"
    _checks.check_inputs(
        name, _registered.inputs, u=u, weight=weight, pose=pose, prior=prior, bias=bias
    )
    _checks.check_flag(name, "leaky", leaky)
    _checks.check_flag(name, "return_coupling", return_coupling)
    s, coupling = _registered.forward(u, weight, pose, prior, bias, leaky, return_coupling)
    return (s, coupling) if return_coupling else s
