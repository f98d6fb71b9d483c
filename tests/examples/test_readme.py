"""The Python of the README runs as it stands."""

import re
from pathlib import Path

import torch
from example_runs import NEW, make_small

import train_mnist
from engine import baseline
from tritoncaps import models
from tritoncaps.data import load_dataset

README = (Path(__file__).parents[2] / "README.md").read_text()


def example(name):
    found = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_operators():
    names = {}
    exec(example("operators"), names)
    assert names["v"].shape == (64, 10, 16)
    assert all(p.grad.isfinite().all() for p in names["model"].primary.parameters())


def test_a_prediction_of_the_run_just_trained(tmp_path, monkeypatch, capsys, dataset):
    """The network is a small one, and answers what it answers."""
    monkeypatch.chdir(tmp_path)
    make_small(monkeypatch.setattr, dataset)
    small = {"channels": (8, 8), "capsule_types": 2}
    kwargs = ("--model-kwargs", *(f"{key}={value}" for key, value in small.items()))
    monkeypatch.setattr(baseline, "create_network", models.create_model)
    assert train_mnist.main([*NEW, "--model=deep_capsnet", "--epochs=1", *kwargs]) == 0
    capsys.readouterr()
    exec(example("predict"), {})
    image = load_dataset("digits").test.images[:1] / 255
    (run,) = Path("runs").iterdir()
    with torch.no_grad():
        answer = int(models.load_model(run)(image).activations.argmax())
    assert capsys.readouterr().out == f"{answer}\n"
