"""The operators from many threads and processes at once: the results of one thread, to the bit.

The kernels are not called interpreted here: Triton's interpreter keeps the position in the grid of
the program that it runs in one global object, so two threads that launch at once overwrite each
other's. Compiled they are called where there is a GPU.

Each thread differentiates a graph of its own. One graph from several threads at once is beyond what
torch does for registered operators: their backward sets `ctx.needs_input_grad` while it runs.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from agreement import gradients
from torch import Tensor

from tritoncaps import _operators, ops
from tritoncaps._operators import INTERPRETED

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="Triton's interpreter keeps its state in one object for all threads"
)

THREADS = 8
B, I, P, J, D = 9, 33, 4, 5, 6


def calls(device: torch.device) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Every operator, with inputs; the fused routing also with so few images that it makes û."""

    def normal(*shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator).to(device)

    def with_prior(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *tensors: function(*tensors[:-1], prior=tensors[-1], return_coupling=True)

    u, weight, u_hat, prior = normal(B, I, P), normal(I, P, J, D), normal(B, I, J, D), normal(I, J)
    target = torch.arange(B, device=device) % J
    return {
        "squash": (ops.squash, [u]),
        "prediction_vectors": (ops.prediction_vectors, [u, weight]),
        "dynamic_routing": (with_prior(ops.dynamic_routing), [u_hat, prior]),
        "fused_dynamic_routing": (with_prior(ops.fused_dynamic_routing), [u, weight, prior]),
        "fused_dynamic_routing, few": (ops.fused_dynamic_routing, [u[:2], weight]),
        "fused_dynamic_routing, bfloat16": (
            ops.fused_dynamic_routing,
            [u.bfloat16(), weight.bfloat16()],
        ),
        "margin_loss": (lambda x: ops.margin_loss(x, target), [u_hat[:, 0].norm(dim=-1)]),
    }


def results(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    outputs, grads = gradients(function, inputs, seed=0)
    return outputs + grads


def at_once(tasks: list[Callable[[], Any]]) -> list[Any]:
    """Run tasks in a thread each, which begin together; their results, or the first error."""
    start = threading.Barrier(len(tasks), timeout=60)

    def begin(task: Callable[[], Any]) -> Any:
        start.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(begin, task) for task in tasks]]


@pytest.fixture
def eager_switching():
    """Threads that take turns after some 10 µs rather than 5 ms: what can interleave does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switching")
def test_eight_threads_get_the_bits_of_one(device):
    """Each goes through all operators, forward and backward, beginning with another one."""
    named = list(calls(device).items())
    expected = {name: results(*call) for name, call in named}

    def go_through(first: int) -> None:
        for name, call in named[first:] + named[:first]:
            for result, bits in zip(results(*call), expected[name], strict=True):
                assert torch.equal(result, bits), name

    at_once([lambda n=n: go_through(n % len(named)) for n in range(THREADS)])


@pytest.mark.usefixtures("eager_switching")
def test_threads_set_autocast_each_for_itself(device):
    """Autocast is off inside an operator: of the thread that calls it, and back on after."""
    u, weight = calls(device)["fused_dynamic_routing"][1][:2]
    exact = ops.fused_dynamic_routing(u, weight)
    low = ops.fused_dynamic_routing(u.bfloat16(), weight.bfloat16())

    def route(is_autocast: bool) -> None:
        for _ in range(10):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_autocast):
                assert torch.equal(ops.fused_dynamic_routing(u, weight), exact)
                assert torch.is_autocast_enabled(device.type) == is_autocast
                half = ops.fused_dynamic_routing(u.bfloat16(), weight.bfloat16())
                assert half.dtype == (torch.float32 if is_autocast else torch.bfloat16)
                assert is_autocast or torch.equal(half, low)

    at_once([lambda n=n: route(n % 2 == 0) for n in range(THREADS)])


@pytest.mark.usefixtures("eager_switching")
def test_a_fallback_is_said_once_to_all_threads(monkeypatch):
    said = []
    monkeypatch.setattr(_operators, "_said", {})
    monkeypatch.setattr(_operators.warnings, "warn", lambda message, **_: said.append(message))
    messages = [f"fallback {n}" for n in range(50)]
    for message in messages:
        at_once([lambda message=message: _operators._say_once(message)] * THREADS)
    assert said == messages


def test_a_fallback_that_is_an_error_is_one_every_time(monkeypatch):
    """`python -W error` must not let the second call pass in silence."""
    monkeypatch.setattr(_operators, "_said", {})
    for _ in range(2):
        with pytest.raises(UserWarning, match="no kernel"):
            _operators._say_once("no kernel")


# In a process of its own --------------------------------------------------------------------------

FIRST_USE = """
import threading
start = threading.Barrier(8, timeout=60)
errors, results = [], []

def work():
    try:
        start.wait()
        import torch
        from tritoncaps import ops
        device = "cuda" if torch.cuda.is_available() else "cpu"
        u = torch.linspace(-1, 1, 9 * 33 * 4, device=device).view(9, 33, 4).requires_grad_()
        weight = torch.linspace(-1, 2, 33 * 4 * 30, device=device).view(33, 4, 5, 6)
        v, c = ops.fused_dynamic_routing(u, weight, return_coupling=True)
        w = ops.dynamic_routing(ops.prediction_vectors(u, weight))
        activations = ops.squash(v + w).norm(dim=-1)
        target = torch.arange(9, device=device) % 5
        (grad,) = torch.autograd.grad(ops.margin_loss(activations, target) + c.square().sum(), u)
        results.append((v.detach(), w.detach(), grad))
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
if errors: raise errors[0]
import torch
assert len(results) == 8
for result in results:
    for tensor, bits in zip(result, results[0], strict=True):
        assert torch.isfinite(tensor).all() and torch.equal(tensor, bits)
print("all the same")
"""

WORKERS = """
import sys, torch
from torch.utils.data import DataLoader, Dataset
from tritoncaps import ops

weight = torch.linspace(-1, 2, 33 * 4 * 30).view(33, 4, 5, 6)
images = torch.linspace(-1, 1, 8 * 9 * 33 * 4).view(8, 9, 33, 4)

def route(u):
    u = u.clone().requires_grad_()
    v, c = ops.fused_dynamic_routing(u, weight, return_coupling=True)
    w = ops.dynamic_routing(ops.prediction_vectors(u, weight))
    activations = ops.squash(v + w).norm(dim=-1)
    loss = ops.margin_loss(activations, torch.arange(9) % 5) + c.square().sum()
    return v.detach(), w.detach(), torch.autograd.grad(loss, u)[0]

class Routed(Dataset):
    def __len__(self):
        return len(images)
    def __getitem__(self, index):
        return route(images[index])

expected = [route(u) for u in images]
context = sys.argv[1]
loader = DataLoader(Routed(), batch_size=None, num_workers=2, multiprocessing_context=context,
                    timeout=50)
count = 0
for epoch in range(2):
    for results, own in zip(loader, expected, strict=True):
        for result, own_result in zip(results, own, strict=True):
            # A worker has one thread, so its chunks, and with them its roundings, are its own.
            torch.testing.assert_close(result, own_result)
        count += 1
print(count, "from workers")
"""


def run_script(script: str, *arguments: str, **environment: str) -> str:
    """Run Python code in a process group of its own, which is ended if it hangs."""
    # Python 3.12 warns of what is tested here: a fork of a process that has threads.
    filters = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    process = subprocess.Popen(
        [sys.executable, *filters, "-c", script, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        # On a GPU every thread compiles every kernel.
        output, _ = process.communicate(timeout=300 if torch.cuda.is_available() else 110)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        pytest.fail(f"hangs; until then it printed:\n{output}")
    assert process.returncode == 0, output
    return output


def test_first_use_from_eight_threads_at_once():
    """Import, registration and, on a GPU, the compilation of every kernel, in eight threads."""
    assert "all the same" in run_script(FIRST_USE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system that does not fork")
def test_forked_workers_use_the_operators_after_their_parent():
    """Two threads a process, since what a fork cannot copy is the pool of threads of its parent."""
    output = run_script(WORKERS, "fork", OMP_NUM_THREADS="2", CUDA_VISIBLE_DEVICES="")
    assert "16 from workers" in output


# On a GPU -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a CUDA device")
def test_two_streams_at_once():
    """Kernels go to the caller's stream, and what they borrow from the allocator stays theirs."""
    device = torch.device("cuda")
    function, inputs = calls(device)["fused_dynamic_routing"]
    other_inputs = [2 * tensor for tensor in inputs]
    expected = [results(function, tensors) for tensors in (inputs, other_inputs)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(20):
        for n, (stream, tensors) in enumerate(zip(streams, (inputs, other_inputs), strict=True)):
            with torch.cuda.stream(stream):
                found[n].append(results(function, tensors))
    torch.cuda.synchronize()
    for n in range(2):
        for repeated in found[n]:
            for result, bits in zip(repeated, expected[n], strict=True):
                assert torch.equal(result, bits)
