"""Measure tritoncaps beside its rivals.

    python -m benchmarks ops                     # each operator, forward, backward and both
    python -m benchmarks ops --only em_routing   # the cases with this word in their name
    python -m benchmarks all                     # everything, with results in benchmarks/results/
    python -m benchmarks all --quick             # check that everything runs, under two minutes
    python -m benchmarks gpu --output results    # everything on a GPU, in under eight minutes
    python -m benchmarks plot                    # draw the results
    python -m benchmarks table [--check]         # write them into the pages, or compare

benchmarks/README.md says what each figure means.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks import compilation, launch, memory, operators, scaling, step, tables
from benchmarks.report import RESULTS, Report, directory_of
from benchmarks.session import Session

BENCHMARKS = {
    "compile": compilation.run_compile,
    "check": operators.run_check,
    "ops": operators.run_ops,
    "memory": memory.run_memory,
    "memory-grid": memory.run_memory_grid,
    "step": step.run_step,
    "scaling": scaling.run_scaling,
    "launch": launch.run_launch,
}
# Seconds after which each part of `gpu` starts nothing new. After 30 more it is stopped.
GPU_SECONDS = {
    "compile": 80,
    "check": 50,
    "ops": 100,
    "memory": 20,
    "memory-grid": 15,
    "step": 70,
    "scaling": 40,
    "launch": 70,
}
ONLY_ON_GPU = ("compile", "launch")
GPU_TOTAL = 460
_LEAST_SECONDS = 15  # with less, a part would not reach its first result


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    args = parse_arguments(arguments)
    if args.command == "plot":
        return run_plot(args.directories, args.speed)
    if args.command == "table":
        return run_table(args.root, args.results, args.check)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device("cuda" if args.command == "gpu" else args.device)
    only = getattr(args, "only", "")
    output = args.output or default_output(device, args.quick or bool(only))
    if args.command in ("all", "gpu"):
        return run_all(device, output, args.quick, args.threads)
    end = time.monotonic() + args.seconds
    settings = {"quick": args.quick, **({"only": only} if only else {})}
    report = Report(args.command, device, settings, output)
    session = Session(device, args.quick, report, end, only)
    BENCHMARKS[args.command](session)
    print(f"{args.command}: {session.report.path}")
    return 0 if session.report.is_complete else 1


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    measure = argparse.ArgumentParser(add_help=False)
    measure.add_argument(
        "--output", type=Path, metavar="DIR", help="default: benchmarks/results/<device>"
    )
    measure.add_argument("--quick", action="store_true", help="a few calls, to see that it runs")
    measure.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    either = argparse.ArgumentParser(add_help=False, parents=[measure])
    either.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    for name, run in BENCHMARKS.items():
        command = commands.add_parser(name, parents=[either], help=first_line(run))
        command.add_argument(
            "--seconds", type=float, default=float("inf"), help="start nothing new after so many"
        )
        if name == "ops":
            command.add_argument(
                "--only", default="", metavar="TEXT", help="cases whose name has this in it"
            )
    commands.add_parser("all", parents=[either], help="Run all these, each in its own process.")
    commands.add_parser("gpu", parents=[measure], help="The same on a GPU, within 8 minutes.")

    plot = commands.add_parser("plot", help="Draw the results as PNG files, and the README's plot.")
    plot.add_argument(
        "directories", nargs="*", type=Path, help="default: all in benchmarks/results"
    )
    plot.add_argument(
        "--speed", type=Path, default=tables.ROOT / "docs/figures/speed.png", metavar="FILE",
        help="the README's plot (default: docs/figures/speed.png)",
    )  # fmt: skip
    pages = ", ".join(map(str, tables.PAGES))
    table = commands.add_parser("table", help=f"Write the results into {pages}.")
    table.add_argument("--check", action="store_true", help="compare; exit with 1 if they differ")
    table.add_argument("--root", type=Path, default=tables.ROOT, help="the folder of the pages")
    table.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def first_line(function: object) -> str:
    return (function.__doc__ or "").splitlines()[0]


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks: torch finds no CUDA device")
    return device


def default_output(device: torch.device, partial: bool) -> Path:
    """Choose the folder of results. A quick run, or one of a few cases, must not replace them."""
    return Path(tempfile.mkdtemp(prefix="benchmarks-")) if partial else directory_of(device)


def run_all(device: torch.device, output: Path, quick: bool, threads: int | None) -> int:
    """Run each benchmark in its own process, so one crash does not stop the rest."""
    on_gpu = device.type == "cuda"
    names = [name for name in BENCHMARKS if on_gpu or name not in ONLY_ON_GPU]
    start = time.monotonic()
    failed = []
    for name in names:
        command = [sys.executable, "-m", "benchmarks", name, "--device", str(device)]
        command += ["--output", str(output.resolve()), *(["--quick"] if quick else [])]
        command += ["--threads", str(threads)] if threads else []
        limit = None
        if on_gpu:
            left = GPU_TOTAL / (4 if quick else 1) - (time.monotonic() - start)
            if left < _LEAST_SECONDS:
                failed.append(f"{name} (not started: no time was left)")
                continue
            seconds = max(0.0, min(GPU_SECONDS[name] / (4 if quick else 1), left - 10))
            command += ["--seconds", f"{seconds:.0f}"]
            limit = min(seconds + 30, left)
        print(f"\n== {name}", flush=True)
        began = time.monotonic()
        try:
            status = run_limited(command, limit)
            if status != 0:
                failed.append(f"{name} (exit status {status})")
        except subprocess.TimeoutExpired:
            failed.append(f"{name} (stopped: it took too long)")
        print(f"== {name}: {time.monotonic() - began:.0f} s", flush=True)
    print(
        f"\nResults of {len(names)} benchmarks are in {output}, {time.monotonic() - start:.0f} s."
    )
    if failed:
        print(f"Something went wrong: {', '.join(failed)}.")
    return 1 if failed else 0


def run_limited(command: list[str], limit: float | None) -> int:
    """Run a command and return its exit status. Whatever it leaves running is killed.

    Raises:
        TimeoutExpired: it took longer than `limit` seconds.
    """
    process = subprocess.Popen(command, cwd=tables.ROOT, start_new_session=True)
    try:
        return process.wait(limit)
    finally:
        process.kill()
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):  # nothing is left alive
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_plot(directories: list[Path], speed: Path) -> int:
    # A machine that only measures may lack matplotlib. Nothing else here needs it.
    from benchmarks import plots

    for directory in directories or sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        for path in plots.draw(directory):
            print(path)
    if not directories:
        plots.draw_speed(tables.load_devices(RESULTS), speed)
        print(speed)
    return 0


def run_table(root: Path, results: Path, check: bool) -> int:
    status = 0
    for page, block in tables.PAGES.items():
        text = (root / page).read_text(encoding="utf-8")
        updated = tables.replace_block(text, block(results))
        if not check:
            (root / page).write_text(updated, encoding="utf-8")
        elif updated != text:
            print(f"{page}: the tables differ from the results; run `python -m benchmarks table`")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
