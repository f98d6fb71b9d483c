"""Train on fewer images: accuracy by the size of the training set, for three networks.

    python examples/less_data.py --dry-run                                # try it, in seconds
    python examples/less_data.py --sizes 100 1000 10000 --epochs 3        # on a CPU
    python examples/less_data.py --seeds 3 --epochs 30                    # all of it, on a GPU

Every size is trained for the same number of steps, by the same schedule. An epoch has as many
images as the largest set: a set of 100 is seen 600 times for every time that a set of 60,000 is
seen, each time with new shifts. So small sets converge, as the training accuracy in the table
shows. Each set holds the classes in proportion and is part of every larger one of its seed. No
image is held out and nothing is chosen: the accuracy is that of the last epoch.

Repeat the command to continue where it was stopped. Beside the runs are runs.csv and runs.json (a
row per run), sizes.csv and sizes.json (mean and spread over the seeds) and sizes.png.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine import figures
from engine.baseline import CNN, PAPER, TITLES, list_networks
from engine.flags import COUNT, Machine, Output, Recipe, flag, models_flag, seeds_flag
from engine.runner import VARIED, Experiment, Job, run_experiment
from engine.tables import averages, grouped, percent
from tritoncaps.data import ImageSet, stratified_subset

SIZES = [100, 300, 1_000, 3_000, 10_000, 30_000, 60_000]


@dataclass(frozen=True)
class Sizes:
    """What is compared."""

    models: list[str] = models_flag((*PAPER, CNN), list_networks())
    sizes: list[int] | None = flag(
        None,
        f"training images (default: those of {SIZES} that there are, and all)",
        nargs="+",
        **COUNT,
    )
    epoch_size: int | None = flag(
        None, "images an epoch, for every size (default: the largest size)", **COUNT
    )
    seeds: int = seeds_flag()


@dataclass(frozen=True)
class PartRecipe(Recipe):
    """A recipe for a part of the training images."""

    train_size: int = 0


def main(argv: list[str] | None = None) -> int:
    """Train and compare; returns the exit status of the program."""
    left_out = (*VARIED, "validation_fraction", "train_size")
    options = {"epochs": 10, "validation_fraction": 0.0}
    groups = (Sizes, PartRecipe)
    return run_experiment("less_data", __doc__, tell, argv, *groups, leave_out=left_out, **options)


def tell(what: Sizes, recipe: PartRecipe, machine: Machine, output: Output) -> None:
    """Train every network on every size, then put them side by side."""
    varied = (*VARIED, "train_size")
    experiment = Experiment("less_data", recipe, machine, output, what, varied)
    sizes = choose_sizes(what.sizes, len(experiment.train_images), output.dry_run)
    epoch_size = what.epoch_size or max(sizes)
    experiment.open(epoch_size=epoch_size)
    base = experiment.recipe
    assert isinstance(base, PartRecipe)
    recipes = {
        f"{model}-{size}-seed{seed}": replace(base, model=model, seed=seed, train_size=size)
        for seed in range(1, what.seeds + 1)
        for size in sizes
        for model in what.models
    }

    def make_job(recipe: PartRecipe) -> Job:
        subset = stratified_subset(experiment.train_images, recipe.train_size, recipe.seed)
        return experiment.classification(recipe, repeated(subset, epoch_size), curve=False)

    results = experiment.run(recipes, make_job)

    rows = averages(results, ("model", "train_size"), ("test_accuracy", "train_accuracy"))
    experiment.write_table("runs", results)
    experiment.write_table("sizes", rows)
    for row in rows:
        print(
            f"{TITLES[row['model']]:<12} {row['train_size']:>7,} images: "
            f"{percent(row['test_accuracy'], row['test_accuracy_spread'])} "
            f"(in training {percent(row['train_accuracy'])})"
        )
    curves: dict[str, dict[int, list[float]]] = {}
    for (model, size), runs in grouped(results, "model", "train_size").items():
        curves.setdefault(TITLES[model], {})[size] = [run["test_accuracy"] for run in runs]
    figures.plot_by_size(
        curves,
        experiment.directory / "sizes.png",
        f"{experiment.dataset.title}: the same number of steps for every size",
        ("training images", "test accuracy"),
    )
    print(f"tables, sizes.png and checkpoints are in {experiment.directory}")


def choose_sizes(wanted: Sequence[int] | None, available: int, dry_run: bool = False) -> list[int]:
    """Return the sizes in ascending order."""
    if dry_run:
        return [available // 2, available]
    if wanted is None:
        return [size for size in SIZES if size < available] + [available]
    sizes = sorted(set(wanted))
    if sizes[-1] > available:
        raise ValueError(f"--sizes {sizes[-1]}: there are {available:,} training images")
    return sizes


def repeated(images: ImageSet, count: int) -> ImageSet:
    """Repeat a set until it has `count` images; the last repetition may be incomplete."""
    return images.subset(torch.arange(count) % len(images))


if __name__ == "__main__":
    sys.exit(main())
