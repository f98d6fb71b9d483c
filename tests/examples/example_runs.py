"""What the tests of runs share: small networks, a few images, and ways to compare two runs."""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import baseline, checkpoint, pictures, runner, training
from tritoncaps import models
from tritoncaps.data import Dataset, load_dataset
from tritoncaps.layers import ReconstructionDecoder
from tritoncaps.models import CapsNet

# Three epochs of three batches. The last batch is smaller.
NEW = (
    "--model=capsnet", "--device=cpu", "--precision=fp32", "--epochs=3", "--batch-size=32",
    "--test-batch-size=32", "--lr=0.003", "--warmup-steps=2", "--log-interval=1",
)  # fmt: skip

# Measured times, the only fields in which two equal runs differ.
TIMES = ("seconds", "images_per_second")

Setter = Callable[[Any, str, Any], None]


def small_network(name: str, **kwargs: Any) -> nn.Module:
    """Build the named network, a thousand times smaller."""
    if name == baseline.CNN:
        return baseline.ConvNet(**{**kwargs, "channels": (4, 4, 4), "hidden": (8, 8)})
    if name == "inverted_capsnet":
        return models.create_model(name, channels=(4, 4), blocks=(1, 1), capsule_types=2, **kwargs)
    if name == "matrix_capsnet":
        return models.create_model(name, channels=(4, 2, 2, 2), **kwargs)
    if name == "efficient_capsnet":
        return models.create_model(name, primary_capsules=2, **{"decoder_hidden": (8, 8), **kwargs})
    channels: dict[str, Any] = {"capsnet": 8, "conv_capsnet": (8, 8), "deep_capsnet": (8, 8)}
    model = models.create_model(name, channels=channels[name], capsule_types=2, **kwargs)
    shape = (1, *kwargs.get("image_size", (28, 28)))
    if kwargs.get("reconstruction", True):
        model.decoder = ReconstructionDecoder(10, 16, shape, hidden=(16, 32))
    return model


def small_model(seed: int = 1) -> CapsNet:
    """Build a small CapsNet from a seed."""
    torch.manual_seed(seed)
    model = small_network("capsnet")
    assert isinstance(model, CapsNet)
    return model


def few_digits(train: int = 90, test: int = 40) -> Dataset:
    """Take the first of the embedded digits."""
    digits = load_dataset("digits")
    return replace(
        digits,
        train=digits.train.subset(range(train)),
        test=digits.test.subset(range(test)),
        note="a few digits",
    )


def make_small(set_attribute: Setter, dataset: Dataset, *, draws: bool = False) -> None:
    """Shrink the networks and data of train_mnist.py. Without `draws` it draws no pictures."""
    set_attribute(baseline, "create_network", small_network)
    set_attribute(runner, "load_dataset", lambda *args, **options: dataset)
    if not draws:
        set_attribute(pictures, "draw", lambda *args: None)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ask for a stop after so many steps, counted over all runs."""
    inner, done = training.Trainer._step, [0]

    def step(self: training.Trainer, *args: Any) -> tuple[Tensor, Tensor]:
        result = inner(self, *args)
        done[0] += 1
        self._stop_requested |= done[0] == steps
        return result

    monkeypatch.setattr(training.Trainer, "_step", step)


def crash_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Fail after so many steps, counted over all runs."""
    inner, done = training.Trainer._step, [0]

    def step(self: training.Trainer, *args: Any) -> tuple[Tensor, Tensor]:
        if done[0] == steps:
            raise MemoryError
        done[0] += 1
        return inner(self, *args)

    monkeypatch.setattr(training.Trainer, "_step", step)


def snapshot(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Return every file below a directory, with its content and modification time."""
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file()
    }


def untimed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out measured times."""
    return {key: value for key, value in record.items() if key not in TIMES}


def summary(directory: Path) -> list[dict[str, str]]:
    """Read summary.csv."""
    with (directory / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def metrics(directory: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, without the measured speed."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [untimed(json.loads(line)) for line in lines]


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Assert that two nested values are the same to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert a == b, where


def assert_same_run(a: Path, b: Path, *, in_one_process: bool = True) -> None:
    """Assert that two directories hold the same run, except for times and flags of a single start.

    Python's and numpy's generators start afresh in every process. No run uses them.
    """
    states = []
    for run in (a, b):
        state = checkpoint.load(run / "last.safetensors")
        state["rows"] = [untimed(row) for row in state["rows"]]
        state["progress"] = untimed(state["progress"])
        if not in_one_process:
            state["rng"] = state["rng"]["torch"]
        states.append({key: value for key, value in state.items() if key != "args"})
    assert_same(*states)
    for name in ("model_best.safetensors", "config.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert metrics(a) == metrics(b)
    assert [untimed(row) for row in summary(a)] == [untimed(row) for row in summary(b)]
