"""Checkpoints and weights with changed bytes are refused, or hold what they held before.

    pytest tests/reliability/test_fuzz_files.py --fuzz-seconds 120 --fuzz-seed 1000

tests/reliability/test_fuzz.py says how cases are drawn.
"""

import json
import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from reliability.fuzzing import (
    CLAIMS,
    Edit,
    assert_nothing_was_claimed,
    edited,
    edits,
    little_memory,
)
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from engine import checkpoint
from engine.checkpoint import CheckpointError
from tritoncaps import _files
from tritoncaps.models import create_model, load_model

STATE = {
    "epoch": 3,
    "weights": {"a": torch.arange(40.0).view(5, 8).T, "b": torch.ones(7, dtype=torch.bfloat16)},
    "rows": [{"loss": 0.5, "name": "x"}, (1, None, True)],
    "best": float("inf"),
    "steps": {0: 1, 1: 2},
}
KWARGS = {"channels": 2, "capsule_types": 1, "image_size": (18, 17), "num_classes": 2}


def assert_same(actual, expected):
    """Assert that two values are equal in every bit."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
    elif isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


def touch(value):
    """Read every byte of the tensors in a value, and return the number of bytes."""
    if isinstance(value, dict):
        return sum(touch(entry) for entry in value.values())
    if isinstance(value, (list, tuple)):
        return sum(touch(entry) for entry in value)
    if isinstance(value, Tensor):
        return len(bytes(value.untyped_storage()))
    assert value is None or isinstance(value, (bool, int, float, str))
    return 0


values = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(CLAIMS)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(("weights.a", "weights.b")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(("$tuple", "$float", "$dict", "$tensor", "$code", "", "model", "args")),
            inner,
            max_size=2,
        )
    ),
    max_leaves=12,
)


@dataclass(frozen=True)
class Forged:
    """A file of ours that another program rewrote. Its seal is valid, its contents are changed."""

    header: list[Edit] | str  # changes to the header, or a new one
    table: list[Edit]  # changes to the description of the tensors
    data: list[Edit]

    def content(self, original: bytes) -> bytes:
        """Return the bytes of the file."""
        table, data = _files._split(original)
        metadata = table.pop("__metadata__")
        del metadata["sha256"]
        if isinstance(self.header, str):
            metadata["header"] = self.header
        else:
            metadata["header"] = edited(metadata["header"].encode(), self.header).decode("latin-1")
        data = edited(bytes(data), self.data)
        start = edited(json.dumps(table).encode(), self.table).decode("latin-1")
        try:
            table = json.loads(start)
            metadata["sha256"] = _files._seal(metadata, table, memoryview(data))
            start = json.dumps({**table, "__metadata__": metadata})
        except (ValueError, TypeError):
            pass  # not JSON: reading the file has to report this
        return len(start.encode()).to_bytes(8, "little") + start.encode() + data


few_edits = st.lists(edits, max_size=2)
damaged = st.lists(edits, min_size=1, max_size=3)
forged = st.builds(
    Forged,
    header=few_edits | values.map(json.dumps),
    table=st.just([]) | few_edits,
    data=st.just([]) | few_edits,
)


def outcome(read, path):
    """Return what reading returns and what it raises. One of the two is None."""
    with little_memory():
        try:
            return read(path), None
        except CheckpointError as error:
            problem = error
    assert str(path) in str(problem)
    assert_nothing_was_claimed(problem)
    return None, problem


def test_checkpoints(fuzz, tmp_path):
    """A damaged file is refused. A forged one gives plain values and tensors that it contains."""
    last = tmp_path / "last.safetensors"
    checkpoint.save(checkpoint.previous_path(last), {**STATE, "epoch": 2})
    checkpoint.save(last, STATE)
    original = last.read_bytes()
    assert_same(checkpoint.load(last), STATE)

    def check(case):
        is_forged = isinstance(case, Forged)
        content = case.content(original) if is_forged else edited(original, case)
        last.write_bytes(content)
        state, problem = outcome(checkpoint.load, last)
        if problem is None:
            assert is_forged or content == original
            assert touch(state) <= len(content)
        else:
            assert str(problem).startswith(f"{last} ")
            state, path, warning = checkpoint.load_latest(tmp_path)
            assert state["epoch"] == 2
            assert path == checkpoint.previous_path(last)
            assert warning is not None

    fuzz(damaged | forged, check)


def test_weights_of_other_programs(fuzz, tmp_path):
    """Without a seal the contents may change, but never exceed what the file holds."""
    tensors = {"a": torch.arange(24.0).view(2, 3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    original = safetensors_bytes(tensors, {"format": "pt"})
    path = tmp_path / "weights.safetensors"

    def check(changes):
        path.write_bytes(edited(original, changes))
        read, problem = outcome(lambda path: _files.read_sealed(path, allow_unsealed=True), path)
        if problem is None:
            loaded, header = read
            assert header == {}
            assert touch(loaded) <= path.stat().st_size

    fuzz(damaged, check)


@pytest.mark.parametrize("kind", ["weights", "state"])
def test_models(fuzz, tmp_path, kind):
    """`load_model` returns a network, or says what is wrong with the file."""
    path = tmp_path / "last.safetensors"
    model = create_model("capsnet", **KWARGS)
    recipe = {"model": "capsnet", "model_kwargs": KWARGS}
    if kind == "weights":
        checkpoint.save_weights(path, model.state_dict(), recipe)
    else:
        checkpoint.save(path, {"args": recipe, "model": model.state_dict()})
    original = path.read_bytes()
    images = torch.zeros(1, 1, 18, 17)

    def check(case):
        is_forged = isinstance(case, Forged)
        path.write_bytes(case.content(original) if is_forged else edited(original, case))
        loaded, problem = outcome(load_model, path)
        if problem is not None:
            assert str(problem).startswith("load_model: ")
            return
        assert isinstance(loaded, nn.Module)
        if not is_forged:
            assert torch.equal(loaded(images).poses, model.eval()(images).poses)

    fuzz(damaged | forged, check)


def test_directories(fuzz, tmp_path):
    """A changed config.json is refused, or its model is the saved one, whatever is asked for."""
    create_model("capsnet", **KWARGS).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    original = config.read_bytes()
    shapes = {name: value.shape for name, value in load_model(tmp_path).state_dict().items()}

    def check(changes):
        config.write_bytes(edited(original, changes))
        for pretrained in (True, False):
            with warnings.catch_warnings():  # sizes far too large
                warnings.simplefilter("ignore", UserWarning)
                model, problem = outcome(
                    lambda path, asked=pretrained: create_model(f"local-dir:{path}", asked),
                    tmp_path,
                )
            if problem is not None:
                assert str(problem).startswith("create_model: ")
                continue
            assert {name: value.shape for name, value in model.state_dict().items()} == shapes

    fuzz(damaged, check)
