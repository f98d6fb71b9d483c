"""A picture of one digit, made like the images of MNIST.

LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition (1998). The
digits are white on black. Each fills a box of 20×20 pixels, with its aspect ratio kept, and its
centre of mass is the middle of 28×28. A network that was trained on MNIST reads nothing else.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tritoncaps._checks import shape_of
from tritoncaps.data.image_pixels import read_image
from tritoncaps.data.sets import DatasetError

_SIDE, _BOX, _MIDDLE = 28, 20, 14
# The least difference between ink and paper, of 255.
_CONTRAST = 16


def read_digit(path: str | Path) -> Tensor:
    """Read a picture of one digit as MNIST would show it: (1, 28, 28), values in [0, 1].

    The ink may be dark or bright, on a plain or a transparent background. `prepare_digit` says what
    is done. Needs Pillow.

    Raises:
        DatasetError: the file is missing or no image, or the picture is blank.
    """
    path = Path(path).expanduser()
    try:
        pixels = read_image(path)
    except ModuleNotFoundError as error:
        raise DatasetError(
            f"images are read by Pillow, which cannot be imported ({error}): "
            'pip install "tritoncaps[train]"'
        ) from error
    try:
        try:
            return prepare_digit(pixels)
        except DatasetError:  # perhaps white ink on a transparent background
            return prepare_digit(read_image(path, paper="black"))
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error


def prepare_digit(pixels: Tensor) -> Tensor:
    """Turn a picture of one digit, (C, H, W) in 0 .. 255, into (1, 28, 28) in [0, 1].

    1. Colours become grey.
    2. Ink is what differs from the background, which is the median of the edge. What differs no
       more than the edge itself does is taken for paper.
    3. The box around the ink is scaled to 20×20, with its aspect ratio kept, and the strokes to
       full white.
    4. The centre of mass is moved to the middle of 28×28.

    An image of MNIST stays almost as it is.

    Raises:
        TypeError, ValueError: the pixels have the wrong type or shape.
        DatasetError: the picture is blank.

    Example:
        >>> paper = torch.full((1, 60, 40), 250, dtype=torch.uint8)
        >>> paper[:, 10:50, 18:22] = 30  # a one
        >>> digit = prepare_digit(paper)
        >>> digit.shape, int((digit[0] > 0.5).sum())  # 20 rows of 2
        (torch.Size([1, 28, 28]), 40)
    """
    if not isinstance(pixels, Tensor):
        raise TypeError(f"prepare_digit: pixels must be a Tensor, got {type(pixels).__name__}")
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(f"prepare_digit: pixels must be (1 or 3, H, W), got {shape_of(pixels)}")
    values = pixels.detach().to("cpu", torch.float32)
    if not values.isfinite().all():
        raise ValueError("prepare_digit: pixels must be finite")
    grey = values[0]
    if len(values) == 3:
        grey = (values * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0)
    ink = _ink(grey)
    rows, columns = (ink.amax(dim=axis).nonzero()[:, 0] for axis in (1, 0))
    box = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = _BOX / max(box.shape)
    size = [max(1, round(side * scale)) for side in box.shape]
    small = F.interpolate(box[None, None], size=size, mode="bilinear", antialias=True)[0, 0]
    # A thin stroke of a large picture has faded.
    small = (small / torch.quantile(small[small > 0], 0.9)).clamp(0, 1)
    mass = small.sum()
    digit = torch.zeros(1, _SIDE, _SIDE)
    place = []
    for axis, side in enumerate(small.shape):
        centre = (small.sum(dim=1 - axis) * torch.arange(side)).sum() / mass
        first = min(max(round(_MIDDLE - float(centre)), 0), _SIDE - side)
        place.append(slice(first, first + side))
    digit[0, place[0], place[1]] = small
    return digit


def _ink(grey: Tensor) -> Tensor:
    """Return how far each pixel differs from the background, 0 for paper."""
    width = max(1, min(grey.shape) // 20)
    inner = torch.zeros_like(grey, dtype=torch.bool)
    inner[width:-width, width:-width] = True
    background = grey[~inner].median()
    is_dark = background - grey.min() > grey.max() - background
    ink = (background - grey if is_dark else grey - background).clamp(min=0)
    most = ink.max()
    if most < _CONTRAST:
        raise DatasetError(
            f"the picture is blank: no pixel differs from its edge by {_CONTRAST} of 255"
        )
    edge = ink[~inner]
    # 98 of 100, because a stroke may touch the edge.
    noise = edge.kthvalue(max(1, round(0.98 * len(edge)))).values
    # The paper of a photo is uneven, that of MNIST is not.
    floor = (1.5 * noise).clamp(most / 3, most / 2) if noise > 0 else noise
    return ink.where(ink > floor, 0)
