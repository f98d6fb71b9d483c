"""Programs of torch's own operators alone: right for every operator, model and batch size."""

import subprocess
import sys

import pytest
import torch
from exported import Call, difference, tensors_of
from torch.utils._python_dispatch import TorchDispatchMode

from tritoncaps import Capsules, RoutedCapsules, export, ops
from tritoncaps.layers import CapsuleHead, ReconstructionDecoder
from tritoncaps.models import CapsuleOutput
from tritoncaps.testing import OPERATORS, SIZES, draw_inputs

REGISTERED = [row for row in OPERATORS.values() if row.registered is not None]


def test_every_operator_has_a_formula():
    names = {overload.name() for overload in export.decompositions()}
    assert names == {f"tritoncaps::{operator}" for operator in REGISTERED}


def variants(operator):
    """The usual options, and each option at each of its other values."""
    yield operator.defaults
    for name, values in operator.options.items():
        yield from (operator.defaults | {name: value} for value in values[1:])


class Formulas(TorchDispatchMode):
    """Computes each operator by its formula, and counts them."""

    def __init__(self):
        super().__init__()
        self.table, self.count = export.decompositions(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.table
        return self.table.get(func, func)(*args, **(kwargs or {}))


@pytest.mark.parametrize("operator", REGISTERED, ids=str)
def test_a_formula_is_its_operator(operator):
    inputs = draw_inputs(operator)
    for options in variants(operator):
        with Formulas() as formulas:
            results = operator.call(inputs, options)
        assert formulas.count == 1
        torch.testing.assert_close(results, operator.call(inputs, options))


@pytest.mark.parametrize("operator", REGISTERED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_formulas_accumulate_in_float32(operator, dtype):
    """The result of float32 is rounded once: it is off by half a unit in the last place."""
    options = operator.defaults
    inputs = draw_inputs(operator, {**SIZES, "I": 500}, dtype=dtype)
    with Formulas():
        results = operator.call(inputs, options)
    exact = operator.call({name: tensor.double() for name, tensor in inputs.items()}, options)
    for result, expected in zip(results, exact, strict=True):
        assert result.dtype == dtype
        unit = torch.finfo(dtype).eps * expected.abs().max()
        assert (result - expected).abs().max() <= 0.51 * unit


@pytest.mark.parametrize("operator", REGISTERED, ids=str)
def test_formulas_replace_the_operator_in_a_program(operator):
    batch = torch.export.Dim("batch")
    shapes = [{0: batch} if axes.startswith("B") else None for axes in operator.axes.values()]
    program = torch.export.export(
        Call(operator, operator.defaults),
        tuple(draw_inputs(operator).values()),
        dynamic_shapes=(tuple(shapes),),
    ).run_decompositions(export.decompositions())
    assert "tritoncaps" not in str(program.graph)
    for B in (1, 5):
        inputs = draw_inputs(operator, {**SIZES, "B": B})
        results = program.module()(*inputs.values())
        torch.testing.assert_close(results, operator.call(inputs, operator.defaults))


def test_a_program_returns_plain_containers(small_model):
    model = small_model("capsnet", reconstruction=False)
    result = export.to_program(model, torch.rand(1, 1, 28, 28)).module()(torch.rand(3, 1, 28, 28))
    assert {name: tuple(tensor.shape) for name, tensor in result.items()} == {
        "activations": (3, 10),
        "poses": (3, 10, 16),
    }


def test_a_program_of_a_head_takes_any_batch():
    head = CapsuleHead(3, 2, feature_size=4)
    program = export.to_program(head, torch.rand(1, 3, 4, 4)).module()
    features = torch.rand(5, 3, 4, 4)
    assert difference(program(features), tensors_of(head(features))) <= 1e-6


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = RoutedCapsules(6, 4, 3, 5)

    def forward(self, first, second):
        return self.layer(first), None, self.layer(second)


def test_one_tensor_given_twice_is_two_inputs():
    module, u = Twice(), torch.rand(2, 6, 4)
    program = export.to_program(module, (u, u)).module()
    first, second = torch.rand(3, 6, 4), torch.rand(3, 6, 4)
    found, (one, _, other) = program(first, second), module(first, second)
    torch.testing.assert_close(found, (one, other))


def test_a_loss_takes_any_batch():
    class Loss(torch.nn.Module):
        def forward(self, activations, target):
            return ops.margin_loss(activations, target)

    program = export.to_program(Loss(), (torch.rand(3, 4), torch.tensor([0, 1, 2]))).module()
    activations, target = torch.rand(5, 4), torch.tensor([3, 2, 1, 0, 3])
    torch.testing.assert_close(program(activations, target), ops.margin_loss(activations, target))


def test_capsules_are_one_argument():
    decoder = ReconstructionDecoder(3, 4, (1, 5, 5))

    def capsules(B):
        return Capsules(torch.rand(B, 3, 4), torch.rand(B, 3))

    program = export.to_program(decoder, capsules(1)).module()
    given = capsules(6)
    torch.testing.assert_close(program(given), decoder(given))


class Agreement(torch.nn.Module):
    """A user's own module, which calls the operators and returns what it likes."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 4, 3, 5))

    def forward(self, u, /, prior=None, *, iterations=2):
        u_hat = ops.prediction_vectors(ops.squash(u, form="exponential"), self.weight)
        return ops.dynamic_routing(u_hat, iterations, prior=prior, return_coupling=True)


def test_a_program_of_a_module_that_calls_the_operators():
    module = Agreement()
    for B in (0, 9):
        # The sizes of the example do not matter.
        program = export.to_program(module, torch.rand(B, 6, 4)).module()
        u = torch.rand(4, 6, 4)
        result = program(u)
        assert type(result) is tuple
        torch.testing.assert_close(result, module(u))


def test_fixed_sizes_are_those_of_the_example():
    program = export.to_program(
        Agreement(), (torch.rand(2, 6, 4), torch.rand(6, 3)), dynamic_batch=False
    )
    assert program.module()(torch.rand(2, 6, 4), torch.rand(6, 3))[0].shape == (2, 3, 5)
    with pytest.raises(Exception, match="== 2"):
        program.module()(torch.rand(3, 6, 4), torch.rand(6, 3))


def test_a_model_is_exported_for_evaluation_and_keeps_its_modes(small_model):
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), small_model("capsnet"))
    model.train()
    model[1].primary.eval()
    before = [module.training for module in model.modules()]
    images = torch.rand(2, 1, 28, 28)
    results = export.to_program(model, images).module()(images)
    assert [module.training for module in model.modules()] == before
    assert difference(results, tensors_of(model.eval()(images))) <= 1e-6
    with pytest.raises(ValueError, match="images"):
        export.to_program(model.train(), torch.rand(2, 3, 28, 28))
    assert all(module.training for module in model.modules())


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposed", [False, True])
def test_torch_saves_and_loads_our_output(small_model, tmp_path, decomposed):
    model, images = small_model("capsnet").eval(), torch.rand(2, 1, 28, 28)
    program = torch.export.export(model, (images,))
    if decomposed:
        program = program.run_decompositions(export.decompositions())
    torch.export.save(program, tmp_path / "model.pt2")
    output = torch.export.load(tmp_path / "model.pt2").module()(images)
    assert type(output) is CapsuleOutput
    assert difference(tensors_of(output), tensors_of(model(images))) <= 1e-6


def test_torch_saves_and_loads_capsules(tmp_path):
    head, features = CapsuleHead(3, 2, feature_size=4), torch.rand(2, 3, 4, 4)
    torch.export.save(torch.export.export(head, (features,)), tmp_path / "head.pt2")
    loaded = torch.export.load(tmp_path / "head.pt2").module()
    assert type(loaded(features)) is Capsules
    torch.testing.assert_close(loaded(features), head(features))


def test_a_compiled_package_runs_without_this_package(tmp_path):
    layer, u = RoutedCapsules(2, 2, 2, 2, iterations=1), torch.rand(3, 2, 2)
    program = export.to_program(layer, u[:1])
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "layer.pt2"),
        # The compiler need not optimize, nor try which vector instructions there are.
        inductor_configs={"cpp.vec_isa_ok": False, "aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    torch.save((u, layer(u).detach()), tmp_path / "expected.pt")
    code = """
import sys, torch
sys.modules["tritoncaps"] = None
layer = torch._inductor.aoti_load_package("layer.pt2")
u, expected = torch.load("expected.pt")
for count in (1, 3):
    torch.testing.assert_close(layer(u[:count]), expected[:count], rtol=0, atol=1e-6)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# Errors -------------------------------------------------------------------------------------------


ERRORS = {
    "no module": (lambda: (ops.squash, torch.rand(2, 3)), TypeError, "model must be an nn.Module"),
    "no tensor": (lambda: (Agreement(), (3, None)), TypeError, "example must be a tensor"),
    "a list": (lambda: (Agreement(), [torch.rand(2, 6, 4)]), TypeError, "example must be a tensor"),
    "batches that differ": (
        lambda: (Agreement(), (torch.rand(2, 6, 4), torch.rand(6, 3))),
        ValueError,
        r"\(2, 6, 4\), \(6, 3\); use dynamic_batch=False",
    ),
    "no axis": (lambda: (Agreement(), torch.tensor(1.0)), ValueError, "first axis of every tensor"),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=f"^to_program: .*{message}"):
        export.to_program(*call())


def test_a_flag_must_be_a_bool():
    with pytest.raises(TypeError, match="to_program: dynamic_batch must be a bool, got int"):
        export.to_program(Agreement(), torch.rand(2, 6, 4), dynamic_batch=1)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("folder.pt2", IsADirectoryError, "is a directory; give the name of a file in it"),
        ("missing/model.pt2", FileNotFoundError, "missing, which is no directory; create it"),
        ("model.pt2", PermissionError, "which cannot be written to"),
    ],
)
def test_a_path_is_checked_before_the_export(monkeypatch, tmp_path, path, error, message):
    (tmp_path / "folder.pt2").mkdir()
    monkeypatch.setattr("os.access", lambda *args: False)  # root may write anywhere
    with pytest.raises(error, match=f"^to_pt2: path .*{message}"):
        export.to_pt2("not exported", tmp_path / path, torch.rand(2, 6, 4))


def test_a_file_stays_whole_if_the_export_fails(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="u must have 3 axes"):
        export.to_pt2(RoutedCapsules(6, 4, 3, 5), path, torch.rand(2, 6))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_bytes() == b"before"
    with pytest.raises(ValueError, match=r"must end in \.pt2.*got 'model'"):
        export.to_pt2(RoutedCapsules(6, 4, 3, 5), "model", torch.rand(2, 6, 4))
