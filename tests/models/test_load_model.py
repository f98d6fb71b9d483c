"""`load_model`: what it reads from a directory or a file, and its errors if there is none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tritoncaps._files import write_sealed
from tritoncaps.models import CheckpointError, create_model, load_model

KWARGS = {"channels": 4, "capsule_types": 1, "image_size": (18, 20), "num_classes": 3}
HEADER = {"model": "capsnet", "model_kwargs": KWARGS, "epoch": 2, "class_names": ("a", "b", "c")}


@pytest.fixture
def model():
    return create_model("capsnet", **KWARGS).eval()


@pytest.fixture
def run(tmp_path, model):
    """A run directory as training leaves it. The weights of its last epoch are zeros."""
    write_sealed(tmp_path / "model_best.safetensors", model.state_dict(), HEADER)
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state = {"model": zeros, "args": {"model": "capsnet", "model_kwargs": KWARGS, "lr": 0.1}}
    write_sealed(tmp_path / "last.safetensors", {}, state)
    return tmp_path


@pytest.fixture
def foreign(tmp_path, model):
    """The same weights as another program would write them, with a config that names the model."""
    path = tmp_path / "foreign.safetensors"
    save_file(model.state_dict(), path)
    config = {"model": "capsnet", "model_kwargs": KWARGS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return path


def assert_same(loaded, model):
    assert not loaded.training
    assert type(loaded) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    images = torch.rand(2, 1, 18, 20)
    assert torch.equal(loaded(images).activations, model(images).activations)


class TestWhatIsLoaded:
    @pytest.mark.parametrize("kind", [str, Path])
    def test_the_best_weights_of_a_run(self, run, model, kind):
        assert_same(load_model(kind(run)), model)
        assert_same(load_model(kind(run / "model_best.safetensors")), model)

    def test_the_last_weights_of_a_run_without_best_ones(self, run):
        (run / "model_best.safetensors").unlink()
        for path in (run, run / "last.safetensors"):
            loaded = load_model(path)
            assert not loaded.training
            assert all(not value.any() for value in loaded.state_dict().values())

    def test_weights_of_another_program(self, foreign, model):
        assert_same(load_model(foreign), model)

    def test_the_file_comes_before_the_config(self, run, foreign, model):
        (run / "config.json").write_text('{"model": "deep_capsnet"}')
        assert_same(load_model(run / "model_best.safetensors"), model)

    def test_a_model_without_arguments(self, tmp_path):
        model = create_model("capsnet")
        write_sealed(tmp_path / "weights", model.state_dict(), {"model": "capsnet"})
        loaded = load_model(tmp_path / "weights")
        assert torch.equal(loaded.conv.weight, model.conv.weight)

    def test_weights_take_the_dtype_of_the_model(self, tmp_path, model):
        halves = {name: value.bfloat16() for name, value in model.state_dict().items()}
        write_sealed(tmp_path / "weights", halves, HEADER)
        weight = load_model(tmp_path / "weights").conv.weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, model.conv.weight.bfloat16().float())

    def test_the_device(self, run):
        assert load_model(run, device="meta").conv.weight.is_meta

    def test_the_callers_random_numbers_stay(self, run):
        before = torch.get_rng_state()
        load_model(run)
        assert torch.equal(torch.get_rng_state(), before)


def assert_refused(path, *parts):
    """The error names the function and contains every part."""
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    message = str(error.value)
    assert message.startswith("load_model: ")
    for part in parts:
        assert str(part) in message


class TestRefusal:
    def test_not_a_path(self):
        with pytest.raises(TypeError, match="load_model: path must be a str or a Path, got int"):
            load_model(3)

    def test_no_such_path(self, tmp_path):
        path = tmp_path / "nowhere"
        assert_refused(path, path, "does not exist; give a run directory or a .safetensors file")

    def test_a_name_that_is_almost_right(self):
        assert_refused("Efficient_CapsNets", "does not exist", "did you mean 'efficient_capsnet'?")

    def test_a_model_without_trained_weights(self):
        with pytest.raises(ValueError, match="load_model: there are no pretrained weights of deep"):
            load_model("deep_capsnet")

    def test_a_directory_without_weights(self, tmp_path):
        files = "holds neither model_best.safetensors nor last.safetensors"
        assert_refused(tmp_path, tmp_path, files, "train_mnist.py or save_pretrained wrote")

    def test_a_damaged_file(self, run):
        path = run / "model_best.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert_refused(run, path, "truncated or damaged", "use an earlier copy")

    def test_neither_a_header_nor_a_config(self, foreign):
        (foreign.parent / "config.json").unlink()
        advice = 'write one, such as {"model": "capsnet", "model_kwargs": {}}'
        assert_refused(foreign, foreign, "does not say which model it belongs to", advice)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "cannot be read: Expecting property name"),
            ("[" * 10**5, "cannot be read"),
            (b"\xff", "cannot be read: 'utf-8' codec"),
            ("[]", "has no entry 'model'; it should look like"),
            ('{"kwargs": {}}', "has no entry 'model'; it should look like"),
            (
                '{"model": "capsnet", "model_kwargs": [4]}',
                "of type list; it should be the arguments",
            ),
        ],
        ids=["not-json", "deep", "not-utf-8", "no-object", "no-model", "no-arguments"],
    )
    def test_a_useless_config(self, foreign, content, message):
        config = foreign.parent / "config.json"
        config.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert_refused(foreign, config, message)

    @pytest.mark.parametrize(
        ("recipe", "message"),
        [
            ({"model": "capsnt"}, "no model is named 'capsnt', there are capsnet"),
            ({"model": [1]}, "no model is named [1], there are capsnet"),
            ({"model": "capsnet", "model_kwargs": {"chanels": 4}}, "argument 'chanels'"),
            ({"model": "capsnet", "model_kwargs": {"channels": 0}}, "channels must be"),
        ],
        ids=["unknown-model", "no-name", "unknown-argument", "wrong-argument"],
    )
    def test_a_model_that_cannot_be_created(self, foreign, recipe, message):
        (foreign.parent / "config.json").write_text(json.dumps(recipe))
        assert_refused(foreign, foreign, "needs create_model(", message)

    @pytest.mark.parametrize(
        ("capsule_types", "message"),
        [(1, f"must be ({2**31 - 1}, 1, 9, 9)"), (2**31 - 1, "size calculation overflowed")],
        ids=["terabytes", "overflow"],
    )
    def test_a_claimed_size_is_not_allocated(self, foreign, capsule_types, message):
        sizes = {"channels": 2**31 - 1, "capsule_types": capsule_types}
        config = {"model": "capsnet", "model_kwargs": {**KWARGS, **sizes}}
        (foreign.parent / "config.json").write_text(json.dumps(config))
        assert_refused(foreign, foreign, message)

    def test_weights_that_do_not_fit(self, tmp_path, model):
        path = tmp_path / "weights"
        weights = model.state_dict()
        del weights["conv.bias"]
        weights["head.scale"] = torch.ones(1)
        weights["routing.weight"] = torch.ones(2, 3)
        write_sealed(path, weights, HEADER)
        shape = tuple(model.routing.weight.shape)
        assert_refused(
            path,
            f"{path} does not fit capsnet: it lacks conv.bias; the model has no head.scale; "
            f"routing.weight is (2, 3) and must be {shape}",
        )

    def test_a_long_list_of_misfits_is_cut(self, tmp_path, model):
        path = tmp_path / "weights"
        write_sealed(path, {"x": torch.ones(1)}, HEADER)
        rest = f"primary.conv.weight and {len(model.state_dict()) - 3} more"
        assert_refused(path, f"it lacks conv.weight, conv.bias, {rest}")

    @pytest.mark.parametrize(
        "state",
        [
            {"args": HEADER},
            {"args": HEADER, "model": 3},
            {"args": HEADER, "model": {"conv.weight": 3}},
        ],
        ids=["none", "no-dict", "no-tensor"],
    )
    def test_a_state_without_weights(self, tmp_path, state):
        write_sealed(tmp_path / "last.safetensors", {}, state)
        assert_refused(tmp_path, "last.safetensors does not fit capsnet: it lacks conv.weight")
