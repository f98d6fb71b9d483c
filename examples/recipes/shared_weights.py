"""How do I share weights over a grid, as a convolution does?

With `positions`. All primary capsules of one type then use the same matrices, and the layer takes a
grid of any size. In the networks the option is called `shared_weights`.
"""

import torch

from tritoncaps import PrimaryCapsules, RoutedCapsules
from tritoncaps.models import CapsNet

primary = PrimaryCapsules(in_channels=64, capsule_types=32, dim=8, kernel_size=3, stride=1)
own = RoutedCapsules(in_capsules=6 * 6 * 32, in_dim=8, out_capsules=10, out_dim=16)
shared = RoutedCapsules(in_capsules=32, in_dim=8, out_capsules=10, out_dim=16, positions=6 * 6)
print(f"weights: {own.weight.numel():,} of its own, {shared.weight.numel():,} shared")

for size in (8, 11, 20):
    u = primary(torch.rand(1, 64, size, size))  # ordered by position, then type
    print(f"{size}×{size} features, {u.shape[1]:,} capsules -> {tuple(shared(u).shape)}")

for option in (False, True):
    model = CapsNet(shared_weights=option, reconstruction=False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"CapsNet(shared_weights={option}): {parameters:,} parameters")
