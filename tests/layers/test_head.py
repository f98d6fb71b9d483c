"""CapsuleHead: any feature maps and number of classes, shared or own matrices, a new head."""

import pytest
import torch

from tritoncaps import CapsuleHead


def build(**options):
    torch.manual_seed(0)
    usual = {"capsule_types": 3, "dim": 4, "class_dim": 6}
    return CapsuleHead(5, 7, **(usual | options))


def count(head):
    return sum(parameter.numel() for parameter in head.parameters())


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (4, 9)])
def test_feature_maps_of_any_size(device, size):
    head = build().to(device)
    features = torch.rand(2, 5, *size, device=device)
    (poses, activations), coupling = head(features, return_coupling=True)
    assert poses.shape == (2, 7, 6)
    torch.testing.assert_close(activations, poses.norm(dim=2))
    assert coupling.shape == (2, 3 * size[0] * size[1], 7)
    torch.testing.assert_close(head(features)[0], poses)
    assert not torch.equal(head(features, iterations=1).poses, poses)
    activations.sum().backward()
    assert all(parameter.grad.any() for parameter in head.parameters())


def test_positions_do_not_matter_to_shared_weights(device):
    """The order of the positions has no influence, as behind a pooling."""
    head, features = build().to(device), torch.rand(2, 5, 4, 4, device=device)
    torch.testing.assert_close(head(features).poses, head(features.flip(2, 3)).poses)


def test_own_matrices_for_each_position():
    shared, own = build(feature_size=(4, 6)), build(feature_size=(4, 6), shared_weights=False)
    assert own.routing.weight.numel() == 4 * 6 * shared.routing.weight.numel()
    assert count(shared) == count(build(feature_size=20))
    features = torch.rand(2, 5, 4, 6)
    assert own(features).poses.shape == shared(features).poses.shape
    with pytest.raises(ValueError, match="weight has I=72 but u has I=75"):
        own(torch.rand(2, 5, 5, 5))


def test_convolution_of_the_primary_capsules():
    """The expected number of positions follows from the kernel."""
    head = build(kernel_size=3, stride=2, padding=1, feature_size=(7, 9))
    assert head.routing.positions == 4 * 5
    assert head(torch.rand(1, 5, 7, 9), return_coupling=True)[1].shape[1] == 3 * 4 * 5


def test_options_reach_the_routing():
    options = {"iterations": 2, "pose_bias": True, "leaky": True, "gradient": "last"}
    routing = build(learned_prior=True, **options).routing
    shown = routing.extra_repr()
    for words in ("iterations=2", "pose_bias=True", "leaky=True", "gradient='last'"):
        assert words in shown
    assert routing.prior.shape == (3, 7)


def test_a_new_head_keeps_the_primary_capsules():
    old = build()
    new = CapsuleHead(5, 2, capsule_types=3, dim=4)
    new.primary = old.primary
    assert new(torch.rand(2, 5, 7, 7)).activations.shape == (2, 2)
    assert any(parameter is old.primary.conv.weight for parameter in new.parameters())


def test_dtype_and_device():
    head = build(device="meta", dtype=torch.float64, learned_prior=True, pose_bias=True)
    for parameter in head.parameters():
        assert parameter.is_meta and parameter.dtype == torch.float64
