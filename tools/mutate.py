"""Mutation check: change one place of the code, run its tests, and see whether one fails.

    python tools/mutate.py                       # 100 mutants of seed 1
    python tools/mutate.py --count 20 --seed 7 --files kernels/squash.py
    python tools/mutate.py --list                # print every mutant and run none
    python tools/mutate.py --only kernels/squash.py:31

A mutant that no test notices survives: either a test is missing or the change makes no difference.
A survivor takes as long as all tests of its file, which is minutes for a kernel. A killed one takes
seconds. Mutants are drawn at random from all places in the files. Each is written to a copy of the
project, never to the working tree, and tested in its own process. (Triton reads the source of a
kernel from its file, so a kernel cannot be changed in memory.) A mutant that exceeds --cpu-seconds
or the memory limit counts as killed.

Two libraries were tried instead. mutmut 3.8 skips decorated functions, and so every kernel. It also
looks for tests of `kernels.squash`, which is imported as `tritoncaps.kernels.squash`. cosmic-ray
8.7 draws no sample, needs a configuration for each file, and never removes a `raise`. It edits the
working tree, and a killed run leaves its mutant behind.
"""

import argparse
import ast
import copy
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("tritoncaps", "kernels", "models", "examples", "tests", "pyproject.toml")
MEMORY_BYTES = 12 << 30

# The files to mutate, and the tests that must notice. Kernels run interpreted. Whether a changed
# kernel compiles does not matter.
TESTS = {
    "kernels": ["tests/kernels"],
    "tritoncaps/_checks.py": ["tests/ops", "tests/layers"],
    "tritoncaps/_operators": ["tests/ops"],
    "tritoncaps/_targets.py": ["tests/ops", "tests/layers"],
    "tritoncaps/_torch_path": ["tests/ops"],
    "tritoncaps/data": ["tests/data"],
    "tritoncaps/layers": ["tests/layers"],
    "tritoncaps/losses.py": ["tests/ops", "tests/layers"],
    "tritoncaps/ops": ["tests/ops"],
}
FILES = [
    str(path.relative_to(ROOT))
    for place in TESTS
    for path in sorted((ROOT / place).glob("*.py") if (ROOT / place).is_dir() else [ROOT / place])
    if path.name != "__init__.py"
]


def selection(file: str) -> list[str]:
    """Return the tests that must notice a change to a file."""
    return next(tests for place, tests in TESTS.items() if file.startswith(place))


@dataclass(frozen=True)
class Mutant:
    """One change: bytes `start` to `end` of a file become `after`."""

    file: str
    line: int
    start: int
    end: int
    before: str
    after: str

    def apply(self, source: bytes) -> bytes:
        """Return the changed source."""
        return source[: self.start] + self.after.encode() + source[self.end :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before}  ->  {self.after}"


# mutants -----------------------------------------------------------------------------------------

_OTHER_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_OTHER_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """Return every mutant of a file, from top to bottom."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    mutants = []
    for node in _code(ast.parse(source)):
        # Expressions get brackets, because their surroundings may bind more tightly.
        form = "({})" if isinstance(node, ast.expr) else "{}"
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        for changed in _changes(node):
            after = form.format(ast.unparse(ast.fix_missing_locations(changed)))
            before = ast.unparse(node)
            mutants.append(Mutant(file, node.lineno, start, end, before, after))
    return sorted(mutants, key=lambda mutant: (mutant.start, mutant.end))


def _code(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Yield the nodes that run, without annotations, decorators, docstrings and f-strings."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.JoinedStr) or not isinstance(child, ast.AST):
                continue
            if isinstance(child, (ast.expr, ast.stmt)):
                yield child
            yield from _code(child)


def _changes(node: ast.expr | ast.stmt) -> Iterator[ast.AST]:
    """Yield the replacements of a node, one change each."""

    def changed(**fields: object) -> ast.AST:
        other = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            for other in _OTHER_COMPARISONS[type(operator)]:
                yield changed(ops=[*node.ops[:index], other(), *node.ops[index + 1 :]])
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in _OTHER_ARITHMETIC:
        yield changed(op=_OTHER_ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield changed(op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield changed(body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, (int, float)):
            yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Call) and len(node.args) > 1:
        first, second, *rest = node.args
        if ast.dump(first) != ast.dump(second):
            yield changed(args=[second, first, *rest])
    if isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield ast.Pass()


# running -----------------------------------------------------------------------------------------


def copy_project(folder: Path) -> None:
    """Copy the project to a folder from which everything can be imported."""
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    # These are found before the installed package, which leads to the original.
    for name in ("kernels", "models"):
        (folder / "tritoncaps" / name).symlink_to(folder / name)


def run_tests(folder: Path, file: str, cpu_seconds: int) -> str:
    """Run the tests of a file in the copy. Return why they fail, or "" if they pass."""

    def limit() -> None:
        # A mutant may ask for any amount of memory, or never end.
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))

    environment = os.environ | {
        "PYTHONPATH": str(folder),
        # Two mutants may share size and time stamp, and would then share a compiled file.
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_PROFILE": "mutants",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1" if file.startswith("kernels/") else "0",
    }
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=no"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *selection(file)],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=limit,
        )
        status = process.wait()
    with suppress(ProcessLookupError):  # end what the tests have started
        os.killpg(process.pid, signal.SIGKILL)
    if status == 0:
        return ""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = (folder / "log").read_text(errors="replace").splitlines()
    reasons = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return reasons[0] if reasons else f"exit status {status}"


def check(mutants: list[Mutant], cpu_seconds: int) -> list[Mutant]:
    """Test the mutants, print the outcome of each, and return the survivors."""
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        copy_project(folder)
        for file in {mutant.file: None for mutant in mutants}:
            if reason := run_tests(folder, file, cpu_seconds):
                raise SystemExit(f"the tests of {file} fail unchanged: {reason}")
        for mutant in mutants:
            path, begun = folder / mutant.file, time.monotonic()
            source = path.read_bytes()
            path.write_bytes(mutant.apply(source))
            reason = run_tests(folder, mutant.file, cpu_seconds)
            path.write_bytes(source)
            word, seconds = "killed" if reason else "SURVIVED", time.monotonic() - begun
            print(f"{word:8} {mutant}  [{seconds:.0f} s] {reason}", flush=True)
            if not reason:
                survivors.append(mutant)
    return survivors


def main(arguments: list[str] | None = None) -> int:
    """Draw the mutants and test them. Return 1 if fewer than `--least` of them are killed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="number of mutants to test")
    parser.add_argument("--seed", type=int, default=1, help="seed of the draw")
    parser.add_argument("--files", nargs="+", default=FILES, help="files to change")
    parser.add_argument("--only", nargs="+", metavar="FILE:LINE", help="all mutants of these lines")
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    parser.add_argument("--cpu-seconds", type=int, default=400, help="limit for each mutant")
    parser.add_argument("--least", type=float, default=0.8, help="share that must be killed")
    args = parser.parse_args(arguments)
    mutants = [m for file in args.files for m in mutants_of(file, (ROOT / file).read_bytes())]
    total = len(mutants)
    if args.only is not None:
        mutants = [mutant for mutant in mutants if f"{mutant.file}:{mutant.line}" in args.only]
    elif args.count < total:
        # Kept in the order of the draw, so a run that is stopped has seen a fair sample.
        mutants = random.Random(args.seed).sample(mutants, args.count)
    if args.list:
        print(*mutants, sep="\n")
        return 0
    survivors = check(mutants, args.cpu_seconds)
    killed = len(mutants) - len(survivors)
    print(f"\n{killed} of {len(mutants)} mutants killed, of {total} in all")
    print(*(f"survived {mutant}" for mutant in survivors), sep="\n")
    return int(killed < args.least * len(mutants))


if __name__ == "__main__":
    sys.exit(main())
