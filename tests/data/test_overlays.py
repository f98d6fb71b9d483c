"""Overlapping images and nested subsets: what they promise for every image they make."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from image_sets import pixels_of

from tritoncaps.data import ImageSet, Overlays, load_dataset, stratified_subset, to_float


def random_set(count, classes=10, *, size=6, seed=0):
    """Make random images with random labels, at least two of which differ."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 1, size, size + 1)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(classes, (count,), generator=generator)
    labels[:2] = torch.tensor([0, classes - 1])
    return ImageSet(images, labels)


def plain_set(value, labels, size=4):
    """Make images of one grey value with these labels."""
    images = torch.full((len(labels), 1, size, size), value, dtype=torch.uint8)
    return ImageSet(images, torch.tensor(labels))


def whole_epoch(overlays, epoch, start=0):
    """Return overlays, originals and labels of an epoch, starting with a batch."""
    parts = [
        (images, originals.images, originals.labels)
        for images, originals in overlays.epoch(epoch, start)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


sets = st.builds(random_set, st.integers(2, 40), st.integers(2, 12), seed=st.integers(0, 9))


class TestOverlays:
    @given(sets, st.integers(0, 3), st.integers(0, 4), st.integers(0, 4))
    def test_every_overlay_keeps_its_promises(self, images, epoch, padding, max_shift):
        """Two classes, in order. Pixels in range. The sum of two images, clipped."""
        overlays = Overlays(images, 7, seed=1, padding=padding, max_shift=max_shift)
        made, originals, labels = whole_epoch(overlays, epoch)
        assert made.shape == (len(images), *overlays.image_shape)
        assert made.dtype is originals.dtype is torch.float32
        assert (labels[:, 0] < labels[:, 1]).all()
        assert made.min() >= 0
        assert made.max() <= 1
        torch.testing.assert_close(made, originals.sum(dim=1).clamp(max=1), atol=1e-6, rtol=0)

    @given(sets, st.integers(0, 2))
    def test_every_image_is_laid_over_one_of_another_class(self, images, epoch):
        pairs = Overlays(images, 7, seed=1).pairs(epoch)
        assert (pairs == torch.arange(len(images)).unsqueeze(1)).any(dim=1).all()
        labels = images.labels[pairs]
        assert (labels[:, 0] < labels[:, 1]).all()

    def test_the_originals_are_the_images_of_the_pair(self):
        digits = load_dataset("digits").test.subset(range(50))
        overlays = Overlays(digits, 16, seed=3, shuffle=False)
        _, originals, labels = whole_epoch(overlays, 2)
        pairs = overlays.pairs(2)
        assert torch.equal(originals, to_float(digits.images)[pairs])
        assert torch.equal(labels, digits.labels[pairs])

    def test_nothing_of_a_shifted_original_is_lost(self):
        """Every original is an image of the set, moved by whole pixels within its padding."""
        digits = load_dataset("digits").test.subset(range(20))
        overlays = Overlays(digits, 20, seed=3, shuffle=False, padding=4, max_shift=4)
        _, originals, _ = whole_epoch(overlays, 0)
        pairs = overlays.pairs(0)
        moves = set()
        for index, place in itertools.product(range(20), range(2)):
            image = to_float(digits.images[pairs[index, place]])
            found = originals[index, place]
            windows = found.unfold(1, 28, 1).unfold(2, 28, 1)[0]  # (9, 9, 28, 28)
            where = (windows == image[0]).flatten(2).all(dim=2).nonzero().tolist()
            assert where
            assert found.sum() == pytest.approx(image.sum().item(), rel=1e-5)
            moves.add(tuple(where[0]))
        assert len(moves) > 15

    def test_the_two_are_shifted_independently(self):
        images = torch.zeros(200, 1, 5, 5, dtype=torch.uint8)
        images[:, :, 2, 2] = 255
        both = ImageSet(images, torch.arange(200) % 2)
        overlays = Overlays(both, 200, seed=0, padding=2, max_shift=2)
        _, originals, _ = whole_epoch(overlays, 0)
        place = originals.flatten(2).argmax(dim=2)  # (200, 2)
        assert len(place[:, 0].unique()) == len(place[:, 1].unique()) == 25
        # By chance, one pair in five shares a row.
        assert 0.1 < (place[:, 0] // 9 == place[:, 1] // 9).double().mean() < 0.3

    @given(st.integers(0, 3), st.integers(0, 5))
    def test_an_epoch_resumed_in_the_middle_continues_bit_by_bit(self, epoch, start):
        def overlays():
            return Overlays(random_set(37), 8, seed=5, padding=2, max_shift=1)

        if start == len(overlays()):
            assert list(overlays().epoch(epoch, start)) == []
            return
        whole, rest = whole_epoch(overlays(), epoch), whole_epoch(overlays(), epoch, start)
        for part, resumed in zip(whole, rest, strict=True):
            assert torch.equal(resumed, part[8 * start :])

    def test_an_overlay_depends_only_on_seed_epoch_and_index(self):
        """It does not depend on the batch size or the global random state."""
        images = random_set(30)
        first = whole_epoch(Overlays(images, 4, seed=1, shuffle=False, max_shift=1), 1)
        torch.manual_seed(123)
        second = whole_epoch(Overlays(images, 11, seed=1, shuffle=False, max_shift=1), 1)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
        state = torch.get_rng_state()
        whole_epoch(Overlays(images, 11, seed=1, shuffle=False), 1)
        assert torch.equal(state, torch.get_rng_state())

    def test_shuffling_changes_only_the_order(self):
        images = random_set(30)
        ordered, shuffled = (
            whole_epoch(Overlays(images, 30, seed=1, shuffle=shuffle, max_shift=1), 0)[0]
            for shuffle in (False, True)
        )
        assert not torch.equal(ordered, shuffled)
        same = (ordered.unsqueeze(1) == shuffled).flatten(2).all(dim=2)  # (30, 30)
        assert (same.sum(dim=0) == 1).all()
        assert (same.sum(dim=1) == 1).all()

    def test_every_epoch_and_every_seed_has_new_partners(self):
        images = random_set(100)
        drawn = [
            Overlays(images, 10, seed=seed).pairs(epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))
        ]
        for one, other in itertools.combinations(drawn, 2):
            assert (one == other).all(dim=1).double().mean() < 0.2

    def test_partners_are_drawn_from_all_other_images_equally(self):
        """Over many epochs each image of the other classes is drawn equally often."""
        images = plain_set(0, [0] * 6 + [1] * 3 + [2] * 1)
        overlays = Overlays(images, 10, seed=0)
        own = torch.arange(10)
        counts = torch.zeros(10, 10)
        for epoch in range(3000):
            partner = overlays.pairs(epoch).sum(dim=1) - own
            counts[own, partner] += 1
        for index, label in enumerate(images.labels):
            others = images.labels != label
            assert (counts[index, ~others] == 0).all()
            expected = 3000 / int(others.sum())
            assert (counts[index, others] - expected).abs().max() < 6 * expected**0.5

    def test_white_over_white_stays_white(self):
        images = plain_set(200, [0, 1, 0, 1])
        assert (whole_epoch(Overlays(images, 4, seed=0), 0)[0] == 1).all()

    def test_a_padded_image_has_a_black_border(self):
        images = random_set(6)
        _, originals, _ = whole_epoch(Overlays(images, 6, seed=0, padding=3), 0)
        inner = F.pad(originals[..., 3:-3, 3:-3], (3, 3, 3, 3))
        assert torch.equal(inner, originals)

    def test_one_class_has_no_partner(self):
        with pytest.raises(ValueError, match="needs two classes, but the 3 images have 1"):
            Overlays(plain_set(0, [5, 5, 5]), 2, seed=0)

    def test_wrong_arguments_are_named(self):
        images = random_set(4)
        with pytest.raises(ValueError, match="padding must be >= 0, got -1"):
            Overlays(images, 2, seed=0, padding=-1)
        with pytest.raises(ValueError, match="max_shift must be >= 0, got -1"):
            Overlays(images, 2, seed=0, max_shift=-1)
        with pytest.raises(ValueError, match="batch_size"):
            Overlays(images, 0, seed=0)
        with pytest.raises(ValueError, match=r"start=3 is not in 0 \.\. 2"):
            Overlays(images, 2, seed=0).epoch(0, 3)


class TestStratifiedSubset:
    @given(st.integers(0, 5), st.lists(st.integers(1, 300), min_size=2, max_size=2))
    def test_a_smaller_one_is_part_of_a_larger_one(self, seed, sizes):
        images = random_set(300, seed=seed, size=8)
        fewer, more = sorted(sizes)
        small = pixels_of(stratified_subset(images, fewer, 1).images)
        large = pixels_of(stratified_subset(images, more, 1).images)
        assert (len(small), len(large)) == (fewer, more)
        assert small <= large

    @given(st.integers(1, 1437), st.integers(0, 3))
    def test_the_classes_keep_their_proportions(self, count, seed):
        digits = load_dataset("digits").train
        share = digits.labels.bincount() * count / len(digits)
        found = stratified_subset(digits, count, seed).labels.bincount(minlength=10)
        assert found.sum() == count
        assert (found - share).abs().max() <= 1

    def test_labels_stay_with_their_images_and_in_order(self):
        images = random_set(60, size=8)
        subset = stratified_subset(images, 20, seed=2)
        places = [
            int((images.images == image).flatten(1).all(dim=1).nonzero()) for image in subset.images
        ]
        assert places == sorted(places)
        assert torch.equal(images.labels[places], subset.labels)

    def test_the_seed_chooses(self):
        images = random_set(300, size=8)
        one, same, other = (stratified_subset(images, 30, seed).images for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_too_many_or_too_few_are_refused(self):
        with pytest.raises(ValueError, match="count=5, but there are 4 images"):
            stratified_subset(random_set(4), 5, seed=0)
        with pytest.raises(ValueError, match="count"):
            stratified_subset(random_set(4), 0, seed=0)
