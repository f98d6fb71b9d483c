"""How do I route sets of any size?

With one matrix for all members (`in_capsules=1`, and `positions` is about the usual size) and a
mask for padding. Here a set of 5 to 20 points lies on a circle or on a straight line.
"""

import torch
from torch import nn

from tritoncaps import RoutedCapsules, ops
from tritoncaps.layers import capsule_lengths


def draw(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw sets of points, (count, 20, 2), what is not padding, and their classes."""
    kind = torch.randint(2, (count,))
    angle = 2 * torch.pi * torch.rand(count, 20)
    circle = torch.stack((angle.cos(), angle.sin()), dim=2)
    line = circle[:, :1] * (2 * torch.rand(count, 20, 1) - 1)
    mask = torch.arange(20) < torch.randint(5, 21, (count, 1))
    points = torch.where(kind.view(-1, 1, 1) == 0, circle, line)
    return points.masked_fill(~mask.unsqueeze(2), torch.nan), mask, kind


torch.manual_seed(0)
embed = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 8))
routing = RoutedCapsules(in_capsules=1, in_dim=8, out_capsules=2, out_dim=8, positions=12)
optimizer = torch.optim.Adam([*embed.parameters(), *routing.parameters()], lr=1e-2)
for _ in range(150):
    points, mask, kind = draw(64)
    poses = routing(ops.squash(embed(points.nan_to_num())), mask)  # (64, 2, 8)
    loss = ops.margin_loss(capsule_lengths(poses), kind)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
points, mask, kind = draw(500)
lengths = capsule_lengths(routing(ops.squash(embed(points.nan_to_num())), mask))
print(f"accuracy on new sets {(lengths.argmax(dim=1) == kind).float().mean():.1%}")
