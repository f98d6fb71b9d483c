"""First calls of the operators that the other benchmarks time.

A kernel or a compiled rival is compiled when it is first called. One after the other, these calls
would take most of a short run. Here processes on all cores make the first calls in parallel. The
other benchmarks then find the code in the caches of Triton and inductor on disk.
"""

import multiprocessing
import os
import time
from functools import partial

import torch

from benchmarks.cases import Case
from benchmarks.launch import launch_cases
from benchmarks.memory import grid, memory_cases
from benchmarks.operators import check_cases, ops_cases
from benchmarks.oracle import gradients
from benchmarks.report import NO_TIME, Row
from benchmarks.rivals import op_rival, ours
from benchmarks.scaling import sweeps, swept_case
from benchmarks.session import Session, reason

# Each process holds a context on the device and the tensors of a case.
_MOST_PROCESSES = 14
# Without a given limit, a run gives up after this, because a killed process never answers.
_MOST_SECONDS = 600.0


def run_compile(session: Session) -> None:
    """Compile the operators that the other benchmarks call, on all cores."""
    make_first_calls(session, compiled_calls(session.device, session.quick))


def make_first_calls(session: Session, calls: list["Call"]) -> None:
    """Call each rival once, in processes on all cores. Report how long it took."""
    missing = list(calls)
    end = min(session.end, time.monotonic() + _MOST_SECONDS)
    processes = min(len(calls), os.cpu_count() or 1, _MOST_PROCESSES)
    with multiprocessing.get_context("spawn").Pool(processes, _use_one_core) as pool:
        outcomes = pool.imap_unordered(partial(first_call, session.device), calls)
        while missing:
            try:
                call, outcome = outcomes.next(max(0.0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                break
            missing.remove(call)
            session.report.add([_facts(call) | outcome], "case", "rival")
    why = NO_TIME if session.is_over() else {"left_out": "its process died or hung"}
    session.report.add([_facts(call) | why for call in missing], "case", "rival")


Call = tuple[str, Case]  # a rival, and what it is called with


def compiled_calls(device: torch.device, quick: bool) -> list[Call]:
    """List what the other benchmarks call, in their order, each once."""
    own = ours(device)
    timed = [*ops_cases(device, quick), *memory_cases(device, quick)]
    swept = [
        swept_case(axis, value, device, quick)
        for axis, values in sweeps(device, quick).items()
        for value in values
    ]
    cases = [*timed, *launch_cases(device, quick), *check_cases(device, quick), *swept]
    calls = [(own, case) for case in [*cases, *grid(quick)]]
    if not quick:
        calls += [("compile", case) for case in timed]
    return list(dict.fromkeys(calls))


def first_call(device: torch.device, call: Call) -> tuple[Call, Row]:
    """Call a rival as the benchmarks do. Return how many seconds it took, or what went wrong."""
    rival, case = call
    start = time.monotonic()
    try:
        function, arguments = op_rival(rival, case, device), case.arguments(device)
        gradients(function, arguments, case.output_gradients(device))
        with torch.no_grad():
            function(**arguments)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    except Exception as error:  # a benchmark that needs this call will report the same
        return call, {"left_out": reason(error)}
    return call, {"first_call_s": time.monotonic() - start}


def _facts(call: Call) -> Row:
    rival, case = call
    return {"case": str(case), "rival": rival}


def _use_one_core() -> None:
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
