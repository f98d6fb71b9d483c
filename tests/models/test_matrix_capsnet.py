"""MatrixCapsNet: the paper's parameters and layers, its options, and that it learns."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tritoncaps import ops
from tritoncaps.models import MatrixCapsNet, create_model

SMALLNORB = {"num_classes": 5, "in_channels": 2, "image_size": 32}
MNIST = {"num_classes": 10, "in_channels": 1, "image_size": 28}


@pytest.mark.parametrize(
    ("images", "size", "parameters"),
    [
        (SMALLNORB, "small", 68_754),
        (SMALLNORB, "big", 317_194),
        (MNIST, "small", 68_444),
        (MNIST, "big", 318_964),
    ],
)
def test_it_has_the_parameters_of_the_paper(images, size, parameters):
    model = create_model("matrix_capsnet", size=size, **images)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_it_is_the_network_of_the_paper(small_model):
    """Layer by layer, from the operators."""
    model = small_model("matrix_capsnet", image_size=(17, 22), iterations=3, num_classes=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "beta" in name:
                parameter.normal_()
    images = torch.rand(2, 1, 17, 22)
    output = model(images, return_coupling=True)
    conv, first, second = model.features[0], *model.capsules
    maps = model.primary.conv(F.conv2d(images, conv.weight, conv.bias, stride=2).relu())
    assert maps.shape == (2, 2 * 17, 7, 9)
    maps = maps.movedim(1, 3)
    grid = maps[..., 2:].unflatten(3, (2, 4, 4)), maps[..., :2].sigmoid()
    D, couplings = 16, []
    # Inputs that lie in a window and outputs, by positions: 7×9 → 3×4 → 1×2 → 1.
    for layer, inputs, outputs, stride in ((first, 7 * 9, 3 * 4, 2), (second, 3 * 4, 2, 1)):
        unit = D * inputs * layer.in_types / (outputs * layer.out_types)
        *grid, coupling = ops.conv_em_routing(
            *grid, layer.weight, layer.beta_u, unit * layer.beta_a, 3, stride=stride,
            temperature=[t / 3 / unit for t in (1, 2, 3)], return_assignment=True,
        )  # fmt: skip
        couplings.append(coupling)
    last = model.classes
    offset = torch.zeros(1, 2, 3, 4, 4)
    offset[..., 0, 3] = 0.5
    offset[0, :, :, 1, 3] = torch.tensor([0.25, 0.75])[:, None]
    unit = D * 2 * 3 / 4
    poses, activations, logits, coupling = ops.em_routing(
        grid[0].flatten(1, 3), grid[1].flatten(1), last.weight.repeat(2, 1, 1, 1), last.beta_u,
        unit * last.beta_a, 3, offset=offset.flatten(0, 2),
        temperature=[t / 3 / unit for t in (1, 2, 3)],
        return_logits=True, return_assignment=True,
    )  # fmt: skip
    torch.testing.assert_close(output.poses, poses.flatten(2))
    torch.testing.assert_close(output.activations, activations)
    torch.testing.assert_close(output.logits, logits)
    couplings.append(coupling.unflatten(1, (1, 2, 3)))
    for actual, expected in zip(output.coupling, couplings, strict=True):
        torch.testing.assert_close(actual, expected)
    assert model(images).coupling is None
    assert torch.equal(model(images, iterations=1).logits, model(images, None, iterations=1)[3])
    assert not torch.allclose(model(images, iterations=1).logits, output.logits)


@pytest.fixture(scope="module")
def page():
    """What the programs of docs/matrix-capsules.md leave behind."""
    text = (Path(__file__).parents[2] / "docs/matrix-capsules.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for program in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(program, names)
    return names


def test_constants_of_the_public_implementations(page):
    """With W of N(0, 1), some outputs get no mass. Nothing becomes NaN."""
    torch.manual_seed(0)
    for constants in (page["authors"], page["ibm"], page["yl_1993"]):
        model = MatrixCapsNet(**constants, channels=(4, 2, 2, 3))
        assert abs(model.capsules[1].weight.std().item() - constants["noise"]) < 0.1
        output = model(torch.rand(2, 1, 28, 28))
        F.cross_entropy(output.logits, torch.tensor([0, 1])).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_constants_of_the_authors_give_their_formula(page, small_model):
    """λ (N (−Σ log σ² − 16 β_u (log 2π + 1)) − 5000 β_a), for the classes, before an E-step."""
    model = small_model("matrix_capsnet", **page["authors"])
    layers = (*model.capsules, model.classes)
    log_2_pi_e = math.log(2 * math.pi) + 1
    betas = [(layer.beta_u[0].item(), layer.beta_a[0].item()) for layer in layers]
    expected = [(0.5 * log_2_pi_e / 2, -1250)] * 2 + [(2 * log_2_pi_e / 2, -2500)]
    torch.testing.assert_close(torch.tensor(betas), torch.tensor(expected), rtol=1e-3, atol=0)
    capsules = model.primary(model.features(torch.rand(2, 1, 28, 28)))
    for layer in model.capsules:
        capsules = layer(capsules)
    model.classes.temperature = model.classes.temperature[:1]
    with torch.no_grad():
        logits = model.classes(capsules, iterations=1).logits
    votes = torch.einsum("bhwcrp,cpkq->bhwckrq", capsules.poses, model.classes.weight)
    votes[..., 0, 3] += ((torch.arange(3) + 0.5) / 3).view(3, 1, 1, 1)
    votes[..., 1, 3] += ((torch.arange(3) + 0.5) / 3).view(3, 1, 1)
    votes, share = votes.flatten(1, 3).flatten(3), capsules.activations.flatten(1)[..., None] / 10
    mass = share.sum(dim=1)
    mean = (share[..., None] * votes).sum(dim=1) / mass[..., None]
    squares = (votes - mean[:, None]).square()
    variance = (share[..., None] * squares).sum(dim=1) / mass[..., None] + 5e-4
    entropy = mass * (-variance.log().sum(dim=2) - 16 * 2 * log_2_pi_e)
    theirs = 0.0025 * 0.05 * (entropy - 5000 * 1)
    torch.testing.assert_close(logits, theirs, rtol=1e-3, atol=1e-4)


def test_weights_of_a_model_made_on_meta_are_drawn_module_by_module():
    with torch.device("meta"):
        model = MatrixCapsNet(channels=(4, 2, 3, 8))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for layer in (*model.capsules, model.classes):
        mean = layer.weight.flatten(0, -4).mean(dim=(0, 2))
        torch.testing.assert_close(mean, torch.eye(4), atol=0.1, rtol=0)
        assert not layer.beta_u.any() and not layer.beta_a.any()
    assert model(torch.rand(1, 1, 28, 28)).logits.isfinite().all()


def test_whitening_makes_brightness_and_contrast_irrelevant(small_model):
    options = {"in_channels": 2, "image_size": 17}
    model = small_model("matrix_capsnet", whiten=True, **options).double().eval()
    plain = small_model("matrix_capsnet", **options).double().eval()
    plain.load_state_dict(model.state_dict())
    images = torch.rand(3, 2, 17, 17, dtype=torch.float64)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    variance = (images - mean).square().mean(dim=(1, 2, 3), keepdim=True)
    expected = plain((images - mean) / (variance + 1e-5).sqrt()).logits
    torch.testing.assert_close(model(images).logits, expected)
    factor = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)[:, None, None, None]
    changed = model(factor * images - 0.2).logits
    # The term beside the variance, 1/12, is not scaled.
    torch.testing.assert_close(changed, expected, rtol=1e-3, atol=1e-2)
    assert model(torch.full((1, 2, 17, 17), 0.5).double()).logits.isfinite().all()


def test_it_refuses_wrong_arguments():
    with pytest.raises(ValueError, match="both sides must be at least 17"):
        MatrixCapsNet(image_size=(17, 16))
    with pytest.raises(TypeError, match=r"channels must be four ints, got \(4, 2, 2\)"):
        MatrixCapsNet(channels=(4, 2, 2))
    with pytest.raises(ValueError, match=r'size must be "small" or "big", got .huge'):
        MatrixCapsNet(size="huge")
    with pytest.raises(TypeError, match="whiten must be a bool, got int"):
        MatrixCapsNet(whiten=1)
    with pytest.raises(TypeError, match="class_options must be a dict or None, got list"):
        MatrixCapsNet(class_options=[])
    with pytest.raises(ValueError, match="class_options has 'stride', but takes only iterations"):
        MatrixCapsNet(class_options={"stride": 2})


@pytest.mark.parametrize("loss", ["cross entropy", "spread"])
def test_it_learns(small_model, loss):
    """Three kinds of stripes."""
    model = small_model("matrix_capsnet", num_classes=3, image_size=17, channels=(8, 2, 3, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    target = torch.arange(24) % 3
    images = torch.zeros(24, 1, 17, 17)
    for index, kind in enumerate(target):
        images[index, :, kind::3] = 1
    images += 0.1 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        output = model(images)
        if loss == "spread":
            value = ops.spread_loss(output.activations, target, 0.5)
        else:
            value = F.cross_entropy(output.logits, target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert (model(images).logits.argmax(dim=1) == target).float().mean() > 0.9
