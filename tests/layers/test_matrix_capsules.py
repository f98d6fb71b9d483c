"""Layers of matrix capsules: what they add to the operators."""

import pytest
import torch

from tritoncaps import Capsules
from tritoncaps.layers import ClassMatrixCapsules, ConvMatrixCapsules, PrimaryMatrixCapsules
from tritoncaps.layers.matrix import _usual_mass


def grid(*shape, pose=(4, 4)):
    generator = torch.Generator().manual_seed(0)
    poses = torch.randn(*shape, *pose, generator=generator)
    return Capsules(poses, torch.rand(shape, generator=generator))


def test_a_primary_capsule_is_some_channels_of_a_position():
    layer = PrimaryMatrixCapsules(3, 2, (2, 3), kernel_size=3, stride=2, padding=1)
    features = torch.randn(2, 3, 5, 7)
    poses, activations = layer(features)
    maps = layer.conv(features)
    assert poses.shape == (2, 3, 4, 2, 2, 3)
    torch.testing.assert_close(activations, maps[:, :2].sigmoid().movedim(1, 3))
    expected = maps[:, 2:].view(2, 2, 2, 3, 3, 4).permute(0, 4, 5, 1, 2, 3)
    torch.testing.assert_close(poses, expected)


@pytest.mark.parametrize("competition", ["children", "position"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_usual_mass_is_the_sum_of_even_assignments(competition, stride):
    layer = ConvMatrixCapsules(2, 3, 2, stride, iterations=1, competition=competition)
    capsules = grid(1, 5, 6, 2)
    _, shares = layer(capsules, return_assignment=True)
    expected = shares.sum(dim=(3, 4, 5)).mean().item()
    mass = _usual_mass(capsules.activations, layer.weight, stride, 0, competition)
    assert mass == pytest.approx(expected)


def test_mean_is_sum_with_other_constants():
    capsules = grid(2, 4, 5, 3)
    means = ClassMatrixCapsules(3, 7, 2, temperature=[0.3, 0.7], beta_u=0.2, beta_a=0.5)
    unit = 16 * 4 * 5 * 3 / 7
    sums = ClassMatrixCapsules(
        3, 7, 2, scale="sum", temperature=[0.3 / unit, 0.7 / unit], beta_u=0.2, beta_a=0.5 * unit
    )
    sums.weight = means.weight
    torch.testing.assert_close(means(capsules).logits, sums(capsules).logits)


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_only_with_mean_do_logits_not_depend_on_the_size_of_a_grid(scale):
    """On a grid that is repeated, "mean" gives the same logits, and "sum" does not."""
    capsules = grid(2, 3, 3, 4)
    layer = ClassMatrixCapsules(4, 5, 2, scale=scale, temperature=0.01, coordinates=False)
    twice = Capsules(*(each.repeat(1, 2, *[1] * (each.ndim - 2)) for each in capsules))
    logits, more = layer(capsules).logits, layer(twice).logits
    assert torch.allclose(logits, more, rtol=1e-4) == (scale == "mean")


def test_coordinates_are_added_to_the_last_column_of_the_votes():
    """One active place gives the class poses that it gives without coordinates, plus its own."""
    layer = ClassMatrixCapsules(2, 3, iterations=1)
    plain = ClassMatrixCapsules(2, 3, iterations=1, coordinates=False)
    plain.weight = layer.weight
    poses = grid(1, 4, 5, 2).poses
    for row, column in ((0, 0), (3, 1), (2, 4)):
        activations = torch.zeros(1, 4, 5, 2)
        activations[0, row, column] = 0.7
        difference = layer(Capsules(poses, activations)).poses
        difference = difference - plain(Capsules(poses, activations)).poses
        expected = torch.zeros(4, 4)
        expected[0, 3], expected[1, 3] = (row + 0.5) / 4, (column + 0.5) / 5
        torch.testing.assert_close(difference, expected.expand(1, 3, 4, 4), atol=1e-5, rtol=0)


def test_a_call_chooses_the_iterations_and_returns_the_assignment():
    capsules = grid(2, 5, 5, 3)
    layer = ConvMatrixCapsules(3, 4, 3, 2, iterations=3)
    fewer = ConvMatrixCapsules(3, 4, 3, 2, iterations=1)
    fewer.load_state_dict(layer.state_dict())
    routed, assignment = layer(capsules, iterations=1, return_assignment=True)
    torch.testing.assert_close(routed.poses, fewer(capsules).poses)
    torch.testing.assert_close(routed.activations, fewer(capsules).activations)
    assert assignment.shape == (2, 2, 2, 3, 3, 3, 4)
    classes = ClassMatrixCapsules(3, 4)(capsules, return_assignment=True)
    assert classes.assignment.shape == (2, 5, 5, 3, 4)
    torch.testing.assert_close(classes.assignment.sum(dim=4), torch.ones(2, 5, 5, 3))
    torch.testing.assert_close(classes.logits.sigmoid(), classes.activations)


def test_poses_of_any_shape_and_dtype():
    layer = ConvMatrixCapsules(2, 3, 2, pose=(3, 5), dtype=torch.float64)
    poses, activations = layer(Capsules(*(x.double() for x in grid(2, 4, 3, 2, pose=(3, 5)))))
    assert poses.shape == (2, 3, 2, 3, 3, 5) and poses.dtype == torch.float64
    assert activations.shape == (2, 3, 2, 3)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: ConvMatrixCapsules(2, 3, temperature=[0.5]),
            ValueError,
            "ConvMatrixCapsules: temperature must be a number, or one for each iteration, "
            "iterations=2, got 1",
        ),
        (
            lambda: ConvMatrixCapsules(2, 3, competition="all"),
            ValueError,
            'ConvMatrixCapsules: competition must be "children" or "position", got \'all\'',
        ),
        (
            lambda: ClassMatrixCapsules(2, 3, pose=(1, 16)),
            ValueError,
            "ClassMatrixCapsules: coordinates need poses of at least 2 rows, got pose=(1, 16); "
            "use coordinates=False",
        ),
        (
            lambda: ClassMatrixCapsules(2, 3)(grid(2, 4, 4, 5)),
            ValueError,
            "ClassMatrixCapsules: weight has C=2 but poses has C=5",
        ),
        *(
            (
                lambda layer=layer: layer(2, 3)(torch.rand(2, 4, 4, 2, 4, 4)),
                TypeError,
                f"{layer.__name__}: capsules must be Capsules(poses, activations), got Tensor",
            )
            for layer in (ConvMatrixCapsules, ClassMatrixCapsules)
        ),
        (
            lambda: PrimaryMatrixCapsules(3, 2)(torch.rand(1, 4, 5, 5)),
            ValueError,
            "PrimaryMatrixCapsules: features must be (B, 3, H, W), got (1, 4, 5, 5)",
        ),
    ],
)
def test_wrong_arguments_are_named(build, error, message):
    with pytest.raises(error) as caught:
        build()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "layer",
    [
        PrimaryMatrixCapsules(3, 2, (2, 3), kernel_size=3, stride=2, padding=1),
        ConvMatrixCapsules(2, 3, 5, 2, 1, 3, competition="position", scale="sum", beta_a=0.5),
        ClassMatrixCapsules(2, 3, 1, pose=(2, 3), temperature=0.5, gradient="last"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_prints_the_arguments_that_build_it(layer):
    again = eval(f"{type(layer).__name__}({layer.extra_repr()})")
    assert again.extra_repr() == layer.extra_repr()
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in layer.named_parameters()
    }
