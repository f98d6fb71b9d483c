"""Calibration: any stack starts alive, and nothing but the scaled weights changes."""

import math
import re

import pytest
import torch
from torch import nn

from tritoncaps import Capsules, PrimaryCapsules, RoutedCapsules, ops
from tritoncaps.layers import calibrate, capsule_lengths, dead_layers


def stack(depth):
    """Routings in series, 32 → 10 → … → 10 capsules."""
    first = RoutedCapsules(32, 8, 10, 16)
    return nn.Sequential(first, *(RoutedCapsules(10, 16, 10, 16) for _ in range(depth - 1)))


def behind_convolution(depth):
    """The same behind a convolution with torch's own initialisation, for images of 14 × 14."""
    stem = (nn.Conv2d(1, 8, 7), nn.ReLU(), PrimaryCapsules(8, 2, 8, kernel_size=5, stride=1))
    return nn.Sequential(*stem, *stack(depth))


STACKS = {
    "capsules": (stack, (16, 32, 8)),
    "images": (behind_convolution, (16, 1, 14, 14)),
}


@pytest.fixture(params=STACKS)
def build(request):
    torch.manual_seed(0)
    make, shape = STACKS[request.param]
    return make, torch.rand(shape)


@pytest.mark.parametrize("depth", [2, 5, 10])
def test_every_layer_of_a_stack_gets_the_length(build, depth):
    make, batch = build
    model = make(depth)
    rows = calibrate(model, batch, 0.4)
    assert [row.name for row in rows] == [n for n, m in model.named_children() if is_capsule(m)]
    assert all(abs(row.after - 0.4) < 0.02 for row in rows)
    assert abs(capsule_lengths(model(batch)).mean().item() - rows[-1].after) < 1e-6
    assert dead_layers(model, batch) == []


def is_capsule(module):
    return isinstance(module, (PrimaryCapsules, RoutedCapsules))


def test_a_deep_stack_learns_after_calibration_only(build):
    make, batch = build
    labels = torch.arange(16) % 4
    batch = batch[labels] / 10
    losses = {}
    for calibrated in (False, True):
        torch.manual_seed(0)
        model = make(4)
        if calibrated:
            calibrate(model, batch)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(40):
            loss = ops.margin_loss(capsule_lengths(model(batch)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[calibrated] = loss.item()
    assert losses[False] > 0.8
    assert losses[True] < 0.5


def test_rows_tell_what_was_done():
    torch.manual_seed(0)
    model, batch = stack(3), torch.rand(4, 32, 8)
    weights = [layer.weight.clone() for layer in model]
    rows = calibrate(model, batch)
    for layer, weight, row in zip(model, weights, rows, strict=True):
        torch.testing.assert_close(layer.weight, weight * row.factor)
    again = calibrate(model, batch)
    assert [row.factor for row in again] == [1.0] * 3
    assert str(again[0]) == (
        f"0: mean length {again[0].before:.3g} -> {again[0].after:.3g}, weight times 1"
    )


class Noisy(nn.Module):
    """A model with buffers, dropout and two arguments; its one routing runs twice."""

    def __init__(self):
        super().__init__()
        self.normalise = nn.BatchNorm1d(10)
        self.routing = RoutedCapsules(10, 8, 10, 8)

    def forward(self, u, scale):
        u = nn.functional.dropout(self.normalise(u * scale), 0.2, self.training)
        return self.routing(self.routing(u))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_the_weights_changes(training):
    torch.manual_seed(0)
    model = Noisy().train(training)
    batch = (torch.rand(16, 10, 8), torch.tensor(0.1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    (row,) = calibrate(model, batch)
    assert abs(row.after - 0.5) < 0.01
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        expected = before[name] * (row.factor if name == "routing.weight" else 1)
        torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-6, atol=0)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())

    torch.set_rng_state(state)
    model.load_state_dict(before)
    assert calibrate(model, batch) == [row]


class Activated(nn.Module):
    """A routing of a kind that the package does not know."""

    calibrated_weight = "matrix"
    out_capsules = 40

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(3, 4))

    def forward(self, u):
        poses = u @ self.matrix
        return Capsules(poses, capsule_lengths(ops.squash(poses)))


def test_other_layers_take_part_by_naming_their_weight():
    (row,) = calibrate(Activated(), torch.full((2, 5, 3), 0.01))
    # More than ten outputs share the length of ten.
    assert row.name == "Activated"
    assert abs(row.after - 0.5 * 10 / 40) < 0.002


def test_the_output_of_a_layer_may_be_a_tuple():
    class Pair(RoutedCapsules):
        def forward(self, u):
            return super().forward(u), u

    torch.manual_seed(0)
    (row,) = calibrate(Pair(32, 8, 10, 16), torch.rand(4, 32, 8))
    assert abs(row.after - 0.5) < 0.01


def test_a_frozen_layer_keeps_its_weight():
    model = stack(3)
    model[1].requires_grad_(False)
    kept = model[1].weight.clone()
    rows = calibrate(model, torch.rand(4, 32, 8))
    assert torch.equal(model[1].weight, kept)
    assert rows[1].factor == 1
    assert abs(rows[2].after - 0.5) < 0.01


def test_autocast_sees_the_scaled_weights():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (row,) = calibrate(PrimaryCapsules(1, 2, 8, 9, 2), torch.rand(2, 1, 28, 28), 0.3)
    assert abs(row.after - 0.3) < 0.01


def test_a_model_that_was_compiled_before_is_looked_into():
    model, u = stack(6), torch.rand(4, 32, 8) / 10
    compiled = torch.compile(model, backend="eager")
    compiled(u)
    assert len(dead_layers(compiled, u)) == len(dead_layers(model, u)) > 0


def test_capsules_are_one_argument():
    capsules = Capsules(torch.rand(4, 32, 8), torch.rand(4, 32))
    (row,) = calibrate(Routed(), capsules)
    assert abs(row.after - 0.5) < 0.01


class Routed(RoutedCapsules):
    """Takes poses with activations."""

    def __init__(self):
        super().__init__(32, 8, 10, 16)

    def forward(self, capsules):
        return super().forward(capsules.poses)


class Idle(nn.Module):
    """A model with a routing that does not run."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = stack(1), stack(1)

    def forward(self, u):
        return self.used(u)


def parametrised():
    model = stack(1)
    nn.utils.parametrizations.weight_norm(model[0], "weight")
    return model


def tied():
    model = nn.Sequential(RoutedCapsules(10, 16, 10, 16), RoutedCapsules(10, 16, 10, 16))
    model[1].weight = model[0].weight
    return model


U = torch.full((2, 32, 8), 0.1)
ERRORS = {
    "model": (lambda: calibrate(ops.squash, U), TypeError, "model must be a module, got function"),
    "batch": (lambda: calibrate(stack(1), [U]), TypeError, "batch must be a tensor or a tuple"),
    "length-kind": (lambda: calibrate(stack(1), U, "1"), TypeError, "length must be a number"),
    "length": (
        lambda: calibrate(stack(1), U, 1.0),
        ValueError,
        "length must be in (0, 1), got 1.0",
    ),
    "none": (lambda: calibrate(nn.Linear(8, 8), U), ValueError, "Linear has no capsule layer"),
    "idle": (lambda: calibrate(Idle(), U), ValueError, "model(batch) does not run spare.0"),
    "parametrised": (
        lambda: calibrate(parametrised(), U),
        ValueError,
        "weight of 0 is not a plain",
    ),
    "zeros": (lambda: calibrate(stack(2), 0 * U), ValueError, "0 returns capsules of length 0"),
    "nan": (lambda: calibrate(stack(2), math.nan * U), ValueError, "outputs of 0 are not finite"),
    "tied": (
        lambda: calibrate(tied(), torch.rand(2, 10, 16)),
        ValueError,
        "0 and 1 share one weight; calibrate before you tie them",
    ),
    "too-short": (
        lambda: calibrate(RoutedCapsules(32, 8, 10, 16, pose_bias=True), U, 0.01),
        ValueError,
        "give a larger length, or no bias",
    ),
    "too-long": (
        lambda: calibrate(RoutedCapsules(1, 8, 10, 4), U[:, :1]),
        ValueError,
        "the outputs of RoutedCapsules cannot have a mean length of 0.5 on this batch",
    ),
    "dead": (lambda: dead_layers(ops.squash, U), TypeError, "dead_layers: model must be a module"),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_is_wrong(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_an_error_leaves_the_weights():
    torch.manual_seed(0)
    model = nn.Sequential(RoutedCapsules(32, 8, 1, 8), RoutedCapsules(1, 8, 10, 4))
    before = [layer.weight.clone() for layer in model]
    with pytest.raises(ValueError, match="outputs of 1 cannot have a mean length"):
        calibrate(model, U)
    assert all(torch.equal(a.weight, b) for a, b in zip(model, before, strict=True))


def test_dead_layers_are_named():
    torch.manual_seed(0)
    model = stack(4)
    assert dead_layers(model[:2], U) == []
    dead = dead_layers(model, U / 5)
    assert [layer.name for layer in dead] == ["1", "2", "3"]
    assert all(layer.length < 1e-3 for layer in dead)
    assert dead_layers(nn.Linear(8, 8), U) == []
