"""The operators where numbers are hard: zeros, denormals, overflow, saturation, long routing, NaN.

What must hold is said in each assertion. A result that no number of the dtype can hold has to be
inf or NaN: a wrong finite number would be trained on unseen.
"""

from contextlib import contextmanager

import pytest
import torch
from agreement import DTYPES as ALL_DTYPES
from agreement import assert_agrees, gradients, round_once

from tritoncaps import ops, reference
from tritoncaps._operators import INTERPRETED
from tritoncaps.models import CapsNet, DeepCapsNet

OPS = ("squash", "prediction_vectors", "dynamic_routing", "fused_dynamic_routing", "margin_loss")
ROUTINGS = ("dynamic_routing", "fused_dynamic_routing")
SHARED = ("grad of input 1", "grad of input 2")  # by all images: the weight, the prior
# Up to B = P the torch path of the fused routing makes û, beyond it does not: two ways to compute.
# Interpreted, a routing takes a tenth of a second even of the smallest sizes.
BATCHES = (2,) if INTERPRETED else (3, 6)
SIZES = (3, 2, 3, 2) if INTERPRETED else (7, 4, 3, 5)  # I, P, J, D
J = SIZES[2]
MANY = 4 if INTERPRETED else 50  # iterations

# Interpreted, tests/test_kernels.py has float64.
DTYPES = (torch.float32,) if INTERPRETED else ALL_DTYPES
TWO_DTYPES = DTYPES if INTERPRETED else (torch.float32, torch.bfloat16)

# Interpreted, a kernel computes with NumPy, which warns of the infinities that these tests make.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inputs_of(name, B, with_prior=False, sizes=SIZES):
    """Inputs in float64, of which û is about as long as a unit vector; the batch comes first."""
    I, P, J, D = sizes
    if name == "squash":
        return [normal(B, I, D) / D**0.5]
    if name == "margin_loss":
        return [normal(B, J).abs().clamp(max=2) / 2]
    if name == "dynamic_routing":
        tensors = [normal(B, I, J, D) / D**0.5]
    else:
        tensors = [normal(B, I, P) / P**0.5, normal(I, P, J, D) / D**0.5]
    return [*tensors, normal(I, J)] if with_prior else tensors


def call_of(module, name, **options):
    """An operator of a module as a function of `inputs_of`."""
    function = getattr(module, name)
    if name == "margin_loss":
        return lambda activations: function(
            activations,
            torch.arange(len(activations), device=activations.device) % activations.shape[1],
            reduction="none",
        )
    if name not in ROUTINGS:
        return function
    count = 1 if name == "dynamic_routing" else 2

    def route(*tensors):
        prior = tensors[count] if len(tensors) > count else None
        return function(*tensors[:count], prior=prior, return_coupling=True, **options)

    return route


def names_of(name, inputs):
    outputs = ["v", "coupling"] if name in ROUTINGS else ["out"]
    return [*outputs, *("grad of input " + str(n) for n in range(len(inputs)))]


def evaluate(call, inputs):
    outputs, grads = gradients(call, inputs, seed=0)
    return outputs + grads


def assert_right(name, inputs, dtype, device, **options):
    """Outputs and gradients by the 2x rule.

    Where a square of the plain form overflows, the truth rounded once stands in for it.
    """
    inputs = [tensor.to(dtype).to(device) for tensor in inputs]
    oracle = call_of(reference, name, **options)
    actual = evaluate(call_of(ops, name, **options), inputs)
    plain = evaluate(oracle, inputs)
    exact = evaluate(oracle, [tensor.double() for tensor in inputs])
    rounded = evaluate(oracle, [round_once(tensor, seed=1) for tensor in inputs])
    results = zip(names_of(name, inputs), actual, plain, exact, rounded, strict=True)
    for what, result, inexact, truth, sensitive in results:
        assert result.dtype == dtype, what
        if what in SHARED and loses_digits(name, inputs):
            continue
        inexact = torch.where(inexact.isfinite(), inexact, truth.to(dtype))
        assert_agrees(what, result, inexact, truth, sensitive)
    return actual


def loses_digits(name, inputs):
    """Whether the gradients of weight and prior are such that the fused kernels lose digits of.

    They compute each logit twice, in two orders, and lose as many digits as it has: see "Precision"
    in kernels/README.md, and `test_the_weights_gradient_loses_what_the_logit_has`.
    """
    runs_kernels = INTERPRETED or inputs[0].is_cuda
    if not runs_kernels or name != "fused_dynamic_routing" or inputs[0].dtype == torch.float64:
        return False
    return longest_vote(inputs) > 10


def longest_vote(inputs):
    u, weight = (tensor.double() for tensor in inputs[:2])
    return reference.prediction_vectors(u, weight).norm(dim=-1).max().item()


# Small, large, equal, saturated -------------------------------------------------------------------


def every_case_of(names):
    """Parameters name, B and with_prior; a prior for the routings alone."""
    cases = [
        (name, B, with_prior)
        for name in names
        for B in BATCHES
        for with_prior in ([False, True] if name in ROUTINGS else [False])
    ]
    ids = [f"{name}-B{B}{'-prior' * with_prior}" for name, B, with_prior in cases]
    return pytest.mark.parametrize(("name", "B", "with_prior"), cases, ids=ids)


@pytest.mark.parametrize("dtype", DTYPES)
@every_case_of(OPS)
def test_zeros_give_zeros(device, name, B, with_prior, dtype):
    inputs = [torch.zeros_like(tensor) for tensor in inputs_of(name, B, with_prior)]
    out, *rest = assert_right(name, inputs, dtype, device)
    if name != "margin_loss":  # a present class of length 0 has a loss
        assert (out == 0).all()
    if name in ROUTINGS:
        torch.testing.assert_close(rest[0], torch.full_like(rest[0], 1 / J))


@pytest.mark.parametrize("dtype", DTYPES)
@every_case_of(OPS)
def test_equal_inputs_are_right(device, name, B, with_prior, dtype):
    """Every agreement of a capsule is the same, so the coupling is the softmax of the prior."""
    inputs = inputs_of(name, B, with_prior)
    equal = [torch.full_like(tensor, 0.5) for tensor in inputs[: len(inputs) - with_prior]]
    inputs[: len(equal)] = equal
    _, *rest = assert_right(name, inputs, dtype, device)
    if name in ROUTINGS and not with_prior:
        torch.testing.assert_close(rest[0], torch.full_like(rest[0], 1 / J))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", ["denormal", "1e-20", "1e20"])
@every_case_of(OPS[:-1])
def test_tiny_and_huge_inputs_are_right(device, name, B, with_prior, magnitude, dtype):
    """Squares of these lie outside of float32, results do not."""
    if dtype == torch.float16 and magnitude != "denormal":
        magnitude = {"1e-20": "1e-3", "1e20": "1e3"}[magnitude]  # whose squares it cannot hold
    scale = torch.finfo(dtype).tiny / 8 if magnitude == "denormal" else float(magnitude)
    inputs = inputs_of(name, B, with_prior)
    inputs[0] = inputs[0] * scale
    assert_right(name, inputs, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [30.0, 300.0])
@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_saturated_routing_is_right(device, name, B, length, dtype):
    """Agreements in the hundreds: each coupling is 0 or 1, and v as long as a unit vector."""
    inputs = inputs_of(name, B)
    inputs[0] = inputs[0] * length
    v, coupling, *_ = assert_right(name, inputs, dtype, device)
    largest = coupling.double().amax(dim=-1)
    assert (largest > 0.99).double().mean() > 0.8
    assert (v.double().norm(dim=-1) > 0.9).double().mean() > 0.6


@pytest.mark.parametrize("length", [3.0, 30.0, 300.0, 3000.0])
def test_the_weights_gradient_loses_what_the_logit_has(device, length):
    """The fused kernels' own bound, relative to the largest gradient: |logit| roundings."""
    inputs = [
        tensor.float().to(device) for tensor in inputs_of("fused_dynamic_routing", BATCHES[-1])
    ]
    inputs[0] = inputs[0] * length
    results = [
        evaluate(call_of(module, "fused_dynamic_routing"), tensors)[3]
        for module, tensors in ((ops, inputs), (reference, [t.double() for t in inputs]))
    ]
    error = (results[0] - results[1]).abs().max() / results[1].abs().max()
    largest_logit = 2 * longest_vote(inputs)  # the V of three iterations is at most 2 long
    assert error <= torch.finfo(torch.float32).eps * (8 + largest_logit)


@pytest.mark.parametrize("dtype", DTYPES)
@every_case_of(ROUTINGS)
def test_many_iterations_are_right(device, name, B, with_prior, dtype):
    """Of votes so short that many iterations do not amplify a rounding."""
    inputs = inputs_of(name, B, with_prior)
    inputs[0] = inputs[0] / 4
    assert_right(name, inputs, dtype, device, iterations=MANY)


@pytest.mark.parametrize("dtype", TWO_DTYPES)
@pytest.mark.parametrize("scale", [10.0, 1e4])
@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_many_iterations_of_long_votes_stay_finite(device, name, B, scale, dtype):
    """Many iterations of these amplify a rounding without bound: there are no digits to compare."""
    inputs = inputs_of(name, B, with_prior=True)
    inputs[0] = inputs[0] * scale
    inputs = [tensor.to(dtype).to(device) for tensor in inputs]
    call = call_of(ops, name, iterations=MANY)
    v, coupling, *grads = evaluate(call, inputs)
    for result in (v, coupling, *grads):
        assert torch.isfinite(result).all()
    assert (v.double().norm(dim=-1) <= 1 + 8 * torch.finfo(dtype).eps).all()
    total = coupling.double().sum(dim=-1)
    torch.testing.assert_close(
        total, torch.ones_like(total), rtol=4 * torch.finfo(dtype).eps, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@every_case_of([*OPS[1:]])
def test_what_overflows_is_not_finite(device, name, B, with_prior, dtype):
    """The square of a length, and û itself, are beyond the dtype: no number would be right."""
    beyond = torch.finfo(torch.promote_types(dtype, torch.float32)).max ** 0.75
    inputs = inputs_of(name, B, with_prior)
    if name == "margin_loss":
        inputs[0] = torch.full_like(inputs[0], beyond)
    elif name == "dynamic_routing":
        inputs[0] = torch.full_like(inputs[0], float("inf"))
    else:
        inputs[:2] = [inputs[0] * beyond, inputs[1] * beyond]
    inputs = [tensor.to(dtype).to(device) for tensor in inputs]
    out, *_ = evaluate(call_of(ops, name), inputs)
    assert not out.isfinite().any()


# One bad image ------------------------------------------------------------------------------------


BAD = [(float("nan"), False), (float("inf"), True)]
if not INTERPRETED:
    BAD += [(float("nan"), True), (float("inf"), False)]


@pytest.mark.parametrize("component", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("beside", [0.0, 1.0, 1e30])
def test_one_bad_component_spoils_its_pose(device, beside, component):
    """A length that is not a number leaves no component one."""
    s = torch.tensor([[component, beside], [1.0, beside]], device=device, requires_grad=True)
    v = ops.squash(s)
    (grad,) = torch.autograd.grad(v, s, torch.ones_like(v))
    for result in (v, grad):
        assert result[0].isnan().all()
        assert result[1].isfinite().all()


@pytest.mark.parametrize("dtype", TWO_DTYPES)
@pytest.mark.parametrize(("bad", "whole"), BAD)
@every_case_of(OPS)
def test_a_bad_image_stays_alone(device, name, B, with_prior, bad, whole, dtype):
    """The outputs and the gradient of that image are lost, and of what all images share.

    Those of the other images are, to the bit, what they are with a good image in its place. That
    they agree with the batch without it, tests/test_ops.py says, and tests/test_kernels.py bit by
    bit for the kernels.
    """
    inputs = [tensor.to(dtype).to(device) for tensor in inputs_of(name, B, with_prior)]
    spoilt = [inputs[0].clone(), *inputs[1:]]
    place = (1,) if whole else (1, 0)  # image, capsule
    spoilt[0][place] = bad
    results = zip(
        names_of(name, inputs),
        evaluate(call_of(ops, name), inputs),
        evaluate(call_of(ops, name), spoilt),
        strict=True,
    )
    for what, expected, result in results:
        lost = torch.zeros_like(result, dtype=torch.bool)
        if what in SHARED:
            # Every image adds to these. û is linear: only its own capsules' weight meets a bad one.
            lost[0 if name == "prediction_vectors" and not whole else ...] = True
        elif name in ROUTINGS:
            lost[1] = True  # every output capsule hears from every input capsule
        elif name == "margin_loss" and what == "out":
            lost[1] = True
        elif what == "out" or name == "squash":
            lost[place] = True
        if name == "margin_loss" and what != "out":
            # torch.clamp has gradient 0 at NaN. The length's own gradient, v / |v|, is NaN.
            others = [b for b in range(B) if b != 1]
            result, expected, lost = result[others], expected[others], lost[others]
        assert torch.equal(result[~lost], expected[~lost]), what
        assert (result[lost].isnan() if name in ROUTINGS else ~result[lost].isfinite()).all(), what


def test_a_bad_image_reaches_its_own_gradient_through_the_loss(device):
    """From the margin loss of a NaN pose, whose own gradient is 0, du is NaN nevertheless."""
    u, weight = (tensor.float().to(device) for tensor in inputs_of("fused_dynamic_routing", 3))
    u[1, 0, 0] = float("nan")
    u.requires_grad_()
    activations = torch.linalg.vector_norm(ops.fused_dynamic_routing(u, weight), dim=-1)
    loss = ops.margin_loss(activations, torch.arange(3, device=device) % J, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(loss.sum(), u)
    assert grad[1].isnan().all()
    assert grad[::2].isfinite().all()


@pytest.mark.parametrize(("network", "channels"), [(CapsNet, 4), (DeepCapsNet, (4, 4))])
def test_a_bad_image_stays_alone_in_a_network(device, network, channels):
    torch.manual_seed(0)
    model = (
        network(channels=channels, capsule_types=1, image_size=20, num_classes=3).to(device).eval()
    )
    images = torch.rand(3, 1, 20, 20, device=device)
    spoilt = images.clone()
    spoilt[1, 0, 5, 5] = float("nan")
    with torch.no_grad():
        for result, expected in zip(model(spoilt), model(images), strict=True):
            assert result[1].isnan().any()
            assert torch.equal(result[::2], expected[::2])


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
@every_case_of(OPS)
def test_a_call_is_repeated_bit_for_bit(device, monkeypatch, name, B, with_prior, sizes, dtype):
    """Also where torch refuses what is not deterministic and fills memory that is not written."""
    inputs = [t.to(dtype).to(device) for t in inputs_of(name, B, with_prior, sizes)]
    call = call_of(ops, name)
    # Without it torch refuses cuBLAS.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    first, second = evaluate(call, inputs), evaluate(call, inputs)
    with deterministic():
        third = evaluate(call, inputs)
    for one, two, three in zip(first, second, third, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
