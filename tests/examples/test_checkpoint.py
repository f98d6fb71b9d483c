"""Checkpoints of a run: two generations that survive any kill, and states that continue exactly.

tests/reliability/test_files.py tests what is read and refused in a single file.
"""

import errno
import functools
import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from engine import checkpoint
from engine.checkpoint import CheckpointError

NAMES = ["last.previous.safetensors", "last.safetensors"]


def names_in(directory):
    return sorted(entry.name for entry in directory.iterdir())


def weight_of(epoch):
    return torch.full((100,), float(epoch))


def save_epochs(directory, *epochs, name="last.safetensors"):
    """Save a checkpoint for each epoch to one path, and return the path."""
    path = directory / name
    for epoch in epochs:
        checkpoint.save(path, {"epoch": epoch, "weight": weight_of(epoch)})
    return path


def flip_a_weight(path):
    """Flip a bit in the last byte, which belongs to a weight."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


class TestStates:
    def test_training_continues_bit_for_bit(self, tmp_path):
        def setup():
            model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

        def train(model, optimizer, schedule):
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.rand(7, 5)).square().mean().backward()
                optimizer.step()
                schedule.step()

        torch.manual_seed(1)
        parts = setup()
        train(*parts)
        state = {str(index): part.state_dict() for index, part in enumerate(parts)}
        path = tmp_path / "last.safetensors"
        checkpoint.save(path, {**state, "rng": checkpoint.rng_state()})
        train(*parts)

        torch.manual_seed(2)
        resumed = setup()
        loaded = checkpoint.load(path)
        for index, part in enumerate(resumed):
            part.load_state_dict(loaded[str(index)])
        checkpoint.set_rng_state(loaded["rng"])
        train(*resumed)

        expected = parts[0].state_dict()
        for name, value in resumed[0].state_dict().items():
            assert torch.equal(value, expected[name]), name
        assert resumed[2].get_last_lr() == parts[2].get_last_lr()

    def test_a_refused_state_leaves_the_one_before(self, tmp_path):
        path = save_epochs(tmp_path, 1)
        with pytest.raises(TypeError, match=r"^save: state\['args'\]\['dir'\] is a pathlib\."):
            checkpoint.save(path, {"args": {"dir": Path("runs")}})
        assert checkpoint.load(path)["epoch"] == 1
        assert names_in(tmp_path) == ["last.safetensors"]


class TestWeights:
    HEADER = {"model": "capsnet", "model_kwargs": {"image_size": (28, 28)}, "epoch": 3}  # noqa: RUF012

    def test_round_trip(self, tmp_path):
        path = tmp_path / "model_best.safetensors"
        state_dict = nn.Linear(2, 3).state_dict()
        checkpoint.save_weights(path, state_dict, self.HEADER)
        weights, header = checkpoint.load_weights(path)
        assert header == self.HEADER
        assert weights.keys() == state_dict.keys()
        assert all(torch.equal(weights[name], state_dict[name]) for name in weights)

    def test_no_header(self, tmp_path):
        checkpoint.save_weights(tmp_path / "file", {"weight": torch.ones(1)}, {})
        assert checkpoint.load_weights(tmp_path / "file")[1] == {}

    def test_what_cannot_be_stored_is_named(self, tmp_path):
        with pytest.raises(TypeError, match=r"^save_weights: header\['dir'\] is a pathlib\."):
            checkpoint.save_weights(tmp_path / "file", {}, {"dir": Path("runs")})
        with pytest.raises(TypeError, match=r"^save_weights: weight is a numpy\.ndarray"):
            checkpoint.save_weights(tmp_path / "file", {"weight": np.ones(1)}, {})

    def test_weights_and_states_are_not_taken_for_each_other(self, tmp_path):
        path = save_epochs(tmp_path, 1)
        with pytest.raises(CheckpointError, match="read the state of a run with load"):
            checkpoint.load_weights(path)
        checkpoint.save_weights(path, {"weight": torch.ones(1)}, self.HEADER)
        with pytest.raises(CheckpointError, match="read it with load_weights"):
            checkpoint.load(path)

    def test_a_damaged_file_gives_way_to_the_previous(self, tmp_path):
        path = tmp_path / "model_best.safetensors"
        for epoch in (1, 2):
            checkpoint.save_weights(path, {"weight": weight_of(epoch)}, {"epoch": epoch})
        (weights, header), used, warning = checkpoint.load_latest_weights(tmp_path)
        assert (header, used, warning) == ({"epoch": 2}, path, None)
        flip_a_weight(path)
        (weights, header), used, warning = checkpoint.load_latest_weights(tmp_path)
        assert header == {"epoch": 1}
        assert torch.equal(weights["weight"], weight_of(1))
        assert used == checkpoint.previous_path(path)
        assert str(path) in warning


class TestTwoGenerations:
    def test_the_replaced_checkpoint_is_kept(self, tmp_path):
        path = save_epochs(tmp_path, 1)
        assert names_in(tmp_path) == ["last.safetensors"]
        save_epochs(tmp_path, 2, 3)
        assert names_in(tmp_path) == NAMES
        assert checkpoint.load(path)["epoch"] == 3
        assert checkpoint.load(checkpoint.previous_path(path))["epoch"] == 2

    def test_it_is_kept_where_there_are_no_hard_links(self, tmp_path):
        refused = OSError(errno.EPERM, "Operation not permitted")
        with mock.patch.object(os, "link", side_effect=refused) as link:
            path = save_epochs(tmp_path, 1, 2, 3)
        assert link.call_count == 2
        assert names_in(tmp_path) == NAMES
        assert checkpoint.load(checkpoint.previous_path(path))["epoch"] == 2

    def test_latest_is_the_last_one(self, tmp_path):
        path = save_epochs(tmp_path, 1, 2)
        state, used, warning = checkpoint.load_latest(tmp_path)
        assert (state["epoch"], used, warning) == (2, path, None)

    @pytest.mark.parametrize(
        "damage",
        [Path.unlink, lambda path: path.write_bytes(b""), flip_a_weight],
        ids=["missing", "empty", "flipped"],
    )
    def test_a_damaged_one_gives_way_to_the_previous(self, tmp_path, damage):
        path = save_epochs(tmp_path, 1, 2)
        damage(path)
        state, used, warning = checkpoint.load_latest(tmp_path)
        assert state["epoch"] == 1
        assert used == checkpoint.previous_path(path)
        assert warning.startswith(f"{path} ")
        assert warning.endswith(f"continuing from the one before, {used}")

    def test_two_damaged_ones_are_both_named(self, tmp_path):
        path = save_epochs(tmp_path, 1, 2)
        path.write_bytes(b"")
        flip_a_weight(checkpoint.previous_path(path))
        with pytest.raises(CheckpointError) as error:
            checkpoint.load_latest(tmp_path)
        assert f"no usable checkpoint: {path} is empty" in str(error.value)
        assert f"{checkpoint.previous_path(path)} is truncated or damaged" in str(error.value)

    def test_other_names_have_their_own_generations(self, tmp_path):
        save_epochs(tmp_path, 1, 2)
        path = save_epochs(tmp_path, 7, name="other.safetensors")
        state, used, warning = checkpoint.load_latest(tmp_path, "other.safetensors")
        assert (state["epoch"], used, warning) == (7, path, None)


def dies_at(step, directory):
    """Return an audit hook that kills its process just before the given use of the directory."""
    steps = itertools.count()

    def hook(event, arguments):
        if any(str(directory) in str(argument) for argument in arguments) and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def exit_of_fork(work, kill_after=None):
    """Run `work` in a fork, killed after so many seconds if given. Return its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_before_every_step(directory, damage_last):
    """Kill a save before each of its uses of the directory in turn. Return their number."""
    for step in itertools.count():
        run = directory / str(step)
        run.mkdir()
        path = save_epochs(run, 1, 2)
        if damage_last:
            path.write_bytes(path.read_bytes()[:-1])

        def work(step=step, run=run):
            sys.addaudithook(dies_at(step, run))
            save_epochs(run, 3)

        status = exit_of_fork(work)
        state, used, warning = checkpoint.load_latest(run)
        assert torch.equal(state["weight"], weight_of(state["epoch"]))
        assert state["epoch"] >= (1 if damage_last else 2), (step, used, warning)
        if status == 0:
            assert state["epoch"] == 3
            return step
        assert status == -signal.SIGKILL
        # The next save works, and clears away whatever was left behind.
        save_epochs(run, 4)
        assert checkpoint.load(path)["epoch"] == 4
        assert names_in(run) == NAMES
    raise AssertionError("unreachable")


def kill_at_random_moments(directory, kills):
    """Kill a process that does nothing but save, again and again."""
    draw = random.Random(0)
    weight = torch.arange(1_000_000.0)

    def save_forever(first):
        for epoch in itertools.count(first):
            checkpoint.save(directory / "last.safetensors", {"epoch": epoch, "weight": weight})

    begun = time.perf_counter()
    checkpoint.save(directory / "last.safetensors", {"epoch": 0, "weight": weight})
    # Within the first few saves, however long one takes.
    latest_kill = max(0.1, 5 * (time.perf_counter() - begun))
    newest = 0
    for _ in range(kills):
        work = functools.partial(save_forever, newest + 1)
        status = exit_of_fork(work, kill_after=draw.uniform(0.01, latest_kill))
        assert status == -signal.SIGKILL
        state, _, _ = checkpoint.load_latest(directory)
        assert state["epoch"] >= newest
        assert torch.equal(state["weight"], weight)
        newest = state["epoch"]
    assert newest > 0, "no save ever finished, so the test proves nothing"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
class TestKilledProcess:
    """A process killed at any moment leaves a good checkpoint, and no later state is lost.

    The forks are made from a separate process, because the one that runs the tests has threads.
    """

    @pytest.fixture
    def fresh_process(self):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as executor:
            yield executor

    @pytest.mark.parametrize("damage_last", [False, True], ids=["last-good", "last-damaged"])
    def test_before_every_step(self, tmp_path, fresh_process, damage_last):
        steps = fresh_process.submit(kill_before_every_step, tmp_path, damage_last).result()
        # At least an open, a link, two renames and two removals.
        assert steps >= 6

    def test_at_random_moments(self, tmp_path, fresh_process):
        fresh_process.submit(kill_at_random_moments, tmp_path, 10).result()


@contextmanager
def file_size_limit(limit):
    """Make every write fail beyond so many bytes of a file, as on a full disk."""
    resource = pytest.importorskip("resource", reason="a POSIX limit makes the write fail")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_failure_changes_nothing(directory, fault, code):
    path = save_epochs(directory, 1, 2)
    weights = directory / "model_best.safetensors"
    for epoch in (1, 2):
        checkpoint.save_weights(weights, {"weight": weight_of(epoch)}, {})
    before = {name: (directory / name).read_bytes() for name in names_in(directory)}
    assert len(before) == 4
    with fault:
        for save in (
            lambda: checkpoint.save(path, {"weight": torch.zeros(1000)}),
            lambda: checkpoint.save_weights(weights, {"weight": torch.zeros(1000)}, {}),
        ):
            with pytest.raises(OSError) as error:
                save()
            assert error.value.errno == code
            assert str(directory) in str(error.value.filename)
    assert {name: (directory / name).read_bytes() for name in names_in(directory)} == before


class TestFailedWrite:
    """An error while saving leaves what was there, and no temporary file."""

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_full_disk(self, tmp_path, call):
        full = OSError(errno.ENOSPC, "No space left on device")
        fault = mock.patch.object(os, call, side_effect=full)
        assert_failure_changes_nothing(tmp_path, fault, errno.ENOSPC)

    def test_a_write_that_stops_halfway(self, tmp_path):
        assert_failure_changes_nothing(tmp_path, file_size_limit(2000), errno.EFBIG)

    def test_a_copy_that_stops_halfway(self, tmp_path):
        """Without hard links the previous file is copied, which can fill the disk too."""

        @contextmanager
        def fault():
            refused = OSError(errno.EPERM, "Operation not permitted")
            with mock.patch.object(os, "link", side_effect=refused), file_size_limit(200):
                yield

        assert_failure_changes_nothing(tmp_path, fault(), errno.EFBIG)

    @pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() == 0,
        reason="root and Windows write to any directory",
    )
    def test_a_read_only_directory(self, tmp_path):
        @contextmanager
        def read_only():
            tmp_path.chmod(0o555)
            try:
                yield
            finally:
                tmp_path.chmod(0o755)

        assert_failure_changes_nothing(tmp_path, read_only(), errno.EACCES)

    def test_an_interrupt(self, tmp_path):
        path = save_epochs(tmp_path, 1)
        with (
            mock.patch.object(os, "fsync", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            save_epochs(tmp_path, 2)
        assert checkpoint.load(path)["epoch"] == 1
        assert names_in(tmp_path) == ["last.safetensors"]


def draw_from_all():
    """Draw from each global generator. The normal draws leave half a pair in its state."""
    return [
        torch.rand(()).item(),
        torch.randn(3)[0].item(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
    ]


class TestRandomState:
    def test_round_trip_through_a_file(self, tmp_path):
        draw_from_all()
        checkpoint.save(tmp_path / "last.safetensors", checkpoint.rng_state())
        expected = [draw_from_all() for _ in range(3)]
        draw_from_all()
        checkpoint.set_rng_state(checkpoint.load(tmp_path / "last.safetensors"))
        assert [draw_from_all() for _ in range(3)] == expected

    def test_absent_devices_are_left_out(self):
        state = checkpoint.rng_state()
        devices = torch.cuda.device_count()
        state["cuda"] = [torch.get_rng_state()] * (devices + 1)
        expected = torch.rand(3)
        with mock.patch.object(torch.cuda, "set_rng_state") as set_on_device:
            checkpoint.set_rng_state(state)
        assert torch.equal(torch.rand(3), expected)
        assert set_on_device.call_count == devices

    def test_cuda_is_not_started(self):
        with (
            mock.patch.object(torch.cuda, "is_initialized", return_value=False),
            mock.patch.object(torch.cuda, "get_rng_state_all", side_effect=AssertionError),
        ):
            assert checkpoint.rng_state()["cuda"] == []

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda_round_trip(self, tmp_path):
        torch.rand(3, device="cuda")
        checkpoint.save(tmp_path / "last.safetensors", checkpoint.rng_state())
        expected = torch.rand(3, device="cuda")
        checkpoint.set_rng_state(checkpoint.load(tmp_path / "last.safetensors"))
        assert torch.equal(torch.rand(3, device="cuda"), expected)
