"""`spread_loss`."""

import torch
from torch import Tensor

from tritoncaps import _checks, _targets
from tritoncaps._tracing import one_node
from tritoncaps.ops._margin_loss import Reduction, reduced


@one_node
def spread_loss(
    activations: Tensor, target: Tensor, margin: float = 0.9, reduction: Reduction = "mean"
) -> Tensor:
    """Push the activation of the true class above each of the others, by at least `margin`.

    L = Σ_{i≠t} max(0, m − (a_t − a_i))², summed over all classes i but the true one, t.

    Args:
        activations: how present each class is, in [0, 1], shape (B, K).
        target: class indices, shape (B,), int64. Each image has one true class. For images with
            several, see `margin_loss`.
        margin: m ≥ 0, a difference of activations. The paper raises it linearly from 0.2 to 0.9
            in training. `tritoncaps.losses.SpreadLoss` does this by the step.
        reduction: over the batch: "mean" (0 for an empty batch), "sum" or "none".

    Returns:
        A scalar, or shape (B,) with "none". The dtype is that of `activations`, or float32 under
        autocast.

    Raises:
        TypeError: an argument of the wrong type, class indices that are not int64.
        ValueError: shapes that do not match, a multi-hot target, K = 0, two devices, an unknown
            `reduction`, a margin that is negative or not finite. On a CPU also class indices
            outside 0 .. K−1. An accelerator does not look: the true class of such an index has
            activation 0.

    Example:
        >>> import torch
        >>> spread_loss(torch.tensor([[0.9, 0.1, 0.3]]), torch.tensor([0]))
        tensor(0.1000)

    Hinton, Sabour, Frosst: Matrix capsules with EM routing (2018), section 4.1, equation 3.
    """
    _checks.check_tensor("spread_loss", "activations", activations, "B K")
    _checks.check_not_empty("spread_loss", "activations", activations, "B K")
    _targets.check_target("spread_loss", target, "activations", activations)
    if target.ndim != 1:
        raise ValueError(
            f"spread_loss: target must be class indices (B,), got {_checks.shape_of(target)}; "
            "use target.argmax(dim=1) if each image has one class, else ops.margin_loss"
        )
    _checks.check_not_negative("spread_loss", "margin", margin)
    _checks.check_choice("spread_loss", "reduction", reduction, ("mean", "sum", "none"))
    activations = activations.to(_checks.routed_dtype(activations))
    is_true = _targets.present_classes(target, activations.shape[1], torch.bool)
    true = activations.where(is_true, 0).sum(dim=1, keepdim=True)
    terms = (margin - (true - activations)).clamp(min=0).square().where(~is_true, 0)
    return reduced(terms.sum(dim=1), reduction)
