"""Compare the capsule networks and a CNN of like size, epoch by epoch (Figures 4 to 8).

    python examples/compare_models.py --dry-run                     # try it, in seconds
    python examples/compare_models.py --epochs 5                    # a first look, on a CPU
    python examples/compare_models.py --epochs 50 --seeds 3         # the paper's, on a GPU
    python examples/compare_models.py --models capsnet deep_capsnet --epochs 30

All networks share one recipe: the same images in the same order, the same shifts, learning rates
and seeds. The same command again goes on where it was stopped; more epochs or seeds add to what is
there. Every run has a directory of its own, which reconstruct.py and robustness.py can read; beside
them stand curves.png, runs.csv and runs.json (a row a run), networks.csv and networks.json (mean
and spread over the seeds).
"""

import argparse
import sys
from typing import Any

from engine import baseline, experiment_figures
from engine.experiment import Cell, Experiment, mean_and_spread, percent, run_program
from engine.flags import add_machine_flags, add_seeds, add_training_flags, new_parser

# What is averaged over the seeds.
AVERAGED = (
    "test_accuracy", "final_test_accuracy", "highest_test_accuracy", "seconds_per_epoch",
)  # fmt: skip


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = new_parser(__doc__)
    what = parser.add_argument_group("experiment")
    networks = baseline.list_networks()
    what.add_argument(
        "--models", nargs="+", choices=networks, default=networks, help="which networks"
    )
    add_seeds(what)
    add_training_flags(parser, epochs=30)
    add_machine_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train and compare; returns the exit status of the program."""
    return run_program("compare_models", tell, parse_arguments(argv))


def tell(args: argparse.Namespace) -> int:
    """Train every network with every seed, then put them side by side."""
    experiment = Experiment("compare_models", args)

    # Seed by seed, so that a comparison that is stopped early has all networks.
    cells = [
        Cell(f"{model}-seed{seed}", model, seed)
        for seed in range(1, args.seeds + 1)
        for model in args.models
    ]
    results = experiment.train(cells, experiment.make_job)
    if results is None:
        return 130

    experiment.write_table("runs", results)
    experiment.write_table("networks", averages(results))

    curves: dict[str, list[list[float]]] = {}
    for result in results:
        title = baseline.TITLES[result["model"]]
        curves.setdefault(title, []).append(experiment.curve(result))
    seeds = max(map(len, curves.values()))
    experiment_figures.plot_model_curves(
        curves,
        experiment.directory / "curves.png",
        f"{experiment.dataset.title}: one recipe, {seeds} {'seed' if seeds == 1 else 'seeds'}",
        "test accuracy",
    )
    print(f"tables, curves.png and checkpoints are in {experiment.directory}")
    return 0


def averages(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each network, with mean and spread over its runs, and print it."""
    rows = []
    for model in dict.fromkeys(result["model"] for result in results):
        runs = [result for result in results if result["model"] == model]
        row: dict[str, Any] = {
            "model": model,
            "parameters": runs[0]["parameters"],
            "epochs": runs[0]["epochs"],
            "seeds": len(runs),
        }
        for name in AVERAGED:
            row[name], row[f"{name}_spread"] = mean_and_spread([run[name] for run in runs])
        rows.append(row)
        chosen = percent(row["test_accuracy"], row["test_accuracy_spread"])
        last = percent(row["final_test_accuracy"], row["final_test_accuracy_spread"])
        highest = percent(row["highest_test_accuracy"], row["highest_test_accuracy_spread"])
        print(
            f"{baseline.TITLES[model]:<12} {row['parameters'] / 1e6:.2f} M parameters: chosen by "
            f"validation {chosen}, last epoch {last}, highest of all epochs {highest}, "
            f"{row['seconds_per_epoch']:.3g} s an epoch"
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
