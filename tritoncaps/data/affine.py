"""Digits under random affine maps: what affNIST tests, made from digits that are at hand.

These are not the images of affNIST, so results on them are not its results.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tritoncaps._checks import check_size
from tritoncaps.data.digits import read_digits
from tritoncaps.data.files import DataFile
from tritoncaps.data.idx import read_idx
from tritoncaps.data.sets import DatasetError, ImageSet

# Those of affNIST: degrees, shear, and the scale of each axis.
ROTATION = 20.0
SHEAR = 0.2
SCALES = (0.8, 1.2)

SIDE = 40
_TEST_SEED = 0
# Images are transformed in parts, which keeps the memory small.
_PART = 1000


def affine_images(images: ImageSet, seed: int, side: int = SIDE) -> ImageSet:
    """Map each image by a random affine map onto a larger black square.

    Rotation is uniform in ±20°, shear in ±0.2, and the scale of each axis in 0.8 .. 1.2. The place
    is uniform among those where everything that is not black stays inside. If it does not fit, it
    is in the middle. Pixels are interpolated bilinearly.

    Args:
        images: the images to map, (N, C, H, W).
        seed: decides the maps. The global random state is neither read nor changed.
        side: height and width of the results, in pixels.

    Returns:
        Images of the same labels, (N, C, side, side), on the device of `images`.

    Raises:
        ValueError: `side` is less than 1.

    Example:
        >>> from tritoncaps.data import load_dataset
        >>> digits = load_dataset("digits").test
        >>> affine_images(digits, seed=1).images.shape
        torch.Size([360, 1, 40, 40])

    Tieleman: affNIST (2013), https://www.cs.toronto.edu/~tijmen/affNIST/
    """
    check_size("affine_images", "side", side)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand((len(images), 6), generator=generator, dtype=torch.float64)
    parts = [
        _mapped(pixels, numbers, side)
        for pixels, numbers in zip(images.images.split(_PART), drawn.split(_PART), strict=True)
        if len(pixels)
    ]
    empty = images.images.new_zeros((0, images.images.shape[1], side, side))
    return ImageSet(torch.cat([empty, *parts]), images.labels.clone())


def read_affine_mnist(
    folder: Path, files: Sequence[DataFile], num_classes: int, verify: bool
) -> tuple[ImageSet, ImageSet]:
    """Read MNIST by `read_idx`. The training set is upright on 40×40, the test set is mapped.

    Raises:
        DatasetError: as `read_idx`, or unverified images are larger than 40×40.
    """
    train, test = read_idx(folder, files, num_classes, verify)
    height, width = train.images.shape[2:]
    if max(height, width) > SIDE:
        raise DatasetError(
            f"{folder}: the images are {height}x{width}, but they must fit into {SIDE}x{SIDE}. "
            "Put smaller ones there, or call affine_images with a larger side."
        )
    return _padded_and_mapped(train, test)


def read_affine_digits() -> tuple[ImageSet, ImageSet]:
    """Make the same of the digits of `read_digits`."""
    return _padded_and_mapped(*read_digits())


def _padded_and_mapped(train: ImageSet, test: ImageSet) -> tuple[ImageSet, ImageSet]:
    height, width = train.images.shape[2:]
    left, top = (SIDE - width) // 2, (SIDE - height) // 2
    room = (left, SIDE - width - left, top, SIDE - height - top)
    return ImageSet(F.pad(train.images, room), train.labels), affine_images(test, _TEST_SEED)


def _mapped(pixels: Tensor, drawn: Tensor, side: int) -> Tensor:
    """Map images, (N, C, H, W), by maps that six numbers in 0 .. 1 decide."""
    angle, shear = (math.radians(ROTATION) * _signed(drawn[:, 0]), SHEAR * _signed(drawn[:, 1]))
    scales = SCALES[0] + (SCALES[1] - SCALES[0]) * drawn[:, 2:4]
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    slant = torch.eye(2, dtype=drawn.dtype).repeat(len(drawn), 1, 1)
    slant[:, 0, 1] = shear
    forward = rotation @ slant @ torch.diag_embed(scales)
    corners = forward @ _corners(pixels).cpu()  # (N, 2, 4), in pixels from the middle
    lowest, highest = corners.amin(dim=2), corners.amax(dim=2)
    # The middle of the result is where that of the image goes, moved by `shift`.
    least, most = -side / 2 - lowest, side / 2 - highest
    shift = least + (most - least) * drawn[:, 4:6]
    shift = torch.where(most < least, -(lowest + highest) / 2, shift)
    # A pixel of the result is fetched from A⁻¹ (x - shift).
    backward = torch.linalg.inv(forward)
    height, width = pixels.shape[2:]
    half = torch.tensor([width / 2, height / 2], dtype=drawn.dtype)[:, None]
    offset = -(backward @ shift[:, :, None]) / half
    theta = torch.cat([backward * (side / 2) / half, offset], dim=2).float().to(pixels.device)
    size = (*pixels.shape[:2], side, side)
    grid = F.affine_grid(theta, list(size), align_corners=False)
    return F.grid_sample(pixels.float(), grid, align_corners=False).round().to(torch.uint8)


def _signed(drawn: Tensor) -> Tensor:
    return 2 * drawn - 1


def _corners(pixels: Tensor) -> Tensor:
    """Return the corners (x, y) of the box of all that is not black, (N, 2, 4), from the middle."""
    ink = pixels.amax(dim=1) > 0
    boxes = []
    for axis, size in ((1, pixels.shape[3]), (2, pixels.shape[2])):
        along = ink.any(dim=axis)
        numbers = torch.arange(size, device=pixels.device)
        first = torch.where(along, numbers, size).amin(dim=1)
        last = torch.where(along, numbers + 1, 0).amax(dim=1)
        is_black = first > last
        boxes.append([torch.where(is_black, size / 2, end) - size / 2 for end in (first, last)])
    (left, right), (top, bottom) = boxes
    x = torch.stack([left, right, left, right], dim=1)
    y = torch.stack([top, top, bottom, bottom], dim=1)
    return torch.stack([x, y], dim=1).double()
