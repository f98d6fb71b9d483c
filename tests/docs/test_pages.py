"""The programs on the pages of the documentation run, in the order of the page."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

from tools import math_pictures
from tritoncaps import data, ops, reference, testing
from tritoncaps.models import create_model

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Pages whose programs are complete.
PAGES = ["quickstart", "choosing-a-routing", "own-layer", "own-routing"]


def programs_of(page):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_run_and_print_what_the_page_says(page, capsys):
    names = {}
    printed = []
    for program in programs_of(page):
        exec(program, names)
        printed += re.findall(r"^print\(.*\)  # (.*)$", program, re.MULTILINE)
    shown = capsys.readouterr().out.splitlines()
    assert names
    for line, expected in zip(shown, printed, strict=True):
        assert line == expected or expected == "the checks that draw many"


def test_the_program_of_the_page_on_initialisation_runs(capsys):
    (calibration,) = programs_of("initialisation")
    model = create_model("capsnet", channels=8, capsule_types=2)
    exec(calibration, {"model": model, "images": torch.rand(8, 1, 28, 28)})
    assert capsys.readouterr().out.count("mean length") == 2


def test_the_programs_of_the_page_on_training_run(tmp_path, monkeypatch):
    loading, solids = programs_of("training")
    monkeypatch.chdir(tmp_path)
    (run,) = re.findall(r'load_model\("(.*)"\)', loading)
    Path("runs").mkdir()
    create_model("deep_capsnet", channels=(2, 2), capsule_types=1).save_pretrained(run)
    names = {}
    exec(loading, names)
    assert names["model"](torch.rand(1, 1, 28, 28)).activations.shape == (1, 10)
    exec(solids.replace("solids(64", "solids(8"), names)
    assert (
        names["train"].images.shape[1:] == (2, 8, 8) and names["novel"].view("azimuth").min() > 90
    )


def test_the_programs_of_the_api_pages_run():
    """Those that are no doctests, with another data set and device than they name."""
    names = {"my_routing": ops.dynamic_routing, "my_routing_in_einsum": reference.dynamic_routing}
    names |= {"pytest": pytest, "torch": torch} | vars(data)
    for module in (data, testing):
        lines = re.findall(r"^    .*|^$", module.__doc__, re.MULTILINE)
        program = textwrap.dedent("\n".join(lines))
        exec(program.replace('"auto"', '"digits"').replace('"cuda"', '"cpu"'), names)
    assert names["images"].shape[1:] == (1, 28, 28)
    names["test_my_routing"](testing.CHECKS["empty_batch"])


def test_every_page_with_programs_has_a_test():
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*/test_*.py"))
    tested = {
        *re.findall(r'docs/([\w-]+)\.md"', tests),
        *re.findall(r'programs_of\("(.*)"\)', tests),
    }
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert {page for page in pages if programs_of(page)} <= {*PAGES, *tested}


def test_the_pictures_of_the_mathematics(tmp_path):
    assert math_pictures.main(["--output", str(tmp_path)]) == 0
    for name in ("squash.svg", "agreement.svg"):
        assert "</svg>" in (tmp_path / name).read_text(encoding="utf-8")
    u_hat = math_pictures.votes()
    lengths = [math_pictures.ops.dynamic_routing(u_hat, n)[0].norm(dim=-1) for n in (1, 2, 3)]
    assert (lengths[0] < lengths[1]).all() and (lengths[1] < lengths[2]).all()  # as the page says
