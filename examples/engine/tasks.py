"""What a network is asked about an image, and when its answer counts as right.

`Trainer` asks one `Task` for all that differs between one class an image and two.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritoncaps import ops
from tritoncaps.data import ImageSet, Originals
from tritoncaps.losses import reconstruction_error
from tritoncaps.models import CapsuleOutput


class Source(Protocol):
    """Batches of images with their targets: `Batches`, `Overlays` or their like."""

    images: ImageSet
    batch_size: int

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """Iterate over (images, target) of an epoch, from batch `start` on."""
        ...


class Task:
    """One class an image: the longest capsule is the answer."""

    def run(self, model: Callable[..., Any], images: Tensor, target: Any = None) -> Any:
        """Run the model, in training with the target, (B,), and in a test without one."""
        return model(images) if target is None else model(images, target)

    def predictions(self, activations: Tensor) -> Tensor:
        """Read the answer off the lengths: (B, K) → (B,)."""
        return activations.argmax(dim=1)

    def correct(self, activations: Tensor, target: Any) -> Tensor:
        """Say which images are answered right, (B,), bool."""
        return self.predictions(activations) == target


class TwoClasses(Task):
    """Two classes an image: the two longest capsules are the answer, each decoded on its own.

    Args:
        decoder: called as decoder(poses, labels), draws the image of one capsule.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder

    def run(
        self, model: Callable[..., Any], images: Tensor, target: Originals | None = None
    ) -> CapsuleOutput:
        """Run the model and decode two capsules: those of the target, else the two longest.

        `reconstruction` is (B, 2, C, H, W), in the order of the classes.
        """
        output = model(images)
        chosen = self.predictions(output.activations) if target is None else target.labels
        both = [self.decoder(output.poses, labels) for labels in chosen.unbind(1)]
        return CapsuleOutput(output.activations, output.poses, torch.stack(both, dim=1))

    def predictions(self, activations: Tensor) -> Tensor:
        """Return the classes of the two longest capsules, ascending: (B, K) → (B, 2)."""
        return activations.topk(2, dim=1).indices.sort(dim=1).values

    def correct(self, activations: Tensor, target: Originals) -> Tensor:
        """Say of which images both classes are found, (B,), bool."""
        return (self.predictions(activations) == target.labels).all(dim=1)


class TwoClassesLoss(nn.Module):
    """Margin loss of two classes at once + `reconstruction_weight` × both squared errors.

    Each reconstruction is compared with the original of its own class, not with the overlay.
    """

    def __init__(self, reconstruction_weight: float = 0.0005) -> None:
        super().__init__()
        self.reconstruction_weight = reconstruction_weight

    def forward(
        self, activations: Tensor, target: Originals, reconstruction: Tensor, images: Tensor
    ) -> Tensor:
        """Compute the loss, a scalar; activations (B, K), reconstruction (B, 2, C, H, W)."""
        present = F.one_hot(target.labels, activations.shape[1]).sum(dim=1)
        error = reconstruction_error(reconstruction.float(), target.images)
        loss = ops.margin_loss(activations, present)
        # Of an empty batch the mean is 0.
        mean = error.sum() / max(1, error.numel())
        return torch.add(loss, mean, alpha=self.reconstruction_weight)


def per_class_rate(predictions: Tensor, labels: Tensor) -> float:
    """Return the share of the classes present that were found; both (N, 2), each row distinct."""
    found = (predictions.unsqueeze(2) == labels.unsqueeze(1)).any(dim=1)
    return found.double().mean().item()
