"""How do I classify one-dimensional signals of any length?

With primary capsules of one dimension and shared weights. Here: sines, squares and sawteeth.
"""

import torch

from tritoncaps import PrimaryCapsules, RoutedCapsules, ops
from tritoncaps.layers import capsule_lengths


def draw(count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw signals, (count, 1, length), and their classes."""
    kind = torch.randint(3, (count,))
    period = 16 + 16 * torch.rand(count, 1)
    turn = torch.arange(length) / period + torch.rand(count, 1)
    sine = (2 * torch.pi * turn).sin()
    waves = torch.stack((sine, sine.sign(), 2 * turn.frac() - 1), dim=1)  # (count, 3, length)
    signals = waves[torch.arange(count), kind].unsqueeze(1)
    return signals + 0.1 * torch.randn_like(signals), kind


torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv1d(1, 16, kernel_size=9, stride=2),
    torch.nn.ReLU(),
    PrimaryCapsules(16, capsule_types=4, dim=8, kernel_size=9, stride=4, spatial_dims=1),
    RoutedCapsules(in_capsules=4, in_dim=8, out_capsules=3, out_dim=8, positions=30),
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(150):
    signal, kind = draw(64, length=256)
    loss = ops.margin_loss(capsule_lengths(model(signal)), kind)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
for length in (128, 256, 512):
    signal, kind = draw(500, length)
    accuracy = (capsule_lengths(model(signal)).argmax(dim=1) == kind).float().mean()
    print(f"accuracy on signals of {length} samples {accuracy:.1%}")
