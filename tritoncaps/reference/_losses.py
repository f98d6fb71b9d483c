"""The losses."""

import torch
from einops import reduce
from torch import Tensor


def margin_loss(
    activations: Tensor,
    target: Tensor,
    m_pos: float = 0.9,
    m_neg: float = 0.1,
    down_weight: float = 0.5,
    reduction: str = "mean",
    *,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Sum T_k·max(0, m⁺−|v_k|)² + λ(1−T_k)·max(0, |v_k|−m⁻)² over classes k (Sabour 2017, 4).

    `activations` is (B, K). `target` is (B,) class indices or (B, K) multi-hot. `class_weight`,
    (K,), multiplies the term of each class.
    """
    classes = torch.arange(activations.shape[1], device=target.device)
    present = target[:, None] == classes if target.ndim == 1 else target
    present = present.to(activations.dtype)
    too_short = (m_pos - activations).clamp(min=0) ** 2
    too_long = (activations - m_neg).clamp(min=0) ** 2
    terms = present * too_short + down_weight * (1 - present) * too_long
    if class_weight is not None:
        terms = terms * class_weight.to(terms.dtype)
    loss = reduce(terms, "B K -> B", "sum")
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def spread_loss(
    activations: Tensor, target: Tensor, margin: float = 0.9, reduction: str = "mean"
) -> Tensor:
    """Sum max(0, m − (a_t − a_i))² over the classes i other than the true one, t (Hinton 2018, 3).

    `activations` is (B, K) and `target` (B,), class indices.
    """
    true = activations.gather(1, target[:, None])
    others = torch.arange(activations.shape[1], device=target.device) != target[:, None]
    loss = reduce(others * (margin - (true - activations)).clamp(min=0) ** 2, "B K -> B", "sum")
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
