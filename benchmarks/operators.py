"""The operators one by one: are they right (`check`), and how fast are they (`ops`)?"""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OPS, SHAPES, Case, batch_size
from benchmarks.oracle import Oracle
from benchmarks.report import NO_TIME, Row
from benchmarks.rivals import Rival, op_rival, ours, rival_names
from benchmarks.roofline import Floor, floor, measure_ceilings
from benchmarks.session import Session, axes, reason, timed
from benchmarks.timing import Task, clock_for, replayed
from tritoncaps._torch_path._slices import cache_bytes

PHASES = ("forward", "backward", "both")
# Calls shorter than this are replayed from a CUDA graph: launching them may take longer.
_LAUNCH_BOUND = 1e-3


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
            rival = op_rival(ours(session.device), case, session.device)
            shares = oracle.check(rival)
            worst = max(shares, key=lambda name: shares[name])
            row |= {"tensor": worst, "share_of_allowed": shares[worst]}
        except Exception as error:  # whatever it is, the other cases go on
            row |= {"left_out": reason(error)}
        session.report.add([row], "tensor")


def check_cases(device: torch.device, quick: bool) -> Iterable[Case]:
    """List what is checked, the most important first."""
    names = ("tiny", "second") if quick else [name for name in SHAPES if name != "large"]

    def case(op: str, name: str, **more: Any) -> Case:
        B = min(batch_size(name, device, quick), 32)
        return Case(op, SHAPES[name], B, name=name, **more)

    yield from (case(op, name) for op in OPS for name in names)
    for precision in ("bf16", "fp16", "fp64"):
        yield from (case(op, names[0], precision=precision) for op in OPS)
    for op in ("fused_dynamic_routing", "dynamic_routing"):
        yield from (case(op, names[0], iterations=r) for r in (1, 2, 5))
        yield case(op, names[0], with_prior=True)
        yield case(op, names[0], gradient="last")


# Operators ----------------------------------------------------------------------------------------


def run_ops(session: Session) -> None:
    """Time each operator forward, backward and both, beside its rivals."""
    ceilings = measure_ceilings(session.device, clock_for(session.device), ["fp32", "bf16"])
    session.report.note(ceilings=asdict(ceilings))
    for number, case in enumerate(ops_cases(session.device, session.quick)):
        print(case, flush=True)
        facts: Row = {"case": str(case), "shape": case.name, **axes(case)}
        names = rival_names(case.op, session.device)
        if session.quick and number > 0:  # once is enough: it takes half a minute of C++ compiler
            names = [name for name in names if name != "compile"]
        if session.is_over():
            session.report.add([facts | NO_TIME], "rival")
            continue
        rivals, left_out = checked_rivals(case, names, session.device)
        session.report.add([facts | row for row in left_out], "rival")
        for phase in PHASES:
            rows = time_phase(session, case, rivals, phase)
            work = floor(case, phase)
            least = ceilings.seconds(work, case.precision)
            common = {**facts, "phase": phase, "floor_s": least}
            session.report.add(
                [{**common, **row, **_figures(row, rows, work, least)} for row in rows],
                "phase",
                "rival",
            )


def ops_cases(device: torch.device, quick: bool) -> list[Case]:
    """List what is timed, the most important first."""

    def case(op: str, name: str, **more: Any) -> Case:
        return Case(
            op, SHAPES[name], **{"B": batch_size(name, device, quick), "name": name, **more}
        )

    if quick:
        return [case(OPS[0], "mnist"), *(case(op, "tiny") for op in OPS)]
    names = [name for name in SHAPES if name not in ("mnist", "large")]
    return [
        case(OPS[0], "mnist"),
        case(OPS[0], "mnist", B=1),
        case(OPS[0], "mnist", precision="bf16"),
        *(case(OPS[0], name) for name in names),
        *(case(op, "mnist") for op in OPS[1:]),
    ]


def checked_rivals(
    case: Case, names: list[str], device: torch.device
) -> tuple[dict[str, Rival], list[Row]]:
    """Build the rivals whose results are right, and a row for each of the others."""
    rivals: dict[str, Rival] = {}
    left_out: list[Row] = []
    try:
        oracle = Oracle(case, device)
    except Exception as error:
        return {}, [{"left_out": f"no measuring stick: {reason(error)}"}]
    for name in names:
        try:
            rival = op_rival(name, case, device)
            oracle.check(rival)
            rivals[name] = rival
        except Exception as error:  # a wrong or failing rival does not stop the others
            left_out.append({"rival": name, "left_out": reason(error)})
    return rivals, left_out


def phase_task(rival: Rival, phase: str, input_sets: list[dict[str, Tensor]], grad: Tensor) -> Task:
    """Make a task of one phase: every run calls the rival once on each of the input sets."""
    leaves = [
        {n: t.detach().requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()}
        for inputs in input_sets
    ]
    wanted = [[t for t in inputs.values() if t.requires_grad] for inputs in leaves]

    def infer(_: Any) -> None:
        with torch.no_grad():
            for inputs in input_sets:
                rival(**inputs)

    def build(_: Any = None) -> list[Tensor]:
        return [rival(**inputs) for inputs in leaves]

    def differentiate(outputs: list[Tensor]) -> None:
        for output, inputs in zip(outputs, wanted, strict=True):
            torch.autograd.grad(output, inputs, grad)

    def both(_: Any) -> None:
        for inputs, inputs_wanted in zip(leaves, wanted, strict=True):
            torch.autograd.grad(rival(**inputs), inputs_wanted, grad)

    calls = len(input_sets)
    if phase == "forward":
        return Task(infer, calls=calls)
    return Task(differentiate, build, calls) if phase == "backward" else Task(both, calls=calls)


def input_sets(case: Case, phase: str, device: torch.device) -> list[dict[str, Tensor]]:
    """Draw so many sets of inputs that the last cache holds none when its turn comes.

    At most 16; what is smaller than a sixteenth of the cache stays there in a network as well. The
    backward alone has one set on a CPU: its graph, built just before, goes through the cache, and
    those of all sets would fill the memory.
    """
    first = case.arguments(device)
    if phase == "backward" and device.type == "cpu":
        return [first]
    cache = last_cache_bytes(device)
    number = math.ceil(2 * cache / sum(tensor.nbytes for tensor in first.values()))
    return [first, *(case.arguments(device, seed) for seed in range(1, min(number, 16)))]


def last_cache_bytes(device: torch.device) -> int:
    """Size of the cache before the memory: a GPU's level 2, a CPU's level 3."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return cache_bytes(3)


def time_phase(session: Session, case: Case, rivals: dict[str, Rival], phase: str) -> list[Row]:
    """Time one phase side by side; a row a rival, with its timing or why it has none."""
    inputs, grad = input_sets(case, phase, session.device), case.output_gradient(session.device)
    clock = clock_for(session.device)
    rows: list[Row] = []
    tasks: dict[str, Task] = {}
    is_launch_bound = False
    for name, rival in rivals.items():
        task = phase_task(rival, phase, inputs, grad)
        try:
            is_launch_bound |= clock.seconds(task) < _LAUNCH_BOUND * task.calls
            tasks[name] = task
        except Exception as error:  # as where memory runs out
            rows.append({"rival": name, "left_out": reason(error)})
    method = "calls"
    if session.device.type == "cuda" and is_launch_bound:
        method, tasks = "graph", _replayable(tasks, rows)
    timings = session.time(tasks, seconds=5.0)
    return rows + [{"rival": n, "method": method, **timed(t)} for n, t in timings.items()]


def _figures(row: Row, rows: list[Row], work: Floor, least: float) -> Row:
    """What follows from a row's time, the eager one's, and the floor's work and seconds."""
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
        except Exception as error:  # what cannot be captured does not stop the others
            left_out.append({"rival": name, "left_out": reason(error)})
    return replays
