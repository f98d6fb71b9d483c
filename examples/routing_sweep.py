"""Sweep the routing iterations of the deep capsule network (Figures 9 to 11).

    python examples/routing_sweep.py --dry-run                            # try it, in seconds
    python examples/routing_sweep.py --main 1 2 3 --secondary 1 2 3 \\
        --limit-train 10000 --epochs 3                                    # on a CPU
    python examples/routing_sweep.py --epochs 30 --seeds 3                # all of it, on a GPU

Each pair of main and secondary iterations is one run, in a directory of its own. A finished one is
not run again, and a larger grid adds to a smaller one. Beside the runs are runs.csv and runs.json
(a row per run), grid.csv and grid.json (a row per pair: mean and spread over the seeds, and whether
it is on the Pareto front), grid.png (accuracies as a heat map), time.png (accuracy against time)
and equal.png (the curves of the pairs with equal counts).

Compare seconds only from one machine that does nothing else; the tables name the device.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine import figures
from engine.flags import Machine, Output, Recipe, flag, positive, seeds_flag
from engine.runner import Experiment, run_experiment
from engine.tables import averages, grouped, percent

PAIR = ("primary_iterations", "secondary_iterations")


def counts_flag(help: str) -> Any:
    """Declare a flag of iterations."""
    return flag((1, 2, 3, 4), help, nargs="+", type=positive, metavar="R")


@dataclass(frozen=True)
class Grid:
    """What is swept over."""

    main: list[int] = counts_flag("iterations of the main route, from primary capsules")
    secondary: list[int] = counts_flag("iterations of the secondary route, to class capsules")
    seeds: int = seeds_flag()


def main(argv: list[str] | None = None) -> int:
    """Train the grid; returns the exit status of the program."""
    return run_experiment("routing_sweep", __doc__, tell, argv, Grid, Recipe, epochs=30)


def tell(grid: Grid, recipe: Recipe, machine: Machine, output: Output) -> None:
    """Train every pair of counts, then compare accuracy and time."""
    experiment = Experiment("routing_sweep", recipe, machine, output, grid)
    experiment.open()
    recipes = {
        f"main{main_count}-secondary{secondary}-seed{seed}": replace(
            experiment.recipe,
            model="deep_capsnet",
            model_kwargs=dict(zip(PAIR, (main_count, secondary), strict=True)),
            seed=seed,
        )
        for seed in range(1, grid.seeds + 1)
        for main_count in sorted(set(grid.main))
        for secondary in sorted(set(grid.secondary))
    }
    results = experiment.run(recipes)

    rows = pairs(results)
    experiment.write_table("runs", results)
    experiment.write_table("grid", rows)
    report(rows)
    draw(experiment, results, rows)
    print(f"tables, pictures and checkpoints are in {experiment.directory}")


def pairs(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each pair of counts, with mean and spread over the seeds."""
    averaged = ("test_accuracy", "highest_test_accuracy", "seconds_per_epoch")
    rows = [
        {"main": row.pop(PAIR[0]), "secondary": row.pop(PAIR[1]), **row}
        for row in averages(results, PAIR, averaged)
    ]
    front = pareto_front([(row["seconds_per_epoch"], row["test_accuracy"]) for row in rows])
    for index, row in enumerate(rows):
        row["pareto_front"] = index in front
    return rows


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the positions of the points (seconds, accuracy) that no other one beats.

    A point beats another if it is at least as fast and as accurate, and better in one of the two.
    """
    return [
        index
        for index, (seconds, accuracy) in enumerate(points)
        if not any(
            other[0] <= seconds and other[1] >= accuracy and other != (seconds, accuracy)
            for other in points
        )
    ]


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table and the most accurate pair."""
    print("main × secondary   test accuracy    s an epoch")
    for row in rows:
        accuracy = percent(row["test_accuracy"], row["test_accuracy_spread"])
        mark = "  Pareto front" if row["pareto_front"] else ""
        name = f"{row['main']} × {row['secondary']}"
        print(f"{name:>10} {accuracy:>21} {row['seconds_per_epoch']:>13.4g}{mark}")
    best = max(rows, key=lambda row: float(row["test_accuracy"]))
    print(f"most accurate: main {best['main']} × secondary {best['secondary']}")


def draw(experiment: Experiment, results: Sequence[dict[str, Any]], rows: list[Any]) -> None:
    """Draw the heat map, accuracy against time, and the curves of the pairs with equal counts."""
    directory = experiment.directory
    network = f"DeepCapsNet on {experiment.dataset.title}"
    by_pair = {(row["main"], row["secondary"]): row["test_accuracy"] for row in rows}
    counts = [sorted({row[name] for row in rows}) for name in ("main", "secondary")]
    figures.plot_heat_map(
        [[by_pair.get((row, column), math.nan) for column in counts[1]] for row in counts[0]],
        counts[0],
        counts[1],
        directory / "grid.png",
        f"{network}, by routing iterations",
        ("iterations of the main route", "iterations of the secondary route", "test accuracy"),
    )
    figures.plot_trade_off(
        [
            (f"{row['main']} × {row['secondary']}", row["seconds_per_epoch"], row["test_accuracy"])
            for row in rows
        ],
        [index for index, row in enumerate(rows) if row["pareto_front"]],
        directory / "time.png",
        f"{network}: iterations main × secondary, on {experiment.runtime.describe()}",
        ("training time of an epoch (s)", "test accuracy"),
    )
    equal = {
        f"{first} × {second}": experiment.curves(runs)
        for (first, second), runs in grouped(results, *PAIR).items()
        if first == second
    }
    if equal:
        title = f"{network}: the same count in both routes"
        figures.plot_model_curves(equal, directory / "equal.png", title, "test accuracy")


if __name__ == "__main__":
    sys.exit(main())
