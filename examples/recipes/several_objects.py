"""How do I recognise several objects in one image?

With a multi-hot target. Each class capsule has a length of its own, so lengths need not add up to 1
as the outputs of a softmax do. Here two digits stand side by side.
"""

import torch

from tritoncaps import CapsuleLoss
from tritoncaps.data import Batches, load_dataset, to_float
from tritoncaps.models import CapsNet

torch.manual_seed(0)
digits = load_dataset("digits")
model = CapsNet(10, 1, (28, 56), channels=16, stride=2, capsule_types=8, padding=2)
loss_function = CapsuleLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)


def pairs(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Put another digit beside each, and say which classes are present."""
    present = torch.nn.functional.one_hot(labels, 10)
    pictures = torch.cat((images, images.roll(1, dims=0)), dim=3)
    return pictures, present | present.roll(1, dims=0)


batches = Batches(digits.train, 32, seed=0)
for batch in (batch for epoch in range(3) for batch in batches.epoch(epoch)):
    images, target = pairs(*batch)
    output = model(images, target)  # decodes all present capsules into one picture
    loss = loss_function(output.activations, target, output.reconstruction, images)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

images, target = pairs(to_float(digits.test.images), digits.test.labels)
with torch.no_grad():
    present = model(images).activations > 0.5
right = (present == target.bool()).all(dim=1).float().mean()
print(f"images of which every class is right {right:.1%}")
