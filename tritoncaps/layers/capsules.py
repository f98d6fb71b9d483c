"""What travels between layers: capsules, each with a pose and an activation."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple


class Capsules(NamedTuple):
    """Poses and activations, for layers that need both.

    `activations` (B, N), in [0, 1], say whether the entity of each capsule is present. `poses`
    (B, N, ...) say how. For a grid of capsules, N stands for the axes H, W, C. Vector capsules need
    only poses, for their length is the activation.
    """

    poses: Tensor
    activations: Tensor


# torch.export writes a module's inputs and outputs by the names of their types.
_register_namedtuple(Capsules, serialized_type_name="tritoncaps.Capsules")


def capsule_lengths(poses: Tensor) -> Tensor:
    """Compute the length of each capsule, (..., D) → (...). A zero capsule has gradient 0.

    Example:
        >>> capsule_lengths(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([5., 0.])
    """
    return torch.linalg.vector_norm(poses, dim=-1)
