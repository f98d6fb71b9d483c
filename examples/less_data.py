"""Train on fewer images: accuracy by the size of the training set, for three networks.

    python examples/less_data.py --dry-run                                # try it, in seconds
    python examples/less_data.py --sizes 100 1000 10000 --epochs 3        # on a CPU
    python examples/less_data.py --seeds 3 --epochs 30                    # the whole, on a GPU

The rule: every size is trained for the same number of steps, by the same schedule. An epoch has as
many images as the largest set has, so that a set of 100 is seen 600 times where one of 60,000 is
seen once, each time shifted anew: small sets have converged, which the training accuracy in the
table shows. Each set holds the classes in proportion and is part of every larger one of its seed.
No image is held out and nothing is chosen: the accuracy is that of the last epoch.

The same command again goes on where it was stopped. Beside the runs stand runs.csv and runs.json (a
row a run), sizes.csv and sizes.json (mean and spread over the seeds) and sizes.png.
"""

import argparse
import sys
from typing import Any

import torch

from engine import baseline, experiment_figures
from engine.experiment import Cell, Experiment, Job, mean_and_spread, percent, run_program
from engine.flags import add_machine_flags, add_seeds, add_training_flags, new_parser, positive
from tritoncaps.data import Batches, ImageSet, stratified_subset

SIZES = [100, 300, 1_000, 3_000, 10_000, 30_000, 60_000]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = new_parser(__doc__)
    what = parser.add_argument_group("experiment")
    networks = baseline.list_networks()
    what.add_argument(
        "--models", nargs="+", choices=networks, default=networks, help="which networks"
    )
    what.add_argument(
        "--sizes",
        nargs="+",
        type=positive,
        metavar="N",
        help=f"training images (default: those of {SIZES} that there are, and all)",
    )
    what.add_argument(
        "--epoch-size",
        type=positive,
        metavar="N",
        help="images an epoch, for every size (default: the largest size)",
    )
    add_seeds(what)
    add_training_flags(parser, epochs=10, holds_out=False)
    add_machine_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train and compare; returns the exit status of the program."""
    return run_program("less_data", tell, parse_arguments(argv))


def tell(args: argparse.Namespace) -> int:
    """Train every network on every size, then put them side by side."""
    experiment = Experiment("less_data", args)
    sizes = choose_sizes(args, len(experiment.train_images))
    epoch_size = args.epoch_size or max(sizes)
    experiment.fix("epoch_size", epoch_size)
    cells = [
        Cell(f"{model}-{size}-seed{seed}", model, seed, train_size=size)
        for seed in range(1, args.seeds + 1)
        for size in sizes
        for model in args.models
    ]

    def make_job(cell: Cell) -> Job:
        assert cell.train_size is not None
        subset = stratified_subset(experiment.train_images, cell.train_size, cell.seed)
        train = repeated(subset, epoch_size)
        batches = Batches(train, args.batch_size, seed=cell.seed, max_shift=args.max_shift)
        return experiment.classification(cell, batches, None, curve=False)

    results = experiment.train(cells, make_job)
    if results is None:
        return 130

    rows = averages(results)
    experiment.write_table("runs", results)
    experiment.write_table("sizes", rows)
    curves: dict[str, dict[int, list[float]]] = {}
    for result in results:
        of_network = curves.setdefault(baseline.TITLES[result["model"]], {})
        of_network.setdefault(result["train_size"], []).append(result["test_accuracy"])
    experiment_figures.plot_by_size(
        curves,
        experiment.directory / "sizes.png",
        f"{experiment.dataset.title}: the same number of steps for every size",
        ("training images", "test accuracy"),
    )
    print(f"tables, sizes.png and checkpoints are in {experiment.directory}")
    return 0


def choose_sizes(args: argparse.Namespace, available: int) -> list[int]:
    """Return the sizes in ascending order."""
    if args.dry_run:
        return [available // 2, available]
    if args.sizes is None:
        return [size for size in SIZES if size < available] + [available]
    sizes = sorted(set(args.sizes))
    if sizes[-1] > available:
        raise ValueError(f"--sizes {sizes[-1]}: there are {available:,} training images")
    return sizes


def repeated(images: ImageSet, count: int) -> ImageSet:
    """Repeat a set until it has `count` images; the last repetition may be cut short."""
    return images.subset(torch.arange(count) % len(images))


def averages(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each network and size, with mean and spread over the seeds, and print it."""
    rows = []
    for model, size in dict.fromkeys((r["model"], r["train_size"]) for r in results):
        runs = [r for r in results if (r["model"], r["train_size"]) == (model, size)]
        row: dict[str, Any] = {"model": model, "train_size": size, "seeds": len(runs)}
        for name in ("test_accuracy", "train_accuracy"):
            row[name], row[f"{name}_spread"] = mean_and_spread([run[name] for run in runs])
        rows.append(row)
        print(
            f"{baseline.TITLES[model]:<12} {size:>7,} images: "
            f"{percent(row['test_accuracy'], row['test_accuracy_spread'])} "
            f"(in training {percent(row['train_accuracy'])})"
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
