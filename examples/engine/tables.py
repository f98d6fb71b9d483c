"""What the tables of the experiments say: accuracies of a run, means and spreads over runs."""

from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any


def accuracies(rows: Sequence[Mapping[str, Any]], best_epoch: int) -> dict[str, Any]:
    """Sum up the epochs of a run.

    `test_accuracy` is that of the model that the validation set chose, or of the last one where
    there is none. `highest_test_accuracy` is the highest of all epochs: as the paper's best it is
    chosen by the test set itself, so it is a little too high. Accuracies that were not measured are
    None. Time is that of training alone.
    """
    last = rows[-1]
    tested = [row for row in rows if "test_accuracy" in row]
    highest = max(tested, key=lambda row: float(row["test_accuracy"]))
    chosen = rows[best_epoch - 1].get("test_accuracy") if best_epoch else last["test_accuracy"]
    return {
        "epochs": last["epoch"],
        "chosen_epoch": best_epoch,
        "test_accuracy": chosen,
        "final_test_accuracy": last["test_accuracy"],
        "highest_test_accuracy": highest["test_accuracy"],
        "highest_epoch": highest["epoch"],
        "train_accuracy": last["train_accuracy"],
        "seconds_per_epoch": round(median(float(row["seconds"]) for row in rows), 2),
    }


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation, None of a single value."""
    return mean(values), stdev(values) if len(values) > 1 else None


def grouped(
    results: Sequence[Mapping[str, Any]], *by: str
) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Group runs by the values of some columns, in their first order."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result[name] for name in by), []).append(result)
    return groups


def averages(
    results: Sequence[Mapping[str, Any]],
    by: Sequence[str],
    averaged: Sequence[str],
    kept: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Average the runs that differ in their seed alone.

    Args:
        results: the runs.
        by: the columns that tell one kind of run from another.
        averaged: the columns to average, each followed by its spread.
        kept: columns that are the same for all runs of a kind.
    """
    rows = []
    for values, runs in grouped(results, *by).items():
        row: dict[str, Any] = dict(zip(by, values, strict=True))
        row |= {name: runs[0][name] for name in kept} | {"seeds": len(runs)}
        for name in averaged:
            row[name], row[f"{name}_spread"] = mean_and_spread([run[name] for run in runs])
        rows.append(row)
    return rows


def percent(value: float, spread: float | None = None) -> str:
    """Format a share as "99.44 %", with its spread as "99.44 ± 0.05 %"."""
    if spread is None:
        return f"{100 * value:.2f} %"
    return f"{100 * value:.2f} ± {100 * spread:.2f} %"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Count things: "1 epoch", "1,200 batches"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
