"""ConvCapsNet: its parameters and grids, what a call returns, and that it learns."""

import pytest
import torch

from tritoncaps import ops
from tritoncaps.models import ConvCapsNet, create_model


def count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_conv_capsnet_has_the_parameters_that_its_page_states():
    with torch.device("meta"):
        model, convolved = ConvCapsNet(), ConvCapsNet(votes="convolved")
    assert count(model) == count(convolved) == 6_331_200
    assert count(model.decoder) == 3_756_544
    assert [layer.weight.shape for layer in model.convolutional] == [(3, 3, 32, 8, 32, 8)] * 2
    assert model.routing.weight.shape == (800, 8, 10, 16)


def test_a_call_returns_the_coupling_of_each_layer(small_model):
    model, images = small_model("conv_capsnet", learned_prior=True).eval(), torch.rand(2, 1, 28, 28)
    output = model(images, return_coupling=True, iterations=3)
    grids = [(2, 6, 6, 3, 3, 2, 2), (2, 4, 4, 3, 3, 2, 2), (2, 32, 10)]
    assert [tuple(coupling.shape) for coupling in output.coupling] == grids
    for coupling in output.coupling:
        torch.testing.assert_close(coupling.sum(-1), torch.ones(coupling.shape[:-1]))
    assert torch.equal(output.poses, model(images, iterations=3).poses)
    assert not torch.equal(output.poses, model(images).poses)


@pytest.mark.parametrize(
    ("size", "stride", "grid", "capsules"),
    [((13, 16), 1, (7, 8), 2), ((32, 28), 1, (16, 14), 40), (96, 3, (16, 16), 50)],
)
def test_any_image_fits(small_model, size, stride, grid, capsules):
    model = small_model("conv_capsnet", image_size=size, stride=stride, votes="convolved")
    seen = []
    model.convolutional[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert model.eval()(torch.rand(1, *model.image_shape)).poses.shape == (1, 10, 16)
    assert seen[0].shape == (1, *grid, 2, 8)
    assert model.routing.in_capsules == capsules
    with pytest.raises(ValueError, match=f"both sides must be at least {12 * stride + 1}"):
        small_model("conv_capsnet", image_size=(96, 12 * stride), stride=stride)


@pytest.mark.parametrize("votes", ["patch", "convolved"])
def test_it_learns_two_patterns(device, votes):
    torch.manual_seed(0)
    model = create_model(
        "conv_capsnet", num_classes=2, in_channels=1, image_size=16,
        channels=(8, 8), capsule_types=4, votes=votes, reconstruction=False,
    ).to(device)  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        target = torch.arange(16, device=device) % 2
        images = 0.3 * torch.rand(16, 1, 16, 16, device=device)
        images[target == 0, :, 4:12, 7:9] += 0.7
        images[target == 1, :, 7:9, 4:12] += 0.7
        activations = model(images).activations
        loss = ops.margin_loss(activations, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (activations.argmax(dim=1) == target).all()
    assert loss.item() < 0.1


def test_wrong_arguments():
    with pytest.raises(ValueError, match='ConvCapsNet: votes must be "patch" or "convolved"'):
        create_model("conv_capsnet", votes="none")
    with pytest.raises(TypeError, match="ConvCapsNet: channels must be two ints"):
        create_model("conv_capsnet", channels=8)
