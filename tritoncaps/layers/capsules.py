"""What travels between layers: capsules, with a pose and an activation each."""

from typing import NamedTuple

import torch
from torch import Tensor


class Capsules(NamedTuple):
    """Capsules of layers that need both: `poses` (B, N, ...) and `activations` (B, N) in [0, 1].

    A vector capsule needs no activation of its own: its length says how present it is.
    """

    poses: Tensor
    activations: Tensor


def capsule_lengths(poses: Tensor) -> Tensor:
    """Compute the length of each capsule, (..., D) → (...); the gradient at a zero capsule is 0."""
    return torch.linalg.vector_norm(poses, dim=-1)
