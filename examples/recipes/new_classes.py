"""How do I teach a trained network new classes?

Build a new head that keeps the primary capsules. Here a network learns the digits 0 to 4. Then a
new head learns 5 to 9 from 200 images, while all that came before stays as it is.
"""

import torch

from tritoncaps import CapsuleHead, ops
from tritoncaps.data import Batches, ImageSet, load_dataset, to_float


def five(digits: ImageSet, first: int) -> ImageSet:
    """Return the images of five digits, which become the classes 0 to 4."""
    chosen = (digits.labels >= first) & (digits.labels < first + 5)
    return ImageSet(digits.images[chosen], digits.labels[chosen] - first)


def train(network: torch.nn.Module, images: ImageSet, epochs: int) -> None:
    """Minimise the margin loss over the parameters that are not frozen."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for epoch in range(epochs):
        for x, labels in Batches(images, 20, seed=0).epoch(epoch):
            optimizer.zero_grad()
            ops.margin_loss(network(x).activations, labels).backward()
            optimizer.step()


torch.manual_seed(0)
digits = load_dataset("digits")
backbone = torch.nn.Sequential(torch.nn.Conv2d(1, 16, 9, stride=2), torch.nn.ReLU())  # to 10×10
old = CapsuleHead(16, num_classes=5, kernel_size=5, stride=2, feature_size=10)
train(torch.nn.Sequential(backbone, old), five(digits.train, 0), epochs=4)
new = CapsuleHead(16, num_classes=5, kernel_size=5, stride=2, feature_size=10)
new.primary = old.primary.requires_grad_(False)
backbone.requires_grad_(False)
train(torch.nn.Sequential(backbone, new), five(digits.train, 5).subset(range(200)), epochs=10)
for name, head, test in (("old", old, five(digits.test, 0)), ("new", new, five(digits.test, 5))):
    predicted = head(backbone(to_float(test.images))).activations.argmax(dim=1)
    print(f"{name} classes: test accuracy {(predicted == test.labels).float().mean():.1%}")
