"""Every command runs at toy sizes, and the command line handles its parts."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from interpreter import runs_the_interpreter

from benchmarks import __main__ as command_line
from benchmarks import (
    compilation,
    launch,
    memory,
    operators,
    rivals,
    scaling,
    step,
    tables,
)
from benchmarks.cases import SHAPES, Case, Shape, operator_names
from benchmarks.rivals import fused_dynamic_routing
from benchmarks.roofline import Ceilings
from benchmarks.session import Session
from tritoncaps import _operators, backend_info, reference, testing

CPU = torch.device("cpu")
SMALL = Case("fused_dynamic_routing", Shape(7, 3, 4, 5), B=6)
FIGURES = {"median_s", "p20_s", "p80_s", "samples"}
# What the fixture `toy` replaces.
REAL_OPS_CASES, REAL_CHECK_CASES = operators.ops_cases, operators.check_cases


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not memory._STATUS.exists(), reason="the peak of a process is read from /proc")
def test_peaks_show_who_stores_the_prediction_vectors():
    case = Case("fused_dynamic_routing", Shape(1152, 8, 16, 16), B=64)
    u_hat_bytes = 4 * 64 * 1152 * 16 * 16
    grad_bytes = 4 * (64 * 1152 * 8 + 1152 * 8 * 16 * 16)
    (eager,) = memory.peaks([case], "eager", CPU)
    assert eager > 2 * u_hat_bytes
    (forward,) = memory.peaks([case], rivals.ours(CPU), CPU, "forward")
    assert forward < u_hat_bytes / 3
    small = Case("fused_dynamic_routing", Shape(10, 8, 16, 16), B=4)
    own, little = memory.peaks([case, small], rivals.ours(CPU), CPU)
    assert grad_bytes < own < u_hat_bytes
    assert little < 2_000_000  # each peak starts from zero


# The commands -------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    """Run the commands at toy sizes, without the half minute that torch.compile takes for C++."""
    names = rivals.rival_names
    monkeypatch.setattr(
        operators,
        "rival_names",
        lambda case, device: [n for n in names(case, device) if n != "compile"],
    )
    cases = [Case(op, SHAPES["tiny"], B=3, name="tiny") for op in operator_names()]
    monkeypatch.setattr(operators, "ops_cases", lambda device, quick: cases)
    monkeypatch.setattr(operators, "check_cases", lambda device, quick: cases)
    ceilings = Ceilings(1e10, {"fp32": 1e11, "bf16": 2e11})
    monkeypatch.setattr(operators, "measure_ceilings", lambda *_: ceilings)
    monkeypatch.setattr(scaling, "swept_case", toy_point)
    monkeypatch.setattr(memory, "rival_names", lambda case, device: ["eager"])
    monkeypatch.setattr(memory, "peaks", lambda cases, *_: [100] * len(cases))
    monkeypatch.setattr(step, "train_images", lambda B, device: toy_images(2))
    monkeypatch.setattr(step, "check_networks", lambda: None)  # test_oracle.py calls it
    monkeypatch.setattr(Session, "has_bf16", lambda session: True)
    for name, channels in (("EinsumCapsNet", 8), ("CapsNet", 8), ("DeepCapsNet", (4, 6))):
        small = partial(getattr(step, name), channels=channels, capsule_types=2)
        monkeypatch.setattr(step, name, small)


def toy_point(axis, value, device, quick):
    sizes = {"I": 4, "J": 2, "B": 2, "r": 2, axis: value}
    shape = Shape(sizes["I"], 3, sizes["J"], 4)
    # Ten iterations would magnify the roundings, and with so few values the 2x rule goes by luck.
    return Case("fused_dynamic_routing", shape, sizes["B"], iterations=min(sizes["r"], 3))


def toy_images(B):
    return torch.rand(B, 1, 28, 28), torch.arange(B)


def run(command, output, *more):
    arguments = [command, "--device", "cpu", "--quick", "--output", str(output), *more]
    status = command_line.main(arguments)
    return status, json.loads((output / f"{command}.json").read_text())


def check_schema(data, benchmark):
    assert data["format"] == 1
    assert data["benchmark"] == benchmark
    assert data["settings"] == {"quick": True}
    environment = data["environment"]
    for name in ("date", "device", "torch", "tritoncaps", "python", "platform"):
        assert isinstance(environment[name], str), name
    assert environment["device_type"] == "cpu"
    assert environment["threads"] == torch.get_num_threads()
    assert data["rows"]
    for row in data["rows"]:
        assert "left_out" not in row
        if "median_s" in row:
            assert row.keys() >= FIGURES
            assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]


@pytest.mark.usefixtures("toy")
def test_check_command(tmp_path):
    status, data = run("check", tmp_path)
    assert status == 0
    check_schema(data, "check")
    assert [row["case"].split()[0] for row in data["rows"]] == operator_names()
    assert all(0 <= row["error"] < 1e-5 > row["eager_error"] >= 0 for row in data["rows"])


@pytest.mark.usefixtures("toy")
def test_some_cases_are_measured_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "directory_of", pytest.fail)  # would replace the results
    status, data = run("ops", tmp_path, "--only=em_routing")
    assert status == 0 and data["settings"] == {"quick": True, "only": "em_routing"}
    assert {row["op"] for row in data["rows"]} == {"em_routing", "conv_em_routing"}
    monkeypatch.setattr(command_line.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "apart"))
    assert command_line.main(["ops", "--device=cpu", "--quick", "--only=margin"]) == 0
    assert (tmp_path / "apart/ops.json").exists()
    with pytest.raises(SystemExit, match="no case has 'nothing' in its name"):
        run("ops", tmp_path, "--only=nothing")


@pytest.mark.usefixtures("toy")
def test_ops_command(tmp_path):
    status, data = run("ops", tmp_path)
    assert status == 0
    check_schema(data, "ops")
    assert data["ceilings"]["copy_bytes_per_second"] == 1e10
    cases = operators.ops_cases(CPU, True)
    assert [case.op for case in cases] == operator_names()
    timed = {(row["op"], row["phase"], row["rival"]) for row in data["rows"]}
    assert timed == {
        (case.op, phase, rival)
        for case in cases
        for phase in operators.PHASES
        for rival in rivals.rival_names(case, CPU)
        if rival != "compile"
    }
    loaded = [row for row in data["rows"] if "loaded_cores" in row]
    assert {(row["phase"], row["rival"]) for row in loaded} == {
        (phase, rival)
        for phase in operators.PHASES
        for rival in rivals.rival_names(cases[0], CPU)
        if rival != "compile"
    }
    assert {row["case"] for row in loaded} == {data["rows"][0]["case"] + " under load"}
    without_products = {"squash", "capsule_mixture_log_prob", "margin_loss", "spread_loss"}
    for row in data["rows"]:
        assert ("backend" in row) == (row["rival"] == rivals.ours(CPU))
        assert row["share_of_floor"] == pytest.approx(row["floor_s"] / row["median_s"])
        assert (row["rival"] == "eager") <= (row["speedup"] == 1)
        assert (row["flops_per_second"] is None) == (row["op"] in without_products)


def test_cores_are_busy_only_inside(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args: started.append(popen(*args)) or started[-1]
    )
    with operators.busy_cores(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)


def mean_pose(u_hat):
    return u_hat.mean(dim=1)


@pytest.mark.usefixtures("toy")
def test_a_row_of_the_operator_table_is_all_that_a_new_routing_needs(tmp_path, monkeypatch):
    row = testing.Operator(
        mean_pose, mean_pose, inputs={"u_hat": "B I J D"}, outputs={"s": "B J D"}
    )
    monkeypatch.setitem(testing.OPERATORS, "mean_pose", row)
    cases = [Case("mean_pose", SHAPES["tiny"], B=3, name="tiny")]
    assert cases[0].op in {case.op for case in REAL_OPS_CASES(CPU, False)}
    assert cases[0].op in {case.op for case in REAL_CHECK_CASES(CPU, False)}
    for name in ("ops_cases", "check_cases"):
        monkeypatch.setattr(operators, name, lambda device, quick: cases)
    status, data = run("check", tmp_path)
    assert (status, data["rows"][0]["error"]) == (0, data["rows"][0]["eager_error"])
    status, data = run("ops", tmp_path)
    assert status == 0
    assert [row["rival"] for row in data["rows"]] == 6 * ["eager", rivals.ours(CPU)]
    assert all(row["floor_s"] > 0 and row["flops_per_second"] is None for row in data["rows"])


@pytest.mark.usefixtures("toy")
def test_memory_command(tmp_path):
    status, data = run("memory", tmp_path)
    assert status == 0
    check_schema(data, "memory")
    assert [(row["rival"], row["peak_bytes"]) for row in data["rows"]] == 2 * [("eager", 100)]
    assert [row["u_hat_bytes"] for row in data["rows"]] == [
        4 * row["B"] * sizes
        for row, sizes in zip(data["rows"], (1152 * 10 * 16, 256 * 5 * 16), strict=True)
    ]


@pytest.mark.usefixtures("toy")
def test_memory_grid_command(tmp_path):
    status, data = run("memory-grid", tmp_path)
    assert status == 0
    check_schema(data, "memory-grid")
    own = rivals.ours(CPU)
    measured = {(r["I"], r["J"], r["B"], r["phase"], r["rival"]) for r in data["rows"]}
    assert len(measured) == len(data["rows"]) == 2 * 2 * 2 * 2 * 2
    for row in data["rows"]:
        assert row["peak_bytes"] == 100
        assert row["u_hat_bytes"] == 4 * row["B"] * row["I"] * row["J"] * row["D"]
        of_torch = row["rival"] == own and backend_info()["cpu"] != "native"
        assert ("formula_bytes" in row) == of_torch


@pytest.mark.usefixtures("toy")
def test_a_grid_that_does_not_fit_says_why(tmp_path, monkeypatch):
    def peaks(cases, rival, *_):
        if rival == "eager":
            raise MemoryError("the process was killed")
        return [100] * len(cases)

    monkeypatch.setattr(memory, "peaks", peaks)
    status, data = run("memory-grid", tmp_path)
    assert status == 1
    for row in data["rows"]:
        killed = row["rival"] == "eager"
        assert row.get("left_out", "").startswith("MemoryError") == killed
        assert ("peak_bytes" in row) == (not killed)


@pytest.mark.usefixtures("toy")
def test_step_command(tmp_path):
    status, data = run("step", tmp_path)
    assert status == 0
    check_schema(data, "step")
    assert [(row["model"], row["rival"], row["precision"]) for row in data["rows"]] == [
        ("CapsNet", "einsum port", "fp32"),
        ("CapsNet", "tritoncaps", "fp32"),
        ("CapsNet", "einsum port", "bf16"),
        ("CapsNet", "tritoncaps", "bf16"),
        ("DeepCapsNet", "tritoncaps", "fp32"),
        ("DeepCapsNet", "tritoncaps", "bf16"),
    ]
    assert data["rows"][0]["speedup"] == 1
    assert all(row["median_s"] > 0 for row in data["rows"])


@pytest.mark.usefixtures("toy")
def test_step_leaves_out_what_would_be_emulated(tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "has_bf16", lambda session: False)
    status, data = run("step", tmp_path)
    assert status == 0
    for row in data["rows"]:
        assert ("median_s" in row) == (row["precision"] == "fp32")
        assert ("bfloat16" in row.get("left_out", "")) == (row["precision"] == "bf16")


@pytest.mark.usefixtures("toy")
def test_ops_leaves_out_what_would_be_emulated(tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "has_bf16", lambda session: False)
    shape = SHAPES["tiny"]
    cases = [Case("squash", shape, B=3, precision=precision) for precision in ("fp32", "bf16")]
    monkeypatch.setattr(operators, "ops_cases", lambda device, quick: cases)
    status, data = run("ops", tmp_path)
    assert status == 0
    for row in data["rows"]:
        assert ("median_s" in row) == (row["precision"] == "fp32")
        assert ("bfloat16" in row.get("left_out", "")) == (row["precision"] == "bf16")


@pytest.mark.parametrize("unit", ["avx512_bf16", "amx_bf16", None])
def test_a_processor_with_bfloat16(unit, monkeypatch):
    capabilities = {name: name == unit for name in ("avx512_bf16", "amx_bf16")}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    session = Session(CPU, quick=True, report=None)
    assert session.has_bf16() == (unit is not None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    assert session.has_bf16()


@pytest.mark.usefixtures("toy")
def test_scaling_command(tmp_path):
    status, data = run("scaling", tmp_path)
    assert status == 0
    check_schema(data, "scaling")
    axes = {axis: {row["value"] for row in data["rows"] if row["axis"] == axis} for axis in "IJBr"}
    assert axes == {"I": {16, 160}, "J": {2, 20}, "B": {1, 10}, "r": {1, 10}}
    assert len(data["fits"]) == 2 * len(axes)
    assert all(fit["memory_exponent"] == 0 for fit in data["fits"])
    assert all(isinstance(fit["time_exponent"], float) for fit in data["fits"])


@pytest.mark.usefixtures("toy")
def test_a_wrong_rival_is_left_out_and_the_others_are_timed(tmp_path, monkeypatch):
    def wrong(u, weight, iterations, **_):
        return reference.fused_dynamic_routing(u, weight, iterations) * 1.1

    monkeypatch.setitem(fused_dynamic_routing.RIVALS, "broadcast", wrong)
    status, data = run("ops", tmp_path)
    assert status == 1
    routing = [row for row in data["rows"] if row["op"] == "fused_dynamic_routing"]
    left_out = {row["rival"]: row["left_out"] for row in routing if "left_out" in row}
    assert left_out.keys() == {"broadcast"}
    assert "error" in left_out["broadcast"]
    assert {row["rival"] for row in routing if "median_s" in row} == {"eager", rivals.ours(CPU)}


def test_compile_command(tmp_path, monkeypatch):
    """It uses its own processes. A call that fails does not stop the others."""
    calls = [(rivals.ours(CPU), SMALL), ("broadcast", Case("squash", SMALL.shape, B=2))]
    monkeypatch.setattr(compilation, "compiled_calls", lambda device, quick: calls)
    status, data = run("compile", tmp_path)
    assert status == 1
    rows = {row["case"]: row for row in data["rows"]}
    assert rows.keys() == {str(case) for _, case in calls}
    assert rows[str(SMALL)]["first_call_s"] > 0
    assert rows[str(calls[1][1])]["left_out"].startswith("KeyError")


@pytest.mark.parametrize("quick", [False, True])
def test_everything_that_is_called_is_compiled(quick):
    device = torch.device("cuda")
    calls = compilation.compiled_calls(device, quick)
    assert len(set(calls)) == len(calls)
    own = {case for rival, case in calls if rival == "triton"}
    timed = {*operators.ops_cases(device, quick), *memory.memory_cases(device, quick)}
    assert own >= timed | {*operators.check_cases(device, quick), *memory.grid(quick)}
    assert own >= {*launch.launch_cases(device, quick), scaling.swept_case("r", 10, device, quick)}
    assert {case for rival, case in calls if rival == "compile"} == (set() if quick else timed)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    "command", ["compile", "check", "ops", "memory", "memory-grid", "step", "scaling"]
)
def test_without_time_nothing_is_started(command, tmp_path):
    status, data = run(command, tmp_path, "--seconds", "0")
    assert status == 0
    assert data["rows"]
    assert {row["left_out"] for row in data["rows"]} == {"no time was left"}


def test_launch_needs_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(_operators, "INTERPRETED", False)
    status, data = run("launch", tmp_path)
    assert status == 1
    assert "do not run on this device" in data["rows"][0]["left_out"]


LAUNCH = """
import sys, torch
sys.path.append("tests")
from interpreter import patch_once
patch_once()
from benchmarks import __main__, launch
launch._CHOICES = (("BLOCK_B", 2),)
launch._WORTHWHILE = 0  # take every candidate, however slow
status = __main__.main(["launch", "--device", "cpu", "--quick", "--output", sys.argv[1]])

from tritoncaps import ops
from tritoncaps.kernels import _launch
used = []
with launch.launch_table() as table:
    _launch.load_table(sys.argv[1] + "/launch_table.json")
    ops.fused_dynamic_routing(torch.randn(2, 5, 3), torch.randn(5, 3, 2, 4))
    names = table.rules.keys() & table.keys()
assert names, "the kernels ask for other entries than the search wrote"
sys.exit(status)
"""


@runs_the_interpreter
def test_launch_search_writes_a_table_that_the_kernels_ask_for(tmp_path):
    pytest.importorskip("triton", reason="the search is about Triton kernels")
    # Triton decides at import whether its kernels are interpreted, so this needs its own process.
    result = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(tmp_path)],
        cwd=tables.ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    table = json.loads((tmp_path / "launch_table.json").read_text())
    assert json.loads((tmp_path / "launch.json").read_text())["table"] == table
    assert any(name.startswith("fused_dynamic_routing") for name in table)
    assert all(type(value) is int for config in table.values() for value in config.values())


def test_all_continues_after_a_failure(tmp_path, monkeypatch):
    calls = []
    limits = []

    def fake_run(command, limit):
        calls.append(command)
        limits.append(limit)
        if command[3] == "ops":
            raise subprocess.TimeoutExpired(command, 1)
        return int(command[3] == "step")

    monkeypatch.setattr(command_line, "run_limited", fake_run)
    assert command_line.run_all(CPU, tmp_path, quick=True, threads=None) == 1
    names = [name for name in command_line.BENCHMARKS if name not in ("compile", "launch")]
    assert [call[3] for call in calls] == names
    assert limits == [None] * len(names)
    calls.clear(), limits.clear()
    command_line.run_all(torch.device("cuda"), tmp_path, quick=False, threads=None)
    assert [call[3] for call in calls] == [*command_line.BENCHMARKS]
    assert all(limit is not None and limit <= command_line.GPU_TOTAL < 480 for limit in limits)
    assert sum(command_line.GPU_SECONDS.values()) < command_line.GPU_TOTAL


def test_gpu_starts_no_part_without_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "GPU_TOTAL", 10)
    monkeypatch.setattr(command_line, "run_limited", None)
    assert command_line.run_all(torch.device("cuda"), tmp_path, quick=False, threads=None) == 1
    assert capsys.readouterr().out.count("not started") == len(command_line.BENCHMARKS)


@pytest.mark.skipif(not memory._STATUS.exists(), reason="who still runs is read from /proc")
@pytest.mark.parametrize("limit", [None, 5.0])
def test_nothing_outlives_the_part_that_started_it(limit, tmp_path):
    code = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(float(sys.argv[2]))
"""
    pid = tmp_path / "pid"
    command = [sys.executable, "-c", code, str(pid), "100" if limit else "0"]
    if limit:
        with pytest.raises(subprocess.TimeoutExpired):
            command_line.run_limited(command, limit)
    else:
        assert command_line.run_limited(command, limit) == 0
    status = Path(f"/proc/{pid.read_text()}/status")
    end = time.monotonic() + 10
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < end, "its child still runs"
        time.sleep(0.01)


def test_gpu_without_a_gpu_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        command_line.main(["gpu", "--output", str(tmp_path)])
