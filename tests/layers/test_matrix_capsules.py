"""Layers of matrix capsules: what they add to the operators."""

import copy

import pytest
import torch

from tritoncaps import Capsules, _patches
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


@pytest.mark.parametrize("padding", [0, 1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_the_usual_mass_is_the_mean_of_what_the_outputs_get(stride, padding):
    """With even shares and activations of 1. The padding, of activation 0, gives nothing."""
    layer = ConvMatrixCapsules(2, 3, 2, stride, padding, iterations=1)
    capsules = grid(1, 5, 6, 2)
    _, shares = layer(capsules, return_assignment=True)
    ones = _patches.pad(torch.ones(1, 5, 6, 2), padding)
    ones = _patches.patches(ones, 2, stride).view(*shares.shape[:-1], 1)
    expected = (shares * ones).sum(dim=(3, 4, 5)).mean().item()
    mass = _usual_mass(capsules.activations, layer.weight, stride, padding, "children")
    assert mass == pytest.approx(expected)


def test_by_position_a_window_without_padding_has_the_usual_mass():
    layer = ConvMatrixCapsules(2, 3, 2, iterations=1, competition="position")
    capsules = grid(1, 5, 6, 2)
    _, shares = layer(capsules, return_assignment=True)
    mass = _usual_mass(capsules.activations, layer.weight, 1, 0, "position")
    torch.testing.assert_close(shares.sum(dim=(3, 4, 5)), torch.full((1, 4, 5, 3), mass))


def test_by_position_an_output_depends_on_its_window_alone():
    """Neither the padding nor the rest of the grid changes the outputs of inner windows."""
    layer = ConvMatrixCapsules(2, 3, padding=1, competition="position")
    plain = ConvMatrixCapsules(2, 3, competition="position")
    plain.load_state_dict(layer.state_dict())
    capsules = grid(2, 6, 7, 2)
    expected = plain(capsules)
    part = Capsules(*(each[:, :5] for each in capsules))
    for result, more, rows in zip(layer(capsules), layer(part), expected, strict=True):
        torch.testing.assert_close(result[:, 1:-1, 1:-1], rows)
        torch.testing.assert_close(more[:, 1:-1, 1:-1], rows[:, :3])


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_windows_of_padding_alone_have_pose_zero(scale):
    """Their activation is the sigmoid of λ β_a."""
    layer = ConvMatrixCapsules(2, 3, 1, 2, 1, scale=scale, temperature=0.5, beta_a=0.7)
    poses, activations = layer(grid(2, 1, 1, 2))
    assert poses.shape == (2, 2, 2, 3, 4, 4) and not poses.any()
    expected = torch.tensor(0.5 * 0.7).sigmoid().expand(2, 2, 2, 3)
    torch.testing.assert_close(activations, expected)


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
        *(
            (
                lambda layer=layer, value=value: layer(2, 3)(grid(2, 4, 4, 2), iterations=value),
                error,
                f"{layer.__name__}: iterations must be {words}",
            )
            for layer in (ConvMatrixCapsules, ClassMatrixCapsules)
            for value, error, words in (
                (0, ValueError, ">= 1, got 0"),
                (-1, ValueError, ">= 1, got -1"),
                (True, TypeError, "an int, got bool"),
                (2.0, TypeError, "an int, got float"),
            )
        ),
        (
            lambda: ConvMatrixCapsules(2, 3, temperature=[0.5, 1])(grid(2, 4, 4, 2), iterations=3),
            ValueError,
            "ConvMatrixCapsules: temperature must be a number, or one for each iteration, "
            "iterations=3, got 2",
        ),
        *(
            (
                lambda name=name: ClassMatrixCapsules(2, 3, **{name: float("inf")}),
                ValueError,
                f"ClassMatrixCapsules: {name} must be finite, got inf",
            )
            for name in ("identity", "beta_u", "beta_a")
        ),
        *(
            (
                lambda layer=layer: layer(2, 3)(grid(2, 4, 4, 2, pose=(1, 4))),
                ValueError,
                f"{layer.__name__}: poses has R=1 but the layer has pose=(4, 4) "
                "(poses: (2, 4, 4, 2, 1, 4)); build it with the pose of its input",
            )
            for layer in (ConvMatrixCapsules, ClassMatrixCapsules)
        ),
        (
            lambda: ConvMatrixCapsules(2, 3)(grid(2, 2, 4, 2)),
            ValueError,
            "ConvMatrixCapsules: the kernel, 3x3, is larger than the grid, 2x4 with padding=0; "
            "use a smaller kernel or more padding",
        ),
        (
            lambda: ConvMatrixCapsules(2, 3)(grid(2, 4, 0, 2)),
            ValueError,
            "ConvMatrixCapsules: poses has W=0 but needs W >= 1 (poses: (2, 4, 0, 2, 4, 4))",
        ),
        (
            lambda: ConvMatrixCapsules(2, 3)(Capsules(torch.rand(2, 4, 4, 2, 4, 4), None)),
            TypeError,
            "ConvMatrixCapsules: activations must be a torch.Tensor, got NoneType",
        ),
        (
            lambda: ConvMatrixCapsules(2, 3).half()(grid(2, 4, 4, 2)),
            TypeError,
            "ConvMatrixCapsules: weight is torch.float16 but poses is torch.float32",
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
        (
            lambda: PrimaryMatrixCapsules(3, 2, padding=1)(torch.rand(1, 3, 0, 5)),
            ValueError,
            "PrimaryMatrixCapsules: features has H=0 but needs H >= 1 (features: (1, 3, 0, 5))",
        ),
        (
            lambda: PrimaryMatrixCapsules(3, 2, kernel_size=5, padding=1)(torch.rand(1, 3, 2, 5)),
            ValueError,
            "PrimaryMatrixCapsules: the kernel, 5x5, is larger than the grid, 2x5 with padding=1; "
            "use a smaller kernel or more padding",
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


@pytest.mark.parametrize("layer", [ConvMatrixCapsules(2, 3, 2, 3), ClassMatrixCapsules(2, 3)])
def test_an_empty_batch_and_half_precision(layer):
    empty = layer(grid(0, 8, 8, 2))
    assert all(len(each) == 0 for each in empty if each is not None)
    rounded = copy.deepcopy(layer).half()
    capsules = Capsules(*(each.half() for each in grid(2, 8, 8, 2)))
    # float32 holds the same numbers, and both sum in float32. The results are rounded to 16 bits.
    exact = copy.deepcopy(rounded).float()(Capsules(*(each.float() for each in capsules)))
    for result, expected in zip(rounded(capsules), exact, strict=True):
        if result is not None:
            torch.testing.assert_close(result, expected.half())
