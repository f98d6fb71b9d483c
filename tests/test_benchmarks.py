"""The benchmarks: what they let pass, what they write, and that every command runs."""

import copy
import gc
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from interpreter import runs_the_interpreter
from torch import Tensor

from benchmarks import __main__ as command_line
from benchmarks import (
    compilation,
    launch,
    memory,
    operators,
    oracle,
    report,
    rivals,
    scaling,
    step,
    tables,
)
from benchmarks.cases import OPS, SHAPES, Case, Shape
from benchmarks.oracle import Oracle, WrongResultError
from benchmarks.roofline import Ceilings, floor, measure_ceilings
from benchmarks.timing import CpuClock, CudaClock, Task, Timing, replayed, time_alternately
from tritoncaps import _operators, reference
from tritoncaps.models import CapsNet

CPU = torch.device("cpu")
SMALL = Case("fused_dynamic_routing", Shape(7, 3, 4, 5), B=6)
FIGURES = {"median_s", "p20_s", "p80_s", "samples"}


class FakeClock:
    """A clock that tells a time that only `sleep` moves."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


# Timing -------------------------------------------------------------------------------------------


def test_timing_is_the_median_and_the_percentiles_of_the_runs() -> None:
    now = FakeClock()
    durations = iter([1000.0, 5.0, 1.0, 4.0, 2.0, 3.0, 6.0])  # one to warm up
    task = Task(lambda _: now.sleep(next(durations)))
    timings = time_alternately({"a": task}, CpuClock(now), rounds=(6, 6), seconds=0, now=now)
    assert timings == {"a": Timing(median=3.5, p20=2.0, p80=5.0, samples=6)}


def test_preparation_is_not_timed_and_a_run_is_divided_by_its_calls() -> None:
    now = FakeClock()

    def prepare() -> str:
        now.sleep(100)
        return "state"

    def run(state: str) -> None:
        assert state == "state"
        now.sleep(8)

    tasks = {"a": Task(run, prepare, calls=4)}
    timings = time_alternately(tasks, CpuClock(now), rounds=(2, 2), seconds=0, now=now)
    assert timings["a"] == Timing(2.0, 2.0, 2.0, samples=2)


def test_rivals_take_turns_in_changing_order() -> None:
    runs: list[str] = []
    tasks = {name: Task(lambda _, name=name: runs.append(name)) for name in "abc"}
    time_alternately(tasks, CpuClock(), rounds=(20, 20), seconds=0)
    rounds = [runs[start : start + 3] for start in range(0, len(runs), 3)]
    assert len(rounds) == 1 + 20
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 3


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 3), (45.0, 5), (1000.0, 9)])
def test_rounds_end_with_the_time_but_not_before_the_least(seconds: float, expected: int) -> None:
    now = FakeClock()
    task = Task(lambda _: now.sleep(10))
    timings = time_alternately({"a": task}, CpuClock(now), rounds=(3, 9), seconds=seconds, now=now)
    assert timings["a"].samples == expected


def test_a_replay_keeps_the_tensors_of_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds addresses alone."""
    for name in ("Stream", "stream", "current_stream", "synchronize", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())

    class Owner:
        def run(self, _: Any) -> None: ...

    owner = Owner()
    alive = weakref.ref(owner)
    replay = replayed(Task(owner.run))
    del owner
    gc.collect()
    assert alive() is not None
    del replay
    gc.collect()
    assert alive() is None


def test_the_garbage_collector_rests_only_while_timing() -> None:
    def fail(_: Any) -> None:
        assert not gc.isenabled()
        raise RuntimeError("this task fails")

    with pytest.raises(RuntimeError, match="this task fails"):
        time_alternately({"a": Task(fail)}, CpuClock(), rounds=(2, 2), seconds=0)
    assert gc.isenabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("phase", operators.PHASES)
def test_a_replayed_phase_is_timed_on_the_device(phase: str) -> None:
    device = torch.device("cuda")
    inputs = [SMALL.arguments(device, seed) for seed in range(3)]
    function = rivals.op_rival("eager", SMALL, device)
    task = operators.phase_task(function, phase, inputs, SMALL.output_gradient(device))
    timings = time_alternately({"a": replayed(task)}, CudaClock(), rounds=(5, 5), seconds=0)
    assert 0 < timings["a"].median < 1


@pytest.mark.parametrize("name", ["tiny", "mnist"])
def test_inputs_outgrow_the_last_cache(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Twice its size, so that a set is forgotten when its turn comes; 16 sets at most."""
    monkeypatch.setattr(operators, "cache_bytes", lambda level: {3: 10 << 20}[level])
    case = Case("prediction_vectors", SHAPES[name], B=2, name=name)
    assert len(operators.input_sets(case, "backward", CPU)) == 1
    sets = operators.input_sets(case, "forward", CPU)
    sizes = [sum(tensor.nbytes for tensor in inputs.values()) for inputs in sets]
    if name == "tiny":
        assert len(sets) == 16
    else:
        assert sum(sizes) >= 20 << 20 > sum(sizes[1:])
    assert not torch.equal(sets[0]["weight"], sets[1]["weight"])


# Oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("op", OPS)
def test_oracle_accepts_every_eager_rival(op: str, precision: str) -> None:
    case = Case(op, Shape(7, 3, 4, 5), B=6, precision=precision)
    truth = Oracle(case, CPU)
    for name in rivals.rival_names(op, CPU):
        if name != "compile":
            shares = truth.check(rivals.op_rival(name, case, CPU))
            assert all(0 <= share <= 1 for share in shares.values())


def test_oracle_accepts_the_torch_path_beside_the_kernels() -> None:
    Oracle(SMALL, CPU).check(partial(rivals._torch_path_fused_dynamic_routing, iterations=3))


def test_oracle_knows_priors_and_detached_couplings() -> None:
    for more in ({"with_prior": True}, {"gradient": "last"}):
        case = Case("dynamic_routing", Shape(7, 3, 4, 5), B=6, **more)  # type: ignore[arg-type]
        Oracle(case, CPU).check(rivals.op_rival(rivals.ours(CPU), case, CPU))


def test_oracle_evaluates_in_slices_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Oracle(SMALL, CPU)._expected
    monkeypatch.setattr(oracle, "_SLICE_BYTES", 2 * 8 * 7 * 4 * 5)
    sliced = Oracle(SMALL, CPU)._expected
    assert whole.keys() == sliced.keys() == {"out", "grad_u", "grad_weight"}
    for name, tensor in whole.items():
        torch.testing.assert_close(sliced[name], tensor)


def right(u: Tensor, weight: Tensor) -> Tensor:
    v = reference.fused_dynamic_routing(u, weight, 3)
    assert isinstance(v, Tensor)
    return v


def softmax_over_the_inputs(u: Tensor, weight: Tensor) -> Tensor:
    u_hat = reference.prediction_vectors(u, weight)
    b = u_hat.new_zeros(u_hat.shape[:3])
    for _ in range(3):
        v = reference.squash(torch.einsum("bij,bijd->bjd", b.softmax(dim=1), u_hat))
        b = b + torch.einsum("bijd,bjd->bij", u_hat, v)
    return v


WRONG: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "out is off": softmax_over_the_inputs,
    "out is off by": lambda u, weight: right(u, weight) * (1 + 1e-5),
    "grad_u is off": lambda u, weight: right(u + (u - u.detach()) * 1e-3, weight),
    "grad_weight is off": lambda u, weight: right(u, weight + (weight - weight.detach()) * 1e-3),
    "out is off by nan": lambda u, weight: right(u, weight) * float("nan"),
    "shape": lambda u, weight: right(u, weight)[:, :1].expand(-1, 4, -1).unsqueeze(0),
    "without gradients is off": lambda u, weight: (
        right(u, weight) * (1 if torch.is_grad_enabled() else 2)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_oracle_refuses_a_wrong_rival(message: str) -> None:
    truth = Oracle(SMALL, CPU)
    truth.check(lambda u, weight: right(u, weight))
    if message == "shape":
        truth.grad = truth.grad.unsqueeze(0)
    with pytest.raises(WrongResultError, match=message):
        truth.check(lambda u, weight: WRONG[message](u, weight))


def test_oracle_refuses_an_operator_that_left_its_kernel() -> None:
    def falls_back(u: Tensor, weight: Tensor) -> Tensor:
        _operators._say_once("fused_dynamic_routing_fwd runs without its Triton kernel")
        return right(u, weight)

    with pytest.raises(RuntimeError, match="without its Triton kernel"):
        Oracle(SMALL, CPU).check(falls_back)


def test_the_port_is_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle.check_networks()
    monkeypatch.setattr(oracle, "EinsumCapsNet", partial(rivals.EinsumCapsNet, iterations=2))
    with pytest.raises(WrongResultError, match="einsum port's"):
        oracle.check_networks()


def test_a_trainer_whose_loss_is_off_is_refused() -> None:
    batch = (torch.rand(2, 1, 28, 28), torch.tensor([3, 7]))
    torch.manual_seed(0)
    trainer = step.Trainer(
        CapsNet(channels=8, capsule_types=2), rivals.tritoncaps_loss, "fp32", batch
    )
    trainer.check()
    trainer.step()
    with pytest.raises(WrongResultError, match="the loss is off by"):
        trainer.check()


# Floors -------------------------------------------------------------------------------------------


def test_floor_of_the_mnist_shape() -> None:
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


def test_ceilings_are_those_of_a_copy_and_a_product() -> None:
    ceilings = measure_ceilings(CPU, CpuClock(), ["fp32"])
    # From the slowest computer that runs torch to ten times the fastest there is.
    assert 1e8 < ceilings.copy_bytes_per_second < 1e14
    assert 1e8 < ceilings.gemm_flops_per_second["fp32"] < 1e16


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.5])
def test_growth_is_fitted(exponent: float) -> None:
    points = [(x, 3 * x**exponent) for x in (1.0, 2.0, 8.0, 40.0)]
    assert scaling.fitted_exponent(points) == exponent
    assert scaling.fitted_exponent(points[:1]) is None


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_sweep_spans_a_decade(device: str, quick: bool) -> None:
    swept = scaling.sweeps(torch.device(device), quick)
    assert swept.keys() == {"I", "J", "B", "r"}
    assert all(max(values) >= 10 * min(values) for values in swept.values())


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not memory._STATUS.exists(), reason="the peak of a process is read from /proc")
def test_peaks_show_who_stores_the_prediction_vectors() -> None:
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
    assert little < 2_000_000  # each peak starts anew


# The commands -------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands at toy sizes, without the half minute that torch.compile takes for C++."""
    names = rivals.rival_names
    monkeypatch.setattr(
        operators,
        "rival_names",
        lambda op, device: [n for n in names(op, device) if n != "compile"],
    )
    tiny = SHAPES["tiny"]
    cases = [Case(op, tiny, B=3, name="tiny") for op in OPS]
    monkeypatch.setattr(operators, "ops_cases", lambda device, quick: cases)
    monkeypatch.setattr(operators, "check_cases", lambda device, quick: cases)
    ceilings = Ceilings(1e10, {"fp32": 1e11, "bf16": 2e11})
    monkeypatch.setattr(operators, "measure_ceilings", lambda device, clock, names: ceilings)
    monkeypatch.setattr(scaling, "swept_case", toy_point)
    monkeypatch.setattr(memory, "rival_names", lambda op, device: ["eager"])
    monkeypatch.setattr(memory, "peaks", lambda cases, *_: [100] * len(cases))
    monkeypatch.setattr(step, "train_images", lambda B, device: toy_images(2))


def toy_point(axis: str, value: int, device: torch.device, quick: bool) -> Case:
    sizes = {"I": 4, "J": 2, "B": 2, "r": 2, axis: value}
    shape = Shape(sizes["I"], 3, sizes["J"], 4)
    return Case("fused_dynamic_routing", shape, sizes["B"], iterations=sizes["r"])


def toy_images(B: int) -> tuple[Tensor, Tensor]:
    return torch.rand(B, 1, 28, 28), torch.arange(B)


def run(command: str, output: Path, *more: str) -> tuple[int, dict[str, Any]]:
    arguments = [command, "--device", "cpu", "--quick", "--output", str(output), *more]
    status = command_line.main(arguments)
    return status, json.loads((output / f"{command}.json").read_text())


def check_schema(data: dict[str, Any], benchmark: str) -> None:
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
def test_check_command(tmp_path: Path) -> None:
    status, data = run("check", tmp_path)
    assert status == 0
    check_schema(data, "check")
    assert [row["case"].split()[0] for row in data["rows"]] == list(OPS)
    assert all(0 <= row["share_of_allowed"] <= 1 for row in data["rows"])


@pytest.mark.usefixtures("toy")
def test_ops_command(tmp_path: Path) -> None:
    status, data = run("ops", tmp_path)
    assert status == 0
    check_schema(data, "ops")
    assert data["ceilings"]["copy_bytes_per_second"] == 1e10
    timed = {(row["op"], row["phase"], row["rival"]) for row in data["rows"]}
    assert timed == {
        (op, phase, rival)
        for op in OPS
        for phase in operators.PHASES
        for rival in rivals.rival_names(op, CPU)
        if rival != "compile"
    }
    for row in data["rows"]:
        assert row["share_of_floor"] == pytest.approx(row["floor_s"] / row["median_s"])
        assert (row["rival"] == "eager") <= (row["speedup"] == 1)
        assert (row["flops_per_second"] is None) == (row["op"] in ("squash", "margin_loss"))


@pytest.mark.usefixtures("toy")
def test_memory_command(tmp_path: Path) -> None:
    status, data = run("memory", tmp_path)
    assert status == 0
    check_schema(data, "memory")
    assert [(row["rival"], row["peak_bytes"]) for row in data["rows"]] == [("eager", 100)]
    assert data["rows"][0]["u_hat_bytes"] == 4 * data["rows"][0]["B"] * 1152 * 10 * 16


@pytest.mark.usefixtures("toy")
def test_memory_grid_command(tmp_path: Path) -> None:
    status, data = run("memory-grid", tmp_path)
    assert status == 0
    check_schema(data, "memory-grid")
    own = rivals.ours(CPU)
    measured = {(r["I"], r["J"], r["B"], r["phase"], r["rival"]) for r in data["rows"]}
    assert len(measured) == len(data["rows"]) == 2 * 2 * 2 * 2 * 2
    for row in data["rows"]:
        assert row["peak_bytes"] == 100
        assert row["u_hat_bytes"] == 4 * row["B"] * row["I"] * row["J"] * row["D"]
        assert ("formula_bytes" in row) == (row["rival"] == own)


@pytest.mark.usefixtures("toy")
def test_a_grid_that_does_not_fit_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks(cases: list[Case], rival: str, *_: Any) -> list[int]:
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
def test_step_command(tmp_path: Path) -> None:
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


@pytest.mark.usefixtures("toy")
def test_scaling_command(tmp_path: Path) -> None:
    status, data = run("scaling", tmp_path)
    assert status == 0
    check_schema(data, "scaling")
    axes = {axis: {row["value"] for row in data["rows"] if row["axis"] == axis} for axis in "IJBr"}
    assert axes == {"I": {16, 160}, "J": {2, 20}, "B": {1, 10}, "r": {1, 10}}
    assert len(data["fits"]) == 2 * len(axes)
    assert all(fit["memory_exponent"] == 0 for fit in data["fits"])
    assert all(isinstance(fit["time_exponent"], float) for fit in data["fits"])


@pytest.mark.usefixtures("toy")
def test_a_wrong_rival_is_left_out_and_the_others_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        rivals._BROADCAST,
        "fused_dynamic_routing",
        lambda u, weight, iterations: right(u, weight) * 1.1,
    )
    status, data = run("ops", tmp_path)
    assert status == 1
    routing = [row for row in data["rows"] if row["op"] == "fused_dynamic_routing"]
    left_out = {row["rival"]: row["left_out"] for row in routing if "left_out" in row}
    assert left_out.keys() == {"broadcast"}
    assert "out is off" in left_out["broadcast"]
    assert {row["rival"] for row in routing if "median_s" in row} == {"eager", rivals.ours(CPU)}


def test_compile_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of its own; a call that fails does not stop the others."""
    calls = [(rivals.ours(CPU), SMALL), ("broadcast", Case("squash", SMALL.shape, B=2))]
    monkeypatch.setattr(compilation, "compiled_calls", lambda device, quick: calls)
    status, data = run("compile", tmp_path)
    assert status == 1
    rows = {row["case"]: row for row in data["rows"]}
    assert rows.keys() == {str(case) for _, case in calls}
    assert rows[str(SMALL)]["first_call_s"] > 0
    assert rows[str(calls[1][1])]["left_out"].startswith("KeyError")


@pytest.mark.parametrize("quick", [False, True])
def test_all_is_compiled_that_is_called(quick: bool) -> None:
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
def test_without_time_nothing_is_begun(command: str, tmp_path: Path) -> None:
    status, data = run(command, tmp_path, "--seconds", "0")
    assert status == 0
    assert data["rows"]
    assert {row["left_out"] for row in data["rows"]} == {"no time was left"}


def test_launch_needs_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_operators, "INTERPRETED", False)
    status, data = run("launch", tmp_path)
    assert status == 1
    assert "do not run on this device" in data["rows"][0]["left_out"]


LAUNCH = """
import sys, torch
from benchmarks import __main__, launch
launch._CHOICES = (("block_b", 2), ("num_stages", 0.34))
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
def test_launch_search_writes_a_table_that_the_kernels_ask_for(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the search is about Triton kernels")
    # Triton decides at import whether its kernels are interpreted, so in a process of its own.
    result = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(tmp_path)],
        cwd=command_line.ROOT,
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


def test_all_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    limits: list[float | None] = []

    def fake_run(command: list[str], limit: float | None) -> int:
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


def test_gpu_begins_no_part_that_has_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "GPU_TOTAL", 10)
    monkeypatch.setattr(command_line, "run_limited", None)
    assert command_line.run_all(torch.device("cuda"), tmp_path, quick=False, threads=None) == 1
    assert capsys.readouterr().out.count("not begun") == len(command_line.BENCHMARKS)


@pytest.mark.skipif(not memory._STATUS.exists(), reason="who still runs is read from /proc")
@pytest.mark.parametrize("limit", [None, 5.0])
def test_nothing_that_a_part_has_started_outlives_it(limit: float | None, tmp_path: Path) -> None:
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


def test_gpu_says_that_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        command_line.main(["gpu", "--output", str(tmp_path)])


# Results ------------------------------------------------------------------------------------------


def test_rows_are_on_disk_as_soon_as_they_are_added(tmp_path: Path) -> None:
    results = report.Report("ops", CPU, {}, tmp_path)
    for number in range(3):
        results.add([{"value": number}], "value")
        rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
        assert [row["value"] for row in rows] == list(range(number + 1))
    assert [path.name for path in tmp_path.iterdir()] == ["ops.json"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.1111, "3.11 s"), (0.0387, "38.7 ms"), (0.000162, "162 µs"), (2e-7, "0.20 µs")],
)
def test_durations_have_three_digits(value: float, text: str) -> None:
    assert report.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(603979776, "604 MB"), (2567430144, "2.57 GB"), (12.0, "12.0 B")]
)
def test_sizes_have_three_digits(value: float, text: str) -> None:
    assert report.quantity(value, "B") == text


def made_up_results(directory: Path) -> dict[str, dict[str, Any]]:
    """Results of a device, whose figures are as easily recognised as they are wrong."""
    directory.mkdir()
    environment = report.describe_environment(CPU) | {"device": "Slide Rule", "commit": "abc"}
    routing = {
        **operators.axes(Case("fused_dynamic_routing", SHAPES["mnist"], B=64)),
        "shape": "mnist",
    }
    case = "fused_dynamic_routing mnist 1152x8->10x16 B=64 r=3 fp32"
    seconds = {"eager": 0.4, "compile": 0.2, "broadcast": 1.0, "torch path": 0.1}

    def timing(median: float) -> dict[str, Any]:
        return {"median_s": median, "p20_s": 0.9 * median, "p80_s": 1.2 * median, "samples": 9}

    (directory / "launch_table.json").write_text('{"fused_dynamic_routing_fwd": {"block_b": 8}}')
    ops_rows = [
        {**routing, "case": case, "phase": phase, "rival": rival, "floor_s": 0.01, **timing(median)}
        for phase in operators.PHASES
        for rival, median in seconds.items()
    ]
    memory_rows = [
        {**routing, "case": case, "rival": rival, "u_hat_bytes": 47185920, "peak_bytes": peak}
        for rival, peak in (("eager", 2e8), ("torch path", 1.5e7))
    ]
    memory_rows.append({**routing, "case": case, "rival": "broadcast", "left_out": "killed"})
    step_rows = [
        {"model": "CapsNet", "rival": rival, "precision": "fp32", "B": 64, "speedup": 1 / median}
        | {"images_per_second": 64 / median, **timing(median)}
        for rival, median in (("einsum port", 1.0), ("tritoncaps", 0.5))
    ]
    scaling_rows = [
        {**routing, "axis": axis, "value": value, "rival": rival, "peak_bytes": 1e6 * value}
        | timing(0.001 * value)
        for axis in "IJBr"
        for rival in ("eager", "torch path")
        for value in (2, 8, 40)
    ]
    fits = [
        {"axis": axis, "rival": rival, "time_exponent": 1.0, "memory_exponent": None}
        for axis in "IJBr"
        for rival in ("eager", "torch path")
    ]
    grid_rows = [
        {**routing, "case": case, "phase": phase, "rival": rival, "u_hat_bytes": 47185920}
        | ({"peak_bytes": 3.1e7, "formula_bytes": 3e7} if rival != "eager" else {"peak_bytes": 2e8})
        for phase in ("forward", "both")
        for rival in ("eager", "torch path")
    ]
    grid_rows[0] = {**grid_rows[0], "peak_bytes": 4096}
    rows = {"ops": ops_rows, "memory": memory_rows, "step": step_rows, "scaling": scaling_rows}
    rows["memory-grid"] = grid_rows
    results = {}
    for benchmark, own in rows.items():
        results[benchmark] = {"format": 1, "environment": environment, "rows": own, "fits": fits}
        (directory / f"{benchmark}.json").write_text(json.dumps(results[benchmark]))
    return results


def test_the_table_shows_the_figures_of_the_results(tmp_path: Path) -> None:
    made_up_results(tmp_path / "slide-rule")
    block = tables.readme_block(tmp_path)
    assert block.startswith(tables.BEGIN)
    assert block.endswith(tables.END)
    for line in (
        "| mnist 1152x8->10x16, B=64, fp32, forward | 400 ms | 200 ms | 100 ms | 4.0 | 2.0 |",
        "| mnist 1152x8->10x16, B=64 | 47.2 MB | 200 MB |  | 15.0 MB |",
        "| CapsNet, tritoncaps, fp32 | 500 ms | 128 | 2.00 |",
    ):
        assert line in block
    assert "**Slide Rule, " in block
    assert "commit abc" in block


def test_the_page_on_memory_shows_the_figures_of_the_grid(tmp_path: Path) -> None:
    results = made_up_results(tmp_path / "slide-rule")
    block = tables.memory_block(tmp_path)
    assert "**Slide Rule, " in block
    assert "Batch 64:" in block
    assert (
        "| 1152 | 10 | 47.2 MB | < 1 MB | 31.0 MB | 30.0 MB | 200 MB | 31.0 MB | 30.0 MB |" in block
    )
    # The README's line on where its figures come from does not name the commit of another page.
    grid = results["memory-grid"]
    grid["environment"] = {**grid["environment"], "commit": "xyz"}
    (tmp_path / "slide-rule" / "memory-grid.json").write_text(json.dumps(grid))
    assert "xyz" not in tables.readme_block(tmp_path)
    assert "xyz" in tables.memory_block(tmp_path)


@pytest.mark.parametrize("page", ["readme", "memory-page"])
def test_the_table_command_writes_what_its_check_accepts(tmp_path: Path, page: str) -> None:
    results = tmp_path / "results"
    results.mkdir()
    made_up_results(results / "slide-rule")
    pages = {name: tmp_path / name for name in ("readme", "memory-page")}
    command = ["table", "--results", str(results)]
    for name, path in pages.items():
        path.write_text(f"before\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n")
        command += [f"--{name}", str(path)]
    readme = pages[page]
    figure = {"readme": "400 ms", "memory-page": "31.0 MB"}[page]
    assert command_line.main([*command, "--check"]) == 1
    assert "old" in readme.read_text()
    assert command_line.main(command) == 0
    written = readme.read_text()
    assert written.startswith("before\n\n" + tables.BEGIN)
    assert written.endswith(tables.END + "\n\nafter\n")
    assert command_line.main([*command, "--check"]) == 0
    assert command_line.main(command) == 0
    assert readme.read_text() == written
    assert figure in written
    readme.write_text(written.replace(figure, "401 ms", 1))
    assert command_line.main([*command, "--check"]) == 1


@pytest.mark.parametrize(
    "text", ["", tables.BEGIN, tables.END + tables.BEGIN, 2 * (tables.BEGIN + tables.END)]
)
def test_a_readme_without_one_pair_of_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected one"):
        tables.replace_block(text, "block")


def test_the_readme_agrees_with_the_results() -> None:
    assert command_line.main(["table", "--check"]) == 0


def test_committed_results_name_their_device_and_commit() -> None:
    paths = sorted(report.RESULTS.glob("*/*.json"))
    assert paths
    for path in paths:
        data = json.loads(path.read_text())
        if path.stem == "launch_table":
            continue
        assert data["benchmark"] == path.stem
        assert data["settings"] == {"quick": False}
        assert data["environment"]["device"]
        assert data["environment"]["commit"]


def test_plots_are_drawn_from_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")
    from matplotlib.image import imread

    from benchmarks import plots

    directory = tmp_path / "slide-rule"
    results = made_up_results(directory)
    paths = list(plots.draw(directory))
    assert [path.name for path in paths] == ["ops.png", "memory.png", "step.png", "scaling.png"]
    before = {path: path.read_bytes() for path in paths}
    for path in paths:
        assert path.stat().st_size < 300_000
        pixels = imread(path)[..., :3]
        border = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
        assert all((edge == 1).all() for edge in border), "something touches the edge"
        assert 0.01 < (pixels < 0.95).any(axis=-1).mean() < 0.5
    assert {path: path.read_bytes() for path in plots.draw(directory)} == before
    changed = copy.deepcopy(results["step"])
    changed["rows"][0]["median_s"] *= 2
    (directory / "step.json").write_text(json.dumps(changed))
    after = {path: path.read_bytes() for path in plots.draw(directory)}
    assert [path.name for path in paths if after[path] != before[path]] == ["step.png"]
