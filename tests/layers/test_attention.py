"""Layers of attention routing: what they add to the operators."""

import pytest
import torch

from tritoncaps import ops
from tritoncaps.layers import (
    AttentionCapsules,
    InvertedAttentionCapsules,
    capsule_lengths,
)


def test_self_attention_squashes_exponentially(device):
    torch.manual_seed(0)
    layer = AttentionCapsules(6, 4, 3, 5).to(device)
    torch.nn.init.normal_(layer.bias)
    u = torch.rand(2, 6, 4, device=device)
    v, coupling = layer(u, return_coupling=True)
    assert torch.equal(v, layer(u))
    s = ops.attention_routing(u, layer.weight, layer.bias)
    torch.testing.assert_close(v, ops.squash(s, form="exponential"))
    rows = 1 + layer.bias.sum(dim=1)
    torch.testing.assert_close(coupling.sum(dim=2), rows.expand(2, 6))


def test_self_attention_without_bias():
    layer = AttentionCapsules(6, 4, 3, 5, bias=False)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    layer(torch.rand(2, 6, 4)).sum().backward()


@pytest.mark.parametrize(("I", "J"), [(16, 10), (256, 10), (16, 100), (4, 1000), (16, 1)])
def test_self_attention_starts_short(I, J):
    """No class is present at first, and none is lost: a zero would pass the squash as zero."""
    torch.manual_seed(0)
    u = torch.nn.functional.normalize(torch.randn(8, I, 8), dim=2)
    lengths = capsule_lengths(AttentionCapsules(I, 8, J, 16)(u))
    assert 0.001 < lengths.mean() < 0.2


@pytest.mark.parametrize("layer", [AttentionCapsules, InvertedAttentionCapsules])
def test_the_coupling_is_asked_for_by_a_bool(layer):
    with pytest.raises(TypeError, match="return_coupling must be a bool, got int"):
        layer(6, 4, 3, 5)(torch.rand(2, 6, 4), return_coupling=1)


def test_inverted_attention_with_matrix_poses(device):
    """Each row of a matrix pose is multiplied by the same matrix, 1e-6 from the einsum form."""
    torch.manual_seed(0)
    layer = InvertedAttentionCapsules(7, 8, 3, 12, iterations=2, rows=4).to(device)
    u = torch.randn(2, 7, 8, device=device)
    u_hat = torch.einsum("birp,ipjd->bijrd", u.view(2, 7, 4, 2), layer.weight).flatten(3)
    pose = layer.norm(u_hat.mean(dim=1) * 7 / 3)
    coupling = torch.einsum("bijd,bjd->bij", u_hat, pose / 12**0.5).softmax(dim=2)
    expected = layer.norm(torch.einsum("bij,bijd->bjd", coupling, u_hat))
    v, returned = layer(u, return_coupling=True)
    torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returned, coupling, rtol=1e-5, atol=1e-6)
    v.square().sum().backward()
    assert layer.weight.grad.shape == (7, 2, 3, 3)
    assert layer.weight.grad.any()


def test_inverted_attention_takes_iterations_of_a_call():
    layer = InvertedAttentionCapsules(7, 4, 3, 5, iterations=3)
    u = torch.randn(2, 7, 4)
    pose = layer(u, iterations=1)
    torch.testing.assert_close(layer(u, pose, iterations=2), layer(u))
    assert not torch.allclose(pose, layer(u))


@pytest.mark.parametrize("size", [{}, {"rows": 2}], ids=str)
def test_inverted_attention_keeps_the_scale(size):
    torch.manual_seed(0)
    layer = InvertedAttentionCapsules(64, 16, 8, 16, **size)
    weight = layer.weight.std().item() * (16 // layer.rows) ** 0.5
    assert weight == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: AttentionCapsules(0, 8, 10, 16),
            ValueError,
            "AttentionCapsules: in_capsules must be >= 1, got 0",
        ),
        (
            lambda: AttentionCapsules(1, 8, 10, 16, bias=1),
            TypeError,
            "AttentionCapsules: bias must be a bool, got int",
        ),
        (
            lambda: InvertedAttentionCapsules(4, 6, 3, 8, rows=4),
            ValueError,
            "InvertedAttentionCapsules: in_dim=6 must be a multiple of rows=4",
        ),
        (
            lambda: InvertedAttentionCapsules(4, 8, 3, 8, 0),
            ValueError,
            "InvertedAttentionCapsules: iterations must be >= 1, got 0",
        ),
    ],
)
def test_wrong_arguments_are_named(build, error, message):
    with pytest.raises(error) as caught:
        build()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "layer",
    [AttentionCapsules(6, 4, 3, 5), InvertedAttentionCapsules(6, 4, 3, 6, 3, rows=2)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_prints_the_arguments_that_build_it(layer):
    again = eval(f"{type(layer).__name__}({layer.extra_repr()})")
    assert again.extra_repr() == layer.extra_repr()
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in layer.named_parameters()
    }
