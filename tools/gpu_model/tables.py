"""The tables of docs/gpu-model.md: what is in them, how they are written, read and compared."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import Case, Shape
from benchmarks.roofline import floor
from tools.gpu_model.launches import (
    BATCH,
    MATRICES,
    ON_VECTORS,
    SHAPES,
    TARGETS,
    Recording,
    record,
    record_matrices,
)
from tools.gpu_model.machine import MACHINES
from tools.gpu_model.prediction import Factors, Predicted, measure_programs, predict
from tools.gpu_model.rival import matrices_bytes, rival_bytes
from tools.gpu_model.sass import CLASSES
from tritoncaps.testing import OPERATORS

# By precision: the dtype, and what torch allows products of float32.
PRECISIONS = {
    "highest": (torch.float32, "highest"),
    "high": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
}


@dataclass(frozen=True)
class Section:
    """One target, precision and operator: a table of calls, and one of launches for each shape."""

    target: str
    precision: str
    operator: str
    shapes: tuple[str, ...]
    detailed: tuple[str, ...] | None = None  # the shapes whose launches are shown; None for all

    @property
    def title(self) -> str:
        """The heading of the section."""
        kind = self.precision if self.precision == "bf16" else f"fp32 {self.precision}"
        return f"{self.operator}, {self.target} ({MACHINES[self.target].name}), {kind}"


_MAIN = "fused_dynamic_routing"
_FEW = ("MNIST", "second stage")
PAGE_SECTIONS = (
    Section("sm90", "highest", _MAIN, tuple(SHAPES), (*_FEW, "100 classes")),
    Section("sm90", "high", _MAIN, _FEW, ("MNIST",)),
    Section("sm90", "bf16", _MAIN, _FEW, ("MNIST",)),
    Section("sm80", "highest", _MAIN, _FEW, ("MNIST",)),
    Section("sm100", "highest", _MAIN, _FEW, ("MNIST",)),
    *(Section("sm90", "highest", name, ("MNIST",)) for name in ON_VECTORS if name != _MAIN),
    Section("sm90", "highest", "em_routing", ("big-conv1",)),
)

_CALLS = (
    "shape", "launches", "forward µs", "floor", "rival",
    "both launches", "both µs", "both floor", "both rival", "scratch MB",
)  # fmt: skip
_KINDS = [kind for kind in CLASSES if kind != "stack"]
_LAUNCHES = (
    "kernel", "registers", "stack", "shared", "programs", "waves", "instructions", *_KINDS,
    "L2 MB", "memory MB", "throughput µs", "latency µs", "predicted µs",
)  # fmt: skip


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Let torch multiply float32 as `torch.set_float32_matmul_precision` allows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def predict_section(
    section: Section, apply: Callable[..., Any] = map, factors: Factors | None = None
) -> dict[str, tuple[Recording, list[Predicted], list[Predicted]]]:
    """Predict the calls of a section: by shape, the recording and its steps, forward and both."""
    machine = MACHINES[section.target]
    dtype, of_products = PRECISIONS[section.precision]
    with products_in(of_products):
        operator, target = OPERATORS[section.operator], TARGETS[section.target][1]
        recordings = {
            name: record_matrices(MATRICES[name], dtype, target)
            if name in MATRICES
            else record(operator, SHAPES[name], dtype, target)
            for name in section.shapes
        }
        programs = measure_programs(recordings.values(), section.target, apply)
    is_float32 = section.precision == "highest"
    found = {}
    for name, recording in recordings.items():
        both = predict(
            (*recording.forward, *recording.backward), programs, machine,
            is_float32=is_float32, factors=factors,
        )  # fmt: skip
        found[name] = recording, both[: len(recording.forward)], both
    return found


def write_section(
    section: Section, apply: Callable[..., Any] = map, factors: Factors | None = None
) -> str:
    """Predict a section and write it as Markdown."""
    found = predict_section(section, apply, factors)
    calls = [
        _call_row(section, name, recording, forward, both)
        for name, (recording, forward, both) in found.items()
    ]
    parts = [f"### {section.title}\n", _table(_CALLS, calls)]
    for name, (_, forward, both) in found.items():
        if section.detailed is None or name in section.detailed:
            rows = [_launch_row(step) for step in both]
            backward = [_HALF, *[""] * (len(_LAUNCHES) - 1)]
            parts += [
                f"{name}:\n",
                _table(_LAUNCHES, [*rows[: len(forward)], backward, *rows[len(forward) :]]),
            ]
    return "\n".join(parts)


_HALF = "*backward*"


def _call_row(
    section: Section,
    shape: str,
    recording: Recording,
    forward: Sequence[Predicted],
    both: Sequence[Predicted],
) -> list[str]:
    rate = MACHINES[section.target].memory_rate
    row = [shape]
    for phase, steps in (("forward", forward), ("both", both)):
        least, rival = _least_bytes(section, shape, phase)
        row += [
            str(len(steps)),
            _micro(sum(step.seconds for step in steps)),
            _micro(least / rate),
            _micro(rival / rate) if rival else "",
        ]
    return [*row, _mega(recording.scratch_bytes)]


def _least_bytes(section: Section, shape: str, phase: str) -> tuple[int, int]:
    """The bytes that a phase of a call moves at least, and those of its rival."""
    operator, is_both = OPERATORS[section.operator], phase == "both"
    dtype = PRECISIONS[section.precision][0]
    if shape in MATRICES:
        return matrices_bytes(operator, MATRICES[shape].sizes, dtype, backward=is_both)
    precision = "bf16" if section.precision == "bf16" else "fp32"
    case = Case(section.operator, Shape(*SHAPES[shape]), BATCH, precision=precision)
    return floor(case, phase).bytes, rival_bytes(operator, case.sizes, dtype, backward=is_both)


def _launch_row(step: Predicted) -> list[str]:
    times = [
        _mega(step.level2_bytes),
        _mega(step.memory_bytes),
        _micro(step.throughput),
        _micro(step.latency),
        _micro(step.seconds),
    ]
    name = f"`{step.name}`"
    if step.program is None:
        return [name, *[""] * (len(_LAUNCHES) - 1 - len(times)), *times]
    taken, counts = step.program.footprint, step.program.instructions
    return [
        name,
        *map(str, (taken.registers, taken.stack, taken.shared_memory, step.programs)),
        f"{step.waves:.2f}",
        str(sum(counts.values())),
        *(str(counts.get(kind, 0)) for kind in _KINDS),
        *times,
    ]


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def _mega(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# Reading ------------------------------------------------------------------------------------------

Tables = Mapping[str, Mapping[str, list[list[str]]]]  # by section and caption; "" for the calls


def read_sections(page: str) -> Tables:
    """Read the tables of a page, without their headings."""
    found: dict[str, dict[str, list[list[str]]]] = {}
    title = caption = ""
    for line in page.splitlines():
        if line.startswith("### "):
            title, caption = line[4:], ""
        elif re.fullmatch(r"[\w -]+:", line):
            caption = line[:-1]
        elif line.startswith("|") and title:
            cells = [cell.strip() for cell in line.strip("|\n").split("|")]
            found.setdefault(title, {}).setdefault(caption, []).append(cells)
    return found


def triton_version(page: str) -> str:
    """The version of Triton that a page was made with."""
    found = re.search(r"^Triton ([\d.]+)", page, re.M)
    if found is None:
        raise ValueError("the page names no version of Triton")
    return found[1]


def differences(expected: Tables, actual: Tables, *, tolerance: float = 0.05) -> list[str]:
    """Where two readings differ, a line for each number that is off by more than the tolerance."""
    found = []
    for title, tables in actual.items():
        for caption, rows in tables.items():
            of_page = expected.get(title, {}).get(caption, [])
            where = f"{title}, {caption or 'calls'}"
            if [row[0] for row in rows] != [row[0] for row in of_page]:
                found.append(f"{where}: other rows: {[row[0] for row in rows]}")
                continue
            for before, now in zip(of_page, rows, strict=True):
                for column, old, new in zip(rows[0], before, now, strict=True):
                    if not _is_close(old, new, tolerance):
                        found.append(f"{where}: {now[0]}: {column} was {old}, is {new}")
    return found


def _is_close(old: str, new: str, tolerance: float) -> bool:
    """Whether two cells agree: as text, or as numbers but for the tolerance and one last digit."""
    try:
        before, now = float(old), float(new)
    except ValueError:
        return old == new
    digit = 10.0 ** -len(old.partition(".")[2])
    return abs(now - before) <= tolerance * abs(before) + digit
