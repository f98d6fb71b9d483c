"""Faults that recur in published capsule networks, each with a test that would have caught it."""

import pytest
import torch

from tritoncaps import PrimaryCapsules, ops, reference
from tritoncaps.layers import capsule_lengths
from tritoncaps.models import DeepCapsNet, list_models
from tritoncaps.testing import OPERATORS, draw_inputs, normal


@pytest.fixture
def u_hat(device):
    sizes = {"B": 2, "I": 7, "J": 4, "D": 3}
    inputs = draw_inputs(OPERATORS["dynamic_routing"], sizes, dtype=torch.float32, device=device)
    return inputs["u_hat"]


def test_coupling_is_a_softmax_over_output_capsules(u_hat):
    """It is not one over the inputs or over the batch."""
    _, c = ops.dynamic_routing(u_hat, return_coupling=True)
    ones = torch.ones_like(u_hat[:, :, 0, 0])
    torch.testing.assert_close(c.sum(dim=2), ones)
    assert not torch.allclose(c.sum(dim=1), ones[:, :1].expand(2, 4))


def test_logits_belong_to_one_image(u_hat):
    """They are neither shared across the batch nor averaged over it."""
    together = ops.dynamic_routing(u_hat)
    alone = torch.cat([ops.dynamic_routing(image[None]) for image in u_hat])
    torch.testing.assert_close(together, alone)


def test_primary_capsule_is_eight_channels_of_one_position(device):
    """It is not eight neighbours in NCHW memory, which would mix positions."""
    layer = PrimaryCapsules(in_channels=3, capsule_types=2, dim=8, kernel_size=1, stride=1)
    layer = layer.to(device)
    features = normal(1, 3, 5, 4, dtype=torch.float32).to(device)
    poses = layer(features)
    # A change at one position changes the two capsules of that position and no other.
    changed = features.clone()
    changed[0, :, 3, 2] += 1
    differs = (layer(changed) != poses).any(dim=-1)[0]
    position = 3 * 4 + 2
    assert differs.nonzero().flatten().tolist() == [2 * position, 2 * position + 1]
    # Each is the squash of its group of output channels there.
    maps = layer.conv(features)[0, :, 3, 2]
    expected = reference.squash(maps.view(2, 8))
    torch.testing.assert_close(poses[0, 2 * position : 2 * position + 2], expected)


def test_iterations_count_weighted_sums(u_hat):
    """Three iterations are three sums and two updates of the logits, not three or one."""
    b = torch.zeros_like(u_hat[..., 0])
    for _ in range(2):
        s = torch.einsum("bij,bijd->bjd", b.softmax(dim=-1), u_hat)
        b = b + torch.einsum("bijd,bjd->bij", u_hat, reference.squash(s))
    s = torch.einsum("bij,bijd->bjd", b.softmax(dim=-1), u_hat)
    torch.testing.assert_close(ops.dynamic_routing(u_hat, 3), reference.squash(s))


@pytest.mark.parametrize("name", ["capsnet", "deep_capsnet", "efficient_capsnet"])
def test_decoder_never_sees_a_label_at_inference(device, small_model, name):
    """Without a target, the longest capsule is decoded. A target changes nothing else."""
    network = small_model(name).to(device).eval()
    images = torch.rand(6, 1, 28, 28).to(device)
    output = network(images)
    longest = output.activations.argmax(dim=1)
    torch.testing.assert_close(output.reconstruction, network(images, longest).reconstruction)
    other = network(images, (longest + 1) % 10)
    assert not torch.allclose(output.reconstruction, other.reconstruction)
    torch.testing.assert_close(output.activations, other.activations, rtol=0, atol=0)


def test_squash_has_a_gradient_at_zero(device):
    s = torch.zeros(2, 8, device=device, requires_grad=True)
    ops.squash(s).sum().backward()
    assert torch.equal(s.grad, torch.zeros_like(s))


def test_length_has_a_gradient_at_zero(device):
    poses = torch.zeros(2, 10, 16, device=device, requires_grad=True)
    capsule_lengths(poses).sum().backward()
    assert torch.equal(poses.grad, torch.zeros_like(poses))


@pytest.mark.parametrize("name", list_models(classifiers=True))
def test_network_of_zeros_has_finite_gradients(device, small_model, name):
    """A dead layer must be able to recover, or at least must not turn into NaN."""
    network = small_model(name).to(device)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    output = network(torch.rand(2, 1, 28, 28, device=device))
    ops.margin_loss(output.activations, torch.tensor([0, 1], device=device)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def test_margin_loss_is_squared_and_summed_over_classes(device):
    """It is not a plain hinge, and not a mean over the classes."""
    activations = torch.tensor([[0.7, 0.3, 0.05, 0.6]], device=device)
    target = torch.tensor([0], device=device)
    expected = 0.2**2 + 0.5 * (0.2**2 + 0.5**2)
    assert ops.margin_loss(activations, target).item() == pytest.approx(expected)
    doubled = ops.margin_loss(activations.repeat(2, 1), target.repeat(2))
    assert doubled.item() == pytest.approx(expected), "a mean over the batch"


def test_two_routings_in_series_start_alive(device):
    """With a small random weight, the second stage's lengths vanish or become NaN."""
    torch.manual_seed(0)
    network = DeepCapsNet(channels=(64, 64)).to(device)
    lengths = {}
    for name in ("primary", "primary_routing", "secondary_routing"):

        def keep(module, inputs, output, name=name):
            lengths[name] = capsule_lengths(output).mean().item()

        getattr(network, name).register_forward_hook(keep)
    network(torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(device))
    for name, length in lengths.items():
        assert 0.05 < length < 0.95, f"{name} starts with a mean length of {length}"
