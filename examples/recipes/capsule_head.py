"""How do I put capsules on a network of torchvision, for large colour images?

In place of its pooling and linear layer. The head needs the number of channels of the feature maps.
Give the network `weights="DEFAULT"` for pretrained features. Without them, as here, it is random.
"""

import torch
from torch import nn
from torchvision.models import resnet18

from tritoncaps import CapsuleHead, ops

torch.manual_seed(0)
network = resnet18(weights=None)
backbone = nn.Sequential(*list(network.children())[:-2]).eval()  # without pooling and classifier
for classes in (10, 1000):
    head = CapsuleHead(in_channels=512, num_classes=classes)
    parameters = sum(parameter.numel() for parameter in head.parameters())
    print(f"a head for {classes} classes has {parameters:,} parameters")

head = CapsuleHead(in_channels=512, num_classes=3)
labels = torch.tensor([0, 1, 2, 0, 1, 2])
images = torch.rand(6, 3, 224, 224)
images[range(6), labels] += 1  # red, green and blue noise
with torch.no_grad():
    features = backbone(images)  # (6, 512, 7, 7)
optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
for step in range(21):
    poses, activations = head(features)  # (6, 3, 16), (6, 3)
    loss = ops.margin_loss(activations, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
with torch.no_grad():
    print("another size:", tuple(head(backbone(torch.rand(1, 3, 320, 256))).poses.shape))
