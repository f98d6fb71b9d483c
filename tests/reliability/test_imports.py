"""What may import what, what an import costs, and which packages it must not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the bottom up. A file may import from its own floor and from those below.
FLOORS = ["kernels", "tritoncaps", "models", "examples", "benchmarks", "demo", "tools"]
# They are imported by the names that they have as scripts.
EXAMPLES = {path.stem for path in (ROOT / "examples").iterdir()}

# Rooms within tritoncaps, each with those of our modules that it may import. Anybody may import the
# modules that know nothing about the operators: `_checks` and so on.
ALWAYS = {"_checks", "_patches", "_targets", "_tracing", "_version"}
ROOMS = {
    "reference": {"reference"},
    "_checks": set(),
    "_patches": set(),
    "_targets": set(),
    "_tracing": set(),
    "_torch_path": {"_torch_path"},
    "_native": {"_native", "_torch_path"},
    "_operators": {"_operators", "_native", "_torch_path", "kernels", "reference"},
    "_backends": {"_operators", "_native"},
    "ops": {"ops", "_operators"},
    "layers": {"layers", "ops"},
    "losses": {"ops"},
    "export": {"_files", "_operators"},
    "data": {"data"},
    "testing": {"testing", "ops", "reference", "_operators"},
}


def imports_of(path):
    """Every module that a file imports, anywhere in the file, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} uses a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def floor_of(module):
    """The floor of an imported module, or None for a third party's."""
    first, _, rest = module.partition(".")
    if first == "tritoncaps":
        second = rest.partition(".")[0]
        return second if second in ("kernels", "models") else first
    if first in EXAMPLES:
        return "examples"
    return first if first in FLOORS else None


def files_of(folder, name):
    path = folder / f"{name}.py"
    return [path] if path.exists() else sorted((folder / name).rglob("*.py"))


def test_imports_run_one_way():
    seen = set()
    for floor in FLOORS:
        for path in files_of(ROOT, floor):
            for module in imports_of(path):
                imported = floor_of(module)
                if imported is not None:
                    seen.add((floor, imported))
                    assert FLOORS.index(imported) <= FLOORS.index(floor), f"{path} imports {module}"
    expected = {("tritoncaps", "kernels"), ("models", "tritoncaps"), ("examples", "models")}
    assert expected <= seen, "imports were not found"


def rooms_imported(path):
    """Rooms of tritoncaps that a file imports. "tritoncaps" itself stands for all of it."""
    for module in imports_of(path):
        if floor_of(module) is not None:
            parts = module.split(".")
            yield parts[1] if parts[0] == "tritoncaps" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_no_more_than_it_may(room):
    files = files_of(ROOT / "tritoncaps", room)
    assert files
    for path in files:
        foreign = set(rooms_imported(path)) - ROOMS[room] - (ALWAYS - {room})
        assert not foreign, f"{path} imports {foreign}"


def test_nothing_in_the_package_imports_testing():
    for floor in ("kernels", "tritoncaps", "models"):
        for path in files_of(ROOT, floor):
            if "testing" not in path.relative_to(ROOT).parts:
                assert "testing" not in set(rooms_imported(path)), path


# In a process of its own --------------------------------------------------------------------------


def run_python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_takes_far_less_time_than_that_of_torch():
    code = """
import time
begun = time.process_time()
import torch
then = time.process_time()
import tritoncaps, tritoncaps.models, tritoncaps.data
print((time.process_time() - then) / (then - begun))
"""
    # A fifth. Take the best of three, because the machine may be busy.
    assert min(float(run_python(code)) for _ in range(3)) < 0.3


def test_parts_that_are_imported_later_are_attributes_of_the_package():
    code = """
import sys
import tritoncaps
later = ["data", "export", "models", "testing"]
assert set(later) <= set(dir(tritoncaps))
assert not {f"tritoncaps.{name}" for name in later} & set(sys.modules)
print(*(getattr(tritoncaps, name).__name__ for name in later))
try:
    tritoncaps.modles
except AttributeError as error:
    print(error)
"""
    assert run_python(code).splitlines() == [
        "tritoncaps.data tritoncaps.export tritoncaps.models tritoncaps.testing",
        "module 'tritoncaps' has no attribute 'modles'",
    ]


UNNEEDED = [
    "torchvision", "triton", "sklearn", "matplotlib", "tqdm", "hypothesis", "huggingface_hub",
]  # fmt: skip


@pytest.mark.parametrize("missing", ["torchvision", "triton", "all"])
def test_package_works_without_optional_packages(missing):
    """Forward and backward of the smallest deep network, with packages made unimportable."""
    blocked = UNNEEDED if missing == "all" else [missing]
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import torch, tritoncaps, tritoncaps.data
from tritoncaps.models import create_model
model = create_model("deep_capsnet", channels=(2, 2), capsule_types=1)
output = model(torch.rand(2, 1, 28, 28))
tritoncaps.ops.margin_loss(output.activations, torch.tensor([1, 2])).backward()
print(tritoncaps.__version__)
"""
    assert run_python(code).strip()


def test_only_the_checks_need_hypothesis():
    """Benchmarks use the drawing of inputs and the 2x rule without it."""
    code = f"""
import sys
for name in {UNNEEDED!r}:
    sys.modules[name] = None
import torch
from tritoncaps import testing
for operator in testing.OPERATORS.values():
    testing.compare(operator, testing.Case(testing.SIZES, operator.defaults))
for name, check in testing.CHECKS.items():
    try:
        check(testing.OPERATORS["prediction_vectors"], torch.device("cpu"))
    except ModuleNotFoundError as error:
        print(name, error.name)
"""
    assert run_python(code).split() == ["agreement", "hypothesis", "fuzz", "hypothesis"]


def test_import_loads_nothing_unneeded():
    code = """
import sys
import torch
before = set(sys.modules)
import tritoncaps, tritoncaps.models, tritoncaps.data
print(*set(sys.modules) - before)
"""
    loaded = set(run_python(code).split())
    assert "tritoncaps.ops" in loaded
    # Triton may be among them, because torch's FLOP counter loads it if it is installed.
    forbidden = {*UNNEEDED, "safetensors", "tritoncaps.kernels", "tritoncaps.testing"} - {"triton"}
    assert not forbidden & loaded
