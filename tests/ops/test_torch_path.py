"""The torch path gives the same however it slices its work, and its slices fit."""

import warnings
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes
from torch.testing import assert_close

from tritoncaps import ops
from tritoncaps._operators import INTERPRETED
from tritoncaps._torch_path import _passes, _slices, squash
from tritoncaps.testing import CHECKS, OPERATORS, cases, compare, draw_inputs, evaluate

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the operators run the kernels"),
    pytest.mark.usefixtures("plain_torch"),
]

CPU = torch.device("cpu")
MB = 1 << 20
ROUTINGS = [
    row for row in OPERATORS.values() if row.registered is not None and "coupling?" in row.outputs
]

# How many bytes a slice may take, so that it holds all input capsules, a few, or one.
SIZES = {"all capsules": 1 << 40, "a few": 2000, "one": 1}
sizes = pytest.mark.parametrize("size", SIZES)


def sliced(size):
    return mock.patch.object(_slices, "slice_bytes", lambda device: SIZES[size])


@pytest.mark.parametrize("operator", ROUTINGS, ids=str)
@given(data=st.data(), size=st.sampled_from(list(SIZES)))
def test_a_routing_agrees_however_it_is_sliced(operator, data, size):
    case = data.draw(cases(operator))
    with sliced(size):
        results = compare(operator, case, CPU)
    gradients = [result for name, result in results.items() if name.startswith("gradient")]
    assert all(result.is_contiguous() for result in gradients)


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prediction_vectors_in_slices(size, dtype):
    operator = OPERATORS["prediction_vectors"]
    inputs = draw_inputs(operator, dtype=dtype, layout="transposed")
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    with sliced(size):
        actual = operator.function(**inputs)
    assert_close(actual, operator.reference(**exact).to(dtype))


@pytest.mark.parametrize("operator", ROUTINGS, ids=str)
def test_registration_is_right_in_slices(operator):
    """Results have the strides that their fakes promise the compiler."""
    with sliced("one"):
        CHECKS["registration"](operator, CPU, traced=False)


def test_compiles_with_inductor_in_slices():
    """Inductor asserts the strides of every result that it uses."""
    torch._dynamo.reset()
    inputs = draw_inputs(OPERATORS["fused_dynamic_routing"], optional=())
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def whole(u, weight):
        return ops.fused_dynamic_routing(u.sin(), weight.cos()).square().sum()

    with warnings.catch_warnings(), sliced("one"):
        warnings.simplefilter("ignore")  # inductor uses deprecated functions
        compiled = torch.compile(whole, fullgraph=True)
        results = [torch.autograd.grad(f(*leaves), leaves) for f in (compiled, whole)]
    assert_close(*results)


@pytest.mark.parametrize("operator", ROUTINGS, ids=str)
@given(data=st.data(), size=st.sampled_from(list(SIZES)))
def test_nan_stays_in_its_image_however_it_is_sliced(operator, data, size):
    case = data.draw(cases(operator, (torch.float32,)))
    inputs = {name: x.contiguous().clone() for name, x in case.inputs(operator).items()}
    first = next(iter(inputs))
    with sliced(size):
        expected = operator.call(inputs, case.options)[0]
        inputs[first][0] = float("nan")
        actual = operator.call(inputs, case.options)[0]
    assert actual[0].isnan().all()
    assert_close(actual[1:], expected[1:])


# EM routing ---------------------------------------------------------------------------------------


CONV_EM = OPERATORS["conv_em_routing"]


@pytest.mark.parametrize("competition", ["children", "position"])
def test_groups_of_rows_give_the_same(competition):
    """The smallest group: a row, or an image where its positions compete."""
    inputs = draw_inputs(CONV_EM, {**CONV_EM.small_sizes, "B": 2, "H": 4, "W": 3})
    options = CONV_EM.defaults | {"competition": competition, "return_assignment": True}
    expected = evaluate(CONV_EM, inputs, options)
    with sliced("one"):
        results = evaluate(CONV_EM, inputs, options)
    for name, result in results.items():
        assert_close(result, expected[name], msg=name)


def test_a_training_step_takes_far_less_memory_than_the_votes():
    """This is the first convolution of the paper's small network, with half a batch."""
    sizes = {"B": 32, "H": 14, "W": 14, "C": 8, "R": 4, "P": 4, "J": 16, "Q": 4, "K": 3}
    inputs = draw_inputs(CONV_EM, sizes, dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    votes = 32 * 36 * 72 * 16 * 16 * 4
    with LiveBytes() as live:
        v, a = ops.conv_em_routing(*leaves, stride=2)
        (v.square().sum() + a.sum()).backward()
    assert live.peak < votes / 3


# Squash -------------------------------------------------------------------------------------------


LENGTHS = [0.0, 1e-38, 1e-30, 1e-10, 1.0, 1e10, 1e25, 3e38, float("inf")]


@pytest.mark.parametrize("form", ["quadratic", "exponential"])
@pytest.mark.parametrize("length", LENGTHS)
def test_squash_where_float32_is_summed_in_itself(monkeypatch, length, form):
    """As on a device without float64."""
    s = length * torch.tensor([[0.6, 0.0, -0.8], [-0.6, 0.8, 0.0]]).nan_to_num()
    grad_v = torch.tensor([[1.0, -2.0, 3.0], [0.5, 1.0, 2.0]])
    expected = [squash.squash_fwd(s, form), squash.squash_bwd(grad_v, s, form)]
    monkeypatch.setattr(squash, "_SUM_IN_FLOAT64", set())
    actual = [squash.squash_fwd(s, form), squash.squash_bwd(grad_v, s, form)]
    assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=1e-36)
    assert all(result.isnan().all() == (length == float("inf")) for result in actual)


# The slices ---------------------------------------------------------------------------------------


@given(
    st.tuples(*[st.integers(0, most) for most in (300, 3000, 300, 64)]),
    st.integers(0, 20),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_slices_cover_every_capsule_once_and_fit_or_are_single(shape, backward_passes, dtype):
    B, I, J, D = shape
    like = torch.empty(0, dtype=dtype)
    parts = _passes.slices_for(shape, backward_passes, like)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(I))
    lengths = {_slices.length(part) for part in parts}
    longest = max(lengths, default=0)
    assert longest <= 1 or longest * B * J * D * dtype.itemsize <= _slices.slice_bytes(CPU)


def test_slices_are_about_equal():
    with mock.patch.object(_slices, "slice_bytes", lambda device: 9000):  # 30 capsules
        parts = _slices.slices(100, 300, CPU)
    assert [_slices.length(part) for part in parts] == [25, 25, 25, 25]


def test_slices_grow_with_the_threads(monkeypatch):
    one, accelerator = (_slices.slice_bytes(torch.device(name)) for name in ("cpu", "meta"))
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3 * threads)
    assert _slices.slice_bytes(CPU) == 3 * one
    assert _slices.slice_bytes(torch.device("meta")) == accelerator
