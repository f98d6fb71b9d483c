"""Efficient-CapsNet and InvertedCapsNet: the papers' layers and parameters, and their routing."""

import pytest
import torch
from torch.nn import functional as F

from tritoncaps import ops
from tritoncaps.models import EfficientCapsNet, InvertedCapsNet, create_model
from tritoncaps.models.inverted_capsnet import CapsuleConvolution


def count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_efficient_capsnet_has_the_parameters_of_the_paper():
    assert count(EfficientCapsNet(reconstruction=False)) == 161_824
    assert count(EfficientCapsNet().decoder) == 1_411_344
    small = EfficientCapsNet(decoder_hidden=(128, 240)).decoder
    assert 4 * count(small) < 1_000_000  # bytes of float32


def test_efficient_capsnet_is_the_network_of_the_paper(device):
    """Layer by layer: the normalisation follows the ReLU, and a capsule is eight channels."""
    torch.manual_seed(0)
    model = EfficientCapsNet(reconstruction=False).to(device).eval()
    convolutions = [m for m in model.features if isinstance(m, torch.nn.Conv2d)]
    shapes = [(m.out_channels, m.kernel_size, m.stride) for m in convolutions]
    assert shapes == [
        (32, (5, 5), (1, 1)),
        (64, (3, 3), (1, 1)),
        (64, (3, 3), (1, 1)),
        (128, (3, 3), (2, 2)),
    ]
    norms = [m for m in model.features if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    images = torch.rand(3, 1, 28, 28, device=device)
    maps = images
    for conv, norm in zip(convolutions, norms, strict=True):
        maps = norm(F.relu(conv(maps)))
    assert maps.shape == (3, 128, 9, 9)
    assert (model.primary.kernel_size, model.primary.groups) == ((9, 9), 128)
    u = ops.squash(model.primary(maps).view(3, 16, 8), form="exponential")
    s = ops.attention_routing(u, model.routing.weight, model.routing.bias)
    output = model(images, return_coupling=True)
    torch.testing.assert_close(output.poses, ops.squash(s, form="exponential"))
    torch.testing.assert_close(output.activations, output.poses.norm(dim=2))
    assert output.coupling.shape == (3, 16, 10)
    assert output.reconstruction is None
    assert output.logits is None


@pytest.mark.parametrize(
    ("stride", "size", "kernel"),
    [(1, (11, 12), (1, 1)), (1, (32, 28), (11, 9)), (2, (48, 17), (8, 1)), (3, 96, (13, 13))],
)
def test_the_primary_kernel_of_efficient_capsnet_is_as_large_as_the_maps(stride, size, kernel):
    model = EfficientCapsNet(3, 2, size, stride=stride, primary_capsules=2, reconstruction=False)
    assert model.primary.kernel_size == kernel
    assert model.eval()(torch.rand(1, *model.image_shape)).poses.shape == (1, 3, 16)
    smallest = 5 + 6 * stride
    with pytest.raises(ValueError, match=f"both sides must be at least {smallest}"):
        EfficientCapsNet(image_size=(smallest, smallest - 1), stride=stride)


def test_inverted_capsnet_has_the_parameters_of_the_paper():
    with torch.device("meta"):
        model = InvertedCapsNet()
    assert count(model) == 1_829_329  # 1.83 M
    assert count(model.features) == 1_340_224  # 1.34 M
    assert [layer.routing.weight.shape for layer in model.capsules] == [
        (288, 4, 32, 4),
        (288, 4, 32, 4),
        (800, 4, 10, 4),
    ]


def test_a_capsule_convolution_sees_its_window():
    """Position by position. Published code has mixed up positions and components here."""
    torch.manual_seed(0)
    layer = CapsuleConvolution(3, 2, (3, 2), stride=2)
    grid = torch.randn(2, 7, 6, 3, 16)
    v = layer(grid, iterations=2)
    assert v.shape == (2, 3, 3, 2, 16)
    for row in range(3):
        for column in range(3):
            window = grid[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 2]
            alone = layer.routing(window.reshape(2, 18, 16), iterations=2)
            torch.testing.assert_close(v[:, row, column], alone)


@pytest.fixture
def inverted(small_model):
    def build(**arguments):
        return small_model("inverted_capsnet", image_size=(13, 17), num_classes=3, **arguments)

    return build


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_concurrent_routing_takes_all_layers_a_pass_at_a_time(inverted, iterations):
    """Also the passes that the model leaves out, because the classes never see them."""
    model = inverted(iterations=iterations).eval()
    images = torch.rand(2, 1, 13, 17)
    grid = model.norm(
        model.primary(model.features(images)).unflatten(1, (2, 16)).permute(0, 3, 4, 1, 2)
    )
    grids = [grid]
    for layer in model.capsules:
        grids.append(layer(grids[-1], iterations=1))
    for _ in range(iterations - 1):
        passed = [
            layer(grids[index], grids[index + 1], iterations=1)
            for index, layer in enumerate(model.capsules)
        ]
        grids = [grid, *passed]
    output = model(images)
    torch.testing.assert_close(output.poses, grids[-1].flatten(1, 3))
    torch.testing.assert_close(output.logits, model.score(output.poses)[..., 0])
    torch.testing.assert_close(output.activations, output.logits.softmax(dim=1))


def test_sequential_routing_ends_a_layer_before_the_next(inverted):
    model = inverted(routing="sequential", iterations=3).eval()
    images = torch.rand(2, 1, 13, 17)
    grid = model.norm(
        model.primary(model.features(images)).unflatten(1, (2, 16)).permute(0, 3, 4, 1, 2)
    )
    for layer in model.capsules:
        grid = layer(grid, iterations=3)
    torch.testing.assert_close(model(images).poses, grid.flatten(1, 3))


def test_without_agreement_both_ways_of_routing_are_the_same(inverted):
    images = torch.rand(2, 1, 13, 17)
    ways = [inverted(routing=way).eval() for way in ("concurrent", "sequential")]
    first, second = (model(images, iterations=1).logits for model in ways)
    assert torch.equal(first, second)
    assert not torch.allclose(*(model(images).logits for model in ways))


@pytest.mark.parametrize("routing", ["concurrent", "sequential"])
def test_inverted_capsnet_learns(inverted, routing):
    """Three kinds of stripes, by cross entropy."""
    model = inverted(routing=routing)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    target = torch.arange(24) % 3
    images = torch.zeros(24, 1, 13, 17)
    for index, kind in enumerate(target):
        images[index, :, kind::3] = 1
    images += 0.1 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(12):
        loss = F.cross_entropy(model(images).logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert (model(images).activations.argmax(dim=1) == target).float().mean() > 0.9


def test_inverted_capsnet_refuses_wrong_arguments():
    with pytest.raises(ValueError, match=r'InvertedCapsNet: routing must be "concurrent" or "seq'):
        create_model("inverted_capsnet", routing="parallel")
    with pytest.raises(ValueError, match="both sides must be at least 13"):
        create_model("inverted_capsnet", image_size=(13, 12))
    model = create_model("inverted_capsnet", channels=(4, 4), blocks=(1, 1), capsule_types=1)
    with pytest.raises(ValueError, match="InvertedCapsNet: iterations must be >= 1, got 0"):
        model(torch.rand(1, 3, 32, 32), iterations=0)
