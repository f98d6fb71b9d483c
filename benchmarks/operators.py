"""The operators one by one: whether they are right (`check`) and how fast they are (`ops`)."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import (
    MAIN,
    SHAPES,
    Case,
    batch_size,
    conv_case,
    folded_case,
    matrix_case,
    operator_names,
)
from benchmarks.oracle import Oracle
from benchmarks.report import NO_BF16, NO_TIME, Row
from benchmarks.rivals import Rival, backend, op_rival, ours, rival_names
from benchmarks.roofline import Floor, floor, measure_ceilings
from benchmarks.session import Session, axes, reason, timed
from benchmarks.timing import Task, clock_for, replayed
from tritoncaps import testing

PHASES = ("forward", "backward", "both")
# Shorter calls are replayed from a CUDA graph, because launching them may take longer.
_LAUNCH_BOUND = 1e-3
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # of Linux
_DEFAULT_CACHE_BYTES = 8 << 20  # if the system does not say: that of a small machine


# Correctness --------------------------------------------------------------------------------------


def run_check(session: Session) -> None:
    """Compare every operator with the float64 reference at the named shapes."""
    for case in check_cases(session.device, session.quick):
        print(case, flush=True)
        row: Row = {"case": str(case)}
        if session.is_over():
            session.report.add([row | NO_TIME], "tensor")
            continue
        try:
            oracle = Oracle(case, session.device)
            errors = oracle.check(op_rival(ours(session.device), case, session.device))
            worst = max(errors, key=lambda name: errors[name])
            eager = oracle.relative_error(worst)
            row |= {"tensor": worst, "error": errors[worst], "eager_error": eager}
        except Exception as error:  # the other cases continue
            row |= {"left_out": reason(error)}
        session.report.add([row], "tensor")


def check_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """List what is checked, the most important first."""
    names = ("tiny", "second") if quick else [name for name in SHAPES if name != "large"]

    def case(op: str, name: str, **more: Any) -> Case:
        B = min(batch_size(name, device, quick), 32)
        case = Case(op, SHAPES[name], B, name=name, **more)
        # Where luck would decide in a lower precision.
        return replace(case, precision="fp64") if case.is_sensitive else case

    yield from (case(op, name) for op in operator_names() for name in names)
    for precision in ("bf16", "fp16", "fp64"):
        yield from (case(op, names[0], precision=precision) for op in operator_names())
    for op in operator_names():
        operator = testing.OPERATORS[op]
        for option, values in operator.options.items():
            for value in values[1:]:
                if option == "iterations":
                    yield case(op, names[0], iterations=value)
                else:
                    yield case(op, names[0], chosen={option: value})
        yield from (case(op, names[0], optional=(name,)) for name in operator.optional)


# Operators ----------------------------------------------------------------------------------------


def run_ops(session: Session) -> None:
    """Time each operator forward, backward and both, beside its rivals."""
    clock = clock_for(session.device)
    ceilings = measure_ceilings(session.device, clock, ["fp32", "bf16"], session.quick)
    session.report.note(ceilings=asdict(ceilings))
    cases = ops_cases(session.device, session.quick)
    calls = [(case, False) for case in cases if session.only in str(case)]
    if not calls:
        raise SystemExit(f"benchmarks: no case has {session.only!r} in its name")
    if session.device.type == "cpu" and calls[0][0] == cases[0]:
        calls.append((cases[0], True))
    for number, (case, is_loaded) in enumerate(calls):
        facts: Row = {"case": str(case), "shape": case.name, **axes(case)}
        if is_loaded:
            facts |= {"case": f"{case} under load", "loaded_cores": os.cpu_count()}
        print(facts["case"], flush=True)
        names = rival_names(case, session.device)
        if session.quick and number > 0:  # once is enough: the C++ compiler takes half a minute
            names = [name for name in names if name != "compile"]
        if session.is_over():
            session.report.add([facts | NO_TIME], "rival")
            continue
        if case.precision == "bf16" and not session.has_bf16():
            # Emulated, the rivals would take many times as long as in float32.
            session.report.add([facts | NO_BF16], "rival")
            continue
        rivals, left_out = checked_rivals(case, names, session.device)
        session.report.add([facts | row for row in left_out], "rival")
        for phase in PHASES:
            with busy_cores(facts.get("loaded_cores", 0)):
                rows = time_phase(session, case, rivals, phase)
            for row in rows:
                if row["rival"] == ours(session.device):
                    row["backend"] = backend(case, session.device)
            work = floor(case, phase)
            least = ceilings.seconds(work, case.precision)
            common = {**facts, "phase": phase, "floor_s": least}
            session.report.add(
                [{**common, **row, **_figures(row, rows, work, least)} for row in rows],
                "phase",
                "rival",
            )


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Keep this many cores busy with other processes."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ops_cases(device: torch.device, quick: bool) -> list[Case]:
    """List what is timed, the most important first."""

    def case(op: str, name: str, B: int | None = None, precision: str = "fp32") -> Case:
        B = B or batch_size(name, device, quick)
        return Case(op, SHAPES[name], B, precision=precision, name=name)

    # At B = 64, the first layer of the big network has 1.4 GB of votes. Eager needs ten times that.
    small, big = (64, 64) if device.type == "cuda" else (64, 8)
    first_layers = [("small-conv1", small), ("big-conv1", big)]
    layers = {
        "em_routing": [folded_case(name, B, r) for name, B in first_layers for r in (2, 3)],
        "conv_em_routing": [
            *(matrix_case(name, B, 2) for name, B in first_layers),
            matrix_case("small-conv1", small, 2, competition="position"),
        ],
        "conv_dynamic_routing": [conv_case(big)],
    }
    if quick:
        return [case(MAIN, "mnist"), *(case(op, "tiny") for op in operator_names())]
    return [
        case(MAIN, "mnist"),
        *(case(MAIN, "mnist", B=B) for B in (1, 8, 256)),
        case(MAIN, "mnist", precision="bf16"),
        *(case(MAIN, name) for name in SHAPES if name not in ("mnist", "large")),
        *(case(op, "mnist") for op in operator_names() if op != MAIN and op not in layers),
        *layers["em_routing"],
        *layers["conv_em_routing"],
        *layers["conv_dynamic_routing"],
    ]


def checked_rivals(
    case: Case, names: list[str], device: torch.device
) -> tuple[dict[str, Rival], list[Row]]:
    """Build the rivals whose results are right. Return them, and a row for each of the others."""
    rivals: dict[str, Rival] = {}
    left_out: list[Row] = []
    try:
        oracle = Oracle(case, device)
    except Exception as error:
        return {}, [{"left_out": f"nothing to compare with: {reason(error)}"}]
    for name in names:
        try:
            rival = op_rival(name, case, device)
            oracle.check(rival)
            rivals[name] = rival
        except Exception as error:  # the other rivals go on
            left_out.append({"rival": name, "left_out": reason(error)})
    return rivals, left_out


def phase_task(
    rival: Rival, phase: str, sets: list[dict[str, Tensor]], output_grads: dict[str, Tensor]
) -> Task:
    """Make a task of one phase: each run calls the rival once on each of the input sets."""
    grads = list(output_grads.values())
    leaves = [{n: t.detach().requires_grad_() for n, t in inputs.items()} for inputs in sets]
    wanted = [list(inputs.values()) for inputs in leaves]

    def infer(_: Any) -> None:
        with torch.no_grad():
            for inputs in sets:
                rival(**inputs)

    def build(_: Any = None) -> list[tuple[Tensor, ...]]:
        return [rival(**inputs) for inputs in leaves]

    def differentiate(results: list[tuple[Tensor, ...]]) -> None:
        for outputs, inputs in zip(results, wanted, strict=True):
            torch.autograd.grad(outputs, inputs, grads)

    def both(_: Any) -> None:
        for inputs, inputs_wanted in zip(leaves, wanted, strict=True):
            torch.autograd.grad(rival(**inputs), inputs_wanted, grads)

    calls = len(sets)
    if phase == "forward":
        return Task(infer, calls=calls)
    return Task(differentiate, build, calls) if phase == "backward" else Task(both, calls=calls)


def input_sets(case: Case, phase: str, device: torch.device) -> list[dict[str, Tensor]]:
    """Draw enough sets of inputs that the last cache has lost each by the time its turn returns.

    There are at most 16 sets: inputs smaller than a sixteenth of the cache stay there in a network
    too. On a CPU, `backward` has one set. Building its graph just before has gone through the
    cache, and the graphs of all sets would fill the memory.
    """
    first = case.arguments(device)
    if phase == "backward" and device.type == "cpu":
        return [first]
    cache = last_cache_bytes(device)
    number = math.ceil(2 * cache / sum(tensor.nbytes for tensor in first.values()))
    return [first, *(case.arguments(device, seed) for seed in range(1, min(number, 16)))]


def last_cache_bytes(device: torch.device) -> int:
    """The size of the last cache before memory: a GPU's level 2, a CPU's level 3."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        for index in _CACHES.glob("index*"):
            if (index / "level").read_text().strip() == "3":
                size = (index / "size").read_text().strip().removesuffix("K")
                return (int(size) << 10) or _DEFAULT_CACHE_BYTES
    except (OSError, ValueError):
        pass
    return _DEFAULT_CACHE_BYTES


def time_phase(session: Session, case: Case, rivals: dict[str, Rival], phase: str) -> list[Row]:
    """Time one phase side by side. Each rival gets a row: its timing, or why it has none."""
    sets = input_sets(case, phase, session.device)[: 2 if session.quick else None]
    grads = case.output_gradients(session.device)
    clock = clock_for(session.device)
    rows: list[Row] = []
    tasks: dict[str, Task] = {}
    is_launch_bound = False
    for name, rival in rivals.items():
        task = phase_task(rival, phase, sets, grads)
        try:
            is_launch_bound |= clock.seconds(task) < _LAUNCH_BOUND * task.calls
            tasks[name] = task
        except Exception as error:  # memory may run out
            rows.append({"rival": name, "left_out": reason(error)})
    method = "calls"
    if session.device.type == "cuda" and is_launch_bound:
        method, tasks = "graph", _replayable(tasks, rows)
    timings = session.time(tasks, seconds=5.0)
    return rows + [{"rival": n, "method": method, **timed(t)} for n, t in timings.items()]


def _figures(row: Row, rows: list[Row], work: Floor, least: float) -> Row:
    """Compute the figures that follow from a row's time, the eager form's time and the floor."""
    if "median_s" not in row:
        return {}
    median = row["median_s"]
    figures = {
        "bytes_per_second": work.bytes / median,
        "flops_per_second": work.flops / median if work.flops else None,
        "share_of_floor": least / median,
    }
    eager = [row["median_s"] for row in rows if row["rival"] == "eager" and "median_s" in row]
    return figures | ({"speedup": eager[0] / median} if eager else {})


def _replayable(tasks: dict[str, Task], left_out: list[Row]) -> dict[str, Task]:
    replays = {}
    for name, task in tasks.items():
        try:
            replays[name] = replayed(task)
        except Exception as error:  # the other rivals go on
            left_out.append({"rival": name, "left_out": reason(error)})
    return replays
