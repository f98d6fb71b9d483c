"""The embedded data set: handwritten digits that need neither a network nor a file."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tritoncaps.data.sets import Dataset, DatasetError, ImageSet, stratified_quotas

TEST_COUNT = 360


def load_digits(note: str = "") -> Dataset:
    """Load the UCI handwritten digits that scikit-learn brings along, laid out like MNIST.

    1,797 real digits of 8×8 pixels with 17 grey levels, enlarged to 20×20 and padded to 28×28. A
    fifth of each class, evenly spaced over the file, is the test set: no seed has a part in it.
    The two sets share their writers, so that a test on it says nothing about an unknown hand.

    Args:
        note: the note of the data set, where there is more to say than what it is.

    Raises:
        DatasetError: scikit-learn cannot be imported.
    """
    try:
        from sklearn.datasets import load_digits as load_sklearn_digits
    except ImportError as error:
        raise DatasetError(
            "the embedded digits are scikit-learn's, which cannot be imported "
            f'({error}): pip install "tritoncaps[train]"'
        ) from error
    source = load_sklearn_digits()
    labels = torch.as_tensor(source.target, dtype=torch.int64)
    digits = ImageSet(_like_mnist(torch.as_tensor(source.images, dtype=torch.float32)), labels)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in enumerate(stratified_quotas(labels, TEST_COUNT)):
        members = (labels == label).nonzero().squeeze(1)
        # The middles of `quota` equal stretches of the class.
        test[members[(2 * torch.arange(quota) + 1) * len(members) // (2 * quota)]] = True
    return Dataset(
        name="digits",
        title="scikit-learn's digits",
        train=digits.subset(~test),
        test=digits.subset(test),
        class_names=tuple("0123456789"),
        note=note or f"scikit-learn's {len(labels):,} embedded 8x8 digits, enlarged to 28x28",
    )


def _like_mnist(images: Tensor) -> Tensor:
    """Make 28×28 bytes of 8×8 grey levels 0 .. 16: shape (N, 8, 8) → (N, 1, 28, 28)."""
    enlarged = F.interpolate(rearrange(images, "n h w -> n 1 h w"), size=(20, 20), mode="bicubic")
    # Bicubic interpolation overshoots beside an edge.
    pixels = (enlarged.clamp(0, 16) * (255 / 16)).round().to(torch.uint8)
    return F.pad(pixels, (4, 4, 4, 4))
