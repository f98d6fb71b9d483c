"""Which native library a processor runs, what happens without one, and what `backend_info` says."""

import ctypes
import logging
import os
import sys
from types import SimpleNamespace

import pytest
import torch

import tritoncaps
from tritoncaps import _native, _torch_path, ops
from tritoncaps._native import _library
from tritoncaps._operators import _dispatch
from tritoncaps.testing import OPERATORS, draw_inputs

ALL = ("avx512", "avx2", "portable")


def find(monkeypatch, choice="", lanes=8, built=ALL):
    """What is found on a processor with such vectors, if these libraries were built."""

    def load(name):
        if name not in built:
            raise OSError(f"_{name}.so was not built")
        return SimpleNamespace(name=name, tritoncaps_lanes=lambda: lanes)

    monkeypatch.setattr(_library, "load", load)
    monkeypatch.setenv("TRITONCAPS_CPU", choice)
    return _library.found.__wrapped__()


@pytest.mark.parametrize(
    ("choice", "lanes", "built", "expected"),
    [
        ("", 16, ALL, "avx512"),
        ("", 8, ALL, "avx2"),
        ("", 4, ALL, "portable"),
        ("", 16, ("avx2", "portable"), "avx2"),
        ("native", 8, ALL, "avx2"),
        ("avx2", 16, ALL, "avx2"),
        ("portable", 16, ALL, "portable"),
    ],
)
def test_the_best_library_that_the_processor_runs_is_taken(
    monkeypatch, choice, lanes, built, expected
):
    found = find(monkeypatch, choice, lanes, built)
    assert found.variant == found.library.name == expected
    assert found.reason is None


@pytest.mark.parametrize(
    ("choice", "built", "reason"),
    [
        ("torch", ALL, "TRITONCAPS_CPU is torch"),
        ("", (), "_portable.so was not built"),
        # Which processor this is, only the portable library can say.
        ("", ("avx2",), "_portable.so was not built"),
    ],
)
def test_without_a_library_there_is_a_reason(monkeypatch, choice, built, reason):
    assert find(monkeypatch, choice, built=built) == (None, None, reason)


@pytest.mark.parametrize(
    ("choice", "built", "error", "message"),
    [
        ("avx512", ALL, RuntimeError, "is avx512, .* has no avx512"),
        ("native", (), RuntimeError, r"is native, .*_portable\.so was not built"),
        ("avx2", ("portable",), RuntimeError, r"is avx2, .*_avx2\.so was not built"),
        ("sse", ALL, ValueError, "native, torch, avx512, avx2, portable, or unset, got 'sse'"),
    ],
)
def test_a_choice_that_is_not_there_is_an_error(monkeypatch, choice, built, error, message):
    with pytest.raises(error, match=message):
        find(monkeypatch, choice, built=built)


def test_the_log_says_once_which_path_runs(monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="tritoncaps"):
        find(monkeypatch)
        find(monkeypatch, built=())
    assert caplog.messages == [
        "routing on a CPU: avx2",
        "routing on a CPU: plain torch (_portable.so was not built)",
    ]


@pytest.mark.parametrize("fault", ["broken", "foreign", "stale"])
def test_a_library_that_cannot_be_used_is_passed_over(monkeypatch, tmp_path, fault):
    library = tmp_path / "_portable.so"
    library.write_bytes(b"This is no library.")
    os.utime(library, (0, 0))
    if fault == "stale":
        (tmp_path / "routing.cpp").touch()
    if fault == "foreign":  # it has none of the functions
        monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace())
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    monkeypatch.setenv("TRITONCAPS_CPU", "")
    found = _library.found.__wrapped__()
    assert found.library is None
    words = {"broken": "_portable.so", "foreign": "tritoncaps_lanes", "stale": "older than its"}
    assert words[fault] in found.reason


# Dispatch -----------------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch):
    """Pretend that there is a library. Returns the dtypes that its functions are called with."""
    dtypes = []

    def fused_dynamic_routing_fwd(u, *args):
        dtypes.append(u.dtype)
        return _torch_path.fused_dynamic_routing_fwd(u, *args)

    monkeypatch.setattr(_native, "library", lambda: "a library")
    monkeypatch.setattr(_native, "fused_dynamic_routing_fwd", fused_dynamic_routing_fwd)
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    return dtypes


def route(dtype):
    inputs = draw_inputs(OPERATORS["fused_dynamic_routing"], dtype=dtype, optional=())
    return ops.fused_dynamic_routing(**inputs)


def test_the_native_kernels_take_two_dtypes_of_a_cpu(called):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        route(dtype)
    assert called == [torch.bfloat16, torch.float32]
    assert not _native.takes(torch.ones(1, device="meta"))


def test_other_operators_run_in_plain_torch_beside_the_native_kernels(called):
    assert not hasattr(_native, "prediction_vectors_fwd")
    inputs = draw_inputs(OPERATORS["prediction_vectors"], dtype=torch.float32)
    assert ops.prediction_vectors(**inputs).ndim == 4
    assert not called


def test_autocast_calls_the_native_kernels_in_float32(called):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert route(torch.bfloat16).dtype == torch.float32
    assert called == [torch.float32]


def test_without_a_library_the_torch_path_runs(called, monkeypatch):
    monkeypatch.setattr(_native, "library", lambda: None)
    route(torch.float32)
    assert not called


def test_interpreted_kernels_come_before_native_ones(called, monkeypatch):
    class Kernels:
        REFUSALS = ()
        fused_dynamic_routing_fwd = staticmethod(_torch_path.fused_dynamic_routing_fwd)

    monkeypatch.setattr(_dispatch, "INTERPRETED", True)
    monkeypatch.setattr(_dispatch, "kernels", lambda: Kernels)
    route(torch.float32)
    assert not called


# backend_info -------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_triton", [True, False])
def test_backend_info_of_native_kernels(monkeypatch, has_triton):
    kernels = SimpleNamespace() if has_triton else None
    monkeypatch.setattr(_dispatch, "kernels", lambda: kernels)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.9.0"))
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    monkeypatch.setattr(_library, "found", lambda: _library.Found("a library", "avx2", None))
    info = tritoncaps.backend_info()
    assert info["triton"] == ("3.9.0" if has_triton else None)
    assert info["cuda"] == ("triton" if has_triton else "torch")
    assert (info["cpu"], info["variant"]) == ("native", "avx2")
    assert info["threads"] == torch.get_num_threads()
    lines = str(info).splitlines()
    assert lines[:2] == [f"tritoncaps: {tritoncaps.__version__}", f"torch: {torch.__version__}"]
    assert ("triton: 3.9.0" in lines) == has_triton
    assert "reason" not in str(info)


def test_backend_info_without_native_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.9.0"))
    monkeypatch.setattr(_library, "found", lambda: _library.Found(None, None, "not built"))
    monkeypatch.setattr(_dispatch, "kernels", lambda: None)
    info = tritoncaps.backend_info()
    assert (info["cpu"], info["variant"], info["reason"]) == ("torch", None, "not built")
    monkeypatch.setattr(_dispatch, "INTERPRETED", True)
    for kernels, cpu in ((None, "torch"), (SimpleNamespace(), "interpreted")):
        monkeypatch.setattr(_dispatch, "kernels", lambda kernels=kernels: kernels)
        assert tritoncaps.backend_info()["cpu"] == cpu
