"""Layers and models: shapes, parameters, names, gradients, representations."""

import pytest
import torch

from tritoncaps import (
    CapsuleLoss,
    MarginLoss,
    PrimaryCapsules,
    ReconstructionDecoder,
    RoutedCapsules,
    ops,
    reference,
)
from tritoncaps.losses import reconstruction_error
from tritoncaps.models import CapsNet, DeepCapsNet, create_model, list_models

# Every argument at another value than its default.
BUILDS = [
    PrimaryCapsules(3, 4, dim=6, kernel_size=5, stride=1),
    RoutedCapsules(6, 8, 10, 16, 2, gradient="last", learned_prior=True, input_length=0.25),
    ReconstructionDecoder(5, 8, (3, 9, 7), hidden=(32, 64)),
    MarginLoss(0.8, 0.2, 0.25, "sum"),
    CapsuleLoss(0.1),
]


@pytest.mark.parametrize("module", BUILDS, ids=lambda module: type(module).__name__)
def test_representation_builds_the_same_module(module):
    text = f"{type(module).__name__}({module.extra_repr()})"
    again = eval(text)
    assert again.extra_repr() == module.extra_repr()
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("name", "parameters"), [("capsnet", 8_215_568), ("deep_capsnet", 7_869_200)]
)
def test_models_have_the_parameters_of_table_1(name, parameters):
    model = create_model(name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


def test_models_have_the_layers_of_table_1():
    capsnet, deep = CapsNet(), DeepCapsNet()
    assert capsnet.conv.weight.shape == (256, 1, 9, 9)
    assert capsnet.primary.conv.weight.shape == (256, 256, 9, 9)
    assert capsnet.routing.weight.shape == (1152, 8, 10, 16)
    assert deep.conv1.weight.shape == (512, 1, 9, 9)
    assert deep.conv2.weight.shape == (256, 512, 5, 5)
    assert deep.primary.conv.weight.shape == (256, 256, 5, 5)
    assert deep.primary_routing.weight.shape == (1152, 8, 10, 16)
    assert deep.secondary_routing.weight.shape == (10, 16, 10, 16)
    assert [capsnet.primary.conv.stride, deep.primary.conv.stride] == [(2, 2), (2, 2)]
    assert (capsnet.routing.iterations, deep.secondary_routing.iterations) == (3, 3)


def test_models_are_known_by_name():
    assert list_models() == ["capsnet", "deep_capsnet"]
    model = create_model("deep_capsnet", hidden_capsules=12, hidden_dim=8, primary_iterations=1)
    assert isinstance(model, DeepCapsNet)
    assert model.primary_routing.weight.shape == (1152, 8, 12, 8)
    assert model.primary_routing.iterations == 1
    with pytest.raises(TypeError):
        create_model("capsnet", hidden_capsules=12)


@pytest.mark.parametrize("name", ["capsnet", "deep_capsnet"])
@pytest.mark.parametrize(
    ("in_channels", "image_size", "num_classes"), [(1, 28, 10), (3, (32, 40), 4), (2, 17, 1)]
)
def test_models_take_any_images(device, name, in_channels, image_size, num_classes):
    torch.manual_seed(0)
    channels = {"capsnet": 4, "deep_capsnet": (4, 6)}[name]
    model = create_model(
        name,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        channels=channels,
        capsule_types=2,
        class_dim=12,
    ).to(device)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    images = torch.rand(3, in_channels, height, width, device=device)
    target = torch.zeros(3, dtype=torch.int64, device=device)
    activations, poses, reconstruction, _ = output = model(images, target)
    assert activations.shape == (3, num_classes)
    assert poses.shape == (3, num_classes, 12)
    assert reconstruction.shape == images.shape
    torch.testing.assert_close(output.activations, output.poses.norm(dim=-1))
    assert ((activations >= 0) & (activations < 1)).all()
    CapsuleLoss()(activations, target, reconstruction, images).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
    alone = model(images[:0])
    assert alone.activations.shape == (0, num_classes)


@pytest.mark.parametrize("name", ["capsnet", "deep_capsnet"])
def test_model_without_decoder(name):
    channels = {"capsnet": 4, "deep_capsnet": (4, 6)}[name]
    model = create_model(name, channels=channels, capsule_types=2, reconstruction=False)
    output = model(torch.rand(2, 1, 28, 28))
    assert output.reconstruction is None
    target = torch.tensor([1, 2])
    loss = CapsuleLoss()(
        output.activations, target, output.reconstruction, torch.rand(2, 1, 28, 28)
    )
    torch.testing.assert_close(loss, ops.margin_loss(output.activations, target))


def test_defaults_are_those_of_the_paper():
    """Sabour 2017: section 4 and figure 1, procedure 1, equation 4, section 4.1 and figure 2."""
    primary, routed = PrimaryCapsules(256), RoutedCapsules(2, 2, 2, 2)
    assert (primary.capsule_types, primary.dim, primary.kernel_size, primary.stride) == (
        32,
        8,
        9,
        2,
    )
    assert (routed.iterations, routed.gradient, routed.prior) == (3, "full", None)
    loss = MarginLoss()
    assert (loss.m_pos, loss.m_neg, loss.down_weight, loss.reduction) == (0.9, 0.1, 0.5, "mean")
    assert CapsuleLoss().reconstruction_weight == 0.0005
    assert ReconstructionDecoder(10, 16, (1, 28, 28)).hidden == (512, 1024)


def test_primary_capsules_count_their_capsules():
    layer = PrimaryCapsules(2, capsule_types=3, dim=4, kernel_size=5, stride=2)
    for height, width in ((5, 5), (6, 9), (28, 17)):
        poses = layer(torch.rand(1, 2, height, width))
        assert poses.shape == (1, layer.num_capsules(height, width), 4)
    assert layer.num_capsules(4, 28) == 0


def test_channels_last_changes_no_result(device):
    torch.manual_seed(0)
    layer = PrimaryCapsules(8, capsule_types=2, dim=4, kernel_size=3).to(device)
    features = torch.rand(2, 8, 9, 9, device=device)
    expected = layer(features)
    layer = layer.to(memory_format=torch.channels_last)
    result = layer(features.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(result, expected)


def test_routed_capsules_are_the_operator(device):
    torch.manual_seed(0)
    layer = RoutedCapsules(6, 4, 5, 3, iterations=2, learned_prior=True).to(device)
    assert torch.equal(layer.prior, torch.zeros(6, 5, device=device))
    torch.nn.init.normal_(layer.prior)
    u = torch.randn(2, 6, 4, device=device)
    expected = reference.fused_dynamic_routing(u, layer.weight, 2, prior=layer.prior)
    torch.testing.assert_close(layer(u), expected)
    layer(u).sum().backward()
    assert layer.prior.grad.abs().sum() > 0


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


def test_reconstruction_error_is_summed_over_an_image():
    error = reconstruction_error(torch.full((2, 3, 4, 5), 0.5), torch.zeros(2, 3, 4, 5))
    torch.testing.assert_close(error, torch.full((2,), 0.25 * 60))


def test_loss_modules_are_the_functions():
    activations, target = torch.rand(3, 5), torch.tensor([1, 4, 0])
    images, drawn = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4)
    expected = ops.margin_loss(activations, target, 0.8, 0.2, 0.25, "sum")
    torch.testing.assert_close(MarginLoss(0.8, 0.2, 0.25, "sum")(activations, target), expected)
    loss = CapsuleLoss(0.1)(activations, target, drawn, images)
    expected = ops.margin_loss(activations, target) + 0.1 * (drawn - images).square().sum() / 3
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["capsnet", "deep_capsnet"])
def test_models_run_under_autocast_and_route_in_float32(device, name):
    channels = {"capsnet": 4, "deep_capsnet": (4, 6)}[name]
    torch.manual_seed(0)
    model = create_model(name, channels=channels, capsule_types=2).to(device)
    images = torch.rand(2, 1, 28, 28, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = model(images)
    assert output.poses.dtype == torch.float32
    torch.testing.assert_close(output.activations, model(images).activations, rtol=0.1, atol=0.05)
    output.activations.sum().backward()


def test_state_dict_round_trip(device):
    torch.manual_seed(0)
    build = {"channels": (4, 6), "capsule_types": 2}
    first, second = (create_model("deep_capsnet", **build).to(device).eval() for _ in range(2))
    images = torch.rand(2, 1, 28, 28, device=device)
    assert not torch.equal(first(images).activations, second(images).activations)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images).activations, second(images).activations)
