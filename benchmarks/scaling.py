"""How time and memory grow with each axis of the routing."""

import math
import statistics

import torch

from benchmarks import memory
from benchmarks.cases import MAIN, SHAPES, Case, Shape
from benchmarks.operators import checked_rivals, time_phase
from benchmarks.report import NO_TIME, Row
from benchmarks.rivals import ours
from benchmarks.session import Session, axes, reason

_COLUMNS = ("axis", "value", "rival")


def run_scaling(session: Session) -> None:
    """Sweep each axis over more than a decade and fit the growth of time and memory."""
    rivals = ["eager", ours(session.device)]
    swept = sweeps(session.device, session.quick)
    for axis, values in swept.items():
        for value in values:
            point: Row = {"axis": axis, "value": value}
            if session.is_over():
                rows = [NO_TIME]
            else:
                rows = _time_point(
                    session, swept_case(axis, value, session.device, session.quick), rivals
                )
            session.report.add([point | row for row in rows], *_COLUMNS)
    timed_rows = [row for row in session.report.rows if "median_s" in row]
    _add_peaks(session, timed_rows)
    fits = [
        {"axis": axis, "rival": rival, **_exponents(timed_rows, axis, rival)}
        for axis in swept
        for rival in rivals
    ]
    session.report.note(fits=fits)
    for fit in fits:
        axis, rival, time, peak = fit.values()
        print(f"  {axis} {rival:<11} time ~ {axis}^{time}, memory ~ {axis}^{peak}")


def _time_point(session: Session, case: Case, names: list[str]) -> list[Row]:
    rivals, left_out = checked_rivals(case, names, session.device)
    rows = left_out + time_phase(session, case, rivals, "both")
    return [axes(case) | row for row in rows]


def sweeps(device: torch.device, quick: bool) -> dict[str, list[int]]:
    """List the values of each axis."""
    if quick:
        return {"I": [16, 160], "J": [2, 20], "B": [1, 10], "r": [1, 10]}
    if device.type == "cuda":
        return {
            "I": [256, 512, 1024, 2048, 4096, 8192],
            "J": [4, 8, 16, 32, 64, 128],
            "B": [16, 32, 64, 128, 256, 512],
            "r": [1, 2, 3, 5, 10],
        }
    return {
        "I": [128, 256, 512, 1024, 2048],
        "J": [4, 8, 16, 32, 64],
        "B": [8, 16, 32, 64, 128],
        "r": [1, 2, 3, 5, 10],
    }


def swept_case(axis: str, value: int, device: torch.device, quick: bool) -> Case:
    """Vary one axis of MNIST's routing."""
    B = 2 if quick else 128 if device.type == "cuda" else 32
    sizes = {**(Shape(32, 8, 4, 16) if quick else SHAPES["mnist"])._asdict(), "B": B}
    sizes |= {"r": 3, axis: value}
    shape = Shape(*(sizes[name] for name in Shape._fields))
    return Case(MAIN, shape, sizes["B"], iterations=sizes["r"])


def _add_peaks(session: Session, rows: list[Row]) -> None:
    """Measure the memory of the points that were timed. If that fails, the times stay."""
    for rival in dict.fromkeys(row["rival"] for row in rows):
        own = [row for row in rows if row["rival"] == rival]
        cases = [
            swept_case(row["axis"], row["value"], session.device, session.quick) for row in own
        ]
        try:
            peaks = memory.peaks(cases, rival, session.device)
        except Exception as error:
            session.report.add([{"rival": rival, "left_out": reason(error)}], "rival")
            continue
        for row, peak in zip(own, peaks, strict=True):
            row["peak_bytes"] = peak


def _exponents(rows: list[Row], axis: str, rival: str) -> Row:
    own = [row for row in rows if (row["axis"], row["rival"]) == (axis, rival)]
    times = [(row["value"], row["median_s"]) for row in own]
    peaks = [(row["value"], row["peak_bytes"]) for row in own if row.get("peak_bytes")]
    return {"time_exponent": fitted_exponent(times), "memory_exponent": fitted_exponent(peaks)}


def fitted_exponent(points: list[tuple[float, float]]) -> float | None:
    """Fit k of y ~ xᵏ by least squares of the logarithms. None with fewer than two points."""
    if len(points) < 2:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in points]
    return round(statistics.linear_regression(*zip(*logs, strict=True)).slope, 3)
