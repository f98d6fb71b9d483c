"""Losses as modules: the margin loss, and the margin loss with reconstruction."""

import torch
from torch import Tensor, nn

from tritoncaps import ops
from tritoncaps._checks import check_choice, check_margins, check_number, shape_of

__all__ = ["CapsuleLoss", "MarginLoss", "reconstruction_error"]


def reconstruction_error(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Sum the squared error over each image (Sabour 2017, section 4.1).

    Args:
        reconstruction: shape (B, C, H, W).
        images: shape (B, C, H, W).

    Returns:
        The sums, shape (B,).

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> reconstruction_error(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4))
        tensor([16., 16.])
    """
    if reconstruction.shape != images.shape:
        raise ValueError(
            f"reconstruction_error: reconstruction is {shape_of(reconstruction)} "
            f"but images is {shape_of(images)}"
        )
    return (reconstruction - images).square().flatten(1).sum(dim=1)


class MarginLoss(nn.Module):
    """`ops.margin_loss` as a module, with the same arguments.

    Example:
        >>> import torch
        >>> MarginLoss()(torch.tensor([[0.9, 0.1, 0.3]]), torch.tensor([0]))
        tensor(0.0200)
    """

    def __init__(
        self,
        m_pos: float = 0.9,
        m_neg: float = 0.1,
        down_weight: float = 0.5,
        reduction: ops.Reduction = "mean",
    ) -> None:
        super().__init__()
        check_margins("MarginLoss", m_pos, m_neg, down_weight)
        self.m_pos = m_pos
        self.m_neg = m_neg
        self.down_weight = down_weight
        check_choice("MarginLoss", "reduction", reduction, ("mean", "sum", "none"))
        self.reduction: ops.Reduction = reduction

    def forward(self, activations: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of activations (B, K) for class indices (B,) or multi-hot (B, K)."""
        return ops.margin_loss(
            activations, target, self.m_pos, self.m_neg, self.down_weight, self.reduction
        )

    def extra_repr(self) -> str:
        """The arguments that build this module."""
        return (
            f"m_pos={self.m_pos}, m_neg={self.m_neg}, down_weight={self.down_weight}, "
            f"reduction={self.reduction!r}"
        )


class CapsuleLoss(nn.Module):
    """Margin loss + `reconstruction_weight` × summed squared error, mean over the batch.

    Args:
        reconstruction_weight: 0.0005 in Sabour 2017 (section 4.1), small enough that the margin
            loss dominates.

    Raises:
        TypeError, ValueError: the weight is not a number. In `forward`, whatever `ops.margin_loss`
            and `reconstruction_error` raise.

    Example:
        >>> import torch
        >>> images = torch.rand(2, 1, 28, 28)
        >>> CapsuleLoss()(torch.rand(2, 10), torch.tensor([3, 7]), images, images).shape
        torch.Size([])
    """

    def __init__(self, reconstruction_weight: float = 0.0005) -> None:
        super().__init__()
        check_number("CapsuleLoss", "reconstruction_weight", reconstruction_weight)
        self.reconstruction_weight = reconstruction_weight

    def forward(
        self, activations: Tensor, target: Tensor, reconstruction: Tensor | None, images: Tensor
    ) -> Tensor:
        """Compute the loss, a scalar. Without a reconstruction it is the margin loss alone."""
        loss = ops.margin_loss(activations, target)
        if reconstruction is None:
            return loss
        error = reconstruction_error(reconstruction.to(images.dtype), images)
        # The mean over an empty batch is 0.
        mean = error.sum() / max(1, len(error))
        return torch.add(loss, mean, alpha=self.reconstruction_weight)

    def extra_repr(self) -> str:
        """The arguments that build this module."""
        return f"reconstruction_weight={self.reconstruction_weight}"
