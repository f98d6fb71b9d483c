"""On a GPU: are the kernels right, and are the predictions? Starts nothing new after 270 s.

    python -m tools.check_gpu --output results              # writes results/check_gpu.json
    TRITON_INTERPRET=1 python -m tools.check_gpu --dry      # on a CPU, to see that it runs

1. Every operator against the reference in float64, at twelve shapes: results and gradients. EM
   routing has shapes of its own: the layers of its networks, and sizes that fill no tile.
2. The same bits in twenty runs, in memory that is full of NaN.
3. Each kernel's own time beside its prediction.
4. Whole calls beside the eager and the compiled einsum form, from CUDA graphs, with inputs that
   rotate.

The exit status is 1 if a check fails. The file corrects the model:
`python -m tools.compile_report --factors results/check_gpu.json`.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import (
    MAIN,
    MATRIX_LAYERS,
    SHAPES,
    Case,
    Shape,
    conv_case,
    folded_case,
    matrix_case,
)
from benchmarks.compilation import make_first_calls
from benchmarks.operators import checked_rivals, input_sets, phase_task, time_phase
from benchmarks.oracle import FallbackError, Oracle, WrongResultError
from benchmarks.report import NO_TIME, Report, Row
from benchmarks.rivals import op_rival, ours
from benchmarks.session import Session, reason
from tools.gpu_model.launches import (
    ON_VECTORS,
    TARGETS,
    call_backward,
    call_forward,
    record,
    returned_outputs,
)
from tools.gpu_model.machine import MACHINES
from tools.gpu_model.prediction import Predicted, measure_programs, predict
from tools.gpu_model.tables import products_in
from tritoncaps import kernels
from tritoncaps._operators import INTERPRETED

SECONDS = 270.0  # after this, nothing new starts
RUNS = 20

# (B, shape). Named shapes first, then sizes that fill no tile.
CHECKED = (
    (128, SHAPES["mnist"]),
    (128, SHAPES["second"]),
    (32, SHAPES["cifar"]),
    (32, SHAPES["classes100"]),
    (2, SHAPES["classes1000"]),
    (128, SHAPES["tiny"]),
    (1, SHAPES["mnist"]),
    (33, Shape(77, 8, 10, 16)),
    (17, Shape(19, 3, 17, 5)),
    (3, Shape(1, 1, 1, 1)),
    (5, Shape(200, 16, 33, 32)),
    (130, Shape(1153, 7, 9, 15)),
)
# (B, R, Q, shape) of matrices: sizes that fill no tile, and the most that a thread holds.
CHECKED_MATRICES = (
    (1, 4, 4, Shape(72, 4, 16, 16)),
    (33, 4, 4, Shape(77, 4, 10, 16)),
    (17, 2, 5, Shape(19, 3, 17, 10)),
    (3, 1, 1, Shape(1, 1, 1, 1)),
    (5, 4, 8, Shape(200, 16, 33, 32)),
    (130, 3, 4, Shape(45, 5, 9, 12)),
)
# What a dry run does: three operators, two iterations.
DRY = [
    Case(op, Shape(2, 1, 2, 1), 2, iterations=2, more={"R": 1, "Q": 1})
    for op in ("squash", MAIN, "em_routing")
]
# (name of a shape, precision of the inputs, what torch allows products of float32).
TIMED = (
    ("mnist", "fp32", "highest"),
    ("mnist", "fp32", "high"),
    ("mnist", "bf16", "highest"),
    ("second", "fp32", "highest"),
    ("classes100", "fp32", "highest"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run all checks, and return the exit status."""
    args = parse_arguments(arguments)
    start = time.monotonic()
    device = torch.device("cpu" if args.dry else "cuda")
    report = Report("check_gpu", device, {"dry": args.dry}, args.output)
    session = Session(device, args.dry, report, start + args.seconds)
    cases = checked_cases(args.dry)
    settings = timed_cases(args.dry)
    if not args.dry:
        title("first calls, on all cores", start)
        compile_all(session, cases, [case for case, _ in settings])
    title("results against float64", start)
    check_results(session, cases)
    runs = 2 if args.dry else RUNS
    title(f"the same bits in {runs} runs, in memory full of NaN", start)
    check_bits(session, cases, runs)
    title("each kernel beside its prediction", start)
    report.note(factors=factors_of(time_kernels(session, settings)))
    title("whole calls beside the einsum forms", start)
    time_calls(session, settings)
    failed = [row for row in report.rows if row.get("left_out") not in (None, NO_TIME["left_out"])]
    print(f"\n{report.path}, {time.monotonic() - start:.0f} s, {len(failed)} failed")
    for row in failed:
        print(f"FAILED {row['part']}: {row['case']}: {row['left_out']}")
    return 1 if failed else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line, and see that the device is there."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: a temporary folder")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="start nothing new after")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, interpreted on a CPU")
    args = parser.parse_args(arguments)
    if args.dry and not INTERPRETED:
        parser.error("--dry interprets the kernels: set TRITON_INTERPRET=1")
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --dry runs on a CPU")
    args.output = args.output or Path(tempfile.mkdtemp(prefix="check-gpu-"))
    return args


def title(text: str, start: float) -> None:
    """Print what comes next."""
    print(f"\n== {text} ({time.monotonic() - start:.0f} s)", flush=True)


def checked_cases(dry: bool) -> list[Case]:
    """List what is compared with float64."""
    if dry:
        return DRY
    cases = [Case(op, shape, B) for B, shape in CHECKED for op in ON_VECTORS]
    B, shape = CHECKED[0]
    options = {"return_coupling": True}
    more = [Case(MAIN, shape, B, precision=precision) for precision in ("bf16", "fp16")]
    more += [Case(MAIN, shape, B, chosen=options, optional=("prior",))]
    return [*cases, *more, conv_case(8), *matrix_cases()]


def matrix_cases() -> list[Case]:
    """List the calls of EM routing. The layers of its networks let positions compete, or not."""
    name = next(iter(MATRIX_LAYERS))
    options = {"gradient": "last", "return_assignment": True}
    return [
        *(matrix_case(layer, 8, 3) for layer in MATRIX_LAYERS),
        matrix_case(name, 8, 3, competition="position"),
        *(
            Case("em_routing", shape, B, more={"R": R, "Q": Q})
            for B, R, Q, shape in CHECKED_MATRICES
        ),
        *(replace(folded_case(name, 8, 3), precision=precision) for precision in ("bf16", "fp16")),
        replace(folded_case(name, 8, 3), chosen=options),
    ]


def timed_cases(dry: bool) -> list[tuple[Case, str]]:
    """List what is timed, with the precision of float32 products."""
    if dry:
        return [(DRY[0], "highest")]
    return [
        (Case(MAIN, SHAPES[name], 128, precision=precision, name=name), products)
        for name, precision, products in TIMED
    ]


def compile_all(session: Session, cases: Sequence[Case], timed: Sequence[Case]) -> None:
    """Fill the caches of Triton and inductor."""
    own = ours(session.device)
    calls = [(own, case) for case in (*timed, *cases)] + [("compile", case) for case in timed]
    make_first_calls(session, list(dict.fromkeys(calls)))
    for row in session.report.rows:
        row["part"] = "first call"


# Right --------------------------------------------------------------------------------------------


def check_results(session: Session, cases: Sequence[Case]) -> None:
    """Compare results and gradients with the reference in float64, by the 2x rule."""
    for case in cases:
        row: Row = {"part": "results", "case": str(case)}
        if session.is_over():
            session.report.add([row | NO_TIME], "case")
            continue
        names: list[tuple[str, float]] = []
        try:
            oracle = Oracle(case, session.device)
            with launches(session.device) as names:
                errors = oracle.check(op_rival(ours(session.device), case, session.device))
            worst = max(errors, key=lambda name: errors[name])
            row |= {"tensor": worst, "error": errors[worst]}
            row |= {"eager_error": oracle.relative_error(worst)}
        except (WrongResultError, FallbackError) as error:
            launched = ", ".join(dict.fromkeys(name for name, _ in names))
            row |= {"left_out": f"{reason(error)} (kernels: {launched})"}
        except Exception as error:  # the other cases continue
            row |= {"left_out": reason(error)}
        session.report.add([row], "case", "tensor")


class Poison(TorchDispatchMode):
    """Fills memory that nobody has written yet with NaN."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Fill what an allocating operator returns."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("empty", "empty_like", "new_empty") and result.is_floating_point():
            result.fill_(math.nan)
        return result


def check_bits(session: Session, cases: Sequence[Case], runs: int) -> None:
    """Call both launchers again and again. Every result has the same bits and no NaN."""
    for case in cases:
        row: Row = {"part": "bits", "case": str(case)}
        if session.is_over():
            session.report.add([row | NO_TIME], "case")
            continue
        try:
            with launches(session.device) as names:
                first = _poisoned(case, session.device)
                for number in range(1, runs):
                    _compare(first, _poisoned(case, session.device), number)
            row |= {"runs": runs, "launches": len(names) // runs}
        except Exception as error:  # the other cases continue
            row |= {"left_out": reason(error)}
        session.report.add([row], "case")


def _poisoned(case: Case, device: torch.device) -> dict[str, Tensor]:
    """The outputs and gradients of a call whose memory starts as NaN."""
    options = case.options
    operator = case.operator
    with Poison():
        given, outputs = call_forward(operator, case.arguments(device), options)
        grads = call_backward(operator, given)
    # What is saved for the backward is not a result, and need not be written in full.
    named = returned_outputs(operator, outputs, options)
    # A launcher has no gradient of an input that only the function has.
    inputs = [name.removesuffix("?") for name in operator.registered.inputs]
    named |= {f"grad_{n}": g for n, g in zip(inputs, grads, strict=True) if g is not None}
    for name, tensor in named.items():
        if not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise WrongResultError(f"{name}: {count} values are not finite in poisoned memory")
    return named


def _compare(first: Mapping[str, Tensor], other: Mapping[str, Tensor], number: int) -> None:
    for name, tensor in first.items():
        if not torch.equal(tensor, other[name]):
            error = (tensor.double() - other[name].double()).abs().max().item()
            raise WrongResultError(
                f"{name}: run {number} differs from the first by {error:.3g}, the bound is 0"
            )


@contextmanager
def launches(device: torch.device) -> Iterator[list[tuple[str, float]]]:
    """Collect the name of each kernel that is launched inside, and its time if it is interpreted.

    On a GPU, a launch returns before the kernel has run, so the time means nothing.
    """
    launched: list[tuple[str, float]] = []
    kernel_type = type(kernels.squash._squash_fwd_kernel)
    run = kernel_type.run

    def watched(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = run(kernel, *args, **kwargs)
        launched.append((kernel.fn.__name__, time.perf_counter() - start))
        return result

    with mock.patch.object(kernel_type, "run", watched):
        yield launched


# Fast ---------------------------------------------------------------------------------------------

Pairs = dict[str, list[tuple[float, float]]]  # by kernel: measured and predicted seconds


def time_kernels(session: Session, settings: Sequence[tuple[Case, str]]) -> Pairs:
    """Time each kernel of a forward and a backward, and predict it."""
    pairs: Pairs = {}
    for case, products in settings:
        facts: Row = {"part": "kernels", "case": f"{case} {products}"}
        if session.is_over():
            session.report.add([facts | NO_TIME], "case")
            continue
        try:
            with products_in(products):
                measured = kernel_seconds(session, case)
                predicted = predicted_seconds(case, products, target_of(session.device))
        except Exception as error:  # the other cases continue
            session.report.add([facts | {"left_out": reason(error)}], "case")
            continue
        for name, seconds in measured.items():
            row = facts | {"kernel": name, "measured_s": seconds}
            if name in predicted:
                row |= {"predicted_s": predicted[name], "factor": seconds / predicted[name]}
                pairs.setdefault(name, []).append((seconds, predicted[name]))
            session.report.add([row], "kernel")
    return pairs


def kernel_seconds(session: Session, case: Case) -> dict[str, float]:
    """Mean seconds of each kernel, by name, over calls with inputs that rotate."""
    device = session.device
    sets = input_sets(case, "both", device)[: 2 if session.quick else 16]
    grads = case.output_gradients(device)
    task = phase_task(op_rival(ours(device), case, device), "both", sets, grads)
    task.run(None)
    found: dict[str, list[float]] = {}
    if device.type == "cpu":
        with launches(device) as launched:
            task.run(None)
        for name, seconds in launched:
            found.setdefault(name, []).append(seconds)
        return {name: sum(times) / len(times) for name, times in found.items()}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        task.run(None)
        torch.cuda.synchronize()
    return {
        event.key: event.device_time_total / event.count / 1e6
        for event in profiler.key_averages()
        if event.device_time_total > 0
    }


@cache
def predicted_steps(case: Case, products: str, target: str) -> tuple[int, list[Predicted]]:
    """Predict a call: how many steps a forward has, and the steps of forward and backward."""
    recording = record(case.operator, case.shape, case.dtype, TARGETS[target][1], batch=case.B)
    steps = predict(
        (*recording.forward, *recording.backward),
        measure_programs([recording], target),
        MACHINES[target],
        is_float32=case.precision == "fp32" and products == "highest",
    )
    return len(recording.forward), steps


def target_of(device: torch.device) -> str | None:
    """The target whose model fits a device, if there is one."""
    if device.type == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return name if (name := f"sm{major}{minor}") in MACHINES else None


def predicted_seconds(case: Case, products: str, target: str | None) -> dict[str, float]:
    """Mean predicted seconds of each kernel, by name, without the gap before the next."""
    if target is None:
        return {}
    times: dict[str, list[float]] = {}
    for step in predicted_steps(case, products, target)[1]:
        gap = MACHINES[target].launch_seconds
        times.setdefault(step.name, []).append(step.seconds - gap)
    return {name: sum(each) / len(each) for name, each in times.items()}


def factors_of(pairs: Pairs) -> dict[str, float]:
    """Measured / predicted by kernel: the geometric mean over all settings."""
    return {
        name: math.exp(sum(math.log(of / by) for of, by in each) / len(each))
        for name, each in pairs.items()
    }


def time_calls(session: Session, settings: Sequence[tuple[Case, str]]) -> None:
    """Time whole calls, forward and both, beside the einsum forms."""
    names = ["eager", *([] if session.quick else ["compile"]), ours(session.device)]
    for case, products in settings:
        facts: Row = {"part": "calls", "case": f"{case} {products}"}
        if session.is_over():
            session.report.add([facts | NO_TIME], "case")
            continue
        with products_in(products):
            rivals, left_out = checked_rivals(case, names, session.device)
            session.report.add([facts | row for row in left_out], "rival")
            for phase in ("forward", "both"):
                rows = time_phase(session, case, rivals, phase)
                if target := target_of(session.device):
                    forward, steps = predicted_steps(case, products, target)
                    steps = steps[:forward] if phase == "forward" else steps
                    seconds = sum(step.seconds for step in steps)
                    rows.append({"rival": "prediction", "predicted_s": seconds})
                session.report.add(
                    [facts | {"phase": phase} | row for row in rows], "phase", "rival"
                )


if __name__ == "__main__":
    sys.exit(main())
