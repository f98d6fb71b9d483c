"""Affine poses of the plane: from six numbers, their product, their inverse."""

import math

import torch
from torch import Tensor

from tritoncaps import _checks
from tritoncaps._tracing import one_node

# The smallest scale of a pose.
_SMALLEST = 0.01


@one_node
def affine_pose(parameters: Tensor, *, similarity: bool = False) -> Tensor:
    """Turn six free numbers into an affine map of the plane that has an inverse.

    The numbers are two scales, an angle, a shear and a translation, before their nonlinearities:
    s = σ(·) + 0.01, θ = 2π·, and h, t_x, t_y = tanh(5·). The map is

        [[s_x cos θ + h s_y sin θ, −s_x sin θ + h s_y cos θ, t_x],
         [s_y sin θ,                s_y cos θ,               t_y]]

    and its determinant is s_x·s_y. A similarity has one scale and no shear:
    [[s cos θ, −s sin θ, t_x], [s sin θ, s cos θ, t_y]].

    Args:
        parameters: shape (..., 6).
        similarity: scale alike in all directions, with the first number. The second scale and the
            shear are not used.

    Returns:
        The maps, shape (..., 2, 3). The last column is the translation.

    Raises:
        TypeError: the parameters are not a floating-point tensor, or `similarity` is not a bool.
        ValueError: the last axis is not 6.

    Example:
        >>> import torch
        >>> affine_pose(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])).round(decimals=2)
        tensor([[0.5100, 0.0000, 0.0000],
                [0.0000, 0.5100, 1.0000]])

    The parametrisation of the authors' code for Kosiorek, Sabour, Teh, Hinton: Stacked Capsule
    Autoencoders (2019).
    """
    _checks.check_floating("affine_pose", "parameters", parameters)
    if parameters.ndim == 0 or parameters.shape[-1] != 6:
        raise ValueError(
            f"affine_pose: parameters must be (..., 6), got {_checks.shape_of(parameters)}"
        )
    _checks.check_flag("affine_pose", "similarity", similarity)
    scale_x, scale_y, angle, shear, x, y = parameters.unbind(-1)
    scale_x, scale_y = scale_x.sigmoid() + _SMALLEST, scale_y.sigmoid() + _SMALLEST
    shear, x, y = (torch.tanh(5 * number) for number in (shear, x, y))
    cos, sin = torch.cos(2 * math.pi * angle), torch.sin(2 * math.pi * angle)
    if similarity:
        first = [scale_x * cos, -scale_x * sin, x]
        second = [scale_x * sin, scale_x * cos, y]
    else:
        first = [
            scale_x * cos + shear * scale_y * sin,
            -scale_x * sin + shear * scale_y * cos,
            x,
        ]
        second = [scale_y * sin, scale_y * cos, y]
    return torch.stack(first + second, dim=-1).unflatten(-1, (2, 3))


def compose(first: Tensor, second: Tensor) -> Tensor:
    """The map that applies `second` and then `first`; both (..., 2, 3)."""
    linear = first[..., :2] @ second
    return torch.cat([linear[..., :2], linear[..., 2:] + first[..., 2:]], dim=-1)


def inverse(pose: Tensor) -> Tensor:
    """The inverse of maps (..., 2, 3)."""
    a, b, x, c, d, y = pose.flatten(-2).unbind(-1)
    determinant = a * d - b * c
    rows = [d, -b, b * y - d * x, -c, a, c * x - a * y]
    return (torch.stack(rows, dim=-1) / determinant.unsqueeze(-1)).unflatten(-1, (2, 3))
