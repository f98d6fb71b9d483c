"""One pass of routing with a given pose: its parts, and the routings built from it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from interpreter import multiply_row_by_row

from tritoncaps import ops, reference
from tritoncaps._operators import INTERPRETED
from tritoncaps.testing import (
    LAYOUTS,
    OPERATORS,
    SIZES,
    cases,
    draw_inputs,
    evaluate,
)

PASS = OPERATORS["routing_pass"]
J = SIZES["J"]

same_device = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def drawn(device, *optional, **options):
    return draw_inputs(PASS, device=device, optional=optional, **options)


def test_without_pose_and_prior_the_coupling_is_uniform(device):
    inputs = drawn(device)
    inputs["pose"] = torch.zeros_like(inputs["pose"])
    s, coupling = ops.routing_pass(**inputs, return_coupling=True)
    torch.testing.assert_close(coupling, torch.full_like(coupling, 1 / J))
    u_hat = ops.prediction_vectors(inputs["u"], inputs["weight"])
    torch.testing.assert_close(s, u_hat.sum(dim=1) / J)


@settings(same_device, max_examples=3 if INTERPRETED else settings.default.max_examples)
@given(case=cases(OPERATORS["fused_dynamic_routing"], (torch.float64,)))
def test_passes_with_the_sum_of_squashed_results_are_dynamic_routing(device, case):
    """x⁽ᵗ⁾ = Σ_{k<t} squash(s⁽ᵏ⁾): values, the last coupling, and gradients."""
    inputs = case.inputs(OPERATORS["fused_dynamic_routing"], device)
    options = case.options | {"gradient": "full", "return_coupling": True}

    def passes(u, weight, iterations, leaky, output, prior=None, pose_bias=0, **_):
        pose = u.new_zeros(len(u), *weight.shape[2:])
        given = {"prior": prior, "leaky": leaky, "return_coupling": True}
        for _ in range(iterations):
            s, coupling = ops.routing_pass(u, weight, pose, **given)
            s = s + pose_bias
            v = ops.squash(s)
            pose = pose + v
        return s if output == "s" else v, coupling

    fused = OPERATORS["fused_dynamic_routing"]
    actual = evaluate(fused, inputs, options, passes, seed=case.seed)
    expected = evaluate(fused, inputs, options, seed=case.seed)
    for name, result in actual.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-9, atol=1e-11)


def test_bias_is_added_after_the_softmax(device):
    inputs = drawn(device, "prior", "bias")
    bias = inputs.pop("bias")
    s, coupling = ops.routing_pass(**inputs, bias=bias, return_coupling=True)
    s_without, coupling_without = ops.routing_pass(**inputs, return_coupling=True)
    torch.testing.assert_close(coupling, coupling_without + bias)
    u_hat = ops.prediction_vectors(inputs["u"], inputs["weight"])
    shift = torch.einsum("ij,bijd->bjd", bias, u_hat)
    torch.testing.assert_close(s, s_without + shift)


@same_device
@given(case=cases(PASS, (torch.float64,)))
def test_rows_of_the_coupling_sum_to_one_and_the_bias(device, case):
    inputs = case.inputs(PASS, device)
    _, coupling = ops.routing_pass(**inputs, return_coupling=True)
    total = 1 + inputs["bias"].sum(dim=-1) if "bias" in inputs else torch.ones(()).to(coupling)
    rows = coupling.sum(dim=-1)
    torch.testing.assert_close(rows, total.expand(rows.shape), rtol=1e-10, atol=1e-12)


def test_prior_and_bias_are_not_mistaken_for_each_other(device):
    inputs = drawn(device, "prior", "bias")
    assert not torch.equal(inputs["prior"], inputs["bias"])
    swapped = inputs | {"prior": inputs["bias"], "bias": inputs["prior"]}
    expected = reference.routing_pass(**inputs)
    torch.testing.assert_close(ops.routing_pass(**inputs), expected)
    assert not torch.allclose(ops.routing_pass(**swapped), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_strides_change_no_bit(device, layout, grad_layout):
    """NaN between the values is not read, and gradients are contiguous."""
    views = drawn(device, "prior", "bias", dtype=torch.float32, layout=layout)
    copies = {name: view.contiguous().clone() for name, view in views.items()}
    options = {"return_coupling": True}
    bits = evaluate(
        PASS, copies, options, layout="expanded" if grad_layout == "expanded" else "contiguous"
    )
    for name, result in evaluate(PASS, views, options, layout=grad_layout).items():
        assert result.is_contiguous(), name
        if INTERPRETED or result.is_cuda:
            assert torch.equal(result, bits[name]), name
        else:  # a product with other strides may take another path in the library
            torch.testing.assert_close(result, bits[name])


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_an_image_has_the_same_bits_in_any_batch(device, monkeypatch):
    if not (INTERPRETED or device.type == "cuda"):
        pytest.skip("torch's own products may add in a different order for another batch size")
    if INTERPRETED:
        multiply_row_by_row(monkeypatch)
    inputs = drawn(device, "prior", "bias", sizes=SIZES | {"B": 19}, dtype=torch.float32)
    inputs["u"][3] = float("nan")
    options = {"return_coupling": True}
    whole = evaluate_rows(inputs, slice(0, 19), options)
    for rows in (slice(0, 2), slice(14, 18), slice(18, 19)):
        for name, result in evaluate_rows(inputs, rows, options).items():
            assert torch.equal(result, whole[name][rows]), name


def evaluate_rows(inputs, rows, options):
    """Results and gradients of some images, given the same gradients of the results."""
    batched = {name for name, axes in PASS.axes.items() if axes.startswith("B")}
    leaves = {
        n: (x[rows] if n in batched else x).clone().requires_grad_() for n, x in inputs.items()
    }
    results = PASS.call(leaves, options)
    named = dict(zip(PASS.output_names(options), results, strict=True))
    grads = torch.autograd.grad([r.cos().sum() for r in results], list(leaves.values()))
    return {n: r.detach() for n, r in named.items()} | {
        n: grad for n, grad in zip(leaves, grads, strict=True) if n in batched
    }
