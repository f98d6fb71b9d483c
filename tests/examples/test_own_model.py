"""The program in docs/own-model.md trains, and continues where it was stopped."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_runs import assert_same, small_model

from engine.tasks import Task
from engine.training import Trainer
from tritoncaps import ops
from tritoncaps.data import Batches

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/own-model.md").read_text()


@pytest.fixture
def program(tmp_path):
    found = re.search(r"<!-- program: own-model -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    path = tmp_path / "small_net.py"
    path.write_text(found[1])

    def run():
        paths = (REPOSITORY / "examples", *sys.path)
        done = subprocess.run(
            [sys.executable, path],
            cwd=tmp_path,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
            },
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def run_from_the_page(program):
    """Run a program of the page; return what it defines."""
    found = re.search(rf"<!-- program: {program} -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    names = {}
    exec(found[1], names)
    return names


def test_the_program_of_a_stack_of_convolutions_runs():
    assert run_from_the_page("convolutional")["poses"].shape == (2, 10, 16)


def test_the_program_for_several_objects_runs():
    names = run_from_the_page("several-objects")
    assert names["picture"].shape == (8, 1, 28, 28)
    assert all(p.grad is not None for p in names["model"].parameters())


def test_the_program_on_the_page_learns_and_continues(program, tmp_path, monkeypatch):
    printed = program()
    accuracy = re.search(r"test accuracy ([\d.]+)%", printed)
    assert accuracy is not None and float(accuracy[1]) > 90, printed
    assert printed.count("epoch ") >= 4
    files = {path.name for path in (tmp_path / "runs/small-net").iterdir()}
    assert {"last.safetensors", "model_best.safetensors", "summary.csv"} <= files
    # Nothing is left to train, and the checkpoint alone gives the same accuracy.
    again = program()
    assert again == f"test accuracy {accuracy[1]}%\n"
    # The next program of the page reads the best weights into the class of the first.
    whole, reading = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(whole.partition("digits = ")[0] + reading, names)
    assert names["header"]["epoch"] >= 1 and names["model"].routing.weight.any()


def test_a_loss_of_ones_own(tmp_path, digits):
    """The task on the page has no reconstruction loss, so no gradient reaches the decoder."""

    class MarginOnly(Task):
        def loss(self, output, target, images):
            return ops.margin_loss(output.activations, target)

    model = small_model()
    before = {name: value.clone() for name, value in model.decoder.state_dict().items()}
    trainer = Trainer(model, tmp_path, task=MarginOnly())
    assert trainer.fit(Batches(digits.subset(range(64)), 32, seed=1), epochs=1)
    assert_same(before, {name: value.cpu() for name, value in model.decoder.state_dict().items()})
    assert not torch.equal(model.routing.weight, small_model().routing.weight)
    text = "return ops.margin_loss(output.activations, target)"
    assert text in PAGE
