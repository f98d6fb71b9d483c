"""The digits, image sets, splits, shifts and batches."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from image_sets import assert_same_set, make_set, pixels_of

from tritoncaps.data import (
    Batches,
    ImageSet,
    load_dataset,
    random_shift,
    split_validation,
    to_float,
)
from tritoncaps.data.batches import _epoch_generator, rotated_and_scaled


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def numbered_set(count):
    """Make images that are numbered by their pixels: all pixels of image i are i + 1."""
    numbers = torch.arange(1, count + 1, dtype=torch.uint8)
    return ImageSet(numbers.reshape(-1, 1, 1, 1).repeat(1, 1, 4, 4), torch.arange(count) % 3)


def numbers_of(images):
    """Return the numbers of images from a `numbered_set`. A shift by 2 leaves at least a pixel."""
    return ((images.amax((1, 2, 3)) * 255).round().long() - 1).tolist()


# digits ------------------------------------------------------------------------------------------


def test_digits_look_like_mnist():
    digits = load_dataset("digits")
    assert digits.train.images.shape == (1437, 1, 28, 28)
    assert digits.test.images.shape == (360, 1, 28, 28)
    assert digits.class_names == tuple("0123456789")
    assert "1,797" in digits.note
    images = torch.cat([digits.train.images, digits.test.images])
    assert torch.equal(F.pad(images[:, :, 4:-4, 4:-4], (4, 4, 4, 4)), images)
    assert (int(images.min()), int(images.max())) == (0, 255)


def test_every_digit_shrinks_back_to_one_original_with_its_label():
    from sklearn.datasets import load_digits

    digits = load_dataset("digits")
    images = torch.cat([digits.train.images, digits.test.images])[:, :, 4:-4, 4:-4]
    labels = torch.cat([digits.train.labels, digits.test.labels])
    source = load_digits()
    shrunk = F.interpolate(images.float(), size=(8, 8), mode="bilinear") * (16 / 255)
    distances = torch.cdist(shrunk.flatten(1), torch.as_tensor(source.data, dtype=torch.float32))
    nearest = distances.min(1)
    assert torch.equal(nearest.indices.sort().values, torch.arange(1797))
    assert torch.equal(labels, torch.as_tensor(source.target)[nearest.indices])
    # Root mean square over the 64 pixels, of 17 grey levels.
    assert float(nearest.values.max()) / 8 < 1


def test_digits_hold_out_a_fifth_of_each_class_whatever_the_seed():
    torch.manual_seed(1)
    first = load_dataset("digits")
    torch.manual_seed(2)
    second = load_dataset("digits")
    assert_same_set(first.test, second.test)
    assert_same_set(first.train, second.train)
    held_out, kept = first.test.labels.bincount(), first.train.labels.bincount()
    assert bool((held_out / (held_out + kept) - 360 / 1797).abs().max() < 1 / 174)
    train, test = pixels_of(first.train.images), pixels_of(first.test.images)
    assert len(train) == 1437
    assert len(test) == 360
    assert not train & test


# image sets --------------------------------------------------------------------------------------

BYTES, INDICES = torch.zeros(3, 1, 4, 4).byte(), torch.zeros(3).long()


@pytest.mark.parametrize(
    ("images", "labels", "error", "fragment"),
    [
        pytest.param(BYTES.float(), INDICES, TypeError, "torch.float32", id="float images"),
        pytest.param(BYTES, INDICES.int(), TypeError, "torch.int32", id="int32 labels"),
        pytest.param(BYTES[:, 0], INDICES, ValueError, "(3, 4, 4)", id="no channel"),
        pytest.param(BYTES, INDICES[:, None], ValueError, "(3, 1)", id="2-D labels"),
        pytest.param(BYTES, INDICES[:2], ValueError, "N=3 but labels", id="lengths"),
        pytest.param(
            BYTES.to("meta"), INDICES, ValueError, "on meta but labels is on cpu", id="devices"
        ),
    ],
)
def test_image_set_refuses_images_and_labels_that_do_not_fit(images, labels, error, fragment):
    with pytest.raises(error) as caught:
        ImageSet(images, labels)
    assert fragment in str(caught.value)


def test_image_set_moves_and_selects():
    images = make_set(12)
    assert len(images) == 12
    assert images.to("meta").images.device.type == "meta"
    for indices in ([5, 0], torch.tensor([5, 0])):
        part = images.subset(indices)
        assert part.labels.tolist() == [5, 0]
        assert torch.equal(part.images, images.images[[5, 0]])
    mask = torch.zeros(12, dtype=torch.bool)
    mask[[0, 5]] = True
    assert_same_set(images.subset(mask), images.subset([0, 5]))
    assert len(images.subset([])) == 0


# splits ------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda s: sum(s) > 1),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_split_is_stratified_disjoint_and_complete(sizes, seed, data):
    total = sum(sizes)
    count = data.draw(st.integers(1, total - 1))
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(total, generator=generator(seed))]
    numbers = torch.arange(total, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    kept, held_out = split_validation(ImageSet(numbers, labels), count, seed)
    assert len(held_out) == count
    together = torch.cat([kept.images, held_out.images]).flatten()
    assert together.sort().values.tolist() == list(range(total))
    for part in (kept, held_out):
        order = part.images.flatten().long()
        assert torch.equal(order, order.sort().values)
        assert torch.equal(part.labels, labels[order])
    quotas = held_out.labels.bincount(minlength=len(sizes)).tolist()
    for quota, size in zip(quotas, sizes, strict=True):
        assert abs(quota - size * count / total) < 1


def test_split_takes_a_share_or_a_number():
    train = make_set(200)
    by_share = split_validation(train, 0.1, seed=1)
    by_number = split_validation(train, 20, seed=1)
    for first, second in zip(by_share, by_number, strict=True):
        assert_same_set(first, second)


def test_split_depends_only_on_the_seed():
    train = make_set(200)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = split_validation(train, 0.1, seed=1)[1]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert_same_set(split_validation(train, 0.1, seed=1)[1], first)
    assert not torch.equal(split_validation(train, 0.1, seed=2)[1].images, first.images)


@pytest.mark.parametrize(
    ("amount", "count"),
    [(0, 0), (0.0, 0), (0.001, 0), (1.0, 200), (-0.5, -100), (-1, -1), (200, 200), (300, 300)],
)
def test_split_leaves_no_part_empty(amount, count):
    with pytest.raises(ValueError, match=f"={amount} holds out {count} of 200 images"):
        split_validation(make_set(200), amount, seed=1)


@pytest.mark.parametrize("amount", [True, "0.1", None])
def test_split_takes_no_other_type(amount):
    with pytest.raises(TypeError, match=f"got {type(amount).__name__}"):
        split_validation(make_set(200), amount, seed=1)


@pytest.mark.parametrize("amount", [float("nan"), float("inf")])
def test_split_takes_no_infinite_share(amount):
    with pytest.raises(ValueError, match=f"fraction_or_count must be finite, got {amount}"):
        split_validation(make_set(200), amount, seed=1)


# shifts ------------------------------------------------------------------------------------------


def test_to_float_maps_bytes_to_the_unit_interval():
    values = to_float(torch.arange(256, dtype=torch.uint8))
    assert values.dtype == torch.float32
    assert (values[0].item(), values[255].item()) == (0.0, 1.0)
    torch.testing.assert_close(values, torch.arange(256) / 255)
    with pytest.raises(TypeError, match=r"torch\.float32"):
        to_float(values)


def shifted(image, down, right):
    """Shift one image (C, H, W) pixel by pixel, following the definition."""
    result = torch.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                result[:, row, column] = image[:, row - down, column - right]
    return result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_every_image_is_shifted_on_its_own_and_filled_with_zeros(dtype):
    image = torch.randint(1, 256, (2, 5, 4), generator=generator(3), dtype=torch.uint8).to(dtype)
    images = image.expand(400, 2, 5, 4)
    result = random_shift(images, 2, generator(4))
    assert result.dtype == dtype
    assert result.shape == images.shape
    candidates = {
        offset: shifted(image, *offset) for offset in itertools.product(range(-2, 3), repeat=2)
    }
    found = [
        [offset for offset, candidate in candidates.items() if torch.equal(row, candidate)]
        for row in result
    ]
    assert all(len(matches) == 1 for matches in found)
    assert {matches[0] for matches in found} == set(candidates)


def test_no_shift_reaches_further_than_the_largest_one():
    images = torch.zeros(500, 1, 9, 9)
    images[:, :, 4, 4] = 1
    rows, columns = random_shift(images, 3, generator()).nonzero()[:, 2:].T
    assert len(rows) == 500
    assert (int(rows.min()), int(rows.max())) == (1, 7)
    assert (int(columns.min()), int(columns.max())) == (1, 7)


def test_a_digit_inside_its_margin_loses_no_mass():
    images = F.pad(make_set(50, height=8, width=8).images, (2, 2, 2, 2))
    result = random_shift(images, 2, generator())
    assert torch.equal(result.sum((1, 2, 3)), images.sum((1, 2, 3)))
    assert not torch.equal(result, images)


def test_a_shift_may_be_larger_than_the_image():
    result = random_shift(torch.ones(300, 1, 2, 3), 5, generator())
    assert set(result.flatten().tolist()) == {0.0, 1.0}
    assert bool((result.sum((1, 2, 3)) == 0).any())


def test_shift_takes_strided_and_empty_images():
    images = make_set(20, height=6, width=6).images
    strided = images.transpose(2, 3)
    expected = random_shift(strided.contiguous(), 2, generator())
    assert torch.equal(random_shift(strided, 2, generator()), expected)
    assert random_shift(images[:0], 2, generator()).shape == (0, 1, 6, 6)


def test_shift_draws_only_from_its_generator():
    images = make_set(20).images
    state = torch.get_rng_state()
    first = random_shift(images, 2, generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(random_shift(images, 2, generator(1)), first)
    assert not torch.equal(random_shift(images, 2, generator(2)), first)


def test_a_shift_of_zero_leaves_the_images():
    images = make_set(20).images
    assert torch.equal(random_shift(images, 0, generator()), images)


@pytest.mark.parametrize(
    ("shape", "max_shift", "error", "message"),
    [
        ((1, 1, 4, 4), -1, ValueError, "max_shift must be >= 0, got -1"),
        ((1, 1, 4, 4), 1.5, TypeError, "max_shift must be an int, got float"),
        ((1, 4, 4), 1, ValueError, r"4 axes \(B, C, H, W\), got 3"),
    ],
    ids=["negative", "float", "three axes"],
)
def test_shift_refuses_wrong_arguments(shape, max_shift, error, message):
    with pytest.raises(error, match=message):
        random_shift(torch.zeros(shape), max_shift, generator())


# batches -----------------------------------------------------------------------------------------


@given(
    count=st.integers(0, 50),
    batch_size=st.integers(1, 60),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_visits_every_image_once(count, batch_size, shuffle, drop_last, seed, epoch):
    images = numbered_set(count)
    batches = Batches(
        images, batch_size, seed=seed, shuffle=shuffle, max_shift=2, drop_last=drop_last
    )
    made = list(batches.epoch(epoch))
    assert len(made) == len(batches)
    assert all(len(labels) == batch_size for _, labels in made[:-1])
    assert all(len(labels) > 0 for _, labels in made)
    visited = [number for pixels, _ in made for number in numbers_of(pixels)]
    if drop_last:
        assert len(visited) == count // batch_size * batch_size
        assert len(set(visited)) == len(visited)
    else:
        assert sorted(visited) == list(range(count))
    if not shuffle:
        assert visited == list(range(len(visited)))
    for pixels, labels in made:
        assert pixels.dtype == torch.float32
        assert pixels.shape[1:] == (1, 4, 4)
        assert torch.equal(labels, images.labels[numbers_of(pixels)])


@given(
    count=st.integers(1, 50),
    batch_size=st.integers(1, 20),
    max_shift=st.integers(0, 2),
    drop_last=st.booleans(),
    data=st.data(),
)
def test_an_epoch_resumed_in_the_middle_continues_bit_by_bit(
    count, batch_size, max_shift, drop_last, data
):
    def batches():
        return Batches(
            make_set(count), batch_size, seed=7, max_shift=max_shift, drop_last=drop_last
        )

    start = data.draw(st.integers(0, len(batches())))
    whole = list(batches().epoch(3))
    torch.manual_seed(start)
    resumed = list(batches().epoch(3, start=start))
    for (pixels, labels), (again, labels_again) in zip(whole[start:], resumed, strict=True):
        assert torch.equal(pixels, again)
        assert torch.equal(labels, labels_again)


def all_pixels(batches, epoch):
    return torch.cat([pixels for pixels, _ in batches.epoch(epoch)])


@pytest.mark.parametrize(
    "options", [{"shuffle": False, "max_shift": 2}, {"shuffle": True}], ids=["shifts", "order"]
)
def test_epochs_and_seeds_differ(options):
    one, other = (Batches(make_set(100), 16, seed=seed, **options) for seed in (1, 2))
    first = all_pixels(one, 0)
    assert torch.equal(all_pixels(one, 0), first)
    assert not torch.equal(all_pixels(one, 1), first)
    assert not torch.equal(all_pixels(other, 0), first)
    # With seed + epoch as the seed, these two would be the same.
    assert not torch.equal(all_pixels(other, 0), all_pixels(one, 1))


def test_shifts_differ_from_image_to_image_and_from_batch_to_batch():
    batches = Batches(numbered_set(80), 40, seed=1, shuffle=False, max_shift=2)
    first, second = [pixels.ne(0) for pixels, _ in batches.epoch(0)]
    assert len(pixels_of(first)) > 5
    assert not torch.equal(first, second)


def test_rotations_and_scalings_are_normal_and_come_after_the_shifts():
    """Order and shifts are those of an epoch without them."""
    images = make_set(40)
    options = {"seed": 1, "max_shift": 2}
    plain = all_pixels(Batches(images, 16, **options), 2)
    zero = all_pixels(Batches(images, 16, rotation=0.0, scaling=0, **options), 2)
    assert torch.equal(zero, plain)
    turned = Batches(images, 16, rotation=8.0, scaling=0.06, **options)
    generator = _epoch_generator(1, 2)
    torch.randperm(40, generator=generator)
    torch.randint(5, (40, 2), generator=generator)
    angles, factors = torch.randn(2, 40, generator=generator)
    angles, factors = angles * math.radians(8), (factors * 0.06).exp()
    pixels = all_pixels(turned, 2)
    torch.testing.assert_close(pixels, rotated_and_scaled(plain, angles, factors))
    assert 0 <= pixels.min() < pixels.max() <= 1
    resumed = torch.cat([pixels for pixels, _ in turned.epoch(2, start=1)])
    assert torch.equal(resumed, pixels[16:])


def test_rotated_and_scaled_in_one():
    """A quarter turn anticlockwise at twice the size: corners of the middle become corners."""
    image = torch.arange(16.0).view(1, 1, 4, 4) / 16
    turn = torch.tensor([math.pi / 2])
    torch.testing.assert_close(
        rotated_and_scaled(image, turn, torch.ones(1)), torch.rot90(image, 1, (2, 3))
    )
    whole = rotated_and_scaled(image, turn, torch.tensor([2.0]))
    corners = torch.rot90(image, 1, (2, 3))[..., 1:3, 1:3]
    centre = whole.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    torch.testing.assert_close(centre, corners, atol=0.04, rtol=0)


def test_a_crop_is_the_middle_and_a_shift_brings_in_what_is_around():
    images = make_set(6, height=11, width=9)
    (cropped, _) = next(Batches(images, 6, seed=1, shuffle=False, crop=4).epoch(0))
    assert torch.equal(cropped, to_float(images.images[:, :, 3:7, 2:6]))
    options = {"seed": 1, "shuffle": False, "max_shift": 4}
    shifted, _ = next(Batches(images, 6, crop=4, **options).epoch(0))
    # As if the whole image had been shifted first; beyond it are zeros.
    whole, _ = next(Batches(images, 6, **options).epoch(0))
    assert torch.equal(shifted, whole[:, :, 3:7, 2:6])
    with pytest.raises(ValueError, match="crop=10, but the images are 11x9; give at most 9"):
        Batches(images, 6, seed=1, crop=10)


def test_batches_leave_the_global_random_state_alone():
    state = torch.get_rng_state()
    all_pixels(Batches(make_set(50), 16, seed=1, max_shift=2), 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_refuse_wrong_arguments():
    images = make_set(10)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        Batches(images, 0, seed=1)
    with pytest.raises(ValueError, match="max_shift must be >= 0, got -2"):
        Batches(images, 4, seed=1, max_shift=-2)
    with pytest.raises(ValueError, match="rotation must be >= 0 and finite, got -1"):
        Batches(images, 4, seed=1, rotation=-1)
    with pytest.raises(TypeError, match="scaling must be a number, got str"):
        Batches(images, 4, seed=1, scaling="0.1")
    batches = Batches(images, 4, seed=1)
    for start in (-1, 4):
        with pytest.raises(ValueError, match=rf"start={start} is not in 0 \.\. 3"):
            batches.epoch(0, start=start)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_the_same_bits_on_cuda():
    images = make_set(100)
    on_cpu = Batches(images, 16, seed=1, max_shift=2).epoch(0)
    on_cuda = Batches(images.to("cuda"), 16, seed=1, max_shift=2).epoch(0)
    for (pixels, labels), (cuda_pixels, cuda_labels) in zip(on_cpu, on_cuda, strict=True):
        assert cuda_pixels.device.type == "cuda"
        assert torch.equal(pixels, cuda_pixels.cpu())
        assert torch.equal(labels, cuda_labels.cpu())
