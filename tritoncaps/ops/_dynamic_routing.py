"""`dynamic_routing`."""

from typing import Literal, overload

from torch import Tensor

from tritoncaps import _checks
from tritoncaps._operators.dynamic_routing import dynamic_routing as _registered
from tritoncaps._tracing import one_node

Gradient = Literal["full", "last"]


@overload
def dynamic_routing(
    u_hat: Tensor,
    iterations: int = ...,
    *,
    prior: Tensor | None = ...,
    gradient: Gradient = ...,
    return_coupling: Literal[False] = ...,
) -> Tensor: ...
@overload
def dynamic_routing(
    u_hat: Tensor,
    iterations: int = ...,
    *,
    prior: Tensor | None = ...,
    gradient: Gradient = ...,
    return_coupling: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@one_node
def dynamic_routing(
    u_hat: Tensor,
    iterations: int = 3,
    *,
    prior: Tensor | None = None,
    gradient: Gradient = "full",
    return_coupling: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Route prediction vectors to output capsules by agreement.

    Start with b = prior, or 0. Then repeat `iterations` times: c = softmax_j(b),
    s_j = Σ_i c_ij û_{j|i}, v_j = squash(s_j), b_ij += û_{j|i}·v_j.

    Args:
        u_hat: prediction vectors, shape (B, I, J, D).
        iterations: the number of weighted sums, at least 1.
        prior: initial logits, shape (I, J). May be learned.
        gradient: "full" differentiates through every iteration. "last" treats the coupling of the
            last iteration as a constant. This is cheaper, and many implementations do it.
        return_coupling: also return the coupling of the last iteration. With "full" it is
            differentiable.

    Returns:
        v, shape (B, J, D). With `return_coupling`, the pair (v, c), where c has shape (B, I, J).

    Raises:
        TypeError: an argument of the wrong type, dtypes that differ, `iterations` not an int.
        ValueError: wrong rank, axes that do not match, an empty axis other than B, two devices,
            `iterations` < 1, an unknown `gradient`.

    Example:
        >>> import torch
        >>> u_hat = torch.randn(2, 1152, 10, 16)
        >>> v, c = dynamic_routing(u_hat, iterations=3, return_coupling=True)
        >>> v.shape, c.shape
        (torch.Size([2, 10, 16]), torch.Size([2, 1152, 10]))

    Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (2017), procedure 1.
    """
    _checks.check_inputs("dynamic_routing", _registered.inputs, u_hat=u_hat, prior=prior)
    _checks.check_routing_options("dynamic_routing", iterations, gradient, return_coupling)
    v, coupling, _ = _registered.forward(u_hat, prior, iterations, gradient, return_coupling)
    if not return_coupling:
        return v
    return v, coupling if gradient == "full" else coupling.detach()
