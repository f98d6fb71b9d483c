"""ConvRoutedCapsules: the operator under it, its parameters, its first weights, and learning."""

import pytest
import torch
from torch.nn import functional as F

from tritoncaps import RoutedCapsules, ops, reference
from tritoncaps.layers import ConvRoutedCapsules, calibrate, capsule_lengths

KINDS = {
    "patch": {"votes": "patch"},
    "convolved": {"votes": "convolved"},
    "shared": {"votes": "convolved", "shared_kernel": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@every_kind
def test_the_layer_is_the_operator(device, kind):
    torch.manual_seed(0)
    options = {"learned_prior": True, "pose_bias": True, "leaky": True}
    layer = ConvRoutedCapsules(3, 4, 5, 6, 2, 2, 1, iterations=1, **kind, **options).to(device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert layer.weight.shape == (2, 2, 1 if "shared_kernel" in kind else 3, 4, 5, 6)
    assert layer.prior.shape == ((2, 2, 3, 5) if kind["votes"] == "patch" else (3, 5))
    u = torch.randn(2, 5, 4, 3, 4, device=device)
    found = layer(u, iterations=2, return_coupling=True)
    expected = reference.conv_dynamic_routing(
        u, layer.weight, 2, stride=2, padding=1, prior=layer.prior, pose_bias=layer.pose_bias,
        votes=kind["votes"], leaky=True, return_coupling=True,
    )  # fmt: skip
    assert found[0].shape == (2, 3, 3, 5, 6)
    torch.testing.assert_close(found, expected)
    assert torch.equal(layer(u), layer(u, iterations=1))
    layer(u).square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())


def test_a_kernel_over_the_whole_grid_is_routed_capsules(device):
    torch.manual_seed(0)
    layer = ConvRoutedCapsules(2, 4, 5, 6, kernel_size=3).to(device)
    plain = RoutedCapsules(3 * 3 * 2, 4, 5, 6).to(device)
    plain.load_state_dict({"weight": layer.weight.flatten(0, 2)})
    u = torch.randn(2, 3, 3, 2, 4, device=device)
    assert torch.equal(layer(u).flatten(1, 3), plain(u.flatten(1, 3)))


@every_kind
def test_a_reset_layer_is_a_fresh_one(kind):
    options = {"learned_prior": True, "pose_bias": True, **kind}
    torch.manual_seed(3)
    fresh = ConvRoutedCapsules(3, 4, 5, 6, **options)
    layer = ConvRoutedCapsules(3, 4, 5, 6, device="meta", **options).to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    for name, value in fresh.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


@pytest.mark.parametrize("in_length", [1.0, 0.15])
@pytest.mark.parametrize(
    ("kernel_size", "C", "J", "D"), [(3, 8, 32, 8), (5, 4, 10, 16), (1, 16, 4, 4)]
)
@every_kind
def test_routing_starts_alive_and_does_not_run_away(device, kind, kernel_size, C, J, D, in_length):
    torch.manual_seed(0)
    layer = ConvRoutedCapsules(C, 8, J, D, kernel_size, in_length=in_length, **kind).to(device)
    u = 0.85 * in_length * F.normalize(torch.randn(4, 7, 7, C, 8, device=device), dim=-1)
    lengths = capsule_lengths(layer(u))
    # As test_initialisation.py asks of other routings.
    assert 0.05 < lengths.mean().item() < 0.7
    lengths.sum().backward()
    assert layer.weight.grad.norm() > 1e-3


def test_a_stack_is_calibrated(device):
    torch.manual_seed(0)
    stack = torch.nn.Sequential(
        ConvRoutedCapsules(4, 8, 8, 8), ConvRoutedCapsules(8, 8, 20, 8, votes="convolved")
    ).to(device)
    found = calibrate(stack, ops.squash(torch.randn(2, 6, 6, 4, 8, device=device)))
    assert [round(layer.after, 2) for layer in found] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 0}, "kernel_size must be >= 1, got 0"),
        ({"padding": -1}, "padding must be >= 0, got -1"),
        ({"votes": "all"}, 'votes must be "patch" or "convolved", got \'all\''),
        ({"shared_kernel": True}, 'shared_kernel=True needs votes="convolved", got votes="patch"'),
        ({"in_length": 0}, "in_length must be > 0 and finite, got 0"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError) as error:
        ConvRoutedCapsules(2, 4, 3, 5, **arguments)
    assert str(error.value) == f"ConvRoutedCapsules: {message}"
