"""Test images made harder: attacked along a gradient, shifted, rotated, scaled.

All functions are pure and take float images in [0, 1], shape (B, C, H, W). The direction of a shift
or a rotation depends on the number of the image in its set, which starts at `first` in a batch. So
no direction is preferred, nothing is random, and batching makes no difference.

Example:
    >>> import torch
    >>> rotated(torch.rand(4, 1, 28, 28), 30.0).shape
    torch.Size([4, 1, 28, 28])
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tritoncaps.data.batches import rotated_and_scaled

# Right, left, down, up.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1))


def shifted(images: Tensor, pixels: float, first: int = 0) -> Tensor:
    """Shift images in turn to the right, to the left, down and up; black comes in."""
    height, width = images.shape[2:]
    directions = torch.tensor(_DIRECTIONS)[(torch.arange(len(images)) + first) % 4]
    # An affine map gives where a pixel comes from, in coordinates from -1 to 1.
    offset = -2 * pixels * directions / torch.tensor([width, height])
    matrix = torch.eye(2).expand(len(images), 2, 2)
    theta = torch.cat([matrix, offset.unsqueeze(2)], dim=2).to(images)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # Outside is black, and rounding leaves nothing outside [0, 1].
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False).clamp(0, 1)


def rotated(images: Tensor, degrees: float, first: int = 0) -> Tensor:
    """Rotate about the centre, in turn anticlockwise and clockwise."""
    sign = 1 - 2 * ((torch.arange(len(images)) + first) % 2)
    return rotated_and_scaled(images, sign * math.radians(degrees), torch.ones(len(images)))


def scaled(images: Tensor, factor: float, first: int = 0) -> Tensor:
    """Enlarge about the centre; a factor below 1 makes smaller."""
    if not factor > 0:
        raise ValueError(f"scaled: factor must be > 0, got {factor}")
    count = len(images)
    return rotated_and_scaled(images, torch.zeros(count), torch.full((count,), float(factor)))


def sign_of_gradient(
    scores: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor], images: Tensor
) -> Tensor:
    """Return the direction of the fast gradient sign attack, −1, 0 or 1 for each pixel.

    Args:
        scores: the network, images → (B, K), without a label.
        loss: scores → (B,), what the attacker increases.
        images: shape (B, C, H, W).

    Goodfellow, Shlens, Szegedy: Explaining and Harnessing Adversarial Examples (2015).
    """
    with torch.enable_grad():
        attacked = images.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(scores(attacked)).sum(), attacked)
    return gradient.sign()


def attacked(images: Tensor, direction: Tensor, epsilon: float) -> Tensor:
    """Move every pixel by `epsilon` in its direction, within [0, 1]."""
    return (images + epsilon * direction).clamp(0, 1)


def score_difference(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how far the best wrong class is ahead of the true one, (B, K), (B,) → (B,).

    Its gradient does not vanish where the network is sure. There the gradient of the margin loss is
    exactly 0, and that of the cross entropy nearly so.
    """
    true = F.one_hot(labels, scores.shape[1]).bool()
    return scores.masked_fill(true, -math.inf).amax(dim=1) - scores[true]
