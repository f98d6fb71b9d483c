"""The four pictures of a run: curves, reconstructions, perturbed capsules, confusion matrix."""

from typing import Any

import torch
from torch import Tensor

from engine import figures
from engine.runtime import Runtime
from engine.training import Evaluation, Trainer
from tritoncaps.data import Dataset, ImageSet, to_float

# How far each dimension of a capsule is moved for perturbations.png (Sabour 2017, figure 4).
OFFSETS = [step * 0.05 for step in range(-5, 6)]


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
    poses = trainer.predict(to_float(test.images[right : right + 1])).poses
    figures.plot_perturbations(
        perturbed(trainer.model, trainer.runtime, poses, label),
        OFFSETS,
        directory / "perturbations.png",
        f"{title}: the dimensions of a capsule of class {names[label]}",
    )

    matrix = torch.zeros(len(names), len(names), dtype=torch.int64)
    matrix.index_put_((labels, evaluation.predictions), torch.tensor(1), accumulate=True)
    figures.plot_confusion(matrix, directory / "confusion.png", f"{title}, test set", names)


@torch.inference_mode()
def perturbed(model: Any, runtime: Runtime, poses: Tensor, label: int) -> Tensor:
    """Decode one capsule with each dimension moved by each offset; (D, steps, C, H, W)."""
    D, steps = poses.shape[-1], len(OFFSETS)
    offsets = torch.tensor(OFFSETS, device=poses.device)
    moved = poses.float().repeat(D * steps, 1, 1).unflatten(0, (D, steps))
    for dimension in range(D):
        moved[dimension, :, label, dimension] += offsets
    target = torch.full((D * steps,), label, device=poses.device)
    with runtime.autocast():
        images = model.decoder(moved.flatten(0, 1), target)
    return images.float().unflatten(0, (D, steps)).cpu()
