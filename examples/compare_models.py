"""Compare the capsule networks and a CNN of similar size, epoch by epoch (Figures 4 to 8).

    python examples/compare_models.py --dry-run                     # try it, in seconds
    python examples/compare_models.py --epochs 5                    # a first look, on a CPU
    python examples/compare_models.py --epochs 50 --seeds 3         # the paper's, on a GPU
    python examples/compare_models.py --models capsnet deep_capsnet --epochs 30

All networks share one recipe: the same images in the same order, the same shifts, learning rates
and seeds. Repeat the command to continue where it was stopped; more epochs or seeds add to what is
there. Every run has a directory of its own, which reconstruct.py and robustness.py can read. Beside
them are curves.png, runs.csv and runs.json (a row per run), networks.csv and networks.json (mean
and spread over the seeds).
"""

import sys
from dataclasses import dataclass, replace

from engine import figures
from engine.baseline import CNN, PAPER, TITLES, list_networks
from engine.flags import Machine, Output, Recipe, models_flag, seeds_flag
from engine.runner import Experiment, run_experiment
from engine.tables import averages, counted, grouped, percent


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    models: list[str] = models_flag((*PAPER, CNN), list_networks())
    seeds: int = seeds_flag()


def main(argv: list[str] | None = None) -> int:
    """Train and compare; returns the exit status of the program."""
    return run_experiment("compare_models", __doc__, tell, argv, Comparison, Recipe, epochs=30)


def tell(comparison: Comparison, recipe: Recipe, machine: Machine, output: Output) -> None:
    """Train every network with every seed, then put them side by side."""
    experiment = Experiment("compare_models", recipe, machine, output, comparison)
    experiment.open()

    # Seed by seed, so that a comparison that is stopped early has all networks.
    recipes = {
        f"{model}-seed{seed}": replace(experiment.recipe, model=model, seed=seed)
        for seed in range(1, comparison.seeds + 1)
        for model in comparison.models
    }
    results = experiment.run(recipes)

    accuracies = ("test_accuracy", "final_test_accuracy", "highest_test_accuracy")
    rows = averages(
        results, ("model",), (*accuracies, "seconds_per_epoch"), kept=("parameters", "epochs")
    )
    experiment.write_table("runs", results)
    experiment.write_table("networks", rows)
    for row in rows:
        chosen, last, highest = (percent(row[name], row[f"{name}_spread"]) for name in accuracies)
        print(
            f"{TITLES[row['model']]:<12} {row['parameters'] / 1e6:.2f} M parameters: chosen by "
            f"validation {chosen}, last epoch {last}, highest of all epochs {highest}, "
            f"{row['seconds_per_epoch']:.3g} s an epoch"
        )

    curves = {
        TITLES[model]: experiment.curves(runs)
        for (model,), runs in grouped(results, "model").items()
    }
    figures.plot_model_curves(
        curves,
        experiment.directory / "curves.png",
        f"{experiment.dataset.title}: one recipe, {counted(comparison.seeds, 'seed')}",
        "test accuracy",
    )
    print(f"tables, curves.png and checkpoints are in {experiment.directory}")


if __name__ == "__main__":
    sys.exit(main())
