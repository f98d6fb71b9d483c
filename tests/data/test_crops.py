"""Windows of images."""

import pytest
import torch

from tritoncaps.data import Batches, ImageSet, ViewSet, centre_crop, crops, to_float


def numbered(height: int, width: int) -> torch.Tensor:
    """One image in which every pixel has a value of its own."""
    return torch.arange(height * width).reshape(1, 1, height, width)


def starts(images, *args) -> list[tuple[int, int]]:
    """Where each window starts."""
    width = images.shape[-1]
    return [divmod(int(window[0, 0, 0, 0]), width) for window in crops(images, *args)]


def test_windows_spread_evenly_about_the_middle():
    images = numbered(48, 40)
    assert starts(images, 32, 1) == [(8, 4)]
    assert starts(images, 32, 2) == [(0, 0), (0, 8), (16, 0), (16, 8)]
    assert starts(images, 32, 3) == [(row, column) for row in (0, 8, 16) for column in (0, 4, 8)]
    assert starts(images, 32, 3, 2) == [(r, c) for r in (6, 8, 10) for c in (2, 4, 6)]
    # No window leaves the image.
    assert starts(images, 32, 2, 6) == [(2, 0), (2, 8), (14, 0), (14, 8)]
    assert starts(images, 32, 2, 0) == [(8, 4)] * 4
    assert {window.shape for window in crops(images, 32, 3)} == {(1, 1, 32, 32)}


@pytest.mark.parametrize("height", [7, 8])
def test_the_middle_is_the_one_that_batches_cut_out(height):
    images = torch.randint(256, (5, 2, height, 9), dtype=torch.uint8)
    whole = ImageSet(images, torch.arange(5))
    (cropped, _) = next(Batches(whole, 5, seed=1, shuffle=False, crop=4).epoch(0))
    assert torch.equal(to_float(centre_crop(whole, 4).images), cropped)


def test_a_cropped_set_keeps_everything_else():
    views = torch.arange(8).reshape(2, 4)
    whole = ViewSet(torch.zeros(2, 1, 6, 6, dtype=torch.uint8), torch.tensor([1, 0]), views)
    part = centre_crop(whole, 4)
    assert part.images.shape == (2, 1, 4, 4) and part.images.is_contiguous()
    assert part.views is views and part.labels is whole.labels
    assert centre_crop(whole, 0) is whole


def test_windows_that_are_not_there_are_refused():
    images = torch.zeros(2, 1, 6, 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match="crops: side=6, but the images are 6x5; give at most 5"):
        crops(images, 6, 1)
    with pytest.raises(ValueError, match="centre_crop: side=6, but the images are 6x5"):
        centre_crop(ImageSet(images, torch.tensor([0, 1])), 6)
    with pytest.raises(ValueError, match="centre_crop: side must be >= 0, got -1"):
        centre_crop(ImageSet(images, torch.tensor([0, 1])), -1)
    with pytest.raises(ValueError, match="crops: count must be >= 1, got 0"):
        crops(images, 2, 0)
    with pytest.raises(ValueError, match="crops: reach must be >= 0, got -1"):
        crops(images, 2, 1, -1)
    with pytest.raises(TypeError, match="crops: side must be an int, got float"):
        crops(images, 2.0, 1)
