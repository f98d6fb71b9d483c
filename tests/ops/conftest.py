"""What the tests of the native kernels share: the variants of the library, threads, memory."""

import os
from pathlib import Path

import pytest
import torch

from tritoncaps._native import _call, _library
from tritoncaps._operators import INTERPRETED

# An interpreted run has the Triton kernels in their place.
collect_ignore = ["test_native.py", "test_native_em.py"] if INTERPRETED else []


@pytest.fixture(params=list(reversed(_library.VARIANTS)))
def native_variant(request, monkeypatch):
    """Run the operators with one variant of the library."""
    monkeypatch.setenv("TRITONCAPS_CPU", request.param)
    forget()
    try:
        _library.library()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    else:
        yield request.param
    finally:
        monkeypatch.undo()
        forget()


def forget():
    """Forget which library was loaded."""
    for cached in (_library.found, _call.function):
        cached.cache_clear()


@pytest.fixture
def set_threads():
    """Set the threads of torch until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def peak_memory():
    """A function that calls another one: its result, and by how many bytes the process grew."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system cannot forget the peak")

    def resident(which):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))

    def measure(call):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        before = resident("VmRSS")
        result = call()
        return result, resident("VmHWM") - before

    return measure
