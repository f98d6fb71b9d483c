"""The check that runs on a GPU: it runs on a CPU too, and a failure says what is wrong."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import runs_the_interpreter

pytest.importorskip("triton", reason="there is no Triton for this platform")

from benchmarks.cases import MAIN, MATRIX_LAYERS, SHAPES, Case, Shape
from benchmarks.report import NO_TIME, Report
from benchmarks.session import Session
from tools import check_gpu
from tools.gpu_model.launches import ON_VECTORS
from tritoncaps import reference
from tritoncaps._operators import INTERPRETED
from tritoncaps.testing import OPERATORS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = Case("squash", Shape(3, 2, 2, 2), B=2)
ONE = torch.ones(1)


@pytest.fixture
def session(tmp_path):
    return Session(CPU, True, Report("check_gpu", CPU, {}, tmp_path))


@runs_the_interpreter
def test_a_dry_run_goes_through_every_part(tmp_path):
    command = [sys.executable, "-m", "tools.check_gpu", "--dry", "--output", str(tmp_path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 failed" in run.stdout
    found = json.loads((tmp_path / "check_gpu.json").read_text())
    assert {row["part"] for row in found["rows"]} == {"results", "bits", "kernels", "calls"}
    assert found["factors"] == {}
    kernels = [row["kernel"] for row in found["rows"] if row["part"] == "kernels"]
    assert kernels == ["_squash_fwd_kernel", "_squash_bwd_kernel"]
    launches = {row["case"]: row["launches"] for row in found["rows"] if row["part"] == "bits"}
    assert all(count >= 2 for count in launches.values())


def test_twelve_shapes_and_every_operator_are_checked():
    cases = check_gpu.checked_cases(False)
    of_vectors = [case for case in cases if case.op in ON_VECTORS]
    of_matrices = [case for case in cases if "em_routing" in case.op]
    for found in (of_vectors, of_matrices):
        assert len({case.name or (case.shape, case.B) for case in found}) == 12
    registered = {name for name, row in OPERATORS.items() if row.registered is not None}
    assert {case.op for case in cases} == registered
    timed = check_gpu.timed_cases(False)
    assert {case.op for case, _ in timed} == {MAIN}
    assert {products for _, products in timed} == {"highest", "high"}


def test_matrices_are_checked_in_every_mode():
    cases = check_gpu.matrix_cases()
    assert {case.name for case in cases} >= MATRIX_LAYERS.keys()
    assert {case.precision for case in cases} == {"fp32", "bf16", "fp16"}
    options = [case.options for case in cases]
    assert {chosen.get("competition") for chosen in options} == {None, "children", "position"}
    assert {chosen["gradient"] for chosen in options} == {"full", "last"}
    assert any(chosen["return_assignment"] for chosen in options)


def test_a_wrong_result_names_the_case_the_error_and_the_bound(session, monkeypatch, capsys):
    def wrong(name, case, device):
        return lambda s: (reference.squash(s) * 1.01,)

    monkeypatch.setattr(check_gpu, "op_rival", wrong)
    check_gpu.check_results(session, [SMALL])
    (row,) = session.report.rows
    assert str(SMALL) == row["case"]
    for words in ("v without autograd: error", "exceeds", "(kernels: )"):
        assert words in row["left_out"]
    assert row["left_out"] in capsys.readouterr().out


def test_a_check_that_cannot_run_has_failed(session, monkeypatch):
    def broken(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(check_gpu, "op_rival", broken)
    monkeypatch.setattr(check_gpu, "_poisoned", broken)
    monkeypatch.setattr(check_gpu, "kernel_seconds", broken)
    check_gpu.check_results(session, [SMALL])
    check_gpu.check_bits(session, [SMALL], runs=2)
    assert check_gpu.time_kernels(session, [(SMALL, "highest")]) == {}
    assert [row["left_out"] for row in session.report.rows] == ["RuntimeError: no memory"] * 3


def test_bits_that_differ_name_the_result_and_the_run(session, monkeypatch):
    results = iter([{"v": torch.zeros(2)}, {"v": torch.zeros(2)}, {"v": torch.tensor([0.0, 3e-8])}])
    monkeypatch.setattr(check_gpu, "_poisoned", lambda case, device: next(results))
    check_gpu.check_bits(session, [SMALL], runs=3)
    (row,) = session.report.rows
    assert "v: run 2 differs from the first by 3e-08, the bound is 0" in row["left_out"]


def test_memory_that_nobody_wrote_is_found(monkeypatch):
    def forgetful(operator, tensors, options):
        v = torch.empty_like(tensors["s"])
        v[0] = 1
        return {"v": v}, (v,)

    monkeypatch.setattr(check_gpu, "call_forward", forgetful)
    monkeypatch.setattr(check_gpu, "call_backward", lambda operator, given: (torch.zeros(2),))
    with pytest.raises(check_gpu.WrongResultError, match="v: 6 values are not finite"):
        check_gpu._poisoned(SMALL, CPU)


def test_factors_are_measured_times_over_predicted_ones(session, monkeypatch):
    measured = iter([{"a": 2.0, "b": 1.0}, {"a": 8.0}])
    monkeypatch.setattr(check_gpu, "kernel_seconds", lambda session, case: next(measured))
    monkeypatch.setattr(check_gpu, "predicted_seconds", lambda *_: {"a": 1.0})
    settings = [(SMALL, "highest"), (SMALL, "high")]
    pairs = check_gpu.time_kernels(session, settings)
    assert pairs == {"a": [(2.0, 1.0), (8.0, 1.0)]}
    assert check_gpu.factors_of(pairs) == {"a": pytest.approx(4.0)}
    assert [row.get("factor") for row in session.report.rows] == [2.0, None, 8.0]


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")
def test_the_prediction_is_by_kernel_and_without_the_gap(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = Case("squash", SHAPES["tiny"], 2)
    found = check_gpu.predicted_seconds(case, "highest", "sm90")
    assert set(found) == {"_squash_fwd_kernel", "_squash_bwd_kernel"}
    assert all(0 < seconds < 1e-4 for seconds in found.values())
    assert check_gpu.predicted_seconds(case, "highest", None) == {}
    assert check_gpu.target_of(CPU) is None


def test_after_the_end_nothing_starts(session):
    late = Session(CPU, True, session.report, end=-math.inf)
    check_gpu.check_results(late, [SMALL])
    check_gpu.check_bits(late, [SMALL], runs=2)
    check_gpu.time_kernels(late, [(SMALL, "highest")])
    check_gpu.time_calls(late, [(SMALL, "highest")])
    assert [row["left_out"] for row in late.report.rows] == [NO_TIME["left_out"]] * 4


@pytest.mark.parametrize("problem, status", [("v: error 1 exceeds 0", 1), (None, 0)])
def test_the_exit_status_says_whether_anything_failed(
    problem, status, tmp_path, monkeypatch, capsys
):
    def report(session, *_):
        row = {"part": "results", "case": "a case"}
        session.report.add([row | ({"left_out": problem} if problem else {})], "case")
        return {}

    monkeypatch.setattr(check_gpu, "INTERPRETED", True)
    for part in ("check_results", "check_bits", "time_kernels", "time_calls"):
        monkeypatch.setattr(check_gpu, part, report)
    assert check_gpu.main(["--dry", "--output", str(tmp_path)]) == status
    out = capsys.readouterr().out
    assert ("FAILED results: a case: v: error 1 exceeds 0" in out) == bool(problem)


def test_the_device_must_be_there(monkeypatch, capsys):
    monkeypatch.setattr(check_gpu, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in ((["--dry"], "set TRITON_INTERPRET=1"), ([], "finds no CUDA device")):
        with pytest.raises(SystemExit):
            check_gpu.main(arguments)
        assert words in capsys.readouterr().err
