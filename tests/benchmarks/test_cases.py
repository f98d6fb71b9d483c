"""What the benchmarks measure: inputs, rivals, floors and sweeps, all from the operator table."""

import pytest
import torch

from benchmarks import operators, rivals, roofline, scaling
from benchmarks.cases import (
    MATRIX_LAYERS,
    SHAPES,
    Case,
    Shape,
    folded_case,
    matrix_case,
    operator_names,
)
from benchmarks.oracle import Oracle
from benchmarks.roofline import Ceilings, Floor, floor, measure_ceilings
from benchmarks.timing import CpuClock
from tritoncaps import _operators, testing

CPU = torch.device("cpu")


def test_every_operator_is_measured_and_the_main_one_comes_first():
    assert operator_names()[0] == "fused_dynamic_routing"
    assert {*operator_names()} == testing.OPERATORS.keys() >= {"routing_pass"}


@pytest.mark.parametrize("op", operator_names())
def test_a_case_draws_what_the_table_says(op):
    case = Case(op, Shape(7, 3, 4, 5), B=6, precision="bf16")
    inputs, grads = case.arguments(CPU), case.output_gradients(CPU)
    outputs = case.operator.call(inputs, case.options)
    assert [grad.shape for grad in grads.values()] == [output.shape for output in outputs]
    assert {tensor.dtype for tensor in [*inputs.values(), *grads.values()]} == {torch.bfloat16}
    # The batch of 6, if a tensor has it, is the first axis.
    assert {name for name, tensor in inputs.items() if tensor.shape[0] != 6} == (
        case.shared & inputs.keys()
    )


def test_the_name_of_a_case_tells_everything_about_it():
    case = Case("fused_dynamic_routing", SHAPES["mnist"], B=64, name="mnist")
    assert str(case) == "fused_dynamic_routing mnist 1152x8->10x16 B=64 r=3 fp32"
    case = Case(
        *("dynamic_routing", Shape(7, 3, 4, 5), 6),
        iterations=2,
        precision="bf16",
        chosen={"gradient": "last"},
        optional=("prior",),
    )
    assert str(case) == "dynamic_routing 7x3->4x5 B=6 r=2 bf16 with prior gradient=last"
    assert case.options == case.operator.defaults | {"iterations": 2, "gradient": "last"}
    assert case.arguments(CPU).keys() == {"u_hat", "prior"}


def test_every_option_is_checked_where_precision_decides():
    cases = list(operators.check_cases(CPU, quick=True))
    for op in operator_names():
        options = testing.OPERATORS[op].options
        checked = [case.options for case in cases if case.op == op]
        for name, values in options.items():
            assert {*values} <= {options[name] for options in checked}, (op, name)
    # Three iterations of EM magnify roundings.
    precisions = {(case.iterations, case.precision) for case in cases if case.op == "em_routing"}
    assert precisions >= {(2, "fp32"), (2, "bf16"), (3, "fp64")} and (3, "fp32") not in precisions


# The two largest have shorter input poses, which do not change the size of û.
SCALED = {**SHAPES, "classes1000": Shape(1152, 2, 1000, 16), "large": Shape(4608, 2, 32, 16)}


@pytest.mark.parametrize("shape", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("op", ["fused_dynamic_routing", "routing_pass"])
def test_couplings_are_far_from_uniform_but_not_saturated(op, shape):
    case = Case(op, shape, B=1, chosen={"return_coupling": True})
    _, coupling = case.operator.call(case.arguments(CPU), case.options, case.operator.reference)
    largest = coupling.amax(dim=-1).mean().item()
    assert 1.3 / shape.J < largest < 0.76


@pytest.mark.parametrize("name", MATRIX_LAYERS)
def test_a_layer_has_as_many_votes_as_positions_folded_into_the_batch(name):
    case = matrix_case(name, 64, 3)
    assert {**case.output_shapes}["v"][-3:] == (MATRIX_LAYERS[name].J, 4, 4)
    rows = {"conv1": 36 * 64, "conv2": 16 * 64, "class": 64}[name.split("-")[1]]
    assert 64 * case.votes == rows * case.shape.I * case.shape.J * 16
    if case.op == "conv_em_routing":
        assert folded_case(name, 64, 3).input_shapes["poses"] == (rows, case.shape.I, 4, 4)


@pytest.mark.parametrize("op", ["em_routing", "conv_em_routing"])
def test_the_broadcast_form_of_em_routing_is_right(op):
    sizes = {"H": 5, "W": 4, "C": 2, "K": 3, "R": 4, "Q": 4}
    chosen = {"competition": "position", "stride": 1} if op.startswith("conv") else {}
    case = Case(op, Shape(18, 4, 3, 16), B=2, iterations=3, chosen=chosen, more=sizes)
    Oracle(case, CPU).check(rivals.op_rival("broadcast", case, CPU))


def test_an_operators_own_rival_is_a_function_in_its_file():
    cuda = torch.device("cuda")
    names = {
        op: rivals.rival_names(Case(op, SHAPES["tiny"], B=2), cuda)
        for op in ("fused_dynamic_routing", "routing_pass")
    }
    own = ["broadcast", "torch path"]
    assert names["fused_dynamic_routing"] == ["eager", "compile", *own, "triton"]
    assert names["routing_pass"] == ["eager", "compile", "triton"]
    with pytest.raises(KeyError, match="broadcast"):
        rivals.op_rival("broadcast", Case("squash", Shape(7, 3, 4, 5), B=2), CPU)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"competition": "position"}, ["broadcast"]),
        ({"competition": "children"}, []),
        ({"competition": "position", "padding": 1}, []),
    ],
)
def test_a_rival_is_left_out_where_it_cannot_take_the_call(chosen, expected):
    case = Case("conv_em_routing", SHAPES["tiny"], B=2, chosen=chosen)
    names = rivals.rival_names(case, CPU)
    assert names == ["eager", "compile", *expected, rivals.ours(CPU)]


# Caches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "expected"),
    [({"2": "1024K", "3": "32768K"}, 32 << 20)]
    + [(listed, 8 << 20) for listed in ({}, {"2": "1024K"}, {"3": ""}, {"3": "?"}, {"3": "0K"})],
)
def test_the_last_cache_is_as_large_as_the_system_says(tmp_path, monkeypatch, listed, expected):
    for level, size in listed.items():
        folder = tmp_path / f"index{level}"
        folder.mkdir()
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{size}\n")
    monkeypatch.setattr(operators, "_CACHES", tmp_path)
    assert operators.last_cache_bytes(CPU) == expected


# Floors -------------------------------------------------------------------------------------------


def test_floor_of_the_mnist_shape():
    case = Case("fused_dynamic_routing", SHAPES["mnist"], B=128)
    forward, both = floor(case, "forward"), floor(case, "both")
    assert round(forward.bytes / 1e6, 1) == 10.7
    assert round(forward.flops / 1e9, 2) == 1.32
    assert round((both.flops - forward.flops) / 1e9, 1) == 2.4
    ceilings = Ceilings(4.3e12, {"fp32": 67e12})
    assert round(1e6 * ceilings.seconds(forward, "fp32"), 1) == 19.7  # arithmetic decides
    squash = Case("squash", SHAPES["mnist"], B=128)
    moved = 2 * 4 * 128 * 1152 * 8
    assert ceilings.seconds(floor(squash, "forward"), "fp32") == pytest.approx(moved / 4.3e12)


B, I, P, J, D = 6, 7, 3, 4, 5
PAIRS = B * I * J * D  # values of û
FLOORS = {
    # Values moved and multiply-adds: forward, then backward.
    "prediction_vectors": (
        (B * I * P + I * P * J * D + PAIRS, P * PAIRS),
        (2 * (B * I * P + I * P * J * D) + PAIRS, 2 * P * PAIRS),
    ),
    "dynamic_routing": ((PAIRS + B * J * D, 5 * PAIRS), (2 * PAIRS + B * J * D, 11 * PAIRS)),
    "routing_pass": (
        (B * I * P + I * P * J * D + 2 * B * J * D, (P + 2) * PAIRS),
        (2 * (B * I * P + I * P * J * D + B * J * D) + B * J * D, 2 * (P + 2) * PAIRS),
    ),
    "squash": ((2 * B * I * P, 0), (3 * B * I * P, 0)),
    "margin_loss": ((B * J + B, 0), (2 * B * J + B, 0)),
}


@pytest.mark.parametrize("op", FLOORS)
def test_floor_is_what_the_axes_say(op):
    """The FLOPs come from the operator's file, or else from torch's counter."""
    case = Case(op, Shape(I, P, J, D), B)
    for phase, (values, products) in zip(("forward", "backward"), FLOORS[op], strict=True):
        assert floor(case, phase) == Floor(4 * values, 2 * products)


def test_torch_counts_no_more_than_an_operators_own_formula():
    """The formula adds what has to be recomputed to the mathematics."""
    for op in ("dynamic_routing", "fused_dynamic_routing"):
        case = Case(op, Shape(I, P, J, D), B)
        for phase in ("forward", "backward"):
            counted = roofline.counted_flops(case, phase)
            assert 0 < counted <= floor(case, phase).flops


def test_ceilings_come_from_a_copy_and_a_product():
    ceilings = measure_ceilings(CPU, CpuClock(), ["fp32"])
    # From the slowest computer that runs torch to ten times the fastest one.
    assert 1e8 < ceilings.copy_bytes_per_second < 1e14
    assert 1e8 < ceilings.gemm_flops_per_second["fp32"] < 1e16
    for rate in ceilings.onednn_flops_per_second.values():
        assert 1e8 < rate < 1e16


def test_the_faster_of_two_libraries_is_the_ceiling():
    product = Floor(0, 100)
    assert Ceilings(1.0, {"fp32": 10.0}, {"fp32": 20.0}).seconds(product, "fp32") == 5
    assert Ceilings(1.0, {"fp32": 10.0, "bf16": 50.0}, {"fp32": 5.0}).seconds(product, "fp32") == 10


@pytest.mark.parametrize(
    ("op", "precision", "variant", "expected"),
    [
        ("fused_dynamic_routing", "bf16", "avx2", "native avx2"),
        ("routing_pass", "fp32", None, "torch"),
        ("fused_dynamic_routing", "fp64", "avx2", "torch"),
        ("dynamic_routing", "fp32", "avx2", "native avx2"),
        ("prediction_vectors", "fp32", "avx2", "torch"),
    ],
)
def test_a_row_says_what_computed_it(monkeypatch, op, precision, variant, expected):
    monkeypatch.setattr(_operators, "INTERPRETED", False)
    monkeypatch.setattr("tritoncaps.backend_info", lambda: {"variant": variant})
    case = Case(op, Shape(I, P, J, D), B, precision=precision)
    assert rivals.backend(case, CPU) == expected
    assert rivals.backend(case, torch.device("cuda")) == "triton"


# Sweeps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.5])
def test_growth_is_fitted(exponent):
    points = [(x, 3 * x**exponent) for x in (1.0, 2.0, 8.0, 40.0)]
    assert scaling.fitted_exponent(points) == exponent
    assert scaling.fitted_exponent(points[:1]) is None


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_sweep_spans_a_decade(device, quick):
    swept = scaling.sweeps(torch.device(device), quick)
    assert swept.keys() == {"I", "J", "B", "r"}
    assert all(max(values) >= 10 * min(values) for values in swept.values())
