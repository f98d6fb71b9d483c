"""What a data set is, and how to hold out a part of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from tritoncaps._checks import shape_of

# A set of images, of whichever class.
AnySet = TypeVar("AnySet", bound="ImageSet")


class DatasetError(RuntimeError):
    """A data set is missing or damaged. The message says which file, why, and what to do."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their labels, on one device.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: class indices, int64, shape (N,).

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape is wrong, or the two differ in length or device.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.labels.dtype != torch.int64:
            raise TypeError(
                "ImageSet: images must be torch.uint8 and labels torch.int64, "
                f"got {self.images.dtype} and {self.labels.dtype}"
            )
        shapes = f"(images: {shape_of(self.images)}, labels: {shape_of(self.labels)})"
        if self.images.ndim != 4 or self.labels.ndim != 1:
            raise ValueError(f"ImageSet: images must be (N, C, H, W) and labels (N,) {shapes}")
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"ImageSet: images has N={len(self.images)} but labels has N={len(self.labels)} "
                f"{shapes}"
            )
        if self.images.device != self.labels.device:
            raise ValueError(
                f"ImageSet: images is on {self.images.device} but labels is on {self.labels.device}"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __repr__(self) -> str:
        """Show shape and device, not the pixels."""
        N, C, H, W = self.images.shape
        name, device = type(self).__name__, str(self.images.device)
        return f"{name}(N={N}, C={C}, H={H}, W={W}, device={device!r})"

    def to(self: AnySet, device: torch.device | str) -> AnySet:
        """Return the set on `device`, without a copy if it is there already."""
        return self._map(lambda tensor: tensor.to(device))

    def subset(self: AnySet, indices: Tensor | Sequence[int]) -> AnySet:
        """Return a copy of the images at `indices`, in that order, or where a mask is true."""
        if not isinstance(indices, Tensor):
            indices = torch.tensor(indices, dtype=torch.int64)
        chosen = indices.to(self.labels.device)
        return self._map(lambda tensor: tensor[chosen])

    def _map(self: AnySet, change: Callable[[Tensor], Tensor]) -> AnySet:
        return type(self)(*(change(getattr(self, entry.name)) for entry in fields(self)))


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A training set, a test set, and a validation set if one is published with them.

    Args:
        name: its name for `load_dataset`, such as "mnist".
        title: its name as people read it, such as "MNIST".
        train: the training images. Where there is no validation set, `split_validation` takes one
            from them.
        test: the test images, the same for every seed.
        class_names: what each label stands for.
        note: one line that says which data set this is and why it was chosen.
        epochs: passes over `train` that a training script makes by default.
        validation: images to choose the best epoch by, or None.
        max_shift: the pixels by which a training script moves its training images by default.
        crop: the side of the windows that a training script cuts out by default, or 0 for whole
            images. See `Batches`.
    """

    name: str
    title: str
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    note: str
    epochs: int = 30
    validation: ImageSet | None = None
    max_shift: int = 2
    crop: int = 0

    def __repr__(self) -> str:
        """Show the sets and the number of classes, however many there are."""
        validation = f", validation={self.validation}" if self.validation is not None else ""
        return (
            f"Dataset({self.name!r}, {len(self.class_names)} classes, train={self.train}"
            f"{validation}, test={self.test})"
        )


def split_validation(
    train: AnySet, fraction_or_count: float | int, seed: int
) -> tuple[AnySet, AnySet]:
    """Split a training set into two parts with the same proportions of the classes.

    The split depends only on the labels and the seed. It neither reads nor changes the global
    random state. Both parts keep the order of the original.

    Args:
        train: the images to split.
        fraction_or_count: how much to hold out. A float in (0, 1) is a share of the images, an int
            is their number.
        seed: chooses the images within each class.

    Returns:
        The images to train on and those to validate on.

    Raises:
        TypeError: `fraction_or_count` is neither a float nor an int.
        ValueError: one of the two parts would be empty.

    Example:
        >>> labels = torch.arange(10).repeat(20)
        >>> train = ImageSet(torch.zeros(200, 1, 28, 28, dtype=torch.uint8), labels)
        >>> kept, held_out = split_validation(train, 0.1, seed=1)
        >>> len(kept), held_out.labels.bincount().tolist()
        (180, [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    if isinstance(fraction_or_count, bool) or not isinstance(fraction_or_count, (float, int)):
        raise TypeError(
            "split_validation: fraction_or_count must be a float or an int, "
            f"got {type(fraction_or_count).__name__}"
        )
    if not math.isfinite(fraction_or_count):
        raise ValueError(
            f"split_validation: fraction_or_count must be finite, got {fraction_or_count}"
        )
    is_share = isinstance(fraction_or_count, float)
    count = round(fraction_or_count * len(train)) if is_share else int(fraction_or_count)
    if not 0 < count < len(train):
        raise ValueError(
            f"split_validation: fraction_or_count={fraction_or_count} holds out {count} of "
            f"{len(train)} images, but both parts need at least one"
        )
    labels = train.labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in enumerate(stratified_quotas(labels, count)):
        members = (labels == label).nonzero().squeeze(1)
        chosen = torch.randperm(len(members), generator=generator)[:quota]
        held_out[members[chosen]] = True
    return train.subset(~held_out), train.subset(held_out)


def stratified_quotas(labels: Tensor, count: int) -> list[int]:
    """Divide `count` images among the classes in proportion to their sizes.

    Each class gets its share, rounded down. The remaining images go to the largest fractions. So
    the quotas add up to `count`, and each differs from its share by less than one.
    """
    shares = labels.bincount() * count
    quotas = shares // len(labels)
    left = count - int(quotas.sum())
    by_fraction = torch.sort(shares % len(labels), descending=True, stable=True).indices
    quotas[by_fraction[:left]] += 1
    return [int(quota) for quota in quotas]
