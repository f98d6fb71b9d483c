"""The four pictures of a run: curves, reconstructions, perturbed capsules, confusion matrix."""

from typing import Any

import torch
from torch import Tensor

from engine import figures
from engine.runtime import Runtime
from engine.training import Evaluation, Trainer
from tritoncaps.data import Dataset, ImageSet, to_float

# How far each dimension of a capsule is moved for perturbations.png (Sabour 2017, figure 4), in
# standard deviations of that dimension.
OFFSETS = [step * 0.4 for step in range(-5, 6)]
# The most images of a class that the standard deviations are taken over.
_SAMPLE = 200


def draw(
    trainer: Trainer, dataset: Dataset, test: ImageSet, evaluation: Evaluation, title: str
) -> None:
    """Draw the pictures of a trained model, and of its `evaluation` on the images of `test`."""
    directory, names, labels = trainer.directory, dataset.class_names, test.labels.cpu()
    figures.plot_curves(trainer.rows, directory / "curves.png", title)

    # Two images of each class. More classes would be too tall for a picture.
    shown = range(min(len(names), 100))
    chosen = torch.cat([(labels == label).nonzero()[:2, 0] for label in shown])
    images = to_float(test.images[chosen.to(test.images.device)])
    output = trainer.predict(images)
    figures.plot_reconstructions(
        images.cpu(),
        output.reconstruction.float().cpu(),
        labels[chosen],
        output.activations.argmax(dim=1).cpu(),
        directory / "reconstructions.png",
        f"{title}: test images over their reconstructions",
        names,
    )

    # The first image that is classified right, and the dimensions of its longest capsule.
    right = int((evaluation.predictions == labels).int().argmax())
    label = int(labels[right])
    members = (labels == label).nonzero()[:_SAMPLE, 0]
    chosen = torch.cat([members.new_tensor([right]), members]).to(test.images.device)
    poses = trainer.predict(to_float(test.images[chosen])).poses.float()
    figures.plot_perturbations(
        perturbed(trainer.model, trainer.runtime, poses[:1], label, spread(poses[1:, label])),
        OFFSETS,
        directory / "perturbations.png",
        f"{title}: the dimensions of a capsule of class {names[label]}",
    )

    matrix = torch.zeros(len(names), len(names), dtype=torch.int64)
    matrix.index_put_((labels, evaluation.predictions), torch.tensor(1), accumulate=True)
    figures.plot_confusion(matrix, directory / "confusion.png", f"{title}, test set", names)


def spread(poses: Tensor) -> Tensor:
    """Return the standard deviation of each dimension of a class capsule: (N, D) → (D,)."""
    return poses.std(dim=0, correction=0)


@torch.inference_mode()
def perturbed(model: Any, runtime: Runtime, poses: Tensor, label: int, spread: Tensor) -> Tensor:
    """Decode one capsule of poses (1, K, D), each dimension moved by each offset × its spread (D,).

    Returns images of shape (D, steps, C, H, W).
    """
    D, steps = len(spread), len(OFFSETS)
    moved = poses.float().repeat(D * steps, 1, 1).unflatten(0, (D, steps))
    # The diagonal pairs each row with the dimension that it moves.
    moved[:, :, label].diagonal(dim1=0, dim2=2).add_(poses.new_tensor(OFFSETS)[:, None] * spread)
    target = torch.full((D * steps,), label, device=poses.device)
    with runtime.autocast():
        images = model.decoder(moved.flatten(0, 1), target)
    return images.float().unflatten(0, (D, steps)).cpu()
