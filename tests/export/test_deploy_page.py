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


@pytest.mark.parametrize(("writes", "reads"), PAIRS)
def test_the_page_runs(tmp_path, writes, reads):
    assert set(PROGRAMS) == {name for pair in PAIRS for name in pair}
    if writes == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"{package} is not installed")
    blocked = {writes: "", reads: "import sys\nsys.modules['tritoncaps'] = None\n"}
    for name in (writes, reads):
        done = subprocess.run(
            [sys.executable, "-c", blocked[name] + PROGRAMS[name]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(tensor\()?\[\d(,? \d){4}\]\)?\n", done.stdout)
