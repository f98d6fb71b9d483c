"""Operators with difficult numbers: zeros, denormals, overflow, saturation, long routing, NaN.

A result that the dtype cannot hold has to be inf or NaN. Training would go on with a wrong finite
number, and nobody would notice.
"""

from contextlib import contextmanager

import pytest
import torch
from calls import CALLS

from tritoncaps import _patches, ops, reference
from tritoncaps._operators import INTERPRETED
from tritoncaps.testing import DTYPES as ALL_DTYPES
from tritoncaps.testing import OPERATORS, compare_inputs, draw_inputs, evaluate

# The interpreter takes a tenth of a second even for a routing of the smallest sizes.
BATCHES = (2,) if INTERPRETED else (3, 6)
USUAL_SIZES = {"I": 7, "P": 4, "J": 3, "D": 5}
SIZES = {"I": 3, "P": 2, "J": 3, "D": 2} if INTERPRETED else USUAL_SIZES
J = SIZES["J"]
MANY_ITERATIONS = 4 if INTERPRETED else 50

# tests/kernels tests float64 in interpreted kernels.
DTYPES = (torch.float32,) if INTERPRETED else ALL_DTYPES
TWO_DTYPES = DTYPES if INTERPRETED else (torch.float32, torch.bfloat16)

ALL = list(CALLS)
# It divides by scales, which must not be 0. Its dummy component explains a part at any distance.
LIKELIHOOD = "capsule_mixture_log_prob"
CAPSULES = [name for name in ALL if not name.endswith("_loss") and name != LIKELIHOOD]
ROUTINGS = [name for name in ALL if "coupling?" in CALLS[name][0].outputs]
LOOPS = [name for name in ROUTINGS if "iterations" in CALLS[name][1]]
# Their logits or their normalisation square a sum of prediction vectors.
SQUARES = ["attention_routing", "inverted_attention_routing"]
EM = ["em_routing", "conv_em_routing"]
# The others squash, and their agreement adds up.
SQUASHING = [name for name in LOOPS if name not in SQUARES]

# Interpreted kernels compute with NumPy, which warns about the infinities that these tests make.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Drawn:
    """A call whose prediction vectors have about unit length. Tests change it."""

    def __init__(self, name, B, has_optional=True, sizes=None, **options):
        # EM routing of three inputs rounds so little that luck decides which form is the better.
        sizes = sizes or (USUAL_SIZES if name in EM else SIZES)
        self.operator, usual = CALLS[name]
        self.options = usual | options
        self.B = B
        self.inputs = draw_inputs(
            self.operator,
            {**self.operator.small_sizes, **sizes, "B": B},
            scale=sizes["D"] ** -0.5,
            optional=None if has_optional else (),
        )
        self.first = next(iter(self.inputs))

    def scale(self, factor):
        """Scale the first input, the capsules or the prediction vectors."""
        self.inputs[self.first] = self.inputs[self.first] * factor

    def tensors(self, dtype, device):
        return {name: tensor.to(dtype).to(device) for name, tensor in self.inputs.items()}

    def assert_right(self, dtype, device):
        """Apply the 2x rule to results and gradients."""
        inputs = self.tensors(dtype, device)
        shared = [f"gradient of {name}" for name in ("weight", "prior")]
        unchecked = shared if self._loses_digits(inputs) else ()
        return compare_inputs(self.operator, inputs, self.options, seed=1, unchecked=unchecked)

    def _loses_digits(self, inputs):
        """Whether fused kernels lose digits in the gradients of weight and prior.

        They compute each logit twice, in two orders, and lose as many digits as it has. See
        "Precision" in kernels/README.md, and `test_weight_gradient_loses_the_digits_of_the_logit`.
        """
        runs_kernels = INTERPRETED or inputs[self.first].is_cuda
        if not runs_kernels or "weight" not in inputs or "coupling?" not in self.operator.outputs:
            return False
        if inputs[self.first].dtype == torch.float64:
            return False
        return longest_prediction_vector(inputs, self.options) > 10


def longest_prediction_vector(inputs, options):
    u, weight = inputs["u"].double(), inputs["weight"].double()
    if u.ndim == 5:  # a grid
        u = _patches.patches(u, len(weight), options["stride"])
        weight = weight.flatten(0, 2)
    return reference.prediction_vectors(u, weight).norm(dim=-1).max().item()


def every_call(names):
    """Parametrize by name, batch, and whether the optional inputs are given."""
    rows = [
        pytest.param(name, B, given, id=f"{name}-B{B}" + "-all" * given)
        for name in names
        for B in BATCHES
        for given in ([False, True] if CALLS[name][0].optional else [False])
    ]
    return pytest.mark.parametrize(("name", "B", "has_optional"), rows)


# Small, large, equal, saturated -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@every_call([name for name in ALL if name != LIKELIHOOD])
def test_zeros_give_zeros(device, name, B, has_optional, dtype):
    call = Drawn(name, B, has_optional)
    call.inputs = {key: torch.zeros_like(tensor) for key, tensor in call.inputs.items()}
    results = call.assert_right(dtype, device)
    if name in CAPSULES:  # a present class of length 0 has a loss
        assert not results[call.operator.output_names(call.options)[0]].any()
    if name in ROUTINGS:
        uniform = torch.full_like(results["coupling"], 1 / J)
        torch.testing.assert_close(results["coupling"], uniform)


# A normalisation makes zeros of equal components. Their gradients cancel to mere roundings.
@pytest.mark.parametrize("dtype", DTYPES)
@every_call([name for name in ALL if name != "inverted_attention_routing"])
def test_equal_inputs_are_right(device, name, B, has_optional, dtype):
    """A capsule agrees equally with all outputs, so the coupling is the softmax of the prior."""
    call = Drawn(name, B, has_optional)
    for key in call.inputs.keys() - set(call.operator.optional):
        call.inputs[key] = torch.full_like(call.inputs[key], 0.5)
    results = call.assert_right(dtype, device)
    if name in ROUTINGS and not has_optional:
        uniform = torch.full_like(results["coupling"], 1 / J)
        torch.testing.assert_close(results["coupling"], uniform)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", ["denormal", "1e-20", "1e20"])
@every_call(CAPSULES)
def test_tiny_and_huge_inputs_are_right(device, name, B, has_optional, magnitude, dtype):
    """Their squares overflow or underflow float32, but the results do not.

    Where a call squares its prediction vectors, docs/operators.md promises half of the exponents.
    """
    if magnitude == "1e20":
        # EM routing divides squares of votes by variances and masses as small as 1e-4 and 1e-20.
        limited = dict.fromkeys(SQUARES, "1e15") | dict.fromkeys(EM, "1e3")
        magnitude = limited.get(name, magnitude)
    if dtype == torch.float16 and magnitude != "denormal":
        magnitude = {"1e-20": "1e-3"}.get(magnitude, "1e3")  # float16 cannot hold their squares
    call = Drawn(name, B, has_optional)
    call.scale(torch.finfo(dtype).tiny / 8 if magnitude == "denormal" else float(magnitude))
    call.assert_right(dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [30.0, 300.0])
@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_saturated_routing_is_right(device, name, B, length, dtype):
    """Agreements in the hundreds make each coupling 0 or 1, and v as long as a unit vector."""
    call = Drawn(name, B, has_optional=False)
    # A routing finds poses that agree. Those of a single pass are drawn.
    call.scale(length if name in SQUASHING else 4 * length)
    results = call.assert_right(dtype, device)
    largest = results["coupling"].double().amax(dim=-1)
    assert (largest > 0.99).double().mean() > 0.8
    if name in LOOPS:
        assert (results["v"].double().norm(dim=-1) > 0.9).double().mean() > 0.6


@pytest.mark.parametrize("length", [3.0, 30.0, 300.0, 3000.0])
def test_weight_gradient_loses_the_digits_of_the_logit(device, length):
    """The fused kernels have their own bound: |logit| roundings of the largest gradient."""
    call = Drawn("fused_dynamic_routing", BATCHES[-1], has_optional=False)
    call.scale(length)
    inputs = call.tensors(torch.float32, device)
    exact_inputs = {name: tensor.double() for name, tensor in inputs.items()}
    actual = evaluate(call.operator, inputs, call.options)["gradient of weight"]
    exact = evaluate(call.operator, exact_inputs, call.options, call.operator.reference)
    exact = exact["gradient of weight"]
    # The V of three iterations is at most 2 long.
    largest_logit = 2 * longest_prediction_vector(inputs, call.options)
    error = (actual - exact).abs().max() / exact.abs().max()
    assert error <= torch.finfo(torch.float32).eps * (8 + largest_logit)


@pytest.mark.parametrize("dtype", DTYPES)
@every_call(LOOPS)
def test_many_iterations_are_right(device, name, B, has_optional, dtype):
    """Prediction vectors are so short that many iterations do not amplify a rounding."""
    call = Drawn(name, B, has_optional, iterations=MANY_ITERATIONS)
    call.scale(1 / 4)
    call.assert_right(dtype, device)


@pytest.mark.parametrize("dtype", TWO_DTYPES)
@pytest.mark.parametrize("scale", [10.0, 1e4])
@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("name", LOOPS)
def test_many_iterations_of_long_prediction_vectors_stay_finite(device, name, B, scale, dtype):
    """Here, iterations amplify a rounding without bound, so there are no digits to compare."""
    call = Drawn(name, B, iterations=MANY_ITERATIONS)
    call.scale(scale)
    results = evaluate(call.operator, call.tensors(dtype, device), call.options)
    for what, result in results.items():
        assert torch.isfinite(result).all(), what
    roundings = torch.finfo(dtype).eps
    if name in SQUASHING:
        assert (results["v"].double().norm(dim=-1) <= 1 + 8 * roundings).all()
    total = results["coupling"].double().sum(dim=-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=4 * roundings, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@every_call([name for name in ALL if not name.startswith("squash") and name != LIKELIHOOD])
def test_what_overflows_is_not_finite(device, name, B, has_optional, dtype):
    """The square of a length, or û itself, overflows the dtype, so no number would be right."""
    beyond = torch.finfo(torch.promote_types(dtype, torch.float32)).max ** 0.75
    call = Drawn(name, B, has_optional)
    if name == "margin_loss":
        call.inputs[call.first] = torch.full_like(call.inputs[call.first], beyond)
    elif "weight" in call.inputs:
        call.scale(beyond)
        call.inputs["weight"] = call.inputs["weight"] * beyond
    else:
        call.inputs[call.first] = torch.full_like(call.inputs[call.first], float("inf"))
    results = evaluate(call.operator, call.tensors(dtype, device), call.options)
    assert not results[call.operator.output_names(call.options)[0]].isfinite().any()


# One bad image ------------------------------------------------------------------------------------


BAD = {"a NaN": (float("nan"), (1, 0)), "an image of inf": (float("inf"), (1,))}
if not INTERPRETED:
    BAD |= {"an image of NaN": (float("nan"), (1,)), "an inf": (float("inf"), (1, 0))}


@pytest.mark.parametrize("dtype", TWO_DTYPES)
@pytest.mark.parametrize(("bad", "place"), BAD.values(), ids=BAD)
@every_call(ALL)
def test_a_bad_image_stays_alone(device, name, B, has_optional, bad, place, dtype):
    """It spoils what the mathematics says it spoils, and changes no other bit.

    The reference shows which results a bad component reaches. Those are not finite. Everything
    else, above all the other images, has the same bits as with a good image.
    """
    call = Drawn(name, B, has_optional)
    good = call.tensors(dtype, device)
    spoilt = good | {call.first: good[call.first].clone()}
    spoilt[call.first][place] = bad
    expected, actual, exact, exact_spoilt = (
        evaluate(call.operator, inputs, call.options, function)
        for function in (None, call.operator.reference)
        for inputs in (good, spoilt)
    )
    axes = {**call.operator.axes, **call.operator.outputs}
    for what, result in actual.items():
        reached = ~exact_spoilt[what].isfinite()
        untouched = exact_spoilt[what] == exact[what]
        assert (~result[reached].isfinite()).all(), what
        assert torch.equal(result[untouched], expected[what][untouched]), what
        named = axes.get(what.removeprefix("gradient of "), axes.get(f"{what}?"))
        if named.startswith("B"):
            assert untouched[0].all(), f"{what}: the reference mixes images"
            assert untouched[2:].all(), f"{what}: the reference mixes images"
        # Every output capsule depends on every input capsule, unless each sees a patch of them.
        if name in LOOPS and not name.startswith("conv"):
            lost = result[1] if named.startswith("B") else result
            assert lost.isnan().all(), what


def test_a_bad_image_reaches_its_own_gradient_through_the_loss(device):
    """The margin loss of a NaN pose has gradient 0. The gradient of u is still NaN."""
    inputs = Drawn("fused_dynamic_routing", 3).tensors(torch.float32, device)
    u = inputs["u"]
    u[1, 0, 0] = float("nan")
    u.requires_grad_()
    activations = ops.fused_dynamic_routing(u, inputs["weight"]).norm(dim=-1)
    loss = ops.margin_loss(activations, torch.arange(3, device=device) % J, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(loss.sum(), u)
    assert grad[1].isnan().all()
    assert grad[::2].isfinite().all()


# The same bits again ------------------------------------------------------------------------------


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


REPEATED = [(9, 2, 3, 2)] if INTERPRETED else [(67, 4, 10, 16), (33, 8, 5, 7), (1, 1, 1, 1)]


@pytest.mark.parametrize("dtype", TWO_DTYPES)
@pytest.mark.parametrize("sizes", REPEATED, ids=str)
@every_call(ALL)
def test_a_call_is_repeated_bit_for_bit(device, monkeypatch, name, B, has_optional, sizes, dtype):
    """Also in torch's deterministic mode, which also fills memory that nobody has written."""
    call = Drawn(name, B, has_optional, dict(zip("IPJD", sizes, strict=True)))
    inputs = call.tensors(dtype, device)
    # Without this, torch refuses cuBLAS.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    first, second = (evaluate(call.operator, inputs, call.options) for _ in range(2))
    with deterministic():
        third = evaluate(call.operator, inputs, call.options)
    for what, bits in first.items():
        assert torch.equal(second[what], bits), what
        assert torch.equal(third[what], bits), what


def test_every_operator_is_here():
    assert {operator.name for operator, _ in CALLS.values()} == set(OPERATORS)
    assert {"squash-quadratic", "squash-exponential", "routing_pass"} <= set(CALLS)
