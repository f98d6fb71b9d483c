"""How do I train a network in a loop of my own?

Like any other torch module. The loss takes what the network returns.
"""

import torch

from tritoncaps import CapsuleLoss
from tritoncaps.data import Batches, load_dataset, to_float
from tritoncaps.models import CapsNet

torch.manual_seed(0)
digits = load_dataset("digits")
model = CapsNet(channels=16, capsule_types=8)
loss_function = CapsuleLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

for epoch in range(2):
    for images, labels in Batches(digits.train, 64, seed=0).epoch(epoch):
        output = model(images, labels)  # decodes the capsules of the labels
        loss = loss_function(output.activations, labels, output.reconstruction, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    output = model(to_float(digits.test.images))  # decodes the longest capsules
accuracy = (output.activations.argmax(dim=1) == digits.test.labels).float().mean()
print(f"test accuracy {accuracy:.1%}")
