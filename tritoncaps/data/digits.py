"""Handwritten digits that need neither a network nor a file."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tritoncaps.data.sets import DatasetError, ImageSet, stratified_quotas

TEST_COUNT = 360


def read_digits() -> tuple[ImageSet, ImageSet]:
    """Read the UCI handwritten digits that scikit-learn contains, laid out like MNIST.

    There are 1,797 real digits of 8×8 pixels with 17 grey levels. They are enlarged to 20×20 and
    padded to 28×28. The test set is a fifth of each class, evenly spaced over the file. It does not
    depend on a seed. Both sets come from the same writers, so a test says nothing about an unknown
    hand.

    Returns:
        The training set, 1,437 images, and the test set, 360.

    Raises:
        DatasetError: scikit-learn cannot be imported.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError(
            "the embedded digits are scikit-learn's, which cannot be imported "
            f'({error}): pip install "tritoncaps[train]"'
        ) from error
    source = load_digits()
    labels = torch.as_tensor(source.target, dtype=torch.int64)
    digits = ImageSet(_like_mnist(torch.as_tensor(source.images, dtype=torch.float32)), labels)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in enumerate(stratified_quotas(labels, TEST_COUNT)):
        members = (labels == label).nonzero().squeeze(1)
        # The middles of `quota` equal stretches of the class.
        test[members[(2 * torch.arange(quota) + 1) * len(members) // (2 * quota)]] = True
    return digits.subset(~test), digits.subset(test)


def _like_mnist(images: Tensor) -> Tensor:
    """Turn 8×8 grey levels 0 .. 16, (N, 8, 8), into 28×28 bytes, (N, 1, 28, 28)."""
    enlarged = F.interpolate(rearrange(images, "n h w -> n 1 h w"), size=(20, 20), mode="bicubic")
    # Bicubic interpolation overshoots next to an edge.
    pixels = (enlarged.clamp(0, 16) * (255 / 16)).round().to(torch.uint8)
    return F.pad(pixels, (4, 4, 4, 4))
