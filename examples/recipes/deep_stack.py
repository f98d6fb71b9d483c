"""Why does a deep stack of my own not learn?

Because its capsules start too short: each squash squares their lengths. `calibrate` scales the
weights, layer by layer, until the mean length is 0.5.
"""

import copy

import torch

from tritoncaps import RoutedCapsules, ops
from tritoncaps.layers import calibrate, capsule_lengths, dead_layers

torch.manual_seed(0)
labels = torch.arange(64) % 10
u = ops.squash(torch.randn(64, 32, 8) + 2 * torch.randn(10, 32, 8)[labels])  # (B, I, P)
stack = torch.nn.Sequential(
    RoutedCapsules(32, 8, 10, 16), *(RoutedCapsules(10, 16, 10, 16) for _ in range(7))
)
calibrated = copy.deepcopy(stack)
print("too short to learn: layers", *(layer.name for layer in dead_layers(stack, u)))
for row in calibrate(calibrated, u):
    print(row)

for name, model in (("as it was", stack), ("calibrated", calibrated)):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        lengths = capsule_lengths(model(u))
        optimizer.zero_grad()
        ops.margin_loss(lengths, labels).backward()
        optimizer.step()
    accuracy = (lengths.argmax(dim=1) == labels).float().mean()
    print(f"{name}: accuracy {accuracy:.0%} after 40 steps")
