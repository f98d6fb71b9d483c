"""The patches of a convolution, cut for a few images at a time.

They are (K / S)² times as large as the grid, so no more than a few images' exist at once. The
backward cuts them again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tritoncaps._patches import add_patches, patches, positions
from tritoncaps._torch_path._precision import accumulation_dtype
from tritoncaps._torch_path._slices import slices


class Images:
    """The images of a grid, (B, H, W, C, ...), as slices, and the K×K patches of each.

    `size` is (H', W'), the positions of the kernel.
    """

    def __init__(self, grid: Tensor, kernel_size: int, stride: int) -> None:
        B, H, W = grid.shape[:3]
        self._kernel_size, self._stride = kernel_size, stride
        self.size = [positions(side, kernel_size, stride) for side in (H, W)]
        patch = kernel_size**2 * grid.shape[3:].numel() * grid.element_size()
        # Twice as many as fit the cache: a routing reads them few at a time, and calls cost time.
        bytes_each = self.size[0] * self.size[1] * patch // 2
        # Without images, one call makes the empty results.
        self.slices = slices(B, bytes_each, grid.device) or [slice(0, 0)]
        self._shape = (B, *self.size)

    def patches(self, grid: Tensor, images: slice) -> Tensor:
        """The patches of some images, (rows, K·K·C, ...)."""
        return patches(grid[images], self._kernel_size, self._stride)

    def add(self, grads: Tensor, out: Tensor, images: slice) -> None:
        """Add the gradients of patches to those of a grid."""
        add_patches(grads, out[images], self._kernel_size, self._stride)

    def routed(
        self, route: Callable[[slice], tuple[Tensor, ...]], axes: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """Route each slice of images, and join the results.

        `axes` say which axis of each result the rows are. There it becomes (B, H', W'). A result of
        one axis was not asked for, and is empty.
        """
        parts = [route(images) for images in self.slices]
        joined = parts[0]
        if len(parts) > 1:
            joined = tuple(map(torch.cat, zip(*parts, strict=True), axes))
        return tuple(
            result if result.ndim == 1 else result.unflatten(axis, self._shape)
            for axis, result in zip(axes, joined, strict=True)
        )


class Gradients:
    """The gradients of tensors, or of None, added up over the images in the accumulation type."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self._dtypes = [None if x is None else x.dtype for x in tensors]
        self._sums = [
            None
            if x is None
            else torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device)
            for x in tensors
        ]

    def __getitem__(self, index: int) -> Any:
        """A sum, to be added to."""
        return self._sums[index]

    def add(self, first: int, grads: Sequence[Tensor | None]) -> None:
        """Add to the tensors from `first` on. The gradients may have fewer axes."""
        for total, grad in zip(self._sums[first:], grads, strict=True):
            if total is not None and grad is not None:
                total += grad.view(total.shape)

    def lowered(self) -> tuple[Any, ...]:
        """The gradients in the types of the tensors."""
        pairs = zip(self._sums, self._dtypes, strict=True)
        return tuple(None if total is None else total.to(dtype) for total, dtype in pairs)
