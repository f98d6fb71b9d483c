"""Losses as modules: the functions behind them, defaults, targets, empty batches and dtypes."""

from functools import partial

import pytest
import torch

from tritoncaps import CapsuleLoss, MarginLoss, ops
from tritoncaps.losses import SpreadLoss, linear_margin, reconstruction_error, sigmoid_margin


def test_defaults_are_those_of_the_paper():
    """Sabour 2017: equation 4 and section 4.1."""
    loss = MarginLoss()
    assert (loss.m_pos, loss.m_neg, loss.down_weight, loss.reduction) == (0.9, 0.1, 0.5, "mean")
    loss = CapsuleLoss()
    assert (loss.m_pos, loss.m_neg, loss.down_weight, loss.reduction) == (0.9, 0.1, 0.5, "mean")
    assert loss.reconstruction_weight == 0.0005


def test_reconstruction_error_is_summed_over_an_image():
    error = reconstruction_error(torch.full((2, 3, 4, 5), 0.5), torch.zeros(2, 3, 4, 5))
    torch.testing.assert_close(error, torch.full((2,), 0.25 * 60))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_error_of_16_bit_images_is_added_up_in_float32(dtype):
    images = torch.ones(1, 3, 256, 256, dtype=dtype)  # their error is beyond float16
    assert reconstruction_error(images, torch.zeros_like(images)).item() == 3 * 256**2


def test_modules_are_the_functions():
    activations, target = torch.rand(3, 5), torch.tensor([1, 4, 0])
    images, drawn = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4)
    expected = ops.margin_loss(activations, target, 0.8, 0.2, 0.25, "sum")
    torch.testing.assert_close(MarginLoss(0.8, 0.2, 0.25, "sum")(activations, target), expected)
    loss = CapsuleLoss(0.1)(activations, target, drawn, images)
    expected = ops.margin_loss(activations, target) + 0.1 * (drawn - images).square().sum() / 3
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_arguments_are_passed_through(reduction):
    activations, target, weight = torch.rand(3, 5), torch.tensor([1, 4, 0]), torch.rand(5)
    images, drawn = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4)
    margins = (0.8, 0.2, 0.25, reduction)
    margin = ops.margin_loss(activations, target, *margins, class_weight=weight)
    loss = MarginLoss(*margins, class_weight=weight)
    torch.testing.assert_close(loss(activations, target), margin)
    loss = CapsuleLoss(0.1, *margins, class_weight=weight)
    torch.testing.assert_close(loss(activations, target, None, images), margin)
    error = (drawn - images).square().sum(dim=(1, 2, 3))
    error = error if reduction == "none" else getattr(error, reduction)()
    torch.testing.assert_close(loss(activations, target, drawn, images), margin + 0.1 * error)


@pytest.mark.parametrize("kind", [MarginLoss, CapsuleLoss])
def test_class_weights_move_and_are_saved_with_the_module(kind):
    loss = kind(class_weight=torch.tensor([1.0, 2.0]))
    assert loss.to("meta").class_weight.is_meta
    assert list(loss.state_dict()) == ["class_weight"]
    assert not kind().state_dict()


def test_an_empty_batch_gives_zero(device):
    images = torch.empty(0, 1, 4, 4, device=device, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=device)
    loss = CapsuleLoss()(torch.empty(0, 10, device=device), target, images, images.detach())
    loss.backward()
    assert loss.item() == 0


def test_float64_stays_float64(device):
    images = torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=device)
    activations = torch.tensor([[0.9, 0.1]], dtype=torch.float64, device=device)
    target = torch.tensor([0], device=device)
    loss = CapsuleLoss(reconstruction_weight=1.0)(activations, target, images + 1 / 3, images)
    assert loss.item() == pytest.approx(1 / 9, rel=1e-15)


def test_the_margin_of_the_spread_loss_rises_with_the_step():
    activations, target = torch.rand(3, 5), torch.tensor([1, 4, 0])
    rising = SpreadLoss(partial(linear_margin, steps=10), "sum")
    for step, margin in ((0, 0.2), (5, 0.55), (10, 0.9), (1000, 0.9)):
        expected = ops.spread_loss(activations, target, margin, "sum")
        torch.testing.assert_close(rising(activations, target, step), expected)
    expected = ops.spread_loss(activations, target, 0.3)
    torch.testing.assert_close(SpreadLoss(0.3)(activations, target, 7), expected)
    assert repr(SpreadLoss(0.3)) == "SpreadLoss(margin=0.3, reduction='mean')"


def test_wrong_margins_and_steps_are_named():
    activations, target = torch.rand(3, 5), torch.tensor([1, 4, 0])
    rising = SpreadLoss(partial(linear_margin, steps=10))
    with pytest.raises(ValueError, match="SpreadLoss: margin must be >= 0 and finite, got -1"):
        SpreadLoss(-1)
    with pytest.raises(TypeError, match="SpreadLoss: step must be an int, got None; the margin is"):
        rising(activations, target)
    for loss in (rising, SpreadLoss(0.9)):
        with pytest.raises(TypeError, match="SpreadLoss: step must be an int, got float"):
            loss(activations, target, 2.5)
        with pytest.raises(ValueError, match="SpreadLoss: step must be >= 0, got -1"):
            loss(activations, target, -1)
    with pytest.raises(ValueError, match="linear_margin: steps must be >= 1, got 0"):
        linear_margin(3, 0)
    for name in ("start", "end"):
        with pytest.raises(ValueError, match=f"linear_margin: {name} must be >= 0 and finite"):
            linear_margin(3, 10, **{name: -0.1})


def test_the_margin_of_the_authors_code():
    """It ends at 0.2 + 0.79 / (1 + e⁻¹⁰), which min(10, ...) leaves just below 0.99."""
    assert sigmoid_margin(0) == pytest.approx(0.2 + 0.79 * 0.0179862, abs=1e-7)
    assert sigmoid_margin(200_000) == pytest.approx(0.595)
    assert sigmoid_margin(700_000) == sigmoid_margin(10**9) == pytest.approx(0.98996, abs=1e-5)
