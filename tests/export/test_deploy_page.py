"""The programs in docs/deploy.md run, in the order of the page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/deploy.md").read_text()
PROGRAMS = dict(re.findall(r"<!-- program: (\S+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
# Each writes a file and reads it elsewhere. The reader cannot import this package.
PAIRS = [("onnx", "onnxruntime"), ("to_pt2", "pt2")]
BLOCKED = "import sys\nsys.modules['tritoncaps'] = None\n"
# The `.pt2` file computes what the model does, for batches other than the example's.
KEPT = """
images = torch.rand(3, 1, 28, 28)
with torch.no_grad():
    torch.save((images, model.eval()(images)[:3]), "expected.pt")
"""
COMPARED = """
images, expected = torch.load("expected.pt")
for count in (1, 3):
    result = model(images[:count])
    assert list(result) == ["activations", "poses", "reconstruction"]
    for tensor, kept in zip(result.values(), expected):
        torch.testing.assert_close(tensor, kept[:count], rtol=0, atol=1e-6)
"""


@pytest.mark.parametrize(("writes", "reads"), PAIRS)
def test_the_page_runs(tmp_path, writes, reads):
    assert set(PROGRAMS) == {name for pair in PAIRS for name in pair}
    if writes == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"{package} is not installed")
    programs = [PROGRAMS[writes], BLOCKED + PROGRAMS[reads]]
    if writes == "to_pt2":
        programs = [programs[0] + KEPT, programs[1] + COMPARED]
    for program in programs:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(tensor\()?\[\d(,? \d){4}\]\)?\n", done.stdout)
