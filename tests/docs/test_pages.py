"""The programs on the pages of the documentation run, in the order of the page."""

import re
from pathlib import Path

import pytest

from tools import math_pictures

DOCS = Path(__file__).parents[2] / "docs"
# Other pages have tests of their own.
PAGES = ["quickstart", "choosing-a-routing", "own-layer", "own-routing"]


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_run_and_print_what_the_page_says(page, capsys):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    names = {}
    printed = []
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(program, names)
        printed += re.findall(r"^print\(.*\)  # (.*)$", program, re.MULTILINE)
    shown = capsys.readouterr().out.splitlines()
    assert names
    for line, expected in zip(shown, printed, strict=True):
        assert line == expected or expected == "the checks that draw many"


def test_the_pictures_of_the_mathematics(tmp_path):
    assert math_pictures.main(["--output", str(tmp_path)]) == 0
    for name in ("squash.svg", "agreement.svg"):
        assert "</svg>" in (tmp_path / name).read_text(encoding="utf-8")
    u_hat = math_pictures.votes()
    lengths = [math_pictures.ops.dynamic_routing(u_hat, n)[0].norm(dim=-1) for n in (1, 2, 3)]
    assert (lengths[0] < lengths[1]).all() and (lengths[1] < lengths[2]).all()  # as the page says
