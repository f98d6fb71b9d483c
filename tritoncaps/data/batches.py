"""Batches of a set that is already on the device, each image moved on its own."""

import hashlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tritoncaps._checks import check_not_negative, check_size
from tritoncaps.data.sets import ImageSet


def to_float(images: Tensor) -> Tensor:
    """Map uint8 pixels 0 .. 255 to float32 in [0, 1].

    Nothing is standardised: a decoder that ends in a sigmoid can only reconstruct images in [0, 1].
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"to_float: images must be torch.uint8, got {images.dtype}")
    # CUDA replaces a division by a constant with a product, but a CPU does not. Written as a
    # product, it gives the same bits on both. 255 becomes exactly 1.
    return images.to(torch.float32) * (1 / 255)


def random_shift(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Shift each image by a random number of whole pixels, up to `max_shift` in each direction.

    Pixels that leave the image are lost, zeros come in, and nothing wraps around.

    Args:
        images: any dtype, shape (B, C, H, W).
        max_shift: the largest shift along each of the two axes, ≥ 0.
        generator: draws the shifts. It need not be on the device of the images.

    Returns:
        The shifted images, shape (B, C, H, W), in the dtype of `images`.

    Raises:
        TypeError: `max_shift` is not an int.
        ValueError: `images` does not have 4 axes, or `max_shift` is negative.

    Example:
        >>> generator = torch.Generator().manual_seed(1)
        >>> random_shift(torch.ones(3, 1, 28, 28), 2, generator).shape
        torch.Size([3, 1, 28, 28])
    """
    _check_max_shift("random_shift", max_shift)
    if images.ndim != 4:
        raise ValueError(f"random_shift: images must have 4 axes (B, C, H, W), got {images.ndim}")
    offsets = _draw_offsets(len(images), max_shift, generator)
    return _shift(images, offsets.to(images.device), max_shift)


def rotated_and_scaled(images: Tensor, angle: Tensor, factor: Tensor) -> Tensor:
    """Rotate and enlarge each image about its centre, with linear interpolation between pixels.

    Args:
        images: float, in [0, 1], shape (B, C, H, W). Black comes in.
        angle: radians, anticlockwise, shape (B,).
        factor: above 1 enlarges, shape (B,).

    Example:
        >>> images = torch.rand(2, 1, 28, 28)
        >>> rotated_and_scaled(images, torch.tensor([0.0, 3.1]), torch.tensor([1.1, 1.0])).shape
        torch.Size([2, 1, 28, 28])
    """
    height, width = images.shape[2:]
    # The map gives where a pixel comes from. Angles are measured in pixels, so they are right for
    # any aspect ratio.
    cos, sin = angle.cos() / factor, angle.sin() / factor
    none = torch.zeros_like(cos)
    rows = [cos, -sin * height / width, none], [sin * width / height, cos, none]
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1).to(images)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # Rounding must leave nothing outside [0, 1].
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False).clamp(0, 1)


class Batches:
    """The batches of an `ImageSet`, epoch by epoch.

    The order and the moves of an epoch depend only on the seed and the number of the epoch, and
    are drawn on the CPU. So they are the same on every device, and no random state has to be saved.
    An epoch resumed in the middle continues exactly as if it had not been interrupted.

    Args:
        images: the set to draw from. Batches are made on its device.
        batch_size: images in a batch. The last batch of an epoch may be smaller.
        seed: determines the order and the moves, together with the number of the epoch.
        shuffle: use a new order in every epoch instead of the order of the set.
        max_shift: shift each image by up to this many pixels. See `random_shift`.
        drop_last: leave out a last batch that is not full.
        rotation: rotate each image by a normal random angle with this standard deviation, in
            degrees.
        scaling: enlarge or shrink each image by a factor exp(x), where x is normal with this
            standard deviation.
        crop: cut this many pixels a side out of the middle. A shift brings in what lies around
            them, and zeros only beyond the image.

    Raises:
        TypeError, ValueError: a size is not an int, a standard deviation is not a number, or one of
            them is out of range.

    Example:
        >>> labels = torch.arange(10).repeat(10)
        >>> train = ImageSet(torch.zeros(100, 1, 28, 28, dtype=torch.uint8), labels)
        >>> batches = Batches(train, batch_size=32, seed=1, max_shift=2)
        >>> [len(labels) for images, labels in batches.epoch(0)]
        [32, 32, 32, 4]
        >>> [len(labels) for images, labels in batches.epoch(0, start=2)]
        [32, 4]
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        max_shift: int = 0,
        drop_last: bool = False,
        rotation: float = 0.0,
        scaling: float = 0.0,
        crop: int | None = None,
    ) -> None:
        check_size("Batches", "batch_size", batch_size)
        if crop is not None:
            check_size("Batches", "crop", crop)
            height, width = images.images.shape[2:]
            if crop > min(height, width):
                raise ValueError(
                    f"Batches: crop={crop}, but the images are {height}x{width}; "
                    f"give at most {min(height, width)}"
                )
        _check_max_shift("Batches", max_shift)
        check_not_negative("Batches", "rotation", rotation)
        check_not_negative("Batches", "scaling", scaling)
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.max_shift = max_shift
        self.drop_last = drop_last
        self.rotation = rotation
        self.scaling = scaling
        self.crop = crop

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        if self.drop_last:
            return len(self.images) // self.batch_size
        return -(-len(self.images) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of an epoch, from batch number `start` on.

        Args:
            epoch: number of the epoch.
            start: number of the first batch. With `len(self)`, no batch is left.

        Returns:
            Pairs of images, float32 in [0, 1], shape (B, C, H, W), and labels, shape (B,).

        Raises:
            ValueError: the epoch has no batch `start`.
        """
        if not 0 <= start <= len(self):
            raise ValueError(
                f"Batches: start={start} is not in 0 .. {len(self)} (batches an epoch)"
            )
        return self._iterate(epoch, start)

    def _iterate(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        # All is drawn for the whole epoch, wherever it starts, and copied to the device once.
        generator = _epoch_generator(self.seed, epoch)
        count, device = len(self.images), self.images.labels.device
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        offsets = _draw_offsets(count, self.max_shift, generator).to(device)
        order = order.to(device)
        is_turned = self.rotation > 0 or self.scaling > 0
        if is_turned:
            turns = torch.randn(2, count, generator=generator)
            angles = (turns[0] * math.radians(self.rotation)).to(device)
            factors = (turns[1] * self.scaling).exp().to(device)
        for batch in range(start, len(self)):
            part = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            chosen = order[part]
            # Shift as uint8, a quarter of the bytes of float32.
            images = self.images.images[chosen]
            images = _shift(images, offsets[part], self.max_shift, self.crop)
            images = to_float(images)
            if is_turned:
                images = rotated_and_scaled(images, angles[part], factors[part])
            yield images, self.images.labels[chosen]


def _check_max_shift(function: str, max_shift: object) -> None:
    if not isinstance(max_shift, int) or isinstance(max_shift, bool):
        raise TypeError(f"{function}: max_shift must be an int, got {type(max_shift).__name__}")
    if max_shift < 0:
        raise ValueError(f"{function}: max_shift must be >= 0, got {max_shift}")


def _epoch_generator(seed: int, epoch: int) -> torch.Generator:
    # With seed + epoch, the second epoch of one seed would repeat the first of the next seed.
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def _draw_offsets(count: int, max_shift: int, generator: torch.Generator) -> Tensor:
    """Draw where each window starts in its padded image: (count, 2), in 0 .. 2·max_shift."""
    return torch.randint(
        2 * max_shift + 1, (count, 2), generator=generator, device=generator.device
    )


def _shift(images: Tensor, offsets: Tensor, max_shift: int, crop: int | None = None) -> Tensor:
    if max_shift == 0 and crop is None:
        return images
    B, _, H, W = images.shape
    height, width = (H, W) if crop is None else (crop, crop)
    top, left = (H - height) // 2, (W - width) // 2
    bottom, right = H - height - top, W - width - left
    # What is negative cuts off.
    margins = [max_shift - margin for margin in (left, right, top, bottom)]
    padded = F.pad(images, margins)
    # A view of all windows of this size: (B, C, 2·max_shift+1, 2·max_shift+1, height, width).
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    each = torch.arange(B, device=images.device)
    return windows[each, :, offsets[:, 0], offsets[:, 1]]
