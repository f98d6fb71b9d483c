"""Layers: shapes, representations, defaults, and the operators under them."""

import pytest
import torch

from tritoncaps import (
    CapsuleLoss,
    MarginLoss,
    PrimaryCapsules,
    ReconstructionDecoder,
    RoutedCapsules,
    reference,
)
from tritoncaps.layers import ConvRoutedCapsules

ALL = {"pose_bias": True, "leaky": True, "gradient": "last", "learned_prior": True}
# Every argument that is shown in full differs from its default.
BUILDS = [
    PrimaryCapsules(3, 4, dim=6, kernel_size=5, stride=1, padding="same", spatial_dims=3),
    RoutedCapsules(6, 8, 10, 16, 2, positions=3, **ALL),
    ConvRoutedCapsules(
        2, 3, 4, 5, 2, 2, 1, 2, votes="convolved", shared_kernel=True, in_length=0.5, **ALL
    ),
    ReconstructionDecoder(5, 8, (3, 9, 7), hidden=(32, 64)),
    MarginLoss(0.8, 0.2, 0.25, "sum"),
    CapsuleLoss(0.1, 0.8, 0.2, 0.25, "none"),
]


@pytest.mark.parametrize("module", BUILDS, ids=lambda module: type(module).__name__)
def test_representation_builds_the_same_module(module):
    again = eval(f"{type(module).__name__}({module.extra_repr()})")
    assert again.extra_repr() == module.extra_repr()
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes


def test_defaults_are_those_of_the_paper():
    """Sabour 2017: section 4 and figure 1, procedure 1, figure 2."""
    primary, routed = PrimaryCapsules(256), RoutedCapsules(2, 2, 2, 2)
    sizes = (primary.capsule_types, primary.dim, primary.kernel_size, primary.stride)
    assert sizes == (32, 8, 9, 2)
    assert (primary.padding, primary.spatial_dims) == (0, 2)
    assert (routed.iterations, routed.gradient, routed.prior) == (3, "full", None)
    assert ReconstructionDecoder(10, 16, (1, 28, 28)).hidden == (512, 1024)


def test_channels_last_changes_no_result(device):
    torch.manual_seed(0)
    layer = PrimaryCapsules(8, capsule_types=2, dim=4, kernel_size=3).to(device)
    features = torch.rand(2, 8, 9, 9, device=device)
    expected = layer(features)
    layer = layer.to(memory_format=torch.channels_last)
    result = layer(features.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("leaky", [False, True])
def test_routed_capsules_are_the_operator(device, leaky):
    torch.manual_seed(0)
    layer = RoutedCapsules(6, 4, 5, 3, 2, pose_bias=True, leaky=leaky, learned_prior=True)
    layer = layer.to(device)
    assert torch.equal(layer.prior, torch.zeros(6, 5, device=device))
    assert torch.equal(layer.pose_bias, torch.full((5, 3), 0.1, device=device))
    torch.nn.init.normal_(layer.prior)
    torch.nn.init.normal_(layer.pose_bias)
    u = torch.randn(2, 6, 4, device=device)
    options = {"prior": layer.prior, "pose_bias": layer.pose_bias, "leaky": leaky}
    expected = reference.fused_dynamic_routing(u, layer.weight, 2, **options)
    torch.testing.assert_close(layer(u), expected)
    layer(u).sum().backward()
    assert layer.prior.grad.any() and layer.pose_bias.grad.any()


def test_decoder_masks_all_but_one_capsule(device):
    torch.manual_seed(0)
    decoder = ReconstructionDecoder(4, 3, (2, 5, 6)).to(device)
    poses = torch.randn(3, 4, 3, device=device)
    target = torch.tensor([2, 0, 3], device=device)
    images = decoder(poses, target)
    assert images.shape == (3, 2, 5, 6)
    assert ((images > 0) & (images < 1)).all()
    only = torch.zeros_like(poses)
    only[range(3), target] = poses[range(3), target]
    torch.testing.assert_close(decoder(only, target), images)
    longest = poses.norm(dim=-1).argmax(dim=1)
    torch.testing.assert_close(decoder(poses), decoder(poses, longest))


def test_decoder_keeps_all_capsules_of_a_multi_hot_target(device):
    torch.manual_seed(0)
    decoder = ReconstructionDecoder(4, 3, (2, 5, 6)).to(device)
    poses = torch.randn(3, 4, 3, device=device)
    one_hot = torch.eye(4, dtype=torch.bool, device=device)[[2, 0, 3]]
    torch.testing.assert_close(
        decoder(poses, one_hot), decoder(poses, torch.tensor([2, 0, 3], device=device))
    )
    present = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], device=device)
    kept = poses.clone()
    kept[0, 2:] = kept[1] = 0
    everything = torch.ones(3, 4, device=device)
    torch.testing.assert_close(decoder(poses, present), decoder(kept, everything))
    torch.testing.assert_close(decoder(poses, 0.3 * everything), decoder(0.3 * poses, everything))


@pytest.mark.parametrize("shape", [(2, 7), (1, 3, 4, 5)])
def test_decoder_draws_sequences_and_volumes(shape):
    decoder = ReconstructionDecoder(3, 4, shape, hidden=(5, 6), dtype=torch.float64)
    drawn = decoder(torch.rand(2, 3, 4, dtype=torch.float64))
    assert (drawn.shape, drawn.dtype) == ((2, *shape), torch.float64)


def test_decoder_draws_its_weights_anew():
    torch.manual_seed(0)
    expected = ReconstructionDecoder(3, 4, (1, 2, 2), hidden=(5, 6))
    decoder = ReconstructionDecoder(3, 4, (1, 2, 2), hidden=(5, 6), device="meta")
    decoder.to_empty(device="cpu")
    torch.manual_seed(0)
    decoder.reset_parameters()
    torch.testing.assert_close(decoder.state_dict(), expected.state_dict())


@pytest.mark.parametrize("num_classes", [2, 50])
def test_a_pose_reaches_the_hidden_units_however_many_classes_there_are(num_classes):
    """A pose of length 1 gives them a mean square of 1 / D; a ReLU halves it."""
    torch.manual_seed(0)
    decoder = ReconstructionDecoder(num_classes, 16, (1, 4, 4))
    poses = torch.nn.functional.normalize(torch.randn(40, num_classes, 16), dim=2)
    kept = poses * (torch.arange(num_classes) == 1)[:, None]
    for hidden in (decoder.layers[:2], decoder.layers[:4]):
        power = hidden(kept.flatten(1)).square().mean().item()
        assert power == pytest.approx(1 / 16, rel=0.1)
