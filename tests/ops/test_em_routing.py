"""EM routing: its convolution, its options, and the mistakes that other implementations make."""

import math
from functools import partial

import pytest
import torch

from tritoncaps import ops, reference
from tritoncaps.reference._em_routing import NO_MASS
from tritoncaps.testing import OPERATORS, compare_inputs, draw_inputs, evaluate, normal

EM, CONV = OPERATORS["em_routing"], OPERATORS["conv_em_routing"]


def grid_inputs(B=2, H=7, W=6, C=3, R=4, P=4, J=5, Q=4, K=3):
    """A grid of matrix capsules and the weights of a convolution."""
    return {
        "poses": normal(B, H, W, C, R, P),
        "activations": normal(B, H, W, C, seed=1).sigmoid(),
        "weight": normal(K, K, C, P, J, Q) / P**0.5,
        "beta_u": normal(J),
        "beta_a": normal(J, seed=1),
    }


def convolution_by_loops(inputs, iterations, stride, competition, temperature, min_variance=1e-4):
    """The paper's procedure 1 in loops over images, positions and votes."""
    poses, activations, weight, beta_u, beta_a = inputs.values()
    B, H, W, C = activations.shape
    K, J = len(weight), len(beta_u)
    corners = [(y, x) for y in range(0, H - K + 1, stride) for x in range(0, W - K + 1, stride)]
    results = []
    for b in range(B):
        # The votes for each output capsule (corner, j), by the input capsule (y, x, c).
        votes = {
            ((y, x), j): {
                (y + ky, x + kx, c): poses[b, y + ky, x + kx, c] @ weight[ky, kx, c, :, j]
                for ky in range(K)
                for kx in range(K)
                for c in range(C)
            }
            for y, x in corners
            for j in range(J)
        }
        rivals = {}  # the output capsules that compete for an input capsule
        for output, of in votes.items():
            for i in of:
                key = (i, output[0] if competition == "position" else None)
                rivals.setdefault(key, []).append(output)
        shares = {(i, output): 1 / len(r) for (i, _), r in rivals.items() for output in r}
        fitted = {}
        for t in range(iterations):
            if t > 0:
                scores = {}
                for output, of in votes.items():
                    mean, variance, logit = fitted[output]
                    for i, vote in of.items():
                        p = (vote - mean) ** 2 / variance + (2 * math.pi * variance).log()
                        scores[i, output] = logit.sigmoid().log() - p.sum() / 2
                for (i, _), r in rivals.items():
                    of_rivals = torch.stack([scores[i, output] for output in r]).softmax(0)
                    shares.update(zip([(i, output) for output in r], of_rivals, strict=True))
            for output, of in votes.items():
                share = torch.stack([shares[i, output] * activations[b][i] for i in of])
                stacked = torch.stack(list(of.values()))
                mass, share = share.sum(), share[:, None, None] / share.sum()
                mean = (share * stacked).sum(0)
                variance = (share * (stacked - mean) ** 2).sum(0) + min_variance
                cost = (beta_u[output[1]] + variance.log() / 2).sum() * mass
                logit = temperature * (beta_a[output[1]] - cost)
                fitted[output] = mean, variance, logit
        results.append([fitted[output] for output in votes])
    return tuple(torch.stack([torch.stack([f[n] for f in r]) for r in results]) for n in (0, 2))


@pytest.mark.parametrize("competition", ["children", "position"])
def test_the_reference_of_the_convolution_agrees_with_loops(competition):
    inputs = grid_inputs(B=1, H=6, W=5, C=2, J=2, P=2, Q=2, R=2)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    v, _, logits = reference.conv_em_routing(
        **inputs,
        iterations=3,
        stride=2,
        competition=competition,
        temperature=0.3,
        return_logits=True,
    )
    v_loops, logits_loops = convolution_by_loops(inputs, 3, 2, competition, 0.3)
    torch.testing.assert_close(v.flatten(1, 3), v_loops)
    torch.testing.assert_close(logits.flatten(1), logits_loops)
    actual, expected = (
        torch.autograd.grad(v.square().sum() + logits.sin().sum(), list(inputs.values()))
        for v, logits in ((v, logits), (v_loops, logits_loops))
    )
    torch.testing.assert_close(actual, expected)


# The operator ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["full", "last"])
@pytest.mark.parametrize("competition", ["children", "position"])
@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_results_and_all_gradients_are_those_of_the_reference(
    iterations, competition, gradient, device
):
    inputs = draw_inputs(CONV, device=device) | {"weight": normal(3, 3, 3, 4, 5, 3).to(device) / 2}
    options = {"stride": 2, "padding": 1, "competition": competition, "gradient": gradient}
    options |= {"temperature": [0.2 * t for t in range(1, iterations + 1)]}
    options |= {"iterations": iterations, "return_logits": True, "return_assignment": True}
    compare_inputs(CONV, inputs, options)  # in float64: to 1e-10


def test_padding_adds_nothing(device):
    """Outputs whose patch has no padding stay the same."""
    inputs = draw_inputs(CONV, {**CONV_SIZES, "H": 5, "W": 5}, device=device)
    options = {"stride": 1, "competition": "position"}
    inner = ops.conv_em_routing(**inputs, **options)
    padded = ops.conv_em_routing(**inputs, **options, padding=1)
    for result, expected in zip(padded, inner, strict=True):
        torch.testing.assert_close(result[:, 1:-1, 1:-1], expected, rtol=0, atol=1e-14)
    # With padding 2, the patch at the corner is all padding, so it has no mass.
    pose, activation = ops.conv_em_routing(**inputs, padding=2)
    assert not pose[:, 0, 0].any()
    expected = torch.sigmoid(0.01 * (1 - 0.95**2) * inputs["beta_a"])
    torch.testing.assert_close(activation[:, 0, 0], expected.expand_as(activation[:, 0, 0]))


CONV_SIZES = {"B": 2, "C": 2, "R": 2, "P": 3, "J": 3, "Q": 2, "K": 2}


def test_the_rivals_for_an_input_capsule_share_one_unit(device):
    """The rivals are the outputs of all positions that it feeds, or those of one position."""
    inputs = draw_inputs(CONV, {**CONV_SIZES, "H": 3, "W": 3}, device=device)
    for competition in ("children", "position"):
        *_, assignment = ops.conv_em_routing(
            **inputs, competition=competition, return_assignment=True
        )
        of_rows = assignment.sum(dim=-1)  # (B, 2, 2, 2, 2, C)
        if competition == "position":
            torch.testing.assert_close(of_rows, torch.ones_like(of_rows))
        # The input in the middle is under the kernel at all four positions.
        total = sum(of_rows[:, y, x, 1 - y, 1 - x] for y in (0, 1) for x in (0, 1))
        expected = torch.full_like(total, 1 if competition == "children" else 4)
        torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_single_output_gets_every_input_in_full(iterations, device):
    inputs = draw_inputs(EM, EM.small_sizes | {"J": 1}, device=device)
    options = {"temperature": 0.5, "return_logits": True, "return_assignment": True}
    options = EM.defaults | options | {"iterations": iterations}
    results = compare_inputs(EM, inputs, options)  # in float64: to 1e-10
    assert (results["assignment"] == 1).all()


def test_an_offset_is_added_to_every_vote(device):
    inputs = draw_inputs(EM, device=device)
    moved = inputs | {"offset": inputs["offset"] + 3}
    (v, a), (v_moved, a_moved) = (ops.em_routing(**given) for given in (inputs, moved))
    torch.testing.assert_close(v_moved, v + 3)
    torch.testing.assert_close(a_moved, a)


# Mistakes of other implementations ----------------------------------------------------------------


def drawn(device, I=12):
    return draw_inputs(
        EM,
        {"B": 3, "I": I, "R": 4, "P": 4, "J": 5, "Q": 4},
        dtype=torch.float32,
        device=device,
        optional=(),
    )


def identical(device):
    inputs = drawn(device)
    return (
        inputs
        | {name: inputs[name][:, :1].expand_as(inputs[name]) for name in ("poses",)}
        | {"weight": inputs["weight"][:1].expand_as(inputs["weight"])}
    )


def with_activations(device, active):
    """The first `active` input capsules are active, the others are not."""
    inputs = drawn(device)
    inputs["activations"][:, active:] = 0
    return inputs


def only(device, i):
    """Input capsule i alone is active."""
    inputs = drawn(device)
    inputs["activations"][:, torch.arange(12, device=device) != i] = 0
    return inputs


def far_from_zero(device, deviations):
    inputs = drawn(device)
    return inputs | {"offset": torch.full((12, 4, 4), float(deviations), device=device)}


EXTREMES = {
    "one input capsule": partial(drawn, I=1),
    "one active input capsule": partial(with_activations, active=1),
    "the sixth input capsule alone": partial(only, i=5),
    "no active input capsule": partial(with_activations, active=0),
    "identical votes": identical,
    **{f"{n} deviations from zero": partial(far_from_zero, deviations=n) for n in (5, 30, 1000)},
    "16 Gaussians that underflow": lambda device: {
        name: tensor * (30 if name == "poses" else 1) for name, tensor in drawn(device).items()
    },
}


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("inputs", EXTREMES.values(), ids=EXTREMES)
def test_extremes_are_finite_and_right(inputs, iterations, device):
    options = {"iterations": iterations, "temperature": 0.5}
    options |= {"return_logits": True, "return_assignment": True}
    compare_inputs(EM, inputs(device), EM.defaults | options)


@pytest.mark.parametrize("inputs", EXTREMES.values(), ids=EXTREMES)
def test_extremes_are_finite_after_more_iterations(inputs, device):
    results = evaluate(EM, inputs(device), EM.defaults | {"iterations": 4, "temperature": 0.5})
    for name, result in results.items():
        assert result.isfinite().all(), name


@pytest.mark.parametrize("iterations", [1, 2, 4])
@pytest.mark.parametrize("operator", [EM, CONV], ids=str)
def test_long_votes_are_finite(operator, iterations, device):
    """docs/operators.md promises it up to a length of 10¹⁰."""
    inputs = draw_inputs(operator, dtype=torch.float32, device=device)
    inputs["poses"] *= 1e10
    results = evaluate(operator, inputs, operator.defaults | {"iterations": iterations})
    for name, result in results.items():
        assert result.isfinite().all(), name


def test_without_mass_a_pose_is_zero_and_passes_no_gradient(device):
    inputs = with_activations(device, 0)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    v, _, logits = ops.em_routing(*leaves, return_logits=True)
    assert not v.any()
    poses, activations, weight, beta_u, beta_a = torch.autograd.grad(logits.sum() + v.sum(), leaves)
    assert not poses.any() and not weight.any() and not beta_u.any()
    assert beta_a.all()
    assert activations.all()  # how the logits start to change


def test_the_activations_of_input_capsules_matter(device):
    """Where a second normalisation of the assignment divides by them, they do not."""
    inputs = drawn(device)
    v, a = ops.em_routing(**inputs)
    inputs["activations"] = inputs["activations"].flip(1)
    v_flipped, a_flipped = ops.em_routing(**inputs)
    assert (v - v_flipped).abs().max() > 0.1
    assert not torch.allclose(a, a_flipped)


def test_beta_u_counts_once_for_each_component(device):
    inputs = drawn(device)
    options = {"temperature": 1.0, "iterations": 1, "return_logits": True}
    *_, z = ops.em_routing(**inputs, **options)
    *_, z_more = ops.em_routing(**inputs | {"beta_u": inputs["beta_u"] + 1}, **options)
    mass = inputs["activations"].sum(dim=1, keepdim=True) / 5
    torch.testing.assert_close(z - z_more, (16 * mass).expand_as(z))


def test_only_last_stops_the_gradient_of_the_assignments(device):
    """With "last" the assignments are constants, so the gradients differ from those of "full"."""
    inputs = {name: tensor.double() for name, tensor in drawn(device).items()}
    full, last = (
        evaluate(EM, inputs, EM.defaults | {"gradient": gradient}) for gradient in ("full", "last")
    )
    for name in ("poses", "activations", "weight"):
        assert not torch.allclose(full[f"gradient of {name}"], last[f"gradient of {name}"])


# Arguments and memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [EM, CONV], ids=str)
@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"min_variance": 0}, "min_variance must be > 0, got 0; an output capsule"),
        (ValueError, {"min_variance": -1.0}, "min_variance must be >= 0 and finite, got -1.0"),
        (ValueError, {"min_variance": math.inf}, "min_variance must be >= 0 and finite, got inf"),
        (TypeError, {"min_variance": None}, "min_variance must be a number, got NoneType"),
        (TypeError, {"min_variance": [1e-4]}, "min_variance must be a number, got list"),
        (ValueError, {"temperature": -0.5}, "temperature must be >= 0 and finite, got -0.5"),
        (ValueError, {"temperature": math.inf}, "temperature must be >= 0 and finite, got inf"),
        *(
            (
                ValueError,
                {"temperature": schedule},
                "temperature must be a number, or one for each iteration, iterations=2, got "
                f"{len(schedule)}",
            )
            for schedule in ([], [0.1], (0.1, 0.2, 0.3))
        ),
        (ValueError, {"temperature": [0.1, -0.2]}, "temperature must be >= 0 and finite, got -0.2"),
        (ValueError, {"temperature": [math.nan, 0.2]}, "temperature must be a number, got nan"),
        (TypeError, {"temperature": [0.1, "cold"]}, "temperature must be a number, got str"),
        (TypeError, {"temperature": [0.1, None]}, "temperature must be a number, got NoneType"),
        (TypeError, {"temperature": {0.1, 0.2}}, "temperature must be a number, got set"),
        (ValueError, {"gradient": "none"}, 'gradient must be "full" or "last", got \'none\''),
        (ValueError, {"iterations": 0}, "iterations must be >= 1, got 0"),
    ],
)
def test_wrong_options_are_refused(operator, error, options, message, device):
    inputs = draw_inputs(operator, device=device)
    with pytest.raises(error) as caught:
        operator.function(**inputs, **{"iterations": 2, **options})
    assert str(caught.value).startswith(f"{operator}: {message}")


@pytest.mark.parametrize("schedule", [[0.0, 0.7], (0, 1)], ids=str)
def test_a_schedule_is_a_temperature_for_each_iteration(schedule, device):
    inputs = drawn(device)
    results = ops.em_routing(**inputs, temperature=schedule)
    expected = reference.em_routing(**inputs, temperature=list(map(float, schedule)))
    torch.testing.assert_close(results, expected)
    # The first logits are 0 whatever beta_a is, so the poses do not change.
    moved = inputs | {"beta_a": inputs["beta_a"] + 1}
    v, _ = ops.em_routing(**moved, temperature=schedule)
    torch.testing.assert_close(v, results[0], rtol=0, atol=0)


def test_a_kernel_larger_than_the_grid_is_refused(device):
    inputs = draw_inputs(CONV, {**CONV_SIZES, "H": 1, "W": 5}, device=device)
    with pytest.raises(ValueError, match=r"^conv_em_routing: .*2x2.*1x5"):
        ops.conv_em_routing(**inputs)


@pytest.mark.parametrize("function", [ops.em_routing, reference.em_routing])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_largest_mass_that_counts_as_none(function, dtype, device):
    """It is the same on every path. On a CPU float32 runs in C++, and float64 in plain torch."""
    none = torch.tensor(NO_MASS, dtype=dtype, device=device)
    mass = torch.stack([none, none.nextafter(torch.ones_like(none))])
    poses, weight = (torch.ones(n, 1, 1, 1, dtype=dtype, device=device) for n in (2, 1))
    beta = torch.zeros(1, dtype=dtype, device=device)
    poses.requires_grad_()
    v, _ = function(poses, mass[:, None], weight, beta, beta, iterations=1)
    (grad,) = torch.autograd.grad(v.sum(), poses)
    for result in (v, grad):
        assert result.flatten().bool().tolist() == [False, True]
