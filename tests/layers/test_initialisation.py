"""The first weights of a routing: bits of the paper's sizes, and lengths at all others."""

import math
from itertools import product

import pytest
import torch

from tritoncaps import MarginLoss, RoutedCapsules, ops
from tritoncaps.layers import capsule_lengths
from tritoncaps.layers._initialisation import routing_weight_std
from tritoncaps.models import CapsNet, DeepCapsNet


@pytest.mark.parametrize(
    ("network", "layer"),
    [(CapsNet, "routing"), (DeepCapsNet, "primary_routing"), (DeepCapsNet, "secondary_routing")],
)
def test_ten_capsules_of_sixteen_start_with_sums_of_length_one(network, layer):
    """σ = J/√(I·D), to the last bit: the training of the paper's networks depends on it."""
    torch.manual_seed(0)
    routing = getattr(network(reconstruction=False), layer)
    torch.manual_seed(1)
    routing.reset_parameters()
    torch.manual_seed(1)
    sigma = 10 / math.sqrt(routing.in_capsules * 16)
    assert torch.equal(routing.weight, torch.empty_like(routing.weight).normal_(std=sigma))


# Larger ones take seconds.
GRID = [
    (I, J, D)
    for I, J, D in product((10, 288, 1152), (1, 2, 10, 43, 100, 1000), (2, 16, 64))
    if I * J * D <= 1_000_000
]


@pytest.mark.parametrize(("I", "J", "D"), GRID)
def test_routing_starts_alive_and_does_not_run_away(device, I, J, D):
    torch.manual_seed(0)
    u = 0.85 * torch.nn.functional.normalize(torch.randn(4, I, 2, device=device), dim=-1)
    weight = torch.randn(I, 2, J, D, device=device) * routing_weight_std(I, J, D)
    weight.requires_grad_()
    lengths = capsule_lengths(ops.fused_dynamic_routing(u, weight))
    assert 1e-3 < lengths.mean().item() < 0.7
    loss = MarginLoss()(lengths, torch.arange(4, device=device) % J)
    loss.backward()
    # All outputs at length 1 would have 0.4 for each of them.
    assert loss.item() < 8
    assert weight.grad.norm() > 1e-5


def test_a_hundred_classes_are_learnt_from_the_first_steps(device):
    """With sums of length 1 the outputs run away, and the loss starts at 36."""
    torch.manual_seed(0)
    layer = RoutedCapsules(288, 8, 100, 16).to(device)
    centres = torch.randn(100, 288, 8, device=device)
    optimizer = torch.optim.Adam(layer.parameters())
    correct = 0
    for step in range(30):
        labels = torch.randint(100, (16,), device=device)
        noise = 0.3 * torch.randn(16, 288, 8, device=device)
        lengths = capsule_lengths(layer(ops.squash(centres[labels] + noise)))
        loss = ops.margin_loss(lengths, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 25:
            correct += (lengths.argmax(dim=1) == labels).sum().item()
    assert correct > 0.7 * 5 * 16
