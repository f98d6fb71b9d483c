"""What travels between layers: capsules, with a pose and an activation each."""

from typing import NamedTuple

import torch
from torch import Tensor


class Capsules(NamedTuple):
    """Poses and activations, for layers that need both.

    `poses` (B, N, ...) say in which way each capsule is present, `activations` (B, N), in [0, 1],
    whether it is. Vector capsules travel as poses alone: their length is the activation.
    """

    poses: Tensor
    activations: Tensor


def capsule_lengths(poses: Tensor) -> Tensor:
    """Compute the length of each capsule, (..., D) → (...); the gradient at a zero capsule is 0."""
    return torch.linalg.vector_norm(poses, dim=-1)
