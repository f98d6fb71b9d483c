"""Spread loss: reductions, what is not defined, and indices that nobody can read."""

import pytest
import torch

from tritoncaps import ops, reference


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_reduction_and_margin_agrees(device, reduction):
    torch.manual_seed(0)
    activations = torch.rand(6, 5, dtype=torch.float64, device=device)
    target = torch.tensor([0, 4, 2, 2, 1, 3], device=device)
    for margin in (0.0, 0.2, 0.9, 2):
        arguments = activations, target, margin, reduction
        expected = reference.spread_loss(*arguments)
        torch.testing.assert_close(ops.spread_loss(*arguments), expected)


def test_it_is_the_sum_over_the_other_classes():
    activations = torch.tensor([[0.5, 0.8, 0.1, 0.3]])
    expected = 0.7**2 + 0.0 + 0.2**2  # margins missed by classes 1, 2 and 3
    loss = ops.spread_loss(activations, torch.tensor([0]), margin=0.4)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_of_no_image_it_is_zero(device, reduction):
    activations = torch.empty(0, 10, device=device, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=device)
    loss = ops.spread_loss(activations, target, reduction=reduction)
    loss.backward()
    assert loss.item() == 0


def test_of_one_class_it_is_zero():
    assert ops.spread_loss(torch.rand(3, 1), torch.zeros(3, dtype=torch.int64)).item() == 0


def test_several_classes_in_an_image_are_refused():
    with pytest.raises(ValueError, match=r"class indices \(B,\), got \(2, 3\); use target.argmax"):
        ops.spread_loss(torch.rand(2, 3), torch.eye(3)[:2])
    with pytest.raises(ValueError, match="spread_loss: margin must be >= 0 and finite, got -1"):
        ops.spread_loss(torch.rand(2, 3), torch.tensor([0, 1]), -1)


def test_each_image_has_a_gradient_of_its_own(device):
    """`vmap(grad(...))`: no value of the target may be read. An index of no class has nothing."""
    activations = torch.rand(3, 4, device=device)

    def loss(one, label):
        return ops.spread_loss(one[None], label[None])

    target = torch.tensor([1, 0, 3], device=device)
    each = torch.func.vmap(torch.func.grad(loss))(activations, target)
    alone = [torch.func.grad(loss)(*pair) for pair in zip(activations, target, strict=True)]
    torch.testing.assert_close(each, torch.stack(alone))
    nowhere = torch.func.vmap(loss)(activations, torch.full_like(target, 7))
    torch.testing.assert_close(nowhere, (0.9 + activations).square().sum(dim=1))
