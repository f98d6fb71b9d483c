"""The pictures of a run: curves, a confusion matrix, and what is special to the network.

With a decoder, these are reconstructions and perturbed capsules. With EM routing, it is the share
of each place in an image that a class gets.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from engine import figures
from engine.drawing import drawable
from engine.runtime import Runtime
from engine.training import Evaluation, Trainer
from tritoncaps.data import Dataset, ImageSet, to_float
from tritoncaps.layers import Capsules, ClassMatrixCapsules
from tritoncaps.models import MatrixCapsNet

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
    if isinstance(trainer.model, MatrixCapsNet):
        _draw_routing(trainer, dataset, test, title)

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


def _draw_routing(trainer: Trainer, dataset: Dataset, test: ImageSet, title: str) -> None:
    """Draw which part of an image feeds which class, and how that changes by iteration."""
    model, labels = trainer.model, test.labels.cpu()
    assert isinstance(model, MatrixCapsNet)
    # An image of each class. More classes would be too wide for a picture.
    shown = range(min(len(dataset.class_names), 10))
    chosen = torch.cat([(labels == label).nonzero()[:1, 0] for label in shown])
    images = to_float(test.images[chosen.to(test.images.device)])
    with trainer.runtime.autocast():
        shares = class_shares(model, images)
    figures.plot_routing(
        images.cpu(),
        shares.float().cpu(),
        trainer.predict(images).logits.float().cpu(),
        labels[chosen],
        trainer.directory / "routing.png",
        f"{title}: the share of each place in an image that a class gets",
        drawable(dataset.class_names),
    )


@torch.inference_mode()
def class_shares(model: MatrixCapsNet, images: Tensor) -> Tensor:
    """Follow the assignments from the image to the classes, after each iteration of the last layer.

    A capsule of the first grid shares itself out among those of the second, and so on. The types at
    a position are weighted by their activations.

    Returns:
        The shares, (T, B, K, H, W), drawn into the middle of what a capsule sees; 0 at the border.
    """
    first = grid = model.primary(model.features(images))
    passed = []
    for layer in model.capsules:
        above, assignment = layer(grid, return_assignment=True)
        passed.append((layer.stride, grid.activations, assignment))
        grid = above
    maps = []
    for share in _by_iteration(model.classes, grid):
        for stride, activations, assignment in reversed(passed):
            share = _shares_below(assignment, share, stride, activations.shape[1:3])
        weights = first.activations.unsqueeze(4)
        maps.append((share * weights).sum(dim=3) / weights.sum(dim=3))
    small = torch.stack(maps).movedim(4, 2)  # (T, B, K, h, w)
    conv = model.features[0]
    assert isinstance(conv, nn.Conv2d)
    enlarged = small.repeat_interleave(conv.stride[0], 3).repeat_interleave(conv.stride[1], 4)
    missing = [full - part for full, part in zip(images.shape[2:], enlarged.shape[3:], strict=True)]
    top, left = (rest // 2 for rest in missing)
    return F.pad(enlarged, (left, missing[1] - left, top, missing[0] - top))


def _by_iteration(layer: ClassMatrixCapsules, grid: Capsules) -> list[Tensor]:
    """Return the assignments of each iteration, (B, H, W, C, K)."""
    # A copy of the same parameters, whose temperatures may change.
    shortened = copy.copy(layer)
    schedule, T = layer.temperature, layer.iterations
    if schedule is None and layer.scale == "mean":
        schedule = [t / T for t in range(1, T + 1)]
    assignments = []
    for t in range(1, T + 1):
        shortened.temperature = schedule[:t] if isinstance(schedule, Sequence) else schedule
        assignments.append(shortened(grid, iterations=t, return_assignment=True).assignment)
    return assignments


def _shares_below(assignment: Tensor, share: Tensor, stride: int, size: Sequence[int]) -> Tensor:
    """Take the shares of the classes from the outputs of a convolution to its inputs.

    (B, H', W', K, K, C, J) and (B, H', W', J, classes) → (B, H, W, C, classes).
    """
    parts = einsum(assignment, share, "B y x ky kx C J, B y x J k -> B y x ky kx C k")
    B, rows, columns, kernel, _, C, classes = parts.shape
    below = parts.new_zeros(B, *size, C, classes)
    for ky in range(kernel):
        for kx in range(kernel):
            y, x = (slice(k, k + stride * n, stride) for k, n in ((ky, rows), (kx, columns)))
            below[:, y, x] += parts[:, :, :, ky, kx]
    # With competition="position", an input gives all of itself at each position.
    return below / below.sum(dim=4, keepdim=True).clamp(min=1)
