"""Grids of capsules, (B, H, W, C, ...), and the patches of them that a convolution sees.

A grid holds C capsules at each of H×W positions. "..." stands for the axes of a capsule, or for
none, as with activations.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from tritoncaps import _checks
from tritoncaps._tracing import one_node


def check_convolution(function: str, stride: object, padding: object) -> None:
    """Raise TypeError or ValueError, unless stride is an int >= 1 and padding an int >= 0."""
    _checks.check_size(function, "stride", stride)
    _checks.check_size(function, "padding", padding, smallest=0)


def positions(side: int, kernel_size: int, stride: int) -> int:
    """Return the number of positions of a kernel along an axis of a grid, without padding."""
    return (side - kernel_size) // stride + 1


def output_size(
    function: str, size: Sequence[int], kernel_size: int, stride: int, padding: int
) -> tuple[int, int]:
    """Return (H', W'), the positions of a kernel on a grid of `size` = (H, W).

    Raises:
        ValueError: the kernel is larger than the padded grid.
    """
    height, width = size
    if min(height, width) + 2 * padding < kernel_size:
        raise ValueError(
            f"{function}: the kernel, {kernel_size}x{kernel_size}, is larger than the grid, "
            f"{height}x{width} with padding={padding}; use a smaller kernel or more padding"
        )
    rows, columns = (positions(side + 2 * padding, kernel_size, stride) for side in size)
    return rows, columns


def pad(grid: Tensor, padding: int) -> Tensor:
    """Add `padding` positions of zeros on all four sides of a grid, (B, H, W, C, ...)."""
    if padding == 0:
        return grid
    inner = (0, 0) * (grid.ndim - 3)
    return F.pad(grid, (*inner, padding, padding, padding, padding))


@one_node
def patches(grid: Tensor, kernel_size: int | tuple[int, int], stride: int = 1) -> Tensor:
    """Cut a grid into patches; (B, H, W, C, ...) → (B·H'·W', K·K·C, ...).

    The first axis is ordered by image, row, column. The second is ordered by row and column in the
    patch, then type. The backward sums in a fixed order.
    """
    return _windows(grid, kernel_size, stride, at=3).flatten(0, 2).flatten(1, 3)


def add_patches(grads: Tensor, out: Tensor, kernel_size: int, stride: int) -> None:
    """Add gradients of patches, (B·H'·W', K·K·C, ...), to those of the grid, (B, H, W, C, ...).

    The order of additions is fixed, by the place in the patch.
    """
    K = kernel_size
    rows, columns = (positions(side, K, stride) for side in out.shape[1:3])
    places = grads.view(len(out), rows, columns, K, K, *out.shape[3:])
    for ky, kx in product(range(K), repeat=2):
        inside = (
            slice(first, first + (count - 1) * stride + 1, stride)
            for first, count in ((ky, rows), (kx, columns))
        )
        out[(slice(None), *inside)] += places[:, :, :, ky, kx]


@one_node
def patches_by_type(grid: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Cut a grid, and join the patch of each type to one capsule; → (B·H'·W', C, K·K·P).

    The grid is (B, H, W, C, P). The last axis is ordered by row and column in the patch, then P.
    """
    return _windows(grid, kernel_size, stride, at=4).flatten(0, 2).flatten(2, 4)


def _windows(grid: Tensor, kernel_size: int | tuple[int, int], stride: int, at: int) -> Tensor:
    """Copy the windows of a grid, (B, H', W', ...), with the axes of the kernel as `at` and `at`+1.

    It stacks K slices of the rows, and K slices of the columns of these. `Tensor.unfold` makes a
    view instead of the first copy. On a CPU its backward takes two to three times as long.
    """
    sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    for axis, side in enumerate(sides, start=1):
        all_before = (slice(None),) * axis
        parts = [
            grid[(*all_before, slice(first, first - side + 1 or None, stride))]
            for first in range(side)
        ]
        grid = torch.stack(parts, dim=at + axis - 1)
    return grid
