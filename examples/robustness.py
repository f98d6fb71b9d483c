"""Measure what attacked, shifted, rotated and scaled images do to trained networks.

    python examples/robustness.py runs/compare_models-mnist/*-seed1 --dry-run
    python examples/robustness.py runs/compare_models-mnist/*-seed1 --limit-test 2000
    python examples/robustness.py RUN RUN RUN                       # also runs of train_mnist.py

Nothing is trained: the networks come from run directories, at the epoch that the validation set
chose. The fast gradient sign attack follows the gradient of a network's default loss, whatever
--loss it was trained with: the cross entropy of its logits, or else the margin loss. The network
sees no label, and the decoder plays no part. The gradient of the margin loss is exactly 0 where all
lengths are beyond their margins, so such an image is not attacked at all. Therefore the share of
these images is reported, and a second attack follows the difference between the best wrong score
and the true one, whose gradient never vanishes. Compare networks only if their clean accuracies are
alike.

It writes robustness.csv and robustness.json (a row for each network and condition), robustness.png
and examples.png. Nothing is measured twice: measured.json keeps all results.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine import distortions, figures
from engine.figures import Panel
from engine.flags import NO_TRAINING, Machine, Output, Recipe, flag
from engine.run_directory import write_json
from engine.runner import Experiment, run_experiment
from engine.tables import percent
from engine.trained import Trained, check_data, check_trained, load_trained
from tritoncaps.data import to_float
from tritoncaps.losses import MarginLoss

# According to the paper, accuracy under the attack stays above this.
CLAIM = 0.7

# If clean accuracies differ by more, a warning says so.
LIKE = 0.005


@dataclass(frozen=True)
class Kind:
    """A way to make images harder: its title, the label of its axis, its amounts and its function.

    `change` is None for attacks, which need the network.
    """

    name: str
    title: str
    axis: str
    amounts: tuple[float, ...]
    change: Callable[[Tensor, float, int], Tensor] | None = None


EPSILONS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
KINDS = (
    Kind("fgsm", "fast gradient sign, its default loss", "ε (pixels are 0 … 1)", EPSILONS),
    Kind(
        "fgsm_difference",
        "fast gradient sign, difference of scores",
        "ε (pixels are 0 … 1)",
        EPSILONS,
    ),
    Kind("shift", "shifted", "pixels", (0, 1, 2, 3, 4, 5, 6, 8), distortions.shifted),
    Kind("rotation", "rotated", "degrees", (0, 10, 20, 30, 40, 50, 60), distortions.rotated),
    Kind("scale", "scaled", "factor", (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5),
         distortions.scaled),
)  # fmt: skip


NAMES = [kind.name for kind in KINDS]


@dataclass(frozen=True)
class Test:
    """What is tested."""

    runs: list[str] = flag(..., "directories of trained networks", nargs="+", metavar="RUN")
    kinds: list[str] = flag(tuple(NAMES), "which conditions", nargs="+", choices=NAMES)


def main(argv: list[str] | None = None) -> int:
    """Measure; returns the exit status of the program."""
    # In 16 bits, rounding decides the sign of a gradient near 0.
    options: dict[str, Any] = {"precision": "fp32", "test_batch_size": 250}
    return run_experiment(
        "robustness", __doc__, tell, argv, Test, Recipe, leave_out=NO_TRAINING, **options
    )


def tell(test: Test, recipe: Recipe, machine: Machine, output: Output) -> None:
    """Measure every network under every condition, then draw one curve for each."""
    for run in test.runs:
        check_trained(run)
    experiment = Experiment("robustness", recipe, machine, output, test, NO_TRAINING)
    experiment.open(trains=False)
    networks = [load_trained(run, experiment.runtime) for run in test.runs]
    for network in networks:
        check_data(network, experiment.dataset)
        # Only classification is measured. Without a decoder, no label can reach one.
        network.model.decoder = None  # type: ignore[assignment]
    titles = distinct_titles(networks)
    kinds = [kind for kind in KINDS if kind.name in test.kinds]
    path = experiment.directory / "measured.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    rows = []
    for title, network in zip(titles, networks, strict=True):
        for kind in kinds:
            amounts = kind.amounts[:: len(kind.amounts) - 1] if output.dry_run else kind.amounts
            # The digest recognizes weights wherever they are.
            key = f"{network.digest} {kind.name} {list(map(float, amounts))}"
            if key not in before:
                before[key] = measure(experiment, network, kind, amounts)
                write_json(path, before)
            measured = before[key]
            line = ", ".join(f"{row['amount']:g}: {percent(row['accuracy'])}" for row in measured)
            print(f"{title}, {kind.title}: {line}", flush=True)
            origin = {"epoch": network.epoch, "run": str(network.directory)}
            rows += [{"network": title, "kind": kind.name, **row, **origin} for row in measured]
    experiment.write_table("robustness", rows)
    compare_clean(rows)
    draw(experiment, rows, kinds, titles, networks)
    print(f"tables and pictures are in {experiment.directory}")


def distinct_titles(networks: list[Trained]) -> list[str]:
    """Name the networks; those with the same title also by their directories."""
    titles = [network.title for network in networks]
    return [
        title if titles.count(title) == 1 else f"{title} ({network.directory.name})"
        for title, network in zip(titles, networks, strict=True)
    ]


def measure(
    experiment: Experiment, network: Trained, kind: Kind, amounts: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Return a row for each amount: accuracy, and the share of images without a gradient."""
    correct = torch.zeros(len(amounts), dtype=torch.int64)
    untouched = 0
    for first, images, labels in batches(experiment):
        if kind.change is None:
            direction = attack(experiment, network, kind, images, labels)
            untouched += int((direction == 0).flatten(1).all(dim=1).sum())
        for index, amount in enumerate(amounts):
            if kind.change is None:
                changed = distortions.attacked(images, direction, amount)
            else:
                changed = kind.change(images, amount, first)
            with torch.inference_mode():
                right = scores(experiment, network, changed).argmax(dim=1) == labels
            correct[index] += right.sum().cpu()
    count = len(experiment.test_images)
    share = untouched / count if kind.change is None else None
    return [
        {"amount": amount, "accuracy": int(right) / count, "images": count, "no_gradient": share}
        for amount, right in zip(amounts, correct, strict=True)
    ]


def batches(experiment: Experiment) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Iterate over the test set: number of the first image, images in [0, 1], labels."""
    test, size = experiment.test_images, experiment.machine.test_batch_size
    for first in range(0, len(test), size):
        part = slice(first, first + size)
        yield first, to_float(test.images[part]), test.labels[part]


def scores(experiment: Experiment, network: Trained, images: Tensor) -> Tensor:
    """Run the network without labels; returns its logits, or lengths if it has none."""
    with experiment.runtime.autocast():
        output = network.model(images)
    found: Tensor = output.activations if output.logits is None else output.logits
    return found.float()


def attack(
    experiment: Experiment, network: Trained, kind: Kind, images: Tensor, labels: Tensor
) -> Tensor:
    """Return the direction of an attack."""

    def loss(values: Tensor) -> Tensor:
        if kind.name == "fgsm_difference":
            return distortions.score_difference(values, labels)
        if network.trains_logits:
            return torch.nn.functional.cross_entropy(values, labels, reduction="none")
        return MarginLoss(reduction="none")(values, labels)

    return distortions.sign_of_gradient(
        lambda changed: scores(experiment, network, changed), loss, images
    )


def compare_clean(rows: list[dict[str, Any]]) -> None:
    """Warn if the networks are not alike on clean images."""
    clean = {
        row["network"]: row["accuracy"]
        for row in rows
        if row["amount"] == (1 if row["kind"] == "scale" else 0)
    }
    if clean and max(clean.values()) - min(clean.values()) > LIKE:
        line = ", ".join(f"{name} {percent(value)}" for name, value in clean.items())
        print(f"warning: clean accuracies differ, so compare with care: {line}", file=sys.stderr)


def draw(
    experiment: Experiment,
    rows: list[dict[str, Any]],
    kinds: list[Kind],
    titles: list[str],
    networks: list[Trained],
) -> None:
    """Draw the curves, and what a digit looks like under each condition."""
    panels = []
    for kind in kinds:
        lines = {}
        for title in titles:
            chosen = [row for row in rows if (row["network"], row["kind"]) == (title, kind.name)]
            lines[title] = ([r["amount"] for r in chosen], [r["accuracy"] for r in chosen])
        level = (CLAIM, f"{100 * CLAIM:.0f} %, the paper's claim") if kind.change is None else None
        panels.append(Panel(kind.title, kind.axis, lines, level))
    name = f"{experiment.dataset.title}, {len(experiment.test_images):,} test images"
    figures.plot_panels(
        panels,
        experiment.directory / "robustness.png",
        f"What changed images do to trained networks: {name}",
        "test accuracy",
    )
    images, labels = next((images[:1], labels[:1]) for _, images, labels in batches(experiment))
    strips = []
    for kind in kinds:
        if kind.change is None:
            direction = attack(experiment, networks[-1], kind, images, labels)
            changed = [distortions.attacked(images, direction, amount) for amount in kind.amounts]
        else:
            changed = [kind.change(images, amount, 0) for amount in kind.amounts]
        names = [f"{amount:g}" for amount in kind.amounts]
        strips.append((kind.title, torch.cat(changed).cpu(), names))
    figures.plot_strips(
        strips,
        experiment.directory / "examples.png",
        f"One test image under every condition (attacks: {titles[-1]})",
    )


if __name__ == "__main__":
    sys.exit(main())
