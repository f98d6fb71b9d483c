"""Windows of images, for tests of a network that was trained on random ones."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from tritoncaps._checks import check_size
from tritoncaps.data.sets import AnySet


def centre_crop(images: AnySet, side: int) -> AnySet:
    """Cut a square out of the middle of each image of a set.

    Args:
        images: the set, with images (N, C, H, W).
        side: the side of the square, in pixels. 0 keeps whole images.

    Raises:
        TypeError: `side` is not an int.
        ValueError: the images are smaller than `side`, or it is negative.

    Example:
        >>> import torch
        >>> from tritoncaps.data import ImageSet
        >>> images = torch.zeros(3, 2, 48, 48, dtype=torch.uint8)
        >>> centre_crop(ImageSet(images, torch.tensor([0, 1, 2])), 32)
        ImageSet(N=3, C=2, H=32, W=32, device='cpu')
    """
    check_size("centre_crop", "side", side, smallest=0)
    if side == 0:
        return images
    _check_fits("centre_crop", side, images.images)
    (window,) = crops(images.images, side, 1)
    return replace(images, images=window.contiguous())


def crops(images: Tensor, side: int, count: int, reach: int | None = None) -> Iterator[Tensor]:
    """Cut count × count windows out of each image, evenly spread about the middle.

    A network that was trained on random windows can be tested on the average of several. With
    `reach`, those at the edge are so many pixels from the middle one, as the training windows of
    `Batches(max_shift=reach)` are at most. One window is the middle.

    Args:
        images: shape (B, C, H, W).
        side: the side of a window, in pixels.
        count: windows along each axis.
        reach: pixels from the middle window to the outermost. The default, and the most, is as far
            as the images go.

    Returns:
        An iterator over views of `images`, shape (B, C, side, side), row by row.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is out of range, or the images are smaller than `side`.

    Example:
        >>> import torch
        >>> images = torch.rand(3, 2, 48, 48)
        >>> windows = list(crops(images, 32, 3))
        >>> len(windows), torch.equal(windows[4], images[:, :, 8:40, 8:40])
        (9, True)
    """
    check_size("crops", "side", side)
    check_size("crops", "count", count)
    if reach is not None:
        check_size("crops", "reach", reach, smallest=0)
    _check_fits("crops", side, images)
    rows, columns = (_starts(length - side, count, reach) for length in images.shape[-2:])
    return (
        images[..., row : row + side, column : column + side] for row in rows for column in columns
    )


def _check_fits(function: str, side: int, images: Tensor) -> None:
    height, width = images.shape[-2:]
    if side > min(height, width):
        raise ValueError(
            f"{function}: side={side}, but the images are {height}x{width}; give at most "
            f"{min(height, width)}"
        )


def _starts(margin: int, count: int, reach: int | None) -> list[int]:
    """Where windows start along one axis, if the margins on both sides add up to `margin`."""
    middle = margin // 2
    first = 0 if reach is None else max(middle - reach, 0)
    last = margin if reach is None else min(middle + reach, margin)
    if count == 1:
        return [middle]
    return [first + round(k * (last - first) / (count - 1)) for k in range(count)]
