"""Peak memory of forward + backward: by how much a call raises it over its inputs.

On a GPU the caching allocator counts (`torch.cuda.max_memory_allocated`). On a CPU the kernel
does: the peak of a process's resident memory (VmHWM), which sees everything a machine has to have,
the scratch space of the libraries included, while torch's own profiler sees tensors alone. A fresh
process measures, so that no other benchmark's memory is in the figure. It has glibc return what is
freed at once; otherwise a warm-up leaves memory behind that the call then takes unseen. `ru_maxrss`
would not do: a new process inherits it from the one that started it.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch

from benchmarks.cases import SHAPES, Case, batch_size
from benchmarks.oracle import gradients
from benchmarks.report import NO_TIME, Row
from benchmarks.rivals import op_rival, rival_names
from benchmarks.session import Session, axes, reason

_RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_STATUS = Path("/proc/self/status")


def run_memory(session: Session) -> None:
    """Measure by how much forward + backward of the routing raises the peak of memory."""
    names = ("mnist",) if session.quick else ("mnist", "cifar", "classes100", "large")
    for name in names:
        B = 64 if name == "large" else batch_size(name, session.device, session.quick)
        case = Case("capsule_routing", SHAPES[name], B, name=name)
        print(case, flush=True)
        u_hat_bytes = B * case.shape.I * case.shape.J * case.shape.D * case.dtype.itemsize
        for rival in rival_names(case.op, session.device):
            if session.quick and rival == "compile":
                continue
            row: Row = {"case": str(case), "shape": name, **axes(case), "rival": rival}
            if session.is_over():
                session.report.add([row | NO_TIME], "rival")
                continue
            try:
                (peak,) = peaks([case], rival, session.device)
                row |= {"u_hat_bytes": u_hat_bytes, "peak_bytes": peak}
            except Exception as error:  # it may need more than the machine has
                row |= {"left_out": reason(error)}
            session.report.add([row], "rival")


def peaks(cases: list[Case], rival: str, device: torch.device) -> list[int]:
    """Measure cases in one process: bytes beyond what is in use before the call.

    The gradients count, the inputs do not.

    Raises:
        OSError: a CPU without Linux's /proc.
        BrokenExecutor: the process was killed, as happens where memory runs out.
    """
    if device.type == "cuda":
        return [_peak(case, rival, device) for case in cases]
    if not _STATUS.exists():
        raise OSError("the peak of a process is read from /proc, which this system does not have")
    threads = torch.get_num_threads()
    with (
        mock.patch.dict(os.environ, _RETURN_AT_ONCE),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(_peaks_of_this_process, cases, rival, threads).result()


def _peaks_of_this_process(cases: list[Case], rival: str, threads: int) -> list[int]:
    torch.set_num_threads(threads)
    return [_peak(case, rival, torch.device("cpu")) for case in cases]


def _peak(case: Case, rival: str, device: torch.device) -> int:
    arguments, grad = case.arguments(device), case.output_gradient(device)
    function = op_rival(rival, case, device)
    gradients(function, arguments, grad)  # loads libraries, compiles
    before = _start(device)
    gradients(function, arguments, grad)
    # What is smaller than the kernel's bookkeeping of pages may come out negative.
    return max(0, _highest(device) - before)


def _start(device: torch.device) -> int:
    """Begin a new peak; returns the memory in use."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _highest(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
