"""The networks that the experiments compare: capsule networks, and a CNN of similar size."""

import bisect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritoncaps.models import CapsuleOutput, create_model, list_models

CNN = "cnn"

# The capsule networks of the paper that the experiments repeat.
PAPER = ("capsnet", "deep_capsnet")

# Trained with the cross entropy of their logits, and without a decoder.
WITH_LOGITS = ("inverted_capsnet", "matrix_capsnet", CNN)

# The names of the networks in pictures and tables.
TITLES = {
    "capsnet": "CapsNet",
    "conv_capsnet": "ConvCapsNet",
    "deep_capsnet": "DeepCapsNet",
    CNN: "CNN",
    "efficient_capsnet": "Efficient-CapsNet",
    "inverted_capsnet": "InvertedCapsNet",
    "matrix_capsnet": "MatrixCapsNet",
}


class ConvNet(nn.Module):
    """A plain convolutional network of the size of the capsule networks.

    Three convolutions of 5×5, two fully connected layers and dropout, after the baseline of Sabour
    2017 (section 5), which has 35.4 M parameters. Here the features are pooled, and the next layer
    is sized for 8.2 M at 28×28, as many as the capsule networks have.

    Args:
        num_classes: classes, K.
        in_channels: channels of the images.
        image_size: (height, width), each at least 14.
        channels: feature maps of the three convolutions.
        hidden: widths of the two fully connected layers.
        whiten: subtract the mean of each image and divide by its standard deviation first.

    Example:
        >>> import torch
        >>> model = ConvNet()
        >>> sum(p.numel() for p in model.parameters())
        8202102
        >>> model(torch.rand(2, 1, 28, 28)).activations.shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: tuple[int, int] = (28, 28),
        *,
        channels: tuple[int, int, int] = (256, 256, 128),
        hidden: tuple[int, int] = (684, 192),
        whiten: bool = False,
    ) -> None:
        super().__init__()
        self.whiten = whiten
        # Three 5×5 kernels take 12 pixels, and the pooling halves the rest.
        rows, columns = ((side - 12) // 2 for side in image_size)
        if min(rows, columns) < 1:
            raise ValueError(f"ConvNet: image_size={image_size}, both sides must be at least 14")
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 5),
            nn.ReLU(),
            nn.Conv2d(channels[0], channels[1], 5),
            nn.ReLU(),
            nn.Conv2d(channels[1], channels[2], 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels[2] * rows * columns, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden[1], num_classes),
        )

    def forward(self, images: Tensor, target: Tensor | None = None) -> CapsuleOutput:
        """Score the classes: (B, C, H, W) → `logits` (B, K), and their softmax as `activations`.

        The scores are also the poses, of one dimension. The target is not used.
        """
        if self.whiten:
            images = F.layer_norm(images, images.shape[1:])
        scores = self.classifier(self.features(images)).float()
        return CapsuleOutput(scores.softmax(dim=1), scores.unsqueeze(2), None, scores)


def list_networks() -> list[str]:
    """List the names that `create_network` knows."""
    return [*list_models(classifiers=True), CNN]


def create_network(name: str, **kwargs: Any) -> nn.Module:
    """Build a capsule network or the CNN by name."""
    return ConvNet(**kwargs) if name == CNN else create_model(name, **kwargs)


def like(
    name: str, from_data: Mapping[str, Any], kwargs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the arguments of the CNN that has about as many parameters as a capsule network.

    `from_data` are arguments of both, and `kwargs` others of the network. A decoder does not count.
    All widths of the CNN shrink or grow alike. If the network whitens images, so does the CNN.

    Example:
        >>> like("efficient_capsnet", {"num_classes": 10})
        {'channels': (36, 36, 18), 'hidden': (96, 27)}
    """
    with torch.device("meta"):
        network = create_network(name, **from_data, **(kwargs or {}))
    wanted = _count(network) - _count(getattr(network, "decoder", None) or nn.Module())

    def widths(step: int) -> dict[str, Any]:
        channels, hidden = (256, 256, 128), (684, 192)
        return {
            key: tuple(max(1, round(width * step / 256)) for width in full)
            for key, full in (("channels", channels), ("hidden", hidden))
        }

    def size(step: int) -> int:
        with torch.device("meta"):
            return _count(ConvNet(**from_data, **widths(step)))

    larger = bisect.bisect_left(range(1, 2048), wanted, key=size) + 1
    found = widths(min(larger, larger - 1 or 1, key=lambda step: abs(size(step) - wanted)))
    return found | {name: value for name, value in (kwargs or {}).items() if name == "whiten"}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
