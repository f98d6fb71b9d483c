"""Routing by agreement: of prediction vectors in memory, and fused with their computation."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from tritoncaps import ops, reference
from tritoncaps.testing import OPERATORS, Case, cases, compare, draw_inputs

LOOPS = [OPERATORS["dynamic_routing"], OPERATORS["fused_dynamic_routing"]]
MNIST_LIKE = {"B": 2, "I": 37, "P": 8, "J": 10, "D": 16}

every_loop = pytest.mark.parametrize("operator", LOOPS, ids=str)
same_device = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@every_loop
@pytest.mark.parametrize("return_coupling", [False, True])
def test_sizes_like_those_of_mnist_agree(device, operator, return_coupling):
    options = operator.defaults | {"return_coupling": return_coupling}
    compare(operator, Case(MNIST_LIKE, options, dtype=torch.float32, seed=1), device)


@every_loop
@same_device
@given(case=cases(LOOPS[1], (torch.float64,)))
def test_rows_of_the_coupling_sum_to_one_unless_leaky(device, operator, case):
    inputs = case.inputs(operator, device)
    _, coupling = operator.call(inputs, case.options | {"return_coupling": True})
    rows = coupling.sum(dim=-1)
    if case.options["leaky"]:
        assert (rows < 1).all()
    else:
        torch.testing.assert_close(rows, torch.ones_like(rows), rtol=1e-10, atol=1e-12)


def authors_routing(votes, bias, iterations, leaky):
    """Route one image as the authors' code does, `votes` (I, J, D) in lists; return v and s."""
    I, J, D = len(votes), len(votes[0]), len(votes[0][0])
    logits = [[0.0] * J for _ in range(I)]
    for _ in range(iterations):
        s = [list(row) for row in bias]
        for i in range(I):
            total = sum(math.exp(logit) for logit in logits[i]) + (1 if leaky else 0)
            for j in range(J):
                for d in range(D):
                    s[j][d] += math.exp(logits[i][j]) / total * votes[i][j][d]
        norms = [math.sqrt(sum(x * x for x in row)) for row in s]
        v = [[x / n * (n * n / (1 + n * n)) for x in row] for row, n in zip(s, norms, strict=True)]
        for i in range(I):
            for j in range(J):
                logits[i][j] += sum(x * y for x, y in zip(votes[i][j], v[j], strict=True))
    return v, s


@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
def test_it_is_the_routing_of_the_authors_code(device, iterations, leaky):
    inputs = draw_inputs(LOOPS[0], {"B": 2, "I": 5, "J": 3, "D": 4}, optional=["pose_bias"])
    votes, bias = inputs["u_hat"].tolist(), inputs["pose_bias"].tolist()
    exact = [authors_routing(image, bias, iterations, leaky) for image in votes]
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    for output, expected in zip("vs", zip(*exact, strict=True), strict=True):
        actual = ops.dynamic_routing(**on_device, iterations=iterations, leaky=leaky, output=output)
        torch.testing.assert_close(actual.cpu(), torch.tensor(expected, dtype=torch.float64))


@every_loop
def test_a_leaky_softmax_has_a_capsule_without_weights(device, operator):
    """An orphan class with logit 0 is one more output capsule whose prediction vectors are 0."""
    inputs = draw_inputs(operator, device=device)
    options = {"gradient": "full", "return_coupling": True}
    result, coupling = operator.function(**inputs, **options, leaky=True)
    widened = {
        name: torch.nn.functional.pad(tensor, (0, 0) * ("D" in operator.axes[name]) + (0, 1))
        for name, tensor in inputs.items()
        if "J" in operator.axes[name]
    }
    wide_result, wide_coupling = operator.function(**(inputs | widened), **options)
    torch.testing.assert_close(result, wide_result[:, :-1])
    torch.testing.assert_close(coupling, wide_coupling[..., :-1])


@every_loop
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e15])
def test_no_output_capsule_is_longer_than_one(device, operator, scale):
    inputs = draw_inputs(operator, MNIST_LIKE, dtype=torch.float32, device=device, optional=())
    first = next(iter(inputs))
    v = operator.function(**inputs | {first: inputs[first] * scale})
    for result in (v, operator.reference(**inputs | {first: inputs[first] * scale})):
        assert (result.double().norm(dim=-1) <= 1).all()


class Zeros(TorchDispatchMode):
    """Remembers the shapes of the tensors of zeros that are made."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "new_zeros":
            self.shapes.append(tuple(result.shape))
        return result


@every_loop
def test_no_gradient_is_made_for_the_sums_that_nobody_reads(operator):
    leaves = {name: x.requires_grad_() for name, x in draw_inputs(operator).items()}
    (v,) = operator.call(leaves, operator.defaults)
    with Zeros() as zeros:
        v.sum().backward()
    iterations, (B, J, D) = operator.defaults["iterations"], v.shape
    assert (iterations, B, J, D) not in zeros.shapes


@every_loop
def test_coupling_is_a_constant_with_gradient_last(device, operator):
    inputs = draw_inputs(operator, device=device)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    v, coupling = operator.function(**leaves, gradient="last", return_coupling=True)
    assert v.requires_grad
    assert not coupling.requires_grad


@same_device
@given(case=cases(LOOPS[0], (torch.float64,)))
def test_one_iteration_is_the_squashed_mean(device, case):
    u_hat = case.inputs(LOOPS[0], device)["u_hat"]
    expected = reference.squash(u_hat.sum(dim=1) / u_hat.shape[2])
    torch.testing.assert_close(ops.dynamic_routing(u_hat, 1), expected, rtol=1e-9, atol=1e-12)


@same_device
@given(case=cases(LOOPS[1], (torch.float64,)))
def test_fused_routing_is_both_steps_in_one(device, case):
    inputs = case.inputs(LOOPS[1], device)
    fused = LOOPS[1].call(inputs, case.options)
    u_hat = ops.prediction_vectors(inputs.pop("u"), inputs.pop("weight"))
    apart = LOOPS[0].call({"u_hat": u_hat, **inputs}, case.options)
    for result, expected in zip(fused, apart, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)
