"""What may import what, what an import costs, and what it must do without."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up: a file may import from its own layer and from those before it.
LAYERS = ["kernels", "tritoncaps", "models", "examples", "benchmarks"]
# How the examples are imported: as they are when they are run as scripts.
EXAMPLES = {path.stem for path in (ROOT / "examples").iterdir()}


def layer_of(module: str) -> str | None:
    """The layer of an imported module, or None for a third party's."""
    if module in ("tritoncaps.kernels", "tritoncaps.models"):
        return module.split(".")[1]
    if module.startswith(("tritoncaps.kernels.", "tritoncaps.models.")):
        return module.split(".")[1]
    if module.split(".")[0] in EXAMPLES:
        return "examples"
    return module.split(".")[0] if module.split(".")[0] in LAYERS else None


def imports_of(path: Path) -> list[str]:
    """Every module that a file imports, wherever in the file."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} uses a relative import"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def test_imports_run_one_way():
    seen = set()
    for layer in LAYERS[:4]:
        for path in (ROOT / layer).rglob("*.py"):
            for module in imports_of(path):
                imported = layer_of(module)
                if imported is None:
                    continue
                seen.add((layer, imported))
                assert LAYERS.index(imported) <= LAYERS.index(layer), f"{path} imports {module}"
    assert {("models", "tritoncaps"), ("examples", "models")} <= seen


def test_reference_imports_nothing_of_ours():
    assert [m for m in imports_of(ROOT / "tritoncaps" / "reference.py") if layer_of(m)] == []


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_adds_less_than_a_second_to_torch():
    code = """
import time
import torch
begun = time.process_time()
import tritoncaps, tritoncaps.models, tritoncaps.data
print(time.process_time() - begun)
"""
    # The best of three: the machine may be busy.
    assert min(float(run_python(code)) for _ in range(3)) < 1.0


UNNEEDED = ["torchvision", "triton", "sklearn", "matplotlib", "tqdm", "safetensors"]


@pytest.mark.parametrize("missing", ["torchvision", "triton", "all"])
def test_package_works_without_what_it_does_not_need(missing):
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


def test_import_loads_nothing_that_it_does_not_need():
    code = """
import sys
import torch
before = set(sys.modules)
import tritoncaps, tritoncaps.models, tritoncaps.data
print(*set(sys.modules) - before)
"""
    loaded = run_python(code).split()
    assert "tritoncaps.ops" in loaded
    # Triton may be among them: torch's FLOP counter loads it where it is installed.
    forbidden = {*UNNEEDED, "tritoncaps.kernels"} - {"triton"}
    assert not forbidden & set(loaded)
