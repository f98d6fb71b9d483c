"""What a network is asked about an image: its answer, whether it is right, and the loss.

`Trainer` leaves to a `Task` whatever differs between one class per image and two, or between
capsules and a plain classifier.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritoncaps import ops
from tritoncaps.data import ImageSet, Originals
from tritoncaps.losses import CapsuleLoss, linear_margin, reconstruction_error
from tritoncaps.models import CapsuleOutput


class Source(Protocol):
    """Batches of images with their targets: `Batches`, `Overlays` or the like."""

    images: ImageSet
    batch_size: int

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """Iterate over (images, target) of an epoch, from batch `start` on."""
        ...


class Task:
    """One class per image, by margin loss and reconstruction: the longest capsule is the answer.

    Override in your own task what is different there.

    Args:
        reconstruction_weight: the weight of the squared error, for a network with a decoder.

    Attributes:
        step: of the training, for a loss that changes; None in an evaluation. The trainer sets it.
    """

    step: int | None = None

    def __init__(self, reconstruction_weight: float = 0.0005) -> None:
        self.capsule_loss = CapsuleLoss(reconstruction_weight)

    def run(self, model: Callable[..., Any], images: Tensor, target: Any = None) -> CapsuleOutput:
        """Run the model, in training with the target, (B,), and in a test without."""
        return model(images) if target is None else model(images, target)

    def loss(self, output: CapsuleOutput, target: Any, images: Tensor) -> Tensor:
        """Compute the mean loss of a batch, a scalar."""
        return self.capsule_loss(output.activations, target, output.reconstruction, images)

    def predictions(self, output: CapsuleOutput) -> Tensor:
        """Return the class with the largest activation: (B, K) → (B,)."""
        return output.activations.argmax(dim=1)

    def correct(self, output: CapsuleOutput, target: Any) -> Tensor:
        """Return which answers are right, (B,), bool."""
        return self.predictions(output) == target


class CrossEntropy(Task):
    """One class per image, by the cross entropy of `output.logits`."""

    def loss(self, output: CapsuleOutput, target: Tensor, images: Tensor) -> Tensor:
        """Compute the mean cross entropy, a scalar."""
        assert output.logits is not None, "the model returns no logits"
        return F.cross_entropy(output.logits, target)

    def predictions(self, output: CapsuleOutput) -> Tensor:
        """Return the class with the largest logit: (B, K) → (B,). A sigmoid of 20 is already 1."""
        assert output.logits is not None, "the model returns no logits"
        return output.logits.argmax(dim=1)


class Spread(Task):
    """One class per image, by spread loss, and reconstruction if there is one.

    In training the margin rises from 0.2 to 0.9. An evaluation always uses 0.9, so its losses can
    be compared from epoch to epoch.

    Args:
        steps: how long the margin rises.
        reconstruction_weight: the weight of the squared error, for a network with a decoder.
    """

    def __init__(self, steps: int, reconstruction_weight: float = 0.0005) -> None:
        super().__init__(reconstruction_weight)
        self.steps = steps

    def loss(self, output: CapsuleOutput, target: Tensor, images: Tensor) -> Tensor:
        """Compute the mean loss of a batch, a scalar."""
        step = self.steps if self.step is None else self.step
        loss = ops.spread_loss(output.activations, target, linear_margin(step, self.steps))
        if output.reconstruction is None:
            return loss
        error = reconstruction_error(output.reconstruction, images).mean()
        return torch.add(loss, error, alpha=self.capsule_loss.reconstruction_weight)


class TwoClasses(Task):
    """Two classes per image: the two longest capsules are the answer, each decoded on its own.

    The target is `Originals`: two labels and the two images that lie over each other. Each
    reconstruction is compared with the original of its own class, not with the overlay. Without
    such originals, a multi-hot target for model and `CapsuleLoss` draws both in one picture.

    Args:
        decoder: called as decoder(poses, labels); draws the image of one capsule.
        reconstruction_weight: the weight of both squared errors.
    """

    def __init__(self, decoder: nn.Module, reconstruction_weight: float = 0.0005) -> None:
        super().__init__(reconstruction_weight)
        self.decoder = decoder

    def run(
        self, model: Callable[..., Any], images: Tensor, target: Originals | None = None
    ) -> CapsuleOutput:
        """Run the model and decode two capsules: those of the target, else the two longest.

        `reconstruction` is (B, 2, C, H, W), in the order of the classes.
        """
        output: CapsuleOutput = model(images)
        chosen = self.predictions(output) if target is None else target.labels
        both = [self.decoder(output.poses, labels) for labels in chosen.unbind(1)]
        return output._replace(reconstruction=torch.stack(both, dim=1))

    def loss(self, output: CapsuleOutput, target: Originals, images: Tensor) -> Tensor:
        """Compute the margin loss of both classes + the weighted squared errors, a scalar."""
        assert output.reconstruction is not None
        classes = torch.arange(output.activations.shape[1], device=target.labels.device)
        present = (target.labels.unsqueeze(2) == classes).any(dim=1)
        error = reconstruction_error(output.reconstruction.float(), target.images)
        # The mean of an empty batch is 0.
        mean = error.sum() / max(1, error.numel())
        loss = ops.margin_loss(output.activations, present)
        return torch.add(loss, mean, alpha=self.capsule_loss.reconstruction_weight)

    def predictions(self, output: CapsuleOutput) -> Tensor:
        """Return the classes of the two longest capsules, ascending: (B, K) → (B, 2)."""
        return output.activations.topk(2, dim=1).indices.sort(dim=1).values

    def correct(self, output: CapsuleOutput, target: Originals) -> Tensor:
        """Return for which images both classes are found, (B,), bool."""
        return (self.predictions(output) == target.labels).all(dim=1)


def per_class_rate(predictions: Tensor, labels: Tensor) -> float:
    """Return the share of the classes shown that were found; both (N, 2), each row distinct."""
    found = (predictions.unsqueeze(2) == labels.unsqueeze(1)).any(dim=1)
    return found.double().mean().item()
