"""Which parts of an image does a class capsule listen to?

`return_coupling=True` returns the coupling c_ij of the last iteration. Printed for each position of
the grid: the share that its primary capsules, weighted by their lengths, give to the class.
"""

import torch

from tritoncaps import ops
from tritoncaps.data import Batches, load_dataset, to_float
from tritoncaps.layers import capsule_lengths
from tritoncaps.models import CapsNet

torch.manual_seed(0)
digits = load_dataset("digits")
types = 8
model = CapsNet(channels=16, capsule_types=types, reconstruction=False)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
batches = Batches(digits.train, 32, seed=0)
for images, labels in (batch for epoch in range(2) for batch in batches.epoch(epoch)):
    loss = ops.margin_loss(model(images).activations, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

image = to_float(digits.test.images[:1])
with torch.no_grad():
    output = model(image, return_coupling=True)
    lengths = capsule_lengths(model.primary(model.conv(image).relu()))  # (1, I)
predicted = int(output.activations.argmax())
share = output.coupling[0, :, predicted] * lengths[0]  # (I,)
grid = share.view(6, 6, types).sum(dim=2) / lengths.view(6, 6, types).sum(dim=2)
print(f"share of class {predicted} at each position; without routing all were 0.10")
for row in grid.tolist():
    print(" ".join(f"{value:.2f}" for value in row))
# As a picture: matplotlib.pyplot.imshow(grid)
