"""Draw what a trained capsule network makes of test images (Figures 12 and 13).

    python examples/reconstruct.py runs/compare_models-mnist/deep_capsnet-seed1
    python examples/reconstruct.py RUN --classes 3 5 8 --per-class 6
    python examples/reconstruct.py RUN --dry-run

The network comes from a run directory, at the epoch that the validation set chose. It sees an image
without a label, and the longest capsule is decoded. In reconstruct/ of the run directory, grids.png
shows the first test images of each class beside their reconstructions. failures.png shows misread
images with the decoded capsules of the predicted class and of the true one. overview.png shows one
image of each class, its reconstruction, and a capsule with one dimension moved.

The paper says that reconstructions are smoother and less noisy than the images. To check that,
reconstruction.csv and reconstruction.json have numbers by class: the squared error, and the total
variation (the sum of the differences between neighbouring pixels) of images and reconstructions.
"""

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine import figures
from engine.drawing import drawable
from engine.flags import COUNT, NO_TRAINING, Machine, Output, Recipe, flag
from engine.pictures import perturbed
from engine.runner import Experiment, run_experiment
from engine.tables import percent
from engine.trained import Trained, check_data, check_trained, load_trained
from tritoncaps.data import to_float
from tritoncaps.losses import reconstruction_error


@dataclass(frozen=True)
class Pictures:
    """What is drawn."""

    run: str = flag(..., "directory of a trained capsule network", metavar="RUN")
    classes: list[str] | None = flag(
        None, "which classes (default: all)", nargs="+", metavar="NAME"
    )
    per_class: int = flag(8, "images per class", **COUNT)
    failures: int = flag(10, "misread images at most", **COUNT)


def main(argv: list[str] | None = None) -> int:
    """Reconstruct; returns the exit status of the program."""
    groups = (Pictures, Recipe)
    return run_experiment("reconstruct", __doc__, tell, argv, *groups, leave_out=NO_TRAINING)


def tell(pictures: Pictures, recipe: Recipe, machine: Machine, output: Output) -> None:
    """Run the network over the test set, then draw and measure what it decodes."""
    default = str(check_trained(pictures.run) / "reconstruct")
    output = replace(output, output_dir=output.output_dir or default)
    experiment = Experiment("reconstruct", recipe, machine, output, pictures, NO_TRAINING)
    experiment.open(trains=False, run=pictures.run)
    network = load_trained(pictures.run, experiment.runtime)
    if getattr(network.model, "decoder", None) is None:
        raise ValueError(
            f"{network.directory} is a {network.title}, which has no decoder: "
            "give the run of a capsule network"
        )
    check_data(network, experiment.dataset)
    class_names = experiment.dataset.class_names
    classes = chosen_classes(pictures.classes, class_names)
    names = drawable(class_names)
    title = f"{network.title} on {experiment.dataset.title}"

    images = to_float(experiment.test_images.images)
    labels = experiment.test_images.labels.cpu()
    predictions, decoded, poses = decode(experiment, network, images)
    images = images.cpu()

    # -- the first images of each class, beside their reconstructions
    shown = [(labels == label).nonzero()[: pictures.per_class, 0] for label in classes]
    columns = min(map(len, shown))
    if columns == 0:
        raise ValueError("--limit-test: it leaves a class without an image, take more")
    grid = torch.stack([rows[:columns] for rows in shown])
    figures.plot_grids(
        images[grid],
        decoded[grid],
        [names[label] for label in classes],
        experiment.directory / "grids.png",
        f"{title}: test images beside their reconstructions",
    )

    # -- the first image of each class, and the capsule dimension that shows most
    first = grid[:, 0]
    moved = perturbed(network.model, experiment.runtime, poses, predictions, first.tolist())
    moved = moved.flatten(0, 1)  # (images · D, steps, C, H, W)
    change = (moved[:, -1] - moved[:, 0]).square().flatten(1).sum(dim=1)
    figures.plot_overview(
        images[first],
        decoded[first],
        moved[change.argmax()],
        [names[label] for label in classes],
        experiment.directory / "overview.png",
        f"{title}: images, what their capsules decode to, and one dimension moved",
    )

    # -- misread images, decoded as the predicted class and as the true one
    of_these = torch.isin(labels, torch.tensor(classes))
    wrong = of_these & (predictions != labels)
    failures = wrong.nonzero()[: pictures.failures, 0]
    if len(failures):
        inputs = images[failures].to(experiment.runtime.device)
        _, as_labelled, _ = decode(experiment, network, inputs, labels[failures])
        figures.plot_failures(
            images[failures],
            decoded[failures],
            as_labelled,
            labels[failures],
            predictions[failures],
            experiment.directory / "failures.png",
            f"{title}: {int(wrong.sum())} of {int(of_these.sum()):,} test images misread",
            names,
        )
    else:
        print("no image of these classes was misread: there is no failures.png")

    # -- the same in numbers
    rows = measure(images, decoded, labels, predictions, classes, class_names)
    experiment.write_table("reconstruction", rows)
    print("class    accuracy   squared error   total variation: image → reconstruction")
    for row in rows:
        print(
            f"{row['class']:<8} {percent(row['accuracy'])} {row['squared_error']:>14.2f} "
            f"{row['variation_image']:>16.1f} → {row['variation_reconstruction']:.1f}"
        )
    print(f"tables and pictures are in {experiment.directory}")


def chosen_classes(wanted: list[str] | None, names: tuple[str, ...]) -> list[int]:
    """Return the indices of the classes."""
    if wanted is None:
        return list(range(len(names)))
    for name in wanted:
        if name not in names:
            raise ValueError(f"--classes {name}: there are {', '.join(names)}")
    return [names.index(name) for name in wanted]


@torch.inference_mode()
def decode(
    experiment: Experiment, network: Trained, images: Tensor, target: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return predictions (N,), decoded images and poses (N, K, D).

    The decoded capsule is the longest one, or the target's.
    """
    predictions, decoded, poses = [], [], []
    size = experiment.machine.test_batch_size
    for first in range(0, len(images), size):
        part = slice(first, first + size)
        labels = None if target is None else target[part].to(images.device)
        with experiment.runtime.autocast():
            output = network.model(images[part], labels)
        predictions.append(output.activations.argmax(dim=1).cpu())
        decoded.append(output.reconstruction.float().cpu())
        poses.append(output.poses.float())
    return torch.cat(predictions), torch.cat(decoded), torch.cat(poses)


def measure(
    images: Tensor,
    decoded: Tensor,
    labels: Tensor,
    predictions: Tensor,
    classes: list[int],
    names: tuple[str, ...],
) -> list[dict[str, Any]]:
    """Return a row for each class, with means over its images."""
    rows = []
    for label in classes:
        members = labels == label
        rows.append(
            {
                "class": names[label],
                "images": int(members.sum()),
                "accuracy": (predictions == labels)[members].double().mean().item(),
                "squared_error": reconstruction_error(decoded, images)[members].mean().item(),
                "variation_image": total_variation(images[members]).mean().item(),
                "variation_reconstruction": total_variation(decoded[members]).mean().item(),
            }
        )
    return rows


def total_variation(images: Tensor) -> Tensor:
    """Sum the absolute differences between neighbours: (N, C, H, W) → (N,)."""
    down = (images[:, :, 1:] - images[:, :, :-1]).abs().flatten(1).sum(dim=1)
    across = (images[..., 1:] - images[..., :-1]).abs().flatten(1).sum(dim=1)
    return down + across


if __name__ == "__main__":
    sys.exit(main())
