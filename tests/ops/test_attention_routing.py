"""Self-attention and inverted attention, each against its published form in einsum."""

import pytest
import torch

from tritoncaps import ops
from tritoncaps._operators import INTERPRETED
from tritoncaps.testing import OPERATORS, SIZES, compare_inputs, draw_inputs, evaluate

ATTENTION, INVERTED = OPERATORS["attention_routing"], OPERATORS["inverted_attention_routing"]
J, D = SIZES["J"], SIZES["D"]


def published_attention(u, weight, bias=0, return_coupling=True):
    """Agreement of all pairs of input capsules, as the authors' code computes it."""
    u_hat = torch.einsum("bip,ipjd->bijd", u, weight)
    pairs = torch.einsum("bijd,bkjd->bijk", u_hat, u_hat) / D**0.5
    coupling = pairs.sum(dim=3).softmax(dim=2) + bias
    return torch.einsum("bij,bijd->bjd", coupling, u_hat), coupling


def published_inverted(
    u, weight, iterations, pose=None, norm_weight=1, norm_bias=0, return_coupling=True
):
    """The normalisation written out."""
    u_hat = torch.einsum("bip,ipjd->bijd", u, weight)
    for _ in range(iterations):
        if pose is None:
            coupling = torch.full_like(u_hat[..., 0], 1 / J)
        else:
            coupling = torch.einsum("bijd,bjd->bij", u_hat, pose / D**0.5).softmax(dim=2)
        s = torch.einsum("bij,bijd->bjd", coupling, u_hat)
        centred = s - s.mean(dim=2, keepdim=True)
        variance = centred.square().mean(dim=2, keepdim=True)
        pose = centred / (variance + 1e-5).sqrt() * norm_weight + norm_bias
    return pose, coupling


def assert_is_published(operator, device, options, published, optional):
    """Values and gradients agree to 1e-12 of the largest."""
    inputs = draw_inputs(operator, device=device, optional=optional)
    actual = evaluate(operator, inputs, options)
    expected = evaluate(operator, inputs, options, published)
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(result, expected[name], rtol=0, atol=1e-12 * scale, msg=name)


@pytest.mark.parametrize("optional", [(), ("bias",)], ids=str)
def test_self_attention_is_the_published_one(device, optional):
    options = {"return_coupling": True}
    assert_is_published(ATTENTION, device, options, published_attention, optional)


@pytest.mark.parametrize("optional", [(), tuple(INVERTED.optional)], ids=["fewest", "all"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_inverted_attention_is_the_published_one(device, iterations, optional):
    options = {"iterations": iterations, "return_coupling": True}
    assert_is_published(INVERTED, device, options, published_inverted, optional)


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("many", (64, 61) if INTERPRETED else (1152, 1151))  # one is a prime
@pytest.mark.parametrize("operator", [ATTENTION, INVERTED], ids=str)
def test_many_input_capsules_keep_their_digits(operator, many, B, device):
    """The pose is a sum over all input capsules. One product over 1152 of them breaks the rule."""
    sizes = {"B": B, "I": many, "P": 8, "J": 10, "D": 16}
    inputs = draw_inputs(
        operator, sizes, dtype=torch.float32, device=device, scale=0.3, optional=()
    )
    compare_inputs(operator, inputs, operator.defaults)


def test_inverted_attention_scales_and_shifts_after_the_normalisation(device):
    inputs = draw_inputs(INVERTED, device=device, optional=("pose",))
    scale = torch.linspace(0.5, 2, D, dtype=torch.float64, device=device)
    plain = ops.inverted_attention_routing(**inputs, iterations=1)
    v = ops.inverted_attention_routing(**inputs, iterations=1, norm_weight=scale, norm_bias=scale)
    torch.testing.assert_close(v, plain * scale + scale)
    torch.testing.assert_close(plain.mean(dim=2), torch.zeros_like(plain[..., 0]))


def test_inverted_attention_goes_on_from_poses(device):
    """Three iterations are one, and two more from its poses. Agreement does not add up."""
    inputs = draw_inputs(INVERTED, device=device, optional=("norm_weight", "norm_bias"))
    first = ops.inverted_attention_routing(**inputs, iterations=1)
    rest = ops.inverted_attention_routing(**inputs, iterations=2, pose=first)
    assert torch.equal(ops.inverted_attention_routing(**inputs, iterations=3), rest)


@pytest.mark.parametrize("change", [{"I": 1}, {"D": 2}], ids=str)
def test_the_normalisation_takes_off_what_the_coupling_does(device, change):
    """With one input capsule, or two components, the table's sizes begin above these."""
    inputs = draw_inputs(INVERTED, {**SIZES, **change}, device=device, optional=("pose",))
    pose = inputs["pose"].requires_grad_()
    inputs["u"] = inputs["u"] * 1e6  # what is added to the variance is then nothing
    v = ops.inverted_attention_routing(**inputs, iterations=1)
    cotangent = torch.arange(v.numel(), dtype=v.dtype, device=device).view_as(v)
    (grad,) = torch.autograd.grad(v, pose, cotangent)
    assert grad.abs().max() < 1e-3


@pytest.mark.parametrize("operator", [ATTENTION, INVERTED], ids=str)
def test_the_prediction_vectors_are_not_kept(operator):
    """Nothing that autograd saves has both axes of û, I and D, but the weight."""
    sizes = {"B": 7, "I": 31, "P": 2, "J": 5, "D": 13}
    inputs = draw_inputs(operator, sizes, dtype=torch.float32)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        operator.call({name: x.requires_grad_() for name, x in inputs.items()}, operator.defaults)
    assert max(kept) <= inputs["weight"].numel() < 7 * 31 * 5 * 13
