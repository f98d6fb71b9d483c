"""The recipes run, are short, answer a question, and are listed in docs/recipes.md."""

import re
import runpy
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe(path, capsys):
    words, least = SHOWN[path.stem]
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(path))
    printed = capsys.readouterr().out
    found = re.search(words, printed)
    assert found, printed
    assert least is None or float(found[1]) >= least, printed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_is_short_and_listed_with_its_question(path):
    text = path.read_text()
    question = text.splitlines()[0].removeprefix('"""')
    assert question.endswith("?")
    assert len(text.splitlines()) <= 40
    assert f"| [{path.stem}](../examples/recipes/{path.name}) | {question} |" in PAGE
