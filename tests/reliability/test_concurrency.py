"""Operators called from many threads and processes at once give the bits of one thread.

Interpreted kernels are left out. Triton's interpreter keeps the grid position of the running
program in one global object, so two threads that launch at once overwrite each other's position.
Compiled kernels run if there is a GPU.
"""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from calls import CALLS

from tritoncaps import _native, ops
from tritoncaps._operators import INTERPRETED, _dispatch
from tritoncaps.testing import draw_inputs, evaluate

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="Triton's interpreter shares its state between threads"
)

THREADS = 8
SIZES = {"B": 9, "I": 33}
FEW = {"B": 2, "I": 33}  # few enough that the fused routing goes by images on a CPU


def drawn(operator, device, sizes=SIZES, **how):
    return draw_inputs(operator, operator.small_sizes | sizes, device=device, **how)


def drawn_calls(device):
    """Arguments of `evaluate` for every operator, and for other ways of the fused routing."""
    calls = {
        name: (operator, drawn(operator, device, dtype=torch.float32), options)
        for name, (operator, options) in CALLS.items()
    }
    fused, _, options = calls["fused_dynamic_routing"]
    few = drawn(fused, device, FEW, dtype=torch.float32, optional=())
    low = drawn(fused, device, dtype=torch.bfloat16, optional=())
    return calls | {"few images": (fused, few, options), "bfloat16": (fused, low, options)}


def at_once(tasks):
    """Run each task in its own thread, all starting together. Return their results."""
    start = threading.Barrier(len(tasks), timeout=60)

    def begin(task):
        start.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(begin, task) for task in tasks]]


@pytest.fixture
def eager_switching():
    """Make threads take turns every 10 µs or so instead of 5 ms, so that they interleave."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switching")
def test_eight_threads_get_the_bits_of_one(device):
    """Each goes through all operators, forward and backward, starting with a different one."""
    named = list(drawn_calls(device).items())
    expected = {name: evaluate(*call) for name, call in named}

    def go_through(first):
        for name, call in named[first:] + named[:first]:
            for what, result in evaluate(*call).items():
                assert torch.equal(result, expected[name][what]), (name, what)

    at_once([lambda n=n: go_through(n % len(named)) for n in range(THREADS)])


@pytest.mark.usefixtures("eager_switching")
def test_each_thread_has_its_own_autocast(device):
    """An operator turns autocast off only for the calling thread, and back on afterwards."""
    inputs = drawn_calls(device)["fused_dynamic_routing"][1]
    u, weight = inputs["u"], inputs["weight"]
    exact = ops.fused_dynamic_routing(u, weight)
    low = ops.fused_dynamic_routing(u.bfloat16(), weight.bfloat16())

    def route(is_autocast):
        for _ in range(10):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_autocast):
                assert torch.equal(ops.fused_dynamic_routing(u, weight), exact)
                assert torch.is_autocast_enabled(device.type) == is_autocast
                half = ops.fused_dynamic_routing(u.bfloat16(), weight.bfloat16())
                assert half.dtype == (torch.float32 if is_autocast else torch.bfloat16)
                assert is_autocast or torch.equal(half, low)

    at_once([lambda n=n: route(n % 2 == 0) for n in range(THREADS)])


@pytest.mark.usefixtures("eager_switching")
def test_eight_threads_get_one_warning_about_a_fallback(monkeypatch):
    warned = []
    monkeypatch.setattr(_dispatch, "_warned", {})
    monkeypatch.setattr(_dispatch.warnings, "warn", lambda message, **_: warned.append(message))
    messages = [f"fallback {n}" for n in range(50)]
    for message in messages:
        at_once([lambda message=message: _dispatch._warn_once(message)] * THREADS)
    assert warned == messages


def test_a_warning_that_is_an_error_is_raised_every_time(monkeypatch):
    """Under `python -W error`, the second call must not pass silently."""
    monkeypatch.setattr(_dispatch, "_warned", {})
    for _ in range(2):
        with pytest.raises(UserWarning, match="no kernel"):
            _dispatch._warn_once("no kernel")


@pytest.mark.usefixtures("eager_switching")
def test_eight_threads_differentiate_one_graph(device):
    operator, inputs, options = drawn_calls(device)["fused_dynamic_routing"]
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    results = operator.function(**leaves, **options)
    loss = sum(result.square().sum() for result in results)

    def differentiate():
        return torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)

    expected = differentiate()
    for found in at_once([differentiate] * THREADS):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# In a process of its own --------------------------------------------------------------------------

FIRST_USE = """
import threading
start = threading.Barrier(8, timeout=60)
errors, found = [], []

def work():
    try:
        start.wait()
        import torch
        from tritoncaps.testing import OPERATORS, draw_inputs, evaluate
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found.append({
            name: evaluate(row, draw_inputs(row, dtype=torch.float32, device=device), row.defaults)
            for name, row in OPERATORS.items()
        })
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
if errors: raise errors[0]
import torch
assert len(found) == 8
for name, results in found[0].items():
    for what, bits in results.items():
        assert torch.isfinite(bits).all()
        assert all(torch.equal(other[name][what], bits) for other in found)
print("all the same:", *found[0])
"""

WORKERS = """
import torch
from torch.utils.data import DataLoader, Dataset
from tritoncaps.testing import OPERATORS, draw_inputs, evaluate

def route(index):
    return {
        name: evaluate(row, draw_inputs(row, dtype=torch.float32, seed=index), row.defaults)
        for name, row in OPERATORS.items()
    }

class Routed(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return route(index)

expected = [route(index) for index in range(8)]
loader = DataLoader(Routed(), batch_size=None, num_workers=2, multiprocessing_context="fork",
                    timeout=50)
count = 0
for epoch in range(2):
    for results, own in zip(loader, expected, strict=True):
        # A worker has one thread, so its slices of the work, and its roundings, are its own.
        torch.testing.assert_close(results, own)
        count += 1
print(count, "from workers")
"""


# Large enough for several threads, which torch then has started too.
NATIVE = """
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch
from tritoncaps import ops, reference

def tasks():
    return len(os.listdir("/proc/self/task"))

def route():
    return ops.fused_dynamic_routing(u, weight)

torch.manual_seed(0)
u, weight = torch.randn(16, 200, 8), torch.randn(200, 8, 10, 16)
torch.randn(4_000_000).exp()
begun = tasks()
expected = route()
torch.testing.assert_close(expected, reference.fused_dynamic_routing(u, weight))
print("threads started:", tasks() - begun)
maps = Path("/proc/self/maps").read_text().split()
print("OpenMP libraries:", len({word for word in maps if "libgomp" in word or "libomp" in word}))
with ThreadPoolExecutor(2) as pool:
    for result in pool.map(lambda _: route(), range(8)):
        assert torch.equal(result, expected)
print("two callers at once")
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(route(), expected) else 1)
print("child:", os.waitpid(child, 0)[1])
"""


def run_script(script, **environment):
    """Run Python code in its own process group, which is killed if it hangs."""
    # Python 3.12 warns about what is tested here, a fork of a process that has threads.
    filters = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    process = subprocess.Popen(
        [sys.executable, *filters, "-c", script],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        # On a GPU, every thread compiles every kernel.
        output, _ = process.communicate(timeout=300 if torch.cuda.is_available() else 110)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        pytest.fail(f"hangs; until then it printed:\n{output}")
    assert process.returncode == 0, output
    return output


def test_first_use_from_eight_threads_at_once():
    """Import, registration and, on a GPU, the compilation of every kernel, in eight threads."""
    output = run_script(FIRST_USE)
    assert "all the same: squash prediction_vectors routing_pass" in output


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_forked_workers_use_the_operators_after_their_parent():
    """With two threads per process, because a fork cannot copy its parent's thread pool."""
    output = run_script(WORKERS, OMP_NUM_THREADS="2", CUDA_VISIBLE_DEVICES="")
    assert "16 from workers" in output


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists the threads")
@pytest.mark.skipif(_native.library() is None, reason="there are no native kernels")
def test_native_kernels_share_the_threads_of_torch_and_survive_a_fork():
    output = run_script(NATIVE, OMP_NUM_THREADS="2")
    expected = ["threads started: 0", "OpenMP libraries: 1", "two callers at once", "child: 0"]
    assert output.splitlines() == expected


# On a GPU -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a CUDA device")
def test_two_streams_at_once():
    """Kernels run on the caller's stream, and no other stream uses their memory meanwhile."""
    operator, inputs, options = drawn_calls(torch.device("cuda"))["fused_dynamic_routing"]
    other_inputs = {name: 2 * tensor for name, tensor in inputs.items()}
    both = (inputs, other_inputs)
    expected = [evaluate(operator, tensors, options) for tensors in both]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = ([], [])
    for _ in range(20):
        for results, stream, tensors in zip(found, streams, both, strict=True):
            with torch.cuda.stream(stream):
                results.append(evaluate(operator, tensors, options))
    torch.cuda.synchronize()
    for results, bits in zip(found, expected, strict=True):
        for repeated in results:
            for what, result in repeated.items():
                assert torch.equal(result, bits[what]), what
