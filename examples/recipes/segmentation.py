"""How do I label every pixel with capsules?

With class capsules at each position, which a convolutional routing makes. Here squares with
horizontal or vertical stripes lie on grey ground. No single pixel shows which they are.
"""

import torch
from matplotlib import pyplot
from torch.nn import Conv2d, ReLU, Sequential, Unflatten

from tritoncaps import PrimaryCapsules, ops
from tritoncaps.layers import ConvRoutedCapsules, capsule_lengths


def draw(count: int, side: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw images, (count, 1, side, side), and the class of each pixel: 0 is the ground."""
    lines = torch.arange(side)
    inside = (lines - torch.randint(side - 6, (count, 2, 1))) // 7 == 0  # rows, columns
    kind = torch.randint(1, 3, (count, 1, 1))
    labels = kind * (inside[:, 0].unsqueeze(2) & inside[:, 1].unsqueeze(1))
    stripes = torch.where(kind == 1, lines.unsqueeze(1), lines).remainder(2)
    return torch.normal(torch.where(labels > 0, stripes, 0.5), 0.2).unsqueeze(1), labels


torch.manual_seed(0)
primary = PrimaryCapsules(32, capsule_types=8, dim=8, kernel_size=3, stride=1, padding="same")
routing = ConvRoutedCapsules(8, 8, out_types=3, out_dim=8, kernel_size=3, padding=1)
model = Sequential(Conv2d(1, 32, 5, padding=2), ReLU(), primary, Unflatten(1, (12, 12, 8)), routing)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for images, labels in (draw(8) for _ in range(60)):
    lengths = capsule_lengths(model(images))  # (8, 12, 12, 3)
    optimizer.zero_grad()
    ops.margin_loss(lengths.flatten(0, 2), labels.flatten()).backward()
    optimizer.step()
images, labels = draw(100)
found = capsule_lengths(model(images)).argmax(dim=3)
right, either = ((found == labels) & (labels > 0)).sum(), ((found > 0) | (labels > 0)).sum()
print(f"intersection over union of the squares {right / either:.1%}")
rows = torch.cat((images.squeeze(1), labels / 2, found / 2), dim=1)[:8].movedim(0, 1).flatten(1)
pyplot.imsave("segmentation.png", rows.repeat_interleave(8, 0).repeat_interleave(8, 1))
