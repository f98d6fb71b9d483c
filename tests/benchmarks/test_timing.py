"""The clock: turns, rounds and medians, and the inputs that rotate."""

import gc
import weakref
from unittest.mock import MagicMock

import pytest
import torch

from benchmarks import operators, rivals
from benchmarks.cases import SHAPES, Case, Shape
from benchmarks.timing import CpuClock, CudaClock, Task, Timing, replayed, time_alternately

CPU = torch.device("cpu")


class FakeClock:
    """A clock that only `sleep` moves."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time

    def sleep(self, seconds):
        self.time += seconds


@pytest.fixture
def now():
    return FakeClock()


def test_timing_is_the_median_and_the_percentiles_of_the_runs(now):
    durations = iter([1000.0, 5.0, 1.0, 4.0, 2.0, 3.0, 6.0])  # the first is the warm-up
    task = Task(lambda _: now.sleep(next(durations)))
    timings = time_alternately({"a": task}, CpuClock(now), rounds=(6, 6), seconds=0, now=now)
    assert timings == {"a": Timing(median=3.5, p20=2.0, p80=5.0, samples=6)}


def test_preparation_is_not_timed_and_a_run_is_divided_by_its_calls(now):
    def prepare():
        now.sleep(100)
        return "state"

    def run(state):
        assert state == "state"
        now.sleep(8)

    tasks = {"a": Task(run, prepare, calls=4)}
    timings = time_alternately(tasks, CpuClock(now), rounds=(2, 2), seconds=0, now=now)
    assert timings["a"] == Timing(2.0, 2.0, 2.0, samples=2)


def test_rivals_take_turns_in_changing_order():
    runs = []
    tasks = {name: Task(lambda _, name=name: runs.append(name)) for name in "abc"}
    time_alternately(tasks, CpuClock(), rounds=(20, 20), seconds=0)
    rounds = [runs[start : start + 3] for start in range(0, len(runs), 3)]
    assert len(rounds) == 1 + 20
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 3


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 3), (45.0, 5), (1000.0, 9)])
def test_rounds_end_with_the_time_but_not_before_the_fewest(now, seconds, expected):
    task = Task(lambda _: now.sleep(10))
    timings = time_alternately({"a": task}, CpuClock(now), rounds=(3, 9), seconds=seconds, now=now)
    assert timings["a"].samples == expected


def test_the_garbage_collector_pauses_only_while_timing():
    def fail(_):
        assert not gc.isenabled()
        raise RuntimeError("this task fails")

    with pytest.raises(RuntimeError, match="this task fails"):
        time_alternately({"a": Task(fail)}, CpuClock(), rounds=(2, 2), seconds=0)
    assert gc.isenabled()


def test_a_replay_keeps_the_tensors_of_its_task(monkeypatch):
    """The graph itself holds only their addresses."""
    for name in ("Stream", "stream", "current_stream", "synchronize", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())

    class Owner:
        def run(self, _): ...

    owner = Owner()
    alive = weakref.ref(owner)
    replay = replayed(Task(owner.run))
    del owner
    gc.collect()
    assert alive() is not None
    del replay
    gc.collect()
    assert alive() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("phase", operators.PHASES)
def test_a_replayed_phase_is_timed_on_the_device(phase):
    device = torch.device("cuda")
    case = Case("fused_dynamic_routing", Shape(7, 3, 4, 5), B=6)
    inputs = [case.arguments(device, seed) for seed in range(3)]
    function = rivals.op_rival("eager", case, device)
    task = operators.phase_task(function, phase, inputs, case.output_gradients(device))
    timings = time_alternately({"a": replayed(task)}, CudaClock(), rounds=(5, 5), seconds=0)
    assert 0 < timings["a"].median < 1


@pytest.mark.parametrize("name", ["tiny", "mnist"])
def test_inputs_outgrow_the_last_cache(monkeypatch, name):
    """They take twice its size, so a set is lost by the time its turn returns. At most 16 sets."""
    monkeypatch.setattr(operators, "last_cache_bytes", lambda device: 10 << 20)
    case = Case("prediction_vectors", SHAPES[name], B=2, name=name)
    assert len(operators.input_sets(case, "backward", CPU)) == 1
    sets = operators.input_sets(case, "forward", CPU)
    sizes = [sum(tensor.nbytes for tensor in inputs.values()) for inputs in sets]
    if name == "tiny":
        assert len(sets) == 16
    else:
        assert sum(sizes) >= 20 << 20 > sum(sizes[1:])
    assert not torch.equal(sets[0]["weight"], sets[1]["weight"])
