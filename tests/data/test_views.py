"""Sets that know their viewpoints, and the solids that are rendered from them."""

import dataclasses
import math

import pytest
import torch
from image_sets import assert_same_set, few_solids, taken

from tritoncaps.data import (
    View,
    ViewSet,
    familiar_and_novel,
    load_dataset,
    registry,
    rendered_solids,
    split_validation,
    stratified_subset,
)
from tritoncaps.data.registry import REGISTRY

# The order of the classes.
L_SHAPE, PYRAMID, CYLINDER, CONE, RING = range(5)


@pytest.fixture(scope="module")
def solids():
    return few_solids()[0]


@pytest.fixture(autouse=True, scope="module")
def single(one_thread: None):
    """Do not share such small images among threads."""


def of_class(images, label):
    """Return the first image of a class, (H, W)."""
    return images.subset(images.labels == label).images[0, 0]


def mostly(image):
    """Return the pixels that a single face covers by more than half."""
    return image > int(image.max()) / 2


# sets ---------------------------------------------------------------------------------------------


def test_a_part_of_a_set_keeps_its_views():
    count = 40
    numbers = torch.arange(count)
    images = numbers.to(torch.uint8).reshape(-1, 1, 1, 1)
    whole = ViewSet(images, numbers % 5, numbers.unsqueeze(1) + 100 * torch.arange(4))
    parts = [whole.to("cpu"), whole.subset([3, 1]), whole.subset(whole.view("azimuth") > 210)]
    parts += [stratified_subset(whole, 10, seed=1), *split_validation(whole, 0.2, seed=1)]
    assert [len(part) for part in parts] == [40, 2, 29, 10, 32, 8]
    for part in parts:
        assert type(part) is ViewSet
        numbers = part.images.flatten().long()
        for column, name in enumerate(View._fields):
            assert torch.equal(part.view(name), numbers + 100 * column)
    assert parts[1].view("instance").tolist() == [3, 1]


@pytest.mark.parametrize(
    ("views", "error", "message"),
    [
        (torch.zeros(2, 4), TypeError, r"views must be torch\.int64, got torch\.float32"),
        (torch.zeros(3, 4, dtype=torch.int64), ValueError, r"\(N, 4\) = \(2, 4\), got \(3, 4\)"),
        (torch.zeros(2, 3, dtype=torch.int64), ValueError, r"\(N, 4\) = \(2, 4\), got \(2, 3\)"),
        (torch.zeros(2, 4, dtype=torch.int64, device="meta"), ValueError, "on meta but labels"),
    ],
)
def test_views_that_do_not_fit_are_refused(views, error, message):
    images, labels = torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(error, match=message):
        ViewSet(images, labels, views)


def test_a_view_that_does_not_exist_is_refused(solids):
    with pytest.raises(ValueError, match=r"ViewSet\.view: name must be .* got 'angle'"):
        solids.view("angle")


# protocols ----------------------------------------------------------------------------------------


def test_the_protocols_of_smallnorb():
    # As smallNORB's: every even tens of degrees, and elevations from 30 to 70.
    views = [View(0, elevation, azimuth, 0) for elevation in range(30, 71, 5)
             for azimuth in range(0, 360, 20)]  # fmt: skip
    whole = ViewSet(
        torch.zeros(len(views), 1, 1, 1, dtype=torch.uint8),
        torch.zeros(len(views), dtype=torch.int64),
        torch.tensor(views),
    )
    familiar, novel = familiar_and_novel(whole, "azimuth")
    assert set(familiar.view("azimuth").tolist()) == {300, 320, 340, 0, 20, 40}
    assert set(novel.view("azimuth").tolist()) == {*range(60, 281, 20)}
    familiar, novel = familiar_and_novel(whole, "elevation")
    assert set(familiar.view("elevation").tolist()) == {30, 35, 40}
    assert set(novel.view("elevation").tolist()) == {45, 50, 55, 60, 65, 70}
    assert len(familiar) + len(novel) == len(whole)


def test_any_field_can_be_divided(solids):
    familiar, novel = familiar_and_novel(solids, "lighting", [1])
    assert set(familiar.view("lighting").tolist()) == {1}
    assert 1 not in novel.view("lighting") and len(familiar) + len(novel) == len(solids)


@pytest.mark.parametrize(
    ("view", "familiar", "message"),
    [
        ("azimuth", [10], r"familiar=\[10\] is 0 of 80 images.* one of 0, 90, 180, 330"),
        ("elevation", [0, 40], r"familiar=\[0, 40\] is 80 of 80 images, but it must be some and"),
        ("lighting", None, "view='lighting' has no usual protocol; give `familiar`"),
        ("angle", [0], "name must be .* got 'angle'"),
    ],
)
def test_a_protocol_that_leaves_nothing_is_refused(solids, view, familiar, message):
    with pytest.raises(ValueError, match=message):
        familiar_and_novel(solids, view, familiar)


# rendered solids ----------------------------------------------------------------------------------


def test_every_instance_is_seen_from_everywhere_in_every_light():
    train, test = few_solids(instances=2)
    for images, instances in ((train, {0, 1}), (test, {2, 3})):
        assert images.images.shape == (5 * 2 * 2 * 4 * 2, 1, 20, 20)
        rows = torch.cat([images.labels.unsqueeze(1), images.views], dim=1)
        assert len(rows.unique(dim=0)) == len(images)
        assert set(images.view("instance").tolist()) == instances
        assert set(images.view("elevation").tolist()) == {0, 40}
        assert set(images.view("azimuth").tolist()) == {0, 90, 180, 330}
    # No proportions come twice.
    view = {"azimuth": 330, "elevation": 40, "lighting": 0}
    shown = torch.cat([taken(images, **view).images for images in (train, test)])
    assert len(shown.unique(dim=0)) == 5 * 4


def test_only_the_seed_decides(solids):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert_same_set(few_solids()[0], solids)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(few_solids(seed=1)[0].images, solids.images)


def test_from_behind_the_outline_is_mirrored(solids):
    front, back = (taken(solids, elevation=0, azimuth=azimuth).images for azimuth in (0, 180))
    # A face seen edge-on may fall on either side of a ray.
    assert ((front > 0) != (back > 0).flip(3)).double().mean() < 0.02


def test_the_shapes_are_what_they_are_called():
    size = 128
    sideways, endways = (
        few_solids(size=size, elevations=[0], azimuths=[azimuth], lightings=1)[0]
        for azimuth in (0, 90)
    )
    # The end of a cylinder is a disc, and the ring, edge-on, a bar without a hole.
    disc = mostly(of_class(endways, CYLINDER))
    across = int(disc.any(dim=0).sum())
    assert int(disc.any(dim=1).sum()) == across
    assert int(disc.sum()) == pytest.approx(math.pi / 4 * across**2, rel=0.05)
    middle = slice(size // 2 - 2, size // 2 + 2)
    assert (of_class(sideways, RING)[middle, middle] == 0).all()
    assert (of_class(endways, RING)[middle, middle] > 0).all()
    # A triangle fills half the rectangle round it, and so does a pyramid's outline.
    triangle = mostly(of_class(sideways, PYRAMID))
    width, height = (int(triangle.any(dim=axis).sum()) for axis in (0, 1))
    assert int(triangle.sum()) == pytest.approx(width * height / 2, rel=0.05)
    # From its base a cone is a disc. It lies on the floor: the apex is no higher than the base.
    cone = of_class(sideways, CONE) > 0
    columns = cone.any(dim=0).nonzero().flatten()
    low = [int(cone[:, column].nonzero().max()) for column in columns[2:-2]]
    assert max(low) - min(low) <= 1
    # The L has one corner less.
    corner = mostly(of_class(sideways, L_SHAPE))
    rows, columns = (corner.any(dim=1 - axis).nonzero().flatten() for axis in (0, 1))
    corners = [corner[rows[r], columns[c]].item() for r in (2, -3) for c in (2, -3)]
    assert sorted(corners) == [False, True, True, True]


def test_the_light_comes_from_the_left_and_then_from_the_right():
    train, _ = few_solids(elevations=[30], azimuths=[0], lightings=3)
    left, front, right = (
        taken(train, lighting=k).subset([PYRAMID]).images[0, 0].double() for k in range(3)
    )
    assert left[:, :10].sum() > 1.2 * left[:, 10:].sum()
    assert right[:, 10:].sum() > 1.2 * right[:, :10].sum()
    assert front[:, :10].sum().item() == pytest.approx(front[:, 10:].sum().item(), rel=0.02)


def test_a_stereo_pair_is_seen_from_two_azimuths():
    pair, _ = few_solids(azimuths=[20], stereo=True)
    for channel, azimuth in enumerate((17, 23)):
        single, _ = few_solids(azimuths=[azimuth])
        assert torch.equal(pair.images[:, channel], single.images[:, 0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 0}, ValueError, "rendered_solids: size must be >= 1, got 0"),
        ({"lightings": 1.5}, TypeError, "rendered_solids: lightings must be an int"),
        ({"azimuths": []}, ValueError, "rendered_solids: azimuths is empty, but it needs"),
        ({"elevations": ()}, ValueError, "rendered_solids: elevations is empty, but it needs"),
        ({"azimuths": [0, 0.5]}, TypeError, r"azimuths must be a sequence of ints .* got float"),
        ({"azimuths": 20}, TypeError, r"azimuths must be a sequence of ints .* got int"),
        ({"elevations": [True]}, TypeError, "elevations must be a sequence of ints .* got bool"),
        ({"elevations": [0, -5]}, ValueError, r"elevations must be in 0 \.\. 90, got -5"),
        ({"elevations": [91]}, ValueError, r"elevations must be in 0 \.\. 90, got 91"),
        ({"stereo": 1}, TypeError, "rendered_solids: stereo must be a bool, got int"),
    ],
)
def test_impossible_solids_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        rendered_solids(**options)


def test_they_are_a_data_set(monkeypatch):
    small = few_solids()
    monkeypatch.setattr(registry, "rendered_solids", lambda: small)
    dataset = load_dataset("rendered-solids", "nowhere")
    assert dataset.train is small[0] and dataset.test is small[1]
    assert dataset.class_names == ("L-shape", "pyramid", "cylinder", "cone", "ring")
    assert "rendered" in dataset.note
    assert dataclasses.asdict(REGISTRY["rendered-solids"])["files"] == ()
