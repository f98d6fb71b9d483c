"""Batches of overlapping images: two images of different classes, one on top of the other."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tritoncaps._checks import check_size
from tritoncaps.data.batches import _check_max_shift, _epoch_generator, _shift, to_float
from tritoncaps.data.sets import ImageSet


class Originals(NamedTuple):
    """The two images that an overlay was made from.

    They are ordered by class, because an overlay has no first or second image.

    `images`: float32 in [0, 1], shifted as in the overlay, shape (B, 2, C, H, W).
    `labels`: class indices, ascending, shape (B, 2).
    """

    images: Tensor
    labels: Tensor


class Overlays:
    """Batches of overlays, epoch by epoch: each image of a set once, with one of another class.

    An overlay is the sum of its two images, clipped at full white. The partner of an image is drawn
    from all images of the other classes with equal probability. Overlay `index` of an epoch depends
    only on the seed, the epoch and the index. So does the order. As in `Batches`, both are drawn on
    the CPU, and an epoch resumed in the middle continues exactly as if it had not been interrupted.

    Args:
        images: the set to draw from, with at least two classes. Batches are made on its device.
        batch_size: overlays in a batch. The last batch of an epoch may be smaller.
        seed: determines the partners, the shifts and the order, together with the number of the
            epoch.
        shuffle: use a new order in every epoch instead of the order of the set.
        padding: black pixels added to each side of every image before it is shifted.
        max_shift: shift each of the two images by up to this many pixels, independently. If
            `padding` is at least as large, no pixel is lost.

    Raises:
        ValueError: there are fewer than two classes, or a size is out of range.

    Example:
        >>> labels = torch.arange(10).repeat(10)
        >>> train = ImageSet(torch.zeros(100, 1, 28, 28, dtype=torch.uint8), labels)
        >>> overlays = Overlays(train, batch_size=32, seed=1, padding=4, max_shift=4)
        >>> images, originals = next(overlays.epoch(0))
        >>> images.shape, originals.images.shape, originals.labels.shape
        (torch.Size([32, 1, 36, 36]), torch.Size([32, 2, 1, 36, 36]), torch.Size([32, 2]))

    padding=4 and max_shift=4 give MultiMNIST as in Sabour, Frosst, Hinton: Dynamic Routing Between
    Capsules (2017), section 6.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        padding: int = 0,
        max_shift: int = 0,
    ) -> None:
        check_size("Overlays", "batch_size", batch_size)
        _check_max_shift("Overlays", max_shift)
        if padding < 0:
            raise ValueError(f"Overlays: padding must be >= 0, got {padding}")
        classes = int((images.labels.bincount() > 0).sum()) if len(images) else 0
        if classes < 2:
            raise ValueError(
                f"Overlays: an overlay needs two classes, but the {len(images)} images have "
                f"{classes}"
            )
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.padding = padding
        self.max_shift = max_shift
        # Arranged in a ring, sorted by class, the images of all other classes are one arc.
        labels = images.labels.cpu()
        self._by_class = torch.sort(labels, stable=True).indices
        sizes = labels.bincount()
        self._own_count = sizes[labels]
        self._own_end = sizes.cumsum(0)[labels]

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-len(self.images) // self.batch_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of an overlay, (C, H, W)."""
        channels, height, width = self.images.images.shape[1:]
        return channels, height + 2 * self.padding, width + 2 * self.padding

    def pairs(self, epoch: int) -> Tensor:
        """Return the indices of the two images of each overlay, shape (N, 2), on the CPU.

        Row `index` contains `index` itself. The two indices are ordered by class.
        """
        return self._draw(epoch)[0]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Originals]]:
        """Iterate over the batches of an epoch, from batch number `start` on.

        Args:
            epoch: number of the epoch.
            start: number of the first batch. With `len(self)`, no batch is left.

        Returns:
            Pairs of overlays, float32 in [0, 1], shape (B, C, H, W), and their `Originals`.

        Raises:
            ValueError: the epoch has no batch `start`.
        """
        if not 0 <= start <= len(self):
            raise ValueError(
                f"Overlays: start={start} is not in 0 .. {len(self)} (batches an epoch)"
            )
        return self._iterate(epoch, start)

    def _iterate(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Originals]]:
        device = self.images.labels.device
        # Copied to the device once.
        pairs, offsets, order = (drawn.to(device) for drawn in self._draw(epoch))
        for batch in range(start, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self._overlay(pairs[chosen], offsets[chosen])

    def _overlay(self, pairs: Tensor, offsets: Tensor) -> tuple[Tensor, Originals]:
        """Lay pairs (B, 2) of images over each other, shifted by offsets (B, 2, 2)."""
        both = self.images.images[pairs.flatten()]
        both = _shift(F.pad(both, (self.padding,) * 4), offsets.flatten(0, 1), self.max_shift)
        both = rearrange(both, "(b two) c h w -> b two c h w", two=2)
        first, second = both.unbind(1)
        # The sum, clipped at 255 before it can overflow uint8.
        overlay = first + torch.minimum(second, 255 - first)
        return to_float(overlay), Originals(to_float(both), self.images.labels[pairs])

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the pairs (N, 2), offsets (N, 2, 2) and order (N,) of an epoch, on the CPU."""
        generator = _epoch_generator(self.seed, epoch)
        count = len(self.images)
        # On the ring, the count − own images of the other classes follow those of the own class.
        others = count - self._own_count
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        step = torch.minimum((uniform * others).long(), others - 1)
        partner = self._by_class[(self._own_end + step) % count]
        labels = self.images.labels.cpu()
        both = torch.stack([torch.arange(count), partner], dim=1)
        ascending = (labels < labels[partner]).unsqueeze(1)
        pairs = torch.where(ascending, both, both.flip(1))
        offsets = torch.randint(2 * self.max_shift + 1, (count, 2, 2), generator=generator)
        # Drawn last, so that shuffling does not change the overlays themselves.
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        return pairs, offsets, order
