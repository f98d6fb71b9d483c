"""Timing: rivals take turns in one process. The result is the median and two percentiles."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Task:
    """Something to time.

    Attributes:
        run: the function to time. It takes what `prepare` returned.
        prepare: called before each run, and not timed.
        calls: how many calls a run makes, each on its own inputs. A timing is per call.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] | None = None
    calls: int = 1

    def state(self) -> Any:
        """Prepare a run."""
        return None if self.prepare is None else self.prepare()


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    p20: float
    p80: float
    samples: int

    @staticmethod
    def of(samples: list[float]) -> "Timing":
        """Summarise at least two samples."""
        p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
        return Timing(statistics.median(samples), p20, p80, len(samples))


class Clock(Protocol):
    """Measures one run of a task, in seconds."""

    def seconds(self, task: Task) -> float:
        """Prepare, then run and measure."""
        ...


class CpuClock:
    """Wall time, for a device that has finished when a call returns."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def seconds(self, task: Task) -> float:
        """Prepare, then run and measure."""
        state = task.state()
        start = self._now()
        task.run(state)
        return self._now() - start


class CudaClock:
    """Time between two events in the device's stream."""

    def __init__(self) -> None:
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def seconds(self, task: Task) -> float:
        """Prepare, then run and measure."""
        state = task.state()
        self._start.record()
        task.run(state)
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def clock_for(device: torch.device) -> Clock:
    """Choose the clock of a device."""
    return CudaClock() if device.type == "cuda" else CpuClock()


def replayed(task: Task) -> Task:
    """Capture a task in CUDA graphs. A replay spends no time on launches from Python.

    `prepare` becomes a graph of its own in the same memory, replayed before each run. The replay
    keeps the task alive, because a graph holds only the addresses of its tensors.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            task.run(task.state())
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    pool = torch.cuda.graph_pool_handle()
    state, preparation = None, None
    graph = torch.cuda.CUDAGraph()
    with _no_collection():  # a collection might free memory, which a capture forbids
        if task.prepare is not None:
            preparation = torch.cuda.CUDAGraph()
            with torch.cuda.graph(preparation, pool=pool):
                state = task.prepare()
        with torch.cuda.graph(graph, pool=pool):
            task.run(state)

    def replay(_: Any, kept: Task = task) -> None:
        graph.replay()

    return Task(replay, None if preparation is None else preparation.replay, task.calls)


def time_alternately(
    tasks: Mapping[str, Task],
    clock: Clock,
    *,
    rounds: tuple[int, int],
    seconds: float,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Timing]:
    """Time tasks side by side, so that a drift of the machine affects all of them alike.

    Every round runs each task once, in a new random order, so no task always follows the same one.
    A first round warms up and does not count.

    Args:
        tasks: by name.
        clock: measures a run.
        rounds: the fewest rounds, at least 2, and the most.
        seconds: after this time no round starts, once the fewest are done.
        now: returns the time.
    """
    order = list(tasks)
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in order}
    with _no_collection():
        for name in order:
            clock.seconds(tasks[name])
        end = now() + seconds
        for done in range(rounds[1]):
            if done >= rounds[0] and now() >= end:
                break
            shuffle(order)
            for name in order:
                samples[name].append(clock.seconds(tasks[name]) / tasks[name].calls)
    return {name: Timing.of(values) for name, values in samples.items()}


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
