"""`margin_loss`."""

from typing import Any, Literal

import torch
from torch import Tensor

from tritoncaps import _checks, _targets
from tritoncaps._tracing import one_node

Reduction = Literal["mean", "sum", "none"]


@one_node
def margin_loss(
    activations: Tensor,
    target: Tensor,
    m_pos: float = 0.9,
    m_neg: float = 0.1,
    down_weight: float = 0.5,
    reduction: Reduction = "mean",
    *,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Push the activations of present classes above `m_pos` and those of absent ones below `m_neg`.

    L = Σ_k w_k·(T_k·max(0, m⁺ − a_k)² + λ·(1 − T_k)·max(0, a_k − m⁻)²), summed over the classes k.

    Args:
        activations: how present each class is, in [0, 1], shape (B, K): the lengths of vector
            capsules, or the activations of matrix capsules.
        target: class indices, shape (B,), int64, or multi-hot, shape (B, K), values in [0, 1]. A
            value between 0 and 1 shares the loss between "present" and "absent". It may be a
            rounding error outside: 1e-6, or 4 eps of a 16-bit target.
        m_pos: m⁺ ≥ 0, the activation from which a present class costs nothing.
        m_neg: m⁻ ≥ 0, the activation up to which an absent class costs nothing.
        down_weight: λ ≥ 0, the weight of absent classes.
        reduction: over the batch: "mean" (0 for an empty batch), "sum" or "none".
        class_weight: w ≥ 0, a factor for the whole term of each class, present or absent, any
            floating-point dtype, shape (K,). The mean still divides by B alone, not by the sum of
            the weights as `torch.nn.CrossEntropyLoss` does.

    Returns:
        A scalar, or shape (B,) with "none". The dtype is that of `activations`, or float32 under
        autocast.

    Raises:
        TypeError: an argument of the wrong type, class indices that are not int64.
        ValueError: shapes that do not match, K = 0, two devices, an unknown `reduction`, a margin
            or weight that is negative or not finite. On a CPU also class indices outside 0 .. K−1,
            multi-hot values outside 0 .. 1 or a `class_weight` that is negative or not finite. An
            accelerator does not look: such an index counts all classes as absent.

    Example:
        >>> import torch
        >>> margin_loss(torch.tensor([[0.9, 0.1, 0.3]]), torch.tensor([0]))
        tensor(0.0200)

    Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (2017), equation 4.
    """
    _checks.check_tensor("margin_loss", "activations", activations, "B K")
    _checks.check_not_empty("margin_loss", "activations", activations, "B K")
    _targets.check_target("margin_loss", target, "activations", activations)
    _checks.check_margins("margin_loss", m_pos, m_neg, down_weight)
    _checks.check_choice("margin_loss", "reduction", reduction, ("mean", "sum", "none"))
    _targets.check_class_weight("margin_loss", class_weight, activations)
    activations = activations.to(_checks.routed_dtype(activations))
    present = _targets.present_classes(target, activations.shape[1], activations.dtype)
    too_short = (m_pos - activations).clamp(min=0).square()
    too_long = (activations - m_neg).clamp(min=0).square()
    terms = present * too_short + down_weight * (1 - present) * too_long
    if class_weight is not None:
        terms = terms * class_weight.to(terms.dtype)
    return reduced(terms.sum(dim=1), reduction)


def reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    """Reduce the losses of a batch, (B,). The mean over an empty batch is 0."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    count: Any = torch.sym_max(1, losses.shape[0])  # `max` would fix the batch of an export
    return losses.sum() / count
