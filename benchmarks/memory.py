"""Peak memory of the routing: how far a call raises it above what its inputs take.

On a GPU the caching allocator counts (`torch.cuda.max_memory_allocated`). On a CPU the operating
system does. The peak of a process's resident memory (VmHWM) includes everything that a machine
needs, even the scratch space of libraries. torch's profiler only sees tensors. The process is a new
one, so the figure includes no memory of other benchmarks. In it, glibc returns freed memory at
once. Otherwise the call could reuse memory of the warm-up, unnoticed. `ru_maxrss` would not do,
because a new process inherits it from its parent.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch

from benchmarks.cases import MAIN, MATRIX_LAYERS, SHAPES, Case, Shape, batch_size, matrix_case
from benchmarks.oracle import gradients
from benchmarks.report import NO_TIME, Row
from benchmarks.rivals import backend, op_rival, ours, rival_names
from benchmarks.session import Session, axes, reason
from tritoncaps._torch_path import accumulation_dtype
from tritoncaps._torch_path._passes import slices_for
from tritoncaps._torch_path._slices import length

_RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_STATUS = Path("/proc/self/status")


def run_memory(session: Session) -> None:
    """Measure how far forward + backward of the routing raise the peak of memory."""
    for case in memory_cases(session.device, session.quick):
        print(case, flush=True)
        u_hat_bytes = case.B * case.votes * case.dtype.itemsize
        for rival in rival_names(case, session.device):
            if session.quick and rival == "compile":
                continue
            row: Row = {"case": str(case), "shape": case.name, **axes(case), "rival": rival}
            if session.is_over():
                session.report.add([row | NO_TIME], "rival")
                continue
            try:
                (peak,) = peaks([case], rival, session.device)
                row |= {"u_hat_bytes": u_hat_bytes, "peak_bytes": peak}
            except Exception as error:  # it may need more than the machine has
                row |= {"left_out": reason(error)}
            session.report.add([row], "rival")


def memory_cases(device: torch.device, quick: bool) -> list[Case]:
    """List what `run_memory` measures."""
    names = ("mnist",) if quick else ("mnist", "cifar", "classes100", "large")
    batches = {name: 64 if name == "large" else batch_size(name, device, quick) for name in names}
    routings = [Case(MAIN, SHAPES[name], batches[name], name=name) for name in names]
    if quick:
        return [*routings, matrix_case("small-class", 4, 3)]
    # Plain torch keeps ten times the votes. On a CPU the big network has a smaller batch.
    layers = [
        matrix_case(name, 8 if name.startswith("big") and device.type == "cpu" else 64, 3)
        for name in MATRIX_LAYERS
    ]
    return [*routings, *layers]


def run_memory_grid(session: Session) -> None:
    """Measure how the peaks of the routing grow with I and J, forward alone and with backward."""
    cases = grid(session.quick)
    for rival in ("eager", ours(session.device)):
        for phase in ("both", "forward"):  # the more important one first
            rows: list[Row] = [
                {"case": str(case), **axes(case), "phase": phase, "rival": rival} for case in cases
            ]
            found: list[Row] = [NO_TIME] * len(cases)
            if not session.is_over():
                try:
                    measured = peaks(cases, rival, session.device, phase)
                    found = [{"peak_bytes": peak} for peak in measured]
                except Exception as error:  # it may need more than the machine has
                    found = [{"left_out": reason(error)}] * len(cases)
            for row, case, figures in zip(rows, cases, found, strict=True):
                row |= {"u_hat_bytes": _bytes_of(case)["u_hat"], **figures}
                of = backend(case, session.device)
                if rival != "eager" and not of.startswith("native"):
                    row["formula_bytes"] = formula_bytes(case, rival, phase, session.device)
            session.report.add(rows, "I", "J", "B", "phase", "rival")


def grid(quick: bool) -> list[Case]:
    """List the routings of the grid: capsule counts around MNIST's, with two batch sizes."""
    sizes, P, D = (((32, 64), (2, 4)), 4, 4) if quick else (((288, 1152, 4608), (10, 40)), 8, 16)
    return [Case(MAIN, Shape(I, P, J, D), B) for B in (64, 1) for I in sizes[0] for J in sizes[1]]


def _bytes_of(case: Case) -> dict[str, int]:
    """Sizes in bytes of the tensors of a routing, in the accumulation type."""
    (I, P, J, D), B = case.shape, case.B
    values = {"u": B * I * P, "weight": I * P * J * D, "u_hat": B * I * J * D, "v": B * J * D}
    width = accumulation_dtype(case.dtype).itemsize
    return {name: count * width for name, count in values.items()}


def formula_bytes(case: Case, rival: str, phase: str, device: torch.device) -> int:
    """Add up what torch or Triton holds at its peak beyond the inputs, with gradient="full".

    - Both paths keep r weighted sums of the size of v and a few more such tensors. The backward
      also keeps V and ds of each iteration, and the gradients of u and the weight.
    - The torch path adds the prediction vectors of n input capsules with 3 coefficients for each,
      and in the backward, with 3r, as much again for their gradients.
    - The kernels add at most 16 slots of each kind. In the backward they add 2·(r − 1) values for
      each pair of image and input capsule.
    """
    size, r = _bytes_of(case), case.iterations
    forward = phase == "forward"
    saved = (r + 3 if forward else 3 * r) * size["v"]
    gradients_ = 0 if forward else size["u"] + size["weight"]
    if rival == "triton":
        slots = (3 if forward else 4) * 16 * size["v"]
        pairs = 0 if forward else 2 * (r - 1) * size["u"] // case.shape.P
        return saved + gradients_ + slots + pairs
    like = torch.empty(0, dtype=accumulation_dtype(case.dtype), device=device)
    (I, _, J, D), passes = case.shape, 1 if forward else r
    n = length(slices_for((case.B, I, J, D), passes, like)[0])
    of_a_slice = n * (D + 3 * passes) * size["v"] // D
    return saved + gradients_ + (1 if forward else 2) * of_a_slice


def peaks(cases: list[Case], rival: str, device: torch.device, phase: str = "both") -> list[int]:
    """Measure cases in one process, in bytes beyond what is in use before the call.

    Gradients count, inputs do not. The phase is "both", or "forward" without autograd.

    Raises:
        OSError: a CPU without Linux's /proc.
        BrokenExecutor: the process was killed, which happens when memory runs out.
    """
    if device.type == "cuda":
        return [_peak(case, rival, device, phase) for case in cases]
    if not _STATUS.exists():
        raise OSError("the peak of a process is read from /proc, which this system does not have")
    threads = torch.get_num_threads()
    with (
        mock.patch.dict(os.environ, _RETURN_AT_ONCE),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(_peaks_of_this_process, cases, rival, threads, phase).result()


def _peaks_of_this_process(cases: list[Case], rival: str, threads: int, phase: str) -> list[int]:
    torch.set_num_threads(threads)
    return [_peak(case, rival, torch.device("cpu"), phase) for case in cases]


def _peak(case: Case, rival: str, device: torch.device, phase: str) -> int:
    arguments, grads = case.arguments(device), case.output_gradients(device)
    function = op_rival(rival, case, device)

    def call() -> None:
        if phase == "both":
            gradients(function, arguments, grads)
        else:
            with torch.no_grad():
                function(**arguments)

    call()  # loads libraries, compiles
    before = _start(device)
    call()
    # A rise smaller than the accuracy of the system's count may come out negative.
    return max(0, _highest(device) - before)


def _start(device: torch.device) -> int:
    """Reset the peak and return the memory in use."""
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
