"""The tables of the experiments: accuracies of a run, means and spreads over runs."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any


def best_epoch(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the row of the epoch that the validation set chooses, the last one if there is no set.

    It is the first with the highest accuracy. The loss breaks ties, which are common on a small
    set. NaN is worse than any number.
    """

    def quality(row: Mapping[str, Any]) -> tuple[float, float]:
        accuracy = float(row.get("validation_accuracy", math.nan))
        loss = float(row.get("validation_loss", math.nan))
        return (
            -math.inf if math.isnan(accuracy) else accuracy,
            -math.inf if math.isnan(loss) else -loss,
        )

    return max(rows, key=quality) if "validation_accuracy" in rows[-1] else rows[-1]


def accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up the epochs of a run.

    `test_accuracy` belongs to the epoch that the validation set chose, or to the last one without a
    validation set. `highest_test_accuracy`, like the paper's best, is chosen by the test set
    itself, so it is a little too high. An accuracy that was not measured is None. The time is that
    of training alone.
    """
    last = rows[-1]
    tested = [row for row in rows if "test_accuracy" in row]
    highest = max(tested, key=lambda row: float(row["test_accuracy"]))
    chosen = best_epoch(rows)
    return {
        "epochs": last["epoch"],
        "chosen_epoch": chosen["epoch"],
        "test_accuracy": chosen.get("test_accuracy"),
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
    """Group runs by the values of some columns, in the order of their first runs."""
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
    """Return one row for each kind of run: averages over the runs, which differ in the seed only.

    `by` are the columns that distinguish the kinds, and `kept` others that all runs of a kind
    share. Each of the `averaged` columns is followed by its spread.
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
