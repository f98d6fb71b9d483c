"""`dynamic_routing`."""

from typing import Literal, overload

from torch import Tensor

from tritoncaps import _checks
from tritoncaps._operators.dynamic_routing import dynamic_routing as _registered
from tritoncaps._tracing import one_node

Gradient = Literal["full", "last"]
Output = Literal["v", "s"]


@overload
def dynamic_routing(
    u_hat: Tensor,
    iterations: int = ...,
    *,
    prior: Tensor | None = ...,
    pose_bias: Tensor | None = ...,
    leaky: bool = ...,
    gradient: Gradient = ...,
    output: Output = ...,
    return_coupling: Literal[False] = ...,
) -> Tensor: ...
@overload
def dynamic_routing(
    u_hat: Tensor,
    iterations: int = ...,
    *,
    prior: Tensor | None = ...,
    pose_bias: Tensor | None = ...,
    leaky: bool = ...,
    gradient: Gradient = ...,
    output: Output = ...,
    return_coupling: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def dynamic_routing(
    u_hat: Tensor,
    iterations: int = ...,
    *,
    prior: Tensor | None = ...,
    pose_bias: Tensor | None = ...,
    leaky: bool = ...,
    gradient: Gradient = ...,
    output: Output = ...,
    return_coupling: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
@one_node
def dynamic_routing(
    u_hat: Tensor,
    iterations: int = 3,
    *,
    prior: Tensor | None = None,
    pose_bias: Tensor | None = None,
    leaky: bool = False,
    gradient: Gradient = "full",
    output: Output = "v",
    return_coupling: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Route prediction vectors to output capsules by agreement.

    Start with b = prior, or 0. Then repeat `iterations` times: c = softmax_j(b),
    s_j = Σ_i c_ij û_{j|i} + pose_bias_j, v_j = squash(s_j), b_ij += û_{j|i}·v_j.

    Args:
        u_hat: prediction vectors, shape (B, I, J, D).
        iterations: the number of weighted sums, at least 1.
        prior: initial logits, shape (I, J). May be learned.
        pose_bias: added to s in every iteration, shape (J, D). May be learned. The authors' own
            code has one that starts at 0.1.
        leaky: let an orphan class with logit 0 take part in the softmax, so that an input capsule
            may belong to no output capsule: c_ij = exp b_ij / (1 + Σ_j exp b_ij).
        gradient: "full" differentiates through every iteration. "last" treats the coupling of the
            last iteration as a constant. This is cheaper, and many implementations do it.
        output: "v" returns the output capsules v. "s" returns the last s, before its squash.
        return_coupling: also return the coupling of the last iteration. With "full" it is
            differentiable.

    Returns:
        v or s, shape (B, J, D). With `return_coupling`, the pair (v, c) or (s, c), where c has
        shape (B, I, J).

    Raises:
        TypeError: an argument of the wrong type, dtypes that differ, `iterations` not an int.
        ValueError: wrong rank, axes that do not match, an empty axis other than B, two devices,
            `iterations` < 1, an unknown `gradient` or `output`.

    Example:
        >>> import torch
        >>> u_hat = torch.randn(2, 1152, 10, 16)
        >>> v, c = dynamic_routing(u_hat, iterations=3, return_coupling=True)
        >>> v.shape, c.shape
        (torch.Size([2, 10, 16]), torch.Size([2, 1152, 10]))

    Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (2017), procedure 1.
    """
    name = "dynamic_routing"
    _checks.check_inputs(name, _registered.inputs, u_hat=u_hat, prior=prior, pose_bias=pose_bias)
    _checks.check_routing_options(name, iterations, leaky, gradient, output, return_coupling)
    result, coupling, _ = _registered.forward(
        u_hat, prior, pose_bias, iterations, leaky, output, return_coupling, gradient
    )
    if not return_coupling:
        return result
    return result, coupling if gradient == "full" else coupling.detach()
