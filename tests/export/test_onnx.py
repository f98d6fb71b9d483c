"""ONNX files: ONNX Runtime computes what torch computes, for every model and operator."""

from pathlib import Path

import pytest
import torch
from exported import difference, tensors_of

from tritoncaps import RoutedCapsules, export, ops
from tritoncaps.testing import OPERATORS, draw_inputs

for _package in ("onnx", "onnxscript"):
    pytest.importorskip(_package, reason=f"{_package} is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def run(path, *inputs):
    """The results of a file by name, and its inputs, as names and shapes."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {
        entry.name: tensor.numpy()
        for entry, tensor in zip(session.get_inputs(), inputs, strict=True)
    }
    names = [entry.name for entry in session.get_outputs()]
    results = [torch.from_numpy(result) for result in session.run(names, given)]
    return dict(zip(names, results, strict=True)), [
        (entry.name, entry.shape) for entry in session.get_inputs()
    ]


WIDE = {"in_channels": 3, "image_size": (33, 40), "num_classes": 4}
MODELS = {
    "capsnet": WIDE,
    "conv_capsnet": {**WIDE, "image_size": (13, 17), "votes": "convolved"},
    "deep_capsnet": {
        "reconstruction": False,
        "gradient": "last",
        "shared_weights": True,
        "learned_prior": True,
        "pose_bias": True,
        "leaky": True,
    },
    "efficient_capsnet": WIDE,
    "inverted_capsnet": {"in_channels": 3, "image_size": (13, 17), "num_classes": 4},
    "matrix_capsnet": {
        **{"in_channels": 3, "image_size": (17, 19), "num_classes": 4},
        "min_variance": 0.05,  # a smaller one enlarges roundings
    },
}


@pytest.mark.parametrize(("name", "arguments"), MODELS.items())
def test_a_file_is_its_model(small_model, tmp_path, name, arguments):
    model = small_model(name, **arguments).eval()
    for parameter in model.parameters():  # a prior starts at 0
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    export.to_onnx(model, tmp_path / "model.onnx", torch.rand(1, *model.image_shape))
    for B in (1, 2, 7):
        images = torch.rand(B, *model.image_shape)
        results, inputs = run(tmp_path / "model.onnx", images)
        assert difference(results, tensors_of(model(images))) <= 1e-5
    assert inputs == [("images", ["batch", *model.image_shape])]
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    # Nothing says where on this machine the model was written.
    content = (tmp_path / "model.onnx").read_bytes()
    assert b".py" not in content and str(Path(torch.__file__).parent).encode() not in content


class Loss(torch.nn.Module):
    """A user's own module with two inputs and results of several kinds."""

    def forward(self, poses, target, scale=None, *, form="exponential"):
        v = ops.squash(poses, form=form)
        lengths = v.norm(dim=-1)
        loss = ops.margin_loss(lengths, target, reduction="none")
        return {"none": None, "loss": loss, "parts": (v, {"lengths": lengths})}


def test_names_are_those_of_forward_and_its_result(tmp_path):
    poses, target = torch.rand(3, 4, 5), torch.tensor([1, 3, 0])
    export.to_onnx(Loss(), tmp_path / "loss.onnx", (poses[:1], target[:1]))
    results, inputs = run(tmp_path / "loss.onnx", poses, target)
    assert inputs == [("poses", ["batch", 4, 5]), ("target", ["batch"])]
    expected = Loss()(poses, target)
    v, lengths = expected["parts"][0], expected["parts"][1]["lengths"]
    named = {"loss": expected["loss"], "parts_0": v, "parts_1_lengths": lengths}
    assert difference(results, named) <= 1e-5


class AllOperators(torch.nn.Module):
    """Every operator of the table, each on its own inputs."""

    def forward(self, *inputs):
        rest, results = list(inputs), []
        for operator in OPERATORS.values():
            options = {
                name: True if name.startswith("return_") else values[0]
                for name, values in operator.options.items()
            }
            given = {name: rest.pop(0) for name in operator.axes}
            results.extend(operator.call(given, options))
        return tuple(results)


def test_every_operator_of_the_table(tmp_path):
    inputs = [
        tensor
        for operator in OPERATORS.values()
        for tensor in draw_inputs(operator, dtype=torch.float32).values()
    ]
    module = AllOperators()
    export.to_onnx(module, tmp_path / "all.onnx", tuple(inputs), dynamic_batch=False)
    results, _ = run(tmp_path / "all.onnx", *inputs)
    assert difference(results, tensors_of(module(*inputs))) <= 1e-5


# Errors -------------------------------------------------------------------------------------------


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx and onnxscript.*'tritoncaps\[export\]'"):
        export.to_onnx(RoutedCapsules(6, 4, 3, 5), tmp_path / "layer.onnx", torch.rand(2, 6, 4))


def test_a_path_is_checked_before_the_export(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"^to_onnx: path .* is a directory"):
        export.to_onnx("not exported", tmp_path, torch.rand(2, 4))


def test_one_name_for_an_input_and_an_output_is_refused(tmp_path):
    class Same(torch.nn.Module):
        def forward(self, poses):
            return {"poses": ops.squash(poses), "none": None}

    with pytest.raises(ValueError, match="to_onnx: poses is the name of an input and of an output"):
        export.to_onnx(Same(), tmp_path / "same.onnx", torch.rand(2, 4))


def test_weights_beyond_the_format_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "_LARGEST_ONNX", 1440)  # 6·4·3·5 float32
    with pytest.raises(ValueError, match="the weights take 1,440 bytes"):
        export.to_onnx(RoutedCapsules(6, 4, 3, 5), tmp_path / "layer.onnx", torch.rand(2, 6, 4))
    assert not list(tmp_path.iterdir())
