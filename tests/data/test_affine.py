"""Digits under affine maps: every map keeps its bounds, and images stay upright and whole."""

import math
import os

import pytest
import torch
from image_sets import assert_same_set, idx_bytes, make_set, needs_mnist

from tritoncaps.data import DatasetError, ImageSet, affine, affine_images, load_dataset
from tritoncaps.data.files import DataFile


def square(size=8, channels=1, count=400):
    """A white square in the middle of 28×28 pixels."""
    images = torch.zeros(count, channels, 28, 28, dtype=torch.uint8)
    low = (28 - size) // 2
    images[..., low : low + size, low : low + size] = 255
    return ImageSet(images, torch.zeros(count, dtype=torch.int64))


def moments(images):
    """The mass of each image, and the mean and the covariance of x and y, in pixels."""
    pixels = images.images.sum(dim=1).double() / images.images.shape[1] / 255
    sides = (torch.arange(n, dtype=torch.float64) for n in pixels.shape[1:])
    y, x = torch.meshgrid(*sides, indexing="ij")
    mass = pixels.sum(dim=(1, 2))
    places = torch.stack([x, y])
    mean = (pixels[:, None] * places).sum(dim=(2, 3)) / mass[:, None]
    apart = places - mean[:, :, None, None]
    covariance = torch.einsum("nhw,nahw,nbhw->nab", pixels, apart, apart) / mass[:, None, None]
    return mass, mean, covariance


def test_areas_are_those_of_the_scales():
    mass, _, _ = moments(affine_images(square(), seed=1))
    areas = mass / 64
    assert 0.8**2 * 0.95 < areas.min() < 0.72 and 1.33 < areas.max() < 1.2**2 * 1.05


def test_maps_turn_and_slant_both_ways():
    # A bar along x: its direction is that of the first column of the map, the rotation alone.
    bar = torch.zeros(400, 1, 28, 28, dtype=torch.uint8)
    bar[:, :, 13:15, 4:24] = 255
    _, _, covariance = moments(affine_images(ImageSet(bar, square().labels), seed=1))
    angles = (
        0.5
        * torch.atan2(2 * covariance[:, 0, 1], covariance[:, 0, 0] - covariance[:, 1, 1]).rad2deg()
    )
    assert -21 < angles.min() < -18 and 18 < angles.max() < 21
    # A bar along y leans by the shear too.
    _, _, covariance = moments(
        affine_images(ImageSet(bar.transpose(2, 3).contiguous(), square().labels), seed=1)
    )
    leans = (covariance[:, 0, 1] / covariance[:, 1, 1]).abs()
    turned = math.tan(math.radians(20))
    assert turned + 0.05 < leans.max() < turned + 0.4


def test_everything_stays_inside_and_goes_everywhere():
    mapped = affine_images(square(size=24), seed=2)
    mass, mean, _ = moments(mapped)
    assert mass.min() > 0.8**2 * 24**2 * 0.97
    free = affine_images(square(size=4), seed=2)
    _, mean, _ = moments(free)
    assert mean.min() < 5 and mean.max() > 34
    assert (mean.mean(dim=0) - 19.5).abs().max() < 1.5


def test_what_does_not_fit_is_in_the_middle():
    _, mean, _ = moments(affine_images(square(size=28), seed=3, side=20))
    torch.testing.assert_close(mean, torch.full_like(mean, 9.5), atol=0.3, rtol=0)


def test_without_a_turn_a_scale_or_a_shear_an_image_is_moved_alone(monkeypatch):
    monkeypatch.setattr(affine, "ROTATION", 0.0)
    monkeypatch.setattr(affine, "SHEAR", 0.0)
    monkeypatch.setattr(affine, "SCALES", (1.0, 1.0))
    images = make_set(3, height=28, width=28)  # not symmetric, white to the border
    moved = affine_images(images, seed=4, side=28)
    assert_same_set(moved, images)


def test_maps_depend_on_the_seed_alone():
    images = square(count=1003)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = affine_images(images, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_set(affine_images(images, seed=5), first)
    assert not torch.equal(affine_images(images, seed=6).images, first.images)


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_channels_and_counts_are_kept_and_black_stays_black(count):
    black = ImageSet(torch.zeros(count, 3, 5, 7, dtype=torch.uint8), torch.arange(count))
    mapped = affine_images(black, seed=1, side=9)
    assert mapped.images.shape == (count, 3, 9, 9) and not mapped.images.any()
    assert torch.equal(mapped.labels, black.labels)


def test_a_side_is_checked():
    with pytest.raises(ValueError, match=r"affine_images: side must be >= 1, got 0"):
        affine_images(square(), seed=1, side=0)


def test_affine_digits_map_the_test_set_alone():
    plain, mapped = load_dataset("digits"), load_dataset("affine-digits")
    assert torch.equal(mapped.train.images[:, :, 6:34, 6:34], plain.train.images)
    assert mapped.train.images.double().sum() == plain.train.images.double().sum()
    assert torch.equal(mapped.test.labels, plain.test.labels)
    assert mapped.test.images.shape[1:] == (1, 40, 40)


def test_images_that_do_not_fit_are_refused(tmp_path):
    """Unverified files may hold larger images, which must not lose their border."""
    large = make_set(3, height=20, width=41)
    files = [DataFile(name, (3, 20, 41)[:axes]) for name, axes in (("images", 3), ("labels", 1))]
    (tmp_path / "images").write_bytes(idx_bytes(large.images.squeeze(1)))
    (tmp_path / "labels").write_bytes(idx_bytes(large.labels.byte()))
    with pytest.raises(DatasetError, match=f"^{tmp_path}: the images are 20x41, .* into 40x40"):
        affine.read_affine_mnist(tmp_path, files * 2, 10, verify=False)


@needs_mnist
def test_affine_mnist_is_made_from_mnist():
    data_dir = os.environ["TRITONCAPS_MNIST"]
    plain, mapped = load_dataset("mnist", data_dir), load_dataset("affine-mnist", data_dir)
    assert torch.equal(mapped.test.labels, plain.test.labels)
    assert mapped.note.startswith("Affine MNIST, found in")
