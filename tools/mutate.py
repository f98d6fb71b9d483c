"""Mutation check: change the code in one place, run its tests, see whether one of them fails.

    python tools/mutate.py                       # 100 mutants of seed 1, about half an hour
    python tools/mutate.py --count 20 --seed 7 --files kernels/squash.py
    python tools/mutate.py --list                # every mutant there is, and none is run
    python tools/mutate.py --only kernels/squash.py:31

A mutant that no test notices has survived: a test is missing, or the change makes no difference.
The mutants are drawn at random from the seed, from all places of the files alike. Each is written
into a copy of the project, where it is tested by a process of its own: Triton reads the source of
a kernel from its file, so nothing short of another file changes it. One that exceeds the time of
--cpu-seconds counts as killed.
"""

import argparse
import ast
import copy
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("tritoncaps", "kernels", "models", "tests", "examples", "pyproject.toml")
MEMORY_BYTES = 12 << 30

# The tests of each file: quick ones, since a mutant that survives takes as long as all of them.
# Kernels run interpreted; what the compiler says of a changed kernel is not asked.
OPERATOR_TESTS = ("errors", "ops", "known_faults", "layers_and_models", "operators")
TORCH_PATH_TESTS = ("torch_path", *OPERATOR_TESTS)
FILES = {
    "tritoncaps/_checks.py": OPERATOR_TESTS,
    "tritoncaps/_operators.py": OPERATOR_TESTS,
    "tritoncaps/_torch_path/_chunks.py": TORCH_PATH_TESTS,
    "tritoncaps/_torch_path/_images.py": TORCH_PATH_TESTS,
    "tritoncaps/_torch_path/_loop.py": TORCH_PATH_TESTS,
    "tritoncaps/_torch_path/_precision.py": TORCH_PATH_TESTS,
    "tritoncaps/_torch_path/_slices.py": TORCH_PATH_TESTS,
    "tritoncaps/_torch_path/fused_dynamic_routing.py": TORCH_PATH_TESTS,
    "tritoncaps/_torch_path/dynamic_routing.py": TORCH_PATH_TESTS,
    "tritoncaps/_torch_path/prediction_vectors.py": TORCH_PATH_TESTS,
    "tritoncaps/_torch_path/squash.py": TORCH_PATH_TESTS,
    "tritoncaps/_transforms.py": OPERATOR_TESTS,
    "tritoncaps/layers.py": OPERATOR_TESTS,
    "tritoncaps/losses.py": OPERATOR_TESTS,
    "tritoncaps/ops.py": OPERATOR_TESTS,
    "kernels/_launch.py": ("kernels",),
    "kernels/_primitives.py": ("kernels",),
    "kernels/fused_dynamic_routing.py": (
        "kernels",
        "-k",
        "fused_dynamic_routing or layout or fused",
    ),
    "kernels/dynamic_routing.py": ("kernels", "-k", "dynamic_routing or layout"),
    "kernels/prediction_vectors.py": ("kernels", "-k", "prediction_vectors"),
    "kernels/squash.py": ("kernels", "-k", "squash or several_blocks or every_mode"),
}


@dataclass(frozen=True)
class Mutant:
    """One change: the bytes from `start` to `end` of a file become `after`."""

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


# finding the places ------------------------------------------------------------------------------

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
    """Every mutant of a file, in the order of its places."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    mutants = []
    for node in _code(ast.parse(source)):
        # Expressions in brackets, since what stands around them may bind more tightly.
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
    """What runs: no annotation, decorator or text, and not the parts of an f-string."""
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
    """What a node is replaced by, one change each."""

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


# testing them -------------------------------------------------------------------------------------


def copy_project(folder: Path) -> None:
    """Copy the project into a folder from which everything can be imported."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    # Found there before the installed package, which leads to the original, is asked.
    for name in ("kernels", "models"):
        (folder / "tritoncaps" / name).symlink_to(folder / name)


def prepare(folder: Path, interpreted: bool) -> None:
    """Make this process one that tests the copy: what all tests import is imported once."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    # Two mutants may have one length and one second, and then a compiled file passes for both.
    sys.dont_write_bytecode = True
    os.environ |= {
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_PROFILE": "mutants",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1" if interpreted else "0",
    }
    for name in ("torch._dynamo.testing", "torch.testing._internal.optests", "einops", "triton"):
        importlib.import_module(name)


def run_tests(folder: Path, file: str, cpu_seconds: int) -> tuple[bool, str]:
    """Run the tests of a file in a process of its own: whether they pass, and else why not."""
    (*names, expression) = FILES[file] if "-k" in FILES[file] else (*FILES[file], "")
    tests = [f"tests/test_{name}.py" for name in names if name != "-k"]
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=no", "-k", expression]
    log = folder / "log"
    child = os.fork()
    if child == 0:
        os.setsid()
        # A mutant may ask for any amount of memory, or never end.
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 70
        try:
            import pytest

            sys.path.insert(0, str(folder / "tests"))
            status = int(pytest.main([*options, *tests]))
            kernels = importlib.import_module("tritoncaps.kernels")
            if not str(kernels.__file__).startswith(str(folder)):
                print("ERROR the tests were not those of the copy")
                status = 71
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    with suppress(ProcessLookupError):  # what the tests have started
        os.killpg(child, signal.SIGKILL)
    if status == 0:
        return True, ""
    lines = log.read_text(errors="replace").splitlines()
    reasons = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if os.WIFSIGNALED(status):
        return False, f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return False, reasons[0] if reasons else f"exit status {os.WEXITSTATUS(status)}"


def check(mutants: list[Mutant], output: Path, cpu_seconds: int, trusted: bool) -> None:
    """Test mutants of which all tests, or none, are interpreted; append what became of each."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        copy_project(folder)
        prepare(folder, mutants[0].file.startswith("kernels/"))
        for tests in () if trusted else {FILES[mutant.file]: mutant for mutant in mutants}.values():
            passed, reason = run_tests(folder, tests.file, cpu_seconds)
            if not passed:
                raise SystemExit(f"the tests of {tests.file} fail unchanged: {reason}")
        for mutant in mutants:
            path, begun = folder / mutant.file, time.monotonic()
            source = path.read_bytes()
            path.write_bytes(mutant.apply(source))
            passed, reason = run_tests(folder, mutant.file, cpu_seconds)
            path.write_bytes(source)
            word, seconds = "SURVIVED" if passed else "killed", time.monotonic() - begun
            print(f"{word:8} {mutant}  [{seconds:.0f} s] {reason}", flush=True)
            with output.open("a") as file:
                record = {"mutant": str(mutant), "killed": not passed, "by": reason}
                file.write(json.dumps(record) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Draw the mutants, test them, print the table; 1 if fewer than `--least` are killed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="mutants to test")
    parser.add_argument("--seed", type=int, default=1, help="which ones")
    parser.add_argument("--files", nargs="+", default=FILES, help="files to change")
    parser.add_argument("--only", nargs="+", metavar="FILE:LINE", help="all mutants of these lines")
    parser.add_argument("--list", action="store_true", help="print the mutants, run none")
    parser.add_argument("--output", type=Path, help="append a line of JSON a mutant to this file")
    parser.add_argument("--cpu-seconds", type=int, default=400, help="then a mutant is killed")
    parser.add_argument("--trusted", action="store_true", help="the tests pass: do not try first")
    parser.add_argument("--least", type=float, default=0.8, help="the share that must be killed")
    args = parser.parse_args(arguments)
    mutants = [m for file in args.files for m in mutants_of(file, (ROOT / file).read_bytes())]
    total = len(mutants)
    if args.only is not None:
        mutants = [mutant for mutant in mutants if f"{mutant.file}:{mutant.line}" in args.only]
    elif args.count < total:
        # Left in the order of the draw, so that a run that is stopped has had a fair sample.
        mutants = random.Random(args.seed).sample(mutants, args.count)
    if args.list:
        print(*mutants, sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as name:
        output = args.output or Path(name) / "mutants.jsonl"
        output.write_text("")
        # Whether Triton interprets is settled when it is imported, so by process.
        for group in ("tritoncaps/", "kernels/"):
            own = [mutant for mutant in mutants if mutant.file.startswith(group)]
            context = multiprocessing.get_context("fork")
            process = context.Process(
                target=check, args=(own, output.absolute(), args.cpu_seconds, args.trusted)
            )
            if own:
                process.start()
                process.join()
                if process.exitcode != 0:
                    return 2
        records = [json.loads(line) for line in output.read_text().splitlines()]
    survivors = [record["mutant"] for record in records if not record["killed"]]
    killed = len(records) - len(survivors)
    print(f"\n{killed} of {len(records)} mutants killed ({killed / len(records):.0%}), of {total}")
    print(*(f"survived {mutant}" for mutant in survivors), sep="\n")
    return int(killed < args.least * len(records))


if __name__ == "__main__":
    sys.exit(main())
