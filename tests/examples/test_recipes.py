"""The recipes run, print and draw what is kept beside them, are short, and are listed."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples/recipes").glob("*.py"))
PAGE = (ROOT / "docs/recipes.md").read_text()

# What each of them prints. A number in brackets is checked: it must be at least this large.
SHOWN = {
    "capsule_head": (r"step 0: loss ([\d.]+)", 0.5),
    "coupling": (r"share of class \d at each position.*\n(?:0\.\d\d ){5}0\.\d\d\n", None),
    "deep_stack": (r"calibrated: accuracy ([\d.]+)%", 60),
    "new_classes": (r"new classes: test accuracy ([\d.]+)%", 75),
    "orphan_class": (r"and ([\d.]+)% of the rest", 20),
    "own_loop": (r"test accuracy ([\d.]+)%", 90),
    "per_sample_gradients": (r"the gradient of the batch, to \de-0[67]", None),
    "sets": (r"accuracy on new sets ([\d.]+)%", 95),
    "segmentation": (r"union of the squares ([\d.]+)%", 75),
    "several_objects": (r"every class is right ([\d.]+)%", 65),
    "shared_weights": (r"20×20 features, 10,368 capsules -> \(1, 10, 16\)", None),
    "signals": (r"signals of 512 samples ([\d.]+)%", 95),
}

# What depends on the machine's roundings: fractions, shares, and the class that is read.
ROUNDED = re.compile(r"\d+\.\d+(e-\d+)?|\d+%|\de-\d+|(?<=class )\d")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(path))
    printed = capsys.readouterr().out
    kept = path.with_suffix(".txt").read_text(encoding="utf-8")
    words, least = SHOWN[path.stem]
    for text in (printed, kept):
        found = re.search(words, text)
        assert found, text
        assert least is None or float(found[1]) >= least, text
    renew = f"renew it: python {path.name} > {path.stem}.txt"
    assert ROUNDED.sub("#", printed) == ROUNDED.sub("#", kept), renew
    # The gallery shows the picture that is kept, so it has to be like the one that is drawn.
    drawn = sorted(file.name for file in tmp_path.iterdir())
    assert drawn == sorted(file.name for file in path.parent.glob(f"{path.stem}.png"))
    for name in drawn:
        new, old = (pyplot.imread(folder / name) for folder in (tmp_path, path.parent))
        assert new.shape == old.shape and abs(new - old).mean() < 0.05, f"{renew}, and keep {name}"
        assert f"](../examples/recipes/{name})" in PAGE


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_is_short_and_listed_with_its_question(path):
    text = path.read_text()
    question = text.splitlines()[0].removeprefix('"""')
    assert question.endswith("?")
    assert len(text.splitlines()) <= 40
    assert f"| [{path.stem}](../examples/recipes/{path.name}) | {question} |" in PAGE
