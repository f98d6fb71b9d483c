"""The run that a benchmark belongs to: its device, its report, its time."""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.report import Report, Row
from benchmarks.timing import Task, Timing, clock_for, time_alternately


@dataclass(frozen=True)
class Session:
    """What all benchmarks of a run share.

    Attributes:
        device: where everything runs.
        quick: make only a few calls of everything, to show that it works. Nothing is measured.
        report: takes the rows.
        end: the time, by `time.monotonic`, after which nothing new starts.
        only: a text in the names of the cases to measure.
    """

    device: torch.device
    quick: bool
    report: Report
    end: float = math.inf
    only: str = ""

    def is_over(self) -> bool:
        """Whether the time for this benchmark is used up."""
        return time.monotonic() >= self.end

    def has_bf16(self) -> bool:
        """Whether the device multiplies bfloat16. If a processor does not say, it is taken to."""
        if self.device.type != "cpu":
            return True
        # Torch 2.10 has no public function for this. Only x86 has such entries.
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(capabilities.get(name, True) for name in ("avx512_bf16", "amx_bf16"))

    def time(self, tasks: dict[str, Task], seconds: float) -> dict[str, Timing]:
        """Time tasks in turn, for about `seconds` on a CPU and a tenth of that on a GPU."""
        seconds = 0.0 if self.quick else seconds / (10 if self.device.type == "cuda" else 1)
        rounds = (2, 3) if self.quick else (5, 100)
        return time_alternately(tasks, clock_for(self.device), rounds=rounds, seconds=seconds)


def reason(error: Exception) -> str:
    """Write an error on one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else repr(error)


def timed(timing: Timing) -> Row:
    """Return the figures of a timing by name."""
    return {f"{name}_s": value for name, value in asdict(timing).items() if name != "samples"} | {
        "samples": timing.samples
    }


def axes(case: Case) -> Row:
    """Return the sizes of a case by name."""
    iterations = {"iterations": case.iterations} if case.iterations else {}
    return {
        "op": case.op,
        **case.shape._asdict(),
        "B": case.B,
        **iterations,
        "precision": case.precision,
    }
