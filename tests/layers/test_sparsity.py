"""How sparse object capsules are, and the loss of a stacked capsule autoencoder."""

import math
import re

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Categorical

from tritoncaps.losses import StackedCapsuleLoss, entropy_sparsity, l2_sparsity


def presences(B=4, J=3):
    torch.manual_seed(0)
    return torch.rand(B, J, dtype=torch.float64)


def test_the_entropies_are_those_of_shares():
    mass = presences() * 5
    within, between = entropy_sparsity(mass)
    expected = torch.stack([Categorical(probs=row).entropy() for row in mass]).mean()
    torch.testing.assert_close(within, expected)
    torch.testing.assert_close(between, Categorical(probs=mass.sum(dim=0)).entropy())
    assert gradcheck(entropy_sparsity, mass.requires_grad_())


def test_a_capsule_without_mass_and_an_image_without_mass():
    mass = torch.tensor([[1.0, 0, 1], [0, 0, 0]], requires_grad=True)
    within, between = entropy_sparsity(mass)
    torch.testing.assert_close(within, torch.tensor(math.log(2) / 2))
    torch.testing.assert_close(between, torch.tensor(math.log(2)))
    (grad,) = torch.autograd.grad(within + between, mass)
    assert grad.isfinite().all()


@pytest.mark.parametrize("mass", [1e-40, 1e-30, 1e-10])
def test_an_image_that_is_hardly_explained_has_a_finite_gradient(mass):
    shares = torch.tensor([[1.0, 2, 1], [0.5, 0, 0.5]])
    shares[0] *= mass
    shares.requires_grad_()
    within, between = entropy_sparsity(shares)
    (grad,) = torch.autograd.grad(within + between, shares)
    assert within.isfinite() and grad.isfinite().all()
    # A network's masses have gradients as small as they are themselves.
    assert (grad * shares).abs().max() < 2


def test_sums_of_many_16_bit_numbers_do_not_overflow():
    within, between = entropy_sparsity(torch.full((64, 32), 4000.0, dtype=torch.float16))
    torch.testing.assert_close(torch.stack([within, between]), torch.full((2,), math.log(32)))
    presence = torch.ones(1024, 32, dtype=torch.float16)
    _, between = l2_sparsity(presence, 10)
    assert between.item() == pytest.approx((1024 - 102.4) ** 2)


def test_the_l2_sparsity_counts_what_is_present():
    presence = presences()
    within, between = l2_sparsity(presence, 2)
    expected = sum((sum(row) - 3 / 2) ** 2 for row in presence.tolist()) / 4
    assert within.item() == pytest.approx(expected)
    expected = sum((sum(column) - 4 / 2) ** 2 for column in presence.T.tolist()) / 3
    assert between.item() == pytest.approx(expected)
    expected = sum((sum(row) - 0.5) ** 2 for row in presence.tolist()) / 4
    assert l2_sparsity(presence, 2, active=0.5)[0].item() == pytest.approx(expected)
    assert gradcheck(lambda p: l2_sparsity(p, 2), presence.requires_grad_())


def test_the_loss_is_the_weighted_sum():
    """Each term has a prime as its weight, so that no two can be mixed up."""
    names = ("deformation", "prior_within", "prior_between", "posterior_within")
    weights = dict(zip((*names, "posterior_between"), (2.0, 3.0, 5.0, 7.0, 11.0), strict=True))
    image, part, deformation = torch.randn(3, 4, dtype=torch.float64)
    presence, explained = presences(), presences().flip(0) * 3
    prior, posterior = l2_sparsity(presence, 4), entropy_sparsity(explained)
    expected = 2 * deformation.mean() - image.mean() - part.mean()
    expected = expected + 3 * prior[0] + 5 * prior[1] + 7 * posterior[0] - 11 * posterior[1]
    loss = StackedCapsuleLoss(4, **weights)
    torch.testing.assert_close(loss(image, part, presence, explained, deformation), expected)
    assert repr(loss).startswith("StackedCapsuleLoss(num_classes=4, deformation=2.0, prior_within=")


CASES = {
    "rank": (
        lambda: entropy_sparsity(torch.ones(3)),
        "entropy_sparsity: mass must have 2 axes (B, J), got 1 (mass: (3,))",
    ),
    "no image": (
        lambda: l2_sparsity(torch.ones(0, 3), 2),
        "l2_sparsity: needs at least one image and capsule, got (0, 3)",
    ),
    "classes": (
        lambda: l2_sparsity(torch.ones(2, 3), 0),
        "l2_sparsity: num_classes must be > 0 and finite, got 0",
    ),
    "active": (
        lambda: l2_sparsity(torch.ones(2, 3), 2, active=-1),
        "l2_sparsity: active must be >= 0 and finite, got -1",
    ),
    "weight": (
        lambda: StackedCapsuleLoss(prior_within=-1),
        "StackedCapsuleLoss: prior_within must be >= 0 and finite, got -1",
    ),
    "images": (
        lambda: StackedCapsuleLoss()(*torch.ones(2, 4), *torch.ones(2, 3, 5), torch.ones(4)),
        "StackedCapsuleLoss: presence has B=3 but image_log_prob has B=4 (image_log_prob: (4,), "
        "part_log_prob: (4,), presence: (3, 5), explained: (3, 5), deformation: (4,))",
    ),
}


@pytest.mark.parametrize(("call", "words"), CASES.values(), ids=CASES)
def test_errors_name_the_argument_and_both_numbers(call, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        call()
