"""The four pictures of a run: curves, reconstructions, perturbed capsules, confusion matrix."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine import figures
from engine.drawing import drawable
from engine.runtime import Runtime
from engine.training import Evaluation, Trainer
from tritoncaps.data import Dataset, ImageSet, to_float

# How far each dimension of a capsule is moved for perturbations.png (Sabour 2017, figure 4), in
# standard deviations of that dimension.
OFFSETS = [step * 0.6 for step in range(-5, 6)]
# The most images of a class that the standard deviations are taken over.
_SAMPLE = 50


def draw(
    trainer: Trainer, dataset: Dataset, test: ImageSet, evaluation: Evaluation, title: str
) -> None:
    """Draw the pictures of a trained model, and of its `evaluation` on the images of `test`."""
    directory, labels = trainer.directory, test.labels.cpu()
    names = drawable(dataset.class_names)
    figures.plot_curves(trainer.rows, directory / "curves.png", title)

    if getattr(trainer.model, "decoder", None) is not None:
        _draw_decoded(trainer, dataset, test, evaluation, title)

    matrix = torch.zeros(len(names), len(names), dtype=torch.int64)
    matrix.index_put_((labels, evaluation.predictions), torch.tensor(1), accumulate=True)
    figures.plot_confusion(matrix, directory / "confusion.png", f"{title}, test set", names)


def _draw_decoded(
    trainer: Trainer, dataset: Dataset, test: ImageSet, evaluation: Evaluation, title: str
) -> None:
    """Draw what the decoder makes of capsules."""
    directory, labels = trainer.directory, test.labels.cpu()
    names = drawable(dataset.class_names)
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

    # The first image of each class that is read right. Draw the one that changes most.
    sample = torch.cat([(labels == label).nonzero()[:_SAMPLE, 0] for label in range(len(names))])
    poses = trainer.predict(to_float(test.images[sample.to(test.images.device)])).poses.float()
    found = evaluation.predictions[sample]
    right = (found == labels[sample]).nonzero()[:, 0].tolist() or [0]
    first = list({int(found[index]): index for index in reversed(right)}.values())
    moved = perturbed(trainer.model, trainer.runtime, poses, found, first)
    change = (moved[:, :, -1] - moved[:, :, 0]).square().flatten(1).sum(dim=1)
    clearest = int(change.argmax())
    figures.plot_perturbations(
        moved[clearest],
        OFFSETS,
        directory / "perturbations.png",
        f"{title}: the dimensions of a capsule of class {names[found[first[clearest]]]} "
        "(σ: standard deviation over the class)",
    )


@torch.inference_mode()
def perturbed(
    model: Any, runtime: Runtime, poses: Tensor, classes: Tensor, indices: Sequence[int]
) -> Tensor:
    """Decode one capsule of each image in `indices`, each of its dimensions moved by each offset.

    Args:
        model: its decoder is used.
        runtime: where it runs.
        poses: all capsules of all images, (N, K, D).
        classes: which capsule of an image is meant, (N,). An offset is in standard deviations over
            the images with the same class.
        indices: the images to decode, n of them.

    Returns:
        The decoded images, (n, D, steps, C, H, W), on the CPU.
    """
    D, steps = poses.shape[2], len(OFFSETS)
    rows = []
    for index in indices:
        label = int(classes[index])
        of_class = poses[(classes == label).to(poses.device), label]
        spread = of_class.std(dim=0, correction=0)
        moved = poses[index].float().repeat(D, steps, 1, 1)
        # The diagonal pairs each row with the dimension that it moves.
        offsets = poses.new_tensor(OFFSETS)[:, None] * spread
        moved[:, :, label].diagonal(dim1=0, dim2=2).add_(offsets)
        target = torch.full((D * steps,), label, device=poses.device)
        with runtime.autocast():
            images = model.decoder(moved.flatten(0, 1), target)
        rows.append(images.float().unflatten(0, (D, steps)).cpu())
    return torch.stack(rows)
