"""How may an input capsule belong to no class at all?

With `leaky=True`. An orphan class takes part in the softmax, and at first takes a quarter of each
input here. Of the four that mean something it loses most in training. Of the four that are noise it
keeps its quarter.
"""

import torch

from tritoncaps import RoutedCapsules, ops
from tritoncaps.layers import capsule_lengths


def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw eight capsules, (count, 8, 4), of which four point where their class says."""
    label = torch.randint(3, (count,))
    u = torch.randn(count, 8, 4)
    u[:, :4] += 4 * torch.eye(3, 4)[label].unsqueeze(1)
    return ops.squash(u), label


torch.manual_seed(0)
routing = RoutedCapsules(8, 4, out_capsules=3, out_dim=8, leaky=True, learned_prior=True)
optimizer = torch.optim.Adam(routing.parameters(), lr=2e-2)
for _ in range(300):
    u, label = draw(64)
    loss = ops.margin_loss(capsule_lengths(routing(u)), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

u, label = draw(1000)
poses, coupling = routing(u, return_coupling=True)
orphan = (1 - coupling.sum(dim=2)).mean(dim=0)  # (8,)
print(f"accuracy {(capsule_lengths(poses).argmax(dim=1) == label).float().mean():.1%}")
print(f"the orphan class takes {orphan[:4].mean():.0%} of what means something", end="")
print(f" and {orphan[4:].mean():.0%} of the rest")
