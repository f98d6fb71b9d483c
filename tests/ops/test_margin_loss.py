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
    is_weighted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_target_and_reduction_agrees(device, reduction, B, K, target, is_weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = {
        "class indices": torch.randint(K, (B,), generator=generator),
        "multi-hot": torch.randint(2, (B, K), generator=generator),
        "shares": torch.rand(B, K, generator=generator),
    }
    fixed = {"target": targets[target].to(device), "m_pos": 0.8, "m_neg": 0.15, "down_weight": 0.4}
    if is_weighted:
        fixed["class_weight"] = torch.rand(K, generator=generator).to(device)
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


def test_class_weights_multiply_the_terms_of_their_class():
    """Those of present and of absent ones. The mean is over the batch, whatever the weights."""
    activations = torch.tensor([[0.4, 0.6], [0.4, 0.6]])
    target, weight = torch.tensor([0, 1]), torch.tensor([10.0, 100.0])
    # 0.5² and 0.3² for the present class, half of 0.5² and 0.3² for the absent one.
    first = 10 * 0.25 + 100 * 0.125
    second = 10 * 0.045 + 100 * 0.09
    each = ops.margin_loss(activations, target, reduction="none", class_weight=weight)
    torch.testing.assert_close(each, torch.tensor([first, second]))
    mean = ops.margin_loss(activations, target, class_weight=weight.double())
    torch.testing.assert_close(mean, torch.tensor((first + second) / 2))


@pytest.mark.parametrize(
    ("dtype", "excess"),
    [(torch.float64, 1e-7), (torch.float32, 1e-7), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)],
)
def test_shares_may_be_a_rounding_error_outside(dtype, excess):
    """Mixing and smoothing leave 1.0000001. Forty times as much is refused."""
    activations = torch.rand(2, 3)
    for value in (1 + excess, -excess):
        share = torch.full((2, 3), value, dtype=dtype)
        assert ops.margin_loss(activations, share).isfinite()
    for value in (1 + 40 * excess, -40 * excess):
        with pytest.raises(ValueError, match="multi-hot values from"):
            ops.margin_loss(activations, torch.full((2, 3), value, dtype=dtype))
