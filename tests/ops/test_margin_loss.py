"""Margin loss: every kind of target and reduction, vmap and fake tensors."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tritoncaps import ops, reference
from tritoncaps.testing import Case, Operator, compare

OUTPUTS = {"mean": {"loss": ""}, "sum": {"loss": ""}, "none": {"loss": "B"}}


@pytest.mark.parametrize("reduction", OUTPUTS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    B=st.integers(1, 9),
    K=st.integers(1, 12),
    target=st.sampled_from(["class indices", "multi-hot", "shares"]),
    seed=st.integers(0, 2**16),
)
def test_every_target_and_reduction_agrees(device, reduction, B, K, target, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = {
        "class indices": torch.randint(K, (B,), generator=generator),
        "multi-hot": torch.randint(2, (B, K), generator=generator),
        "shares": torch.rand(B, K, generator=generator),
    }
    fixed = {"target": targets[target].to(device), "m_pos": 0.8, "m_neg": 0.15, "down_weight": 0.4}
    operator = Operator(
        partial(ops.margin_loss, **fixed),
        partial(reference.margin_loss, **fixed),
        inputs={"activations": "B K"},
        outputs=OUTPUTS[reduction],
        name="margin_loss",
        domain={"activations": torch.sigmoid},
    )
    case = Case({"B": B, "K": K}, {"reduction": reduction}, dtype=torch.float32, seed=seed)
    compare(operator, case, device)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_batch_gives_zero(device, reduction):
    activations = torch.empty(0, 10, device=device, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=device)
    loss = ops.margin_loss(activations, target, reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert activations.grad.shape == (0, 10)


def test_vmap_over_activations_and_targets(device):
    activations = torch.rand(3, 10, device=device)
    target = torch.tensor([1, 0, 9], device=device)
    each = torch.func.vmap(lambda x, y: ops.margin_loss(x[None], y[None]))(activations, target)
    torch.testing.assert_close(each, ops.margin_loss(activations, target, reduction="none"))


def test_fake_tensors_work():
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.margin_loss(torch.rand(3, 10), torch.zeros(3, dtype=torch.int64))
    assert fake.shape == ()


def test_each_image_has_a_gradient_of_its_own(device):
    """`vmap(grad(...))`, as in per-sample gradients: no value of the target may be read."""
    activations = torch.rand(3, 10, device=device)
    target = torch.tensor([1, 0, 9], device=device)

    def loss(one, label):
        return ops.margin_loss(one[None], label[None])

    each = torch.func.vmap(torch.func.grad(loss))(activations, target)
    alone = [torch.func.grad(loss)(*pair) for pair in zip(activations, target, strict=True)]
    torch.testing.assert_close(each, torch.stack(alone))


def test_an_index_that_is_no_class_marks_none():
    """A CPU refuses it. Where no value can be read, it is an image without any class."""
    activations = torch.rand(2, 4)
    each = torch.func.vmap(lambda x, y: ops.margin_loss(x[None], y[None]))
    nowhere = each(activations, torch.tensor([4, -1]))
    absent = ops.margin_loss(activations, torch.zeros(2, 4), reduction="none")
    torch.testing.assert_close(nowhere, absent)
