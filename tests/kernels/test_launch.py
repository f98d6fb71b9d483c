"""The launch rules, the measured table and the facts that they use. Needs only Triton."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="there is no Triton for this platform")

import triton

from tritoncaps.kernels import (
    _launch,
    _two_products,
    _vote_gradient,
    dynamic_routing,
    prediction_vectors,
    routing_pass,
)

SM80, SM90 = _launch.Target("sm80", 166912), _launch.Target("sm90", 232448)
GFX942 = _launch.Target("gfx942", 65536)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"BLOCK_P": 2}, "sets 'BLOCK_P', but a table may set num_warps"),
        ({"BLOK_I": 2}, "sets 'BLOK_I'"),
        ({"BLOCK_I": 3}, "sets BLOCK_I=3, must be a power of two"),
        ({"MAX_SPLITS": 0}, "sets MAX_SPLITS=0, must be an int >= 1"),
        ({"num_warps": 4.0}, "sets num_warps=4.0"),
    ],
)
def test_a_table_that_would_give_wrong_results_is_refused(tmp_path, monkeypatch, keywords, words):
    monkeypatch.setattr(_launch, "_table", {})
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"weight_gradient sm90 float32 I5 P4 J3 D2": keywords}))
    with pytest.raises(ValueError, match=words):
        _launch.load_table(path)
    assert not _launch._table


def test_a_table_with_a_keyword_that_the_rule_does_not_use_is_refused(monkeypatch):
    name = "weight_gradient sm90 float32 I5 P4 J3 D2"
    monkeypatch.setattr(_launch, "_table", {name: {"BLOCK_J": 2}})
    with pytest.raises(ValueError, match=r"sets \['BLOCK_J'\], but this rule sets \['BLOCK_B'"):
        routing_pass.weight_gradient_launch(5, 4, 3, 2, torch.float32, SM90)


def test_a_table_named_in_the_environment_is_loaded_with_the_kernels(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"weight_gradient sm90 float32 I5 P4 J3 D2": {"BLOCK_I": 8}}))
    code = "from tritoncaps.kernels import _launch; print(*_launch._table.values())"
    environment = {**os.environ, "TRITONCAPS_LAUNCH_TABLE": str(path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'BLOCK_I': 8}"


@given(
    I=st.integers(1, 5000),
    P=st.integers(1, 64),
    J=st.integers(1, 2000),
    D=st.integers(1, 64),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    architecture=st.sampled_from(["sm80", "sm90", "gfx942"]),
    shared_memory=st.sampled_from([65536, 101376, 232448]),
)
def test_launches_cover_the_capsules_and_fit(I, P, J, D, dtype, architecture, shared_memory):
    target = _launch.Target(architecture, shared_memory)
    width = 8 if dtype == torch.float64 else 4

    def assert_covers(splits, tiles, tile):
        assert splits <= 16
        assert (splits - 1) * tile * tiles < I <= splits * tile * tiles

    for rule in ("routing_pass", "fused_dynamic_routing"):
        launch, splits, tiles = routing_pass.pass_launch(rule, I, P, J, D, dtype, target)
        tile = launch["GROUPS"] * launch["BLOCK_I"]
        assert_covers(splits, tiles, tile)
        assert launch["BLOCK_P"] >= P
        assert launch["BLOCK_D"] >= D
        assert launch["BLOCK_I"] * launch["BLOCK_P"] >= 16
        assert tile * launch["BLOCK_P"] * launch["BLOCK_D"] * width <= shared_memory
    block, logits, weighted_sum = _two_products.two_products_launch(I, P, J, D, dtype, target)
    assert block["BLOCK_P"] >= P
    assert block["BLOCK_D"] >= D
    columns = block["BLOCK_I"] * block["BLOCK_P"]
    assert columns >= 16
    for launch, warps in ((logits, logits["GROUPS"]), (weighted_sum, weighted_sum["BLOCK_J"])):
        weight = warps * columns * block["BLOCK_D"] * width
        assert weight * (4 if launch["num_stages"] > 1 else 1) <= shared_memory
        assert 16 <= launch["BLOCK_B"] <= 64
        assert launch["num_warps"] == warps
    launch, splits, tiles = dynamic_routing.dynamic_routing_launch(I, J, D, dtype, target)
    assert_covers(splits, tiles, launch["BLOCK_I"])


@pytest.mark.parametrize(
    ("backend", "arch", "architecture"), [("cuda", 90, "sm90"), ("hip", "gfx942", "gfx942")]
)
def test_target_is_that_of_the_tensors_device(monkeypatch, backend, arch, architecture):
    """Not that of the current device: architecture and shared memory are requested by index."""
    current = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *error):
            current.pop()

    class Driver:
        class utils:  # noqa: N801
            @staticmethod
            def get_device_properties(index):
                return {"max_shared_mem": 1000 + index}

        @staticmethod
        def get_current_target():
            assert current == [3]
            return SimpleNamespace(backend=backend, arch=arch)

    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=Driver))
    monkeypatch.setattr(torch.cuda, "device", Device)
    tensor = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=3))
    _launch._cuda_target.cache_clear()
    try:
        assert _launch.target_of(tensor) == _launch.Target(architecture, 1003)
    finally:
        _launch._cuda_target.cache_clear()


@pytest.mark.parametrize(("num_warps", "registers"), [(4, 255), (8, 255), (16, 128), (32, 64)])
def test_all_registers_may_be_used_on_nvidia(num_warps, registers):
    launch = {"num_warps": num_warps, "num_stages": 2}
    assert _launch.with_all_registers(launch, GFX942) == launch
    assert _launch.with_all_registers(launch, SM90) == launch | {"maxnreg": registers}


@pytest.mark.parametrize(
    ("architecture", "holds"),
    [
        *((name, True) for name in ("sm75", "sm80", "sm89", "sm120")),
        *((name, False) for name in ("sm90", "sm100", "sm103", "gfx942", "interpreter")),
    ],
)
def test_smaller_tiles_where_products_keep_operands_in_registers(architecture, holds):
    target = _launch.Target(architecture, 232448)
    assert _launch.holds_operands(target) == holds
    shape = (1152, 8, 10, 16, torch.float32, target)
    assert routing_pass.weight_gradient_launch(*shape)["BLOCK_B"] == (16 if holds else 32)


@pytest.mark.parametrize(("target", "block_i"), [(SM80, 2), (SM90, 2), (GFX942, 4)])
def test_the_backward_of_a_single_pass_has_smaller_tiles_on_nvidia(target, block_i):
    shape = (1152, 8, 10, 16, torch.float32, target)
    launch, *_ = routing_pass.pass_launch("routing_pass", *shape)
    assert launch["BLOCK_I"] == block_i
    launch, *_ = routing_pass.pass_launch("fused_dynamic_routing", *shape)
    assert launch["BLOCK_I"] == 4


@pytest.mark.parametrize(
    ("architecture", "I", "tiling"),
    [
        ("sm90", 1, (1, 1, 1)),
        ("sm90", 10, (2, 1, 5)),
        ("sm90", 1152, (8, 2, 15)),
        ("interpreter", 10, (8, 2, 1)),
    ],
)
def test_few_input_capsules_are_spread_over_programs_first(architecture, I, tiling):
    target = _launch.Target(architecture, 65536)
    launch, splits, _ = routing_pass.pass_launch("any", I, 16, 10, 16, torch.float32, target)
    assert (launch["GROUPS"], launch["BLOCK_I"], splits) == tiling


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, 64), (torch.float64, 32)])
def test_the_widest_prediction_vectors_that_a_grid_covers(dtype, block):
    rule, widest = prediction_vectors.prediction_vectors_launch, 65535 * block
    assert rule(8, widest, 1, dtype, SM90)["BLOCK_N"] == block
    with pytest.raises(_launch.UnsupportedShape, match=f"J·D = {widest + 1} columns"):
        rule(8, widest + 1, 1, dtype, SM90)


@pytest.mark.parametrize(("J", "block_j"), [(1, 1), (8, 8), (9, 2), (10, 4), (13, 16), (16, 16)])
def test_a_block_of_output_capsules_is_at_most_a_quarter_empty(J, block_j):
    launch, *_ = dynamic_routing.dynamic_routing_launch(4, J, 16, torch.float32, SM90)
    assert launch["BLOCK_J"] == block_j


def test_precision_follows_torch():
    nvidia, amd = _launch.Target("sm90", 232448), _launch.Target("gfx942", 65536)
    assert _launch.dot_precision(torch.float64, nvidia) == "ieee"
    assert _launch.dot_precision(torch.float16, nvidia) == "tf32"
    assert _launch.dot_precision(torch.float32, amd) == "ieee"
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert _launch.dot_precision(torch.float32, nvidia) == expected
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("B", "shape", "expected"),
    [
        (128, (1152, 8, 10, 16), (1, 8)),
        (128, (10, 16, 10, 16), (8, 1)),  # few capsules: a step for each program
        (6272, (288, 8, 32, 8), (12, 33)),  # a convolution of 7×7 positions
        (6272, (288, 8, 1000, 16), (1, 392)),  # a slot would be larger than u
        (1024, (16384, 8, 10, 16), (1, 64)),  # enough programs
    ],
    ids=str,
)
def test_programs_share_a_batch_if_there_are_few_or_it_is_long(B, shape, expected):
    I, P, J, D = shape
    groups = _vote_gradient.vote_gradient_launch(I, P, J, D, torch.float32, SM90)["GROUPS"]
    programs, steps_b = triton.cdiv(I, groups), triton.cdiv(B, 16)
    assert _vote_gradient.share_batch(programs, steps_b, B * I * P, I * P * J * D) == expected
