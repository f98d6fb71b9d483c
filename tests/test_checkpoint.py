"""Checkpoints: what is written survives a crash, and what is read is intact and never executed."""

import argparse
import errno
import functools
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from engine import checkpoint
from engine.checkpoint import CheckpointError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def names_in(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def saved_epochs(directory: Path, *epochs: int) -> Path:
    """Save a checkpoint per epoch, one over the other, and return the path."""
    path = directory / "last.pt"
    for epoch in epochs:
        checkpoint.save(path, {"epoch": epoch, "weight": torch.full((100,), float(epoch))})
    return path


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


class TestRoundTrip:
    @pytest.mark.parametrize(
        "value",
        [
            None,
            True,
            -3,
            2**127,
            float("-inf"),
            1j,
            "text, ünïcode",
            b"\x00\xff",
            [1, [2.5]],
            (1, (2, None)),
            {"a": {1: 2, (3, 4): 5}},
            OrderedDict(b=1, a=2),
            torch.Size((2, 3)),
            torch.bfloat16,
            torch.device("cpu"),
        ],
        ids=repr,
    )
    def test_plain_values_come_back_with_their_types(self, tmp_path: Path, value: object) -> None:
        checkpoint.save(tmp_path / "last.pt", {"value": value})
        loaded = checkpoint.load(tmp_path / "last.pt")
        assert loaded == {"value": value}
        assert type(loaded["value"]) is type(value)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
    def test_tensors_come_back_bit_for_bit(self, tmp_path: Path, dtype: torch.dtype) -> None:
        tensor = torch.arange(24).reshape(2, 3, 4).to(dtype).transpose(0, 2)
        checkpoint.save(tmp_path / "last.pt", {"tensor": tensor, "parameter": nn.Parameter()})
        loaded = checkpoint.load(tmp_path / "last.pt")
        assert loaded["tensor"].dtype == dtype
        assert torch.equal(loaded["tensor"], tensor)
        assert isinstance(loaded["parameter"], nn.Parameter)

    def test_training_continues_bit_for_bit(self, tmp_path: Path) -> None:
        def setup() -> tuple[Any, Any, Any]:
            model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
            optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
            return model, optimiser, torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.9)

        def train(model: Any, optimiser: Any, schedule: Any) -> None:
            for _ in range(3):
                optimiser.zero_grad()
                model(torch.rand(7, 5)).square().mean().backward()
                optimiser.step()
                schedule.step()

        torch.manual_seed(1)
        parts = setup()
        train(*parts)
        state = {str(index): part.state_dict() for index, part in enumerate(parts)}
        checkpoint.save(tmp_path / "last.pt", {**state, "rng": checkpoint.rng_state()})
        train(*parts)

        torch.manual_seed(2)
        resumed = setup()
        loaded = checkpoint.load(tmp_path / "last.pt")
        for index, part in enumerate(resumed):
            part.load_state_dict(loaded[str(index)])
        checkpoint.set_rng_state(loaded["rng"])
        train(*resumed)

        expected = parts[0].state_dict()
        for name, value in resumed[0].state_dict().items():
            assert torch.equal(value, expected[name]), name
        assert resumed[2].get_last_lr() == parts[2].get_last_lr()


class TestRefusalToSave:
    @pytest.mark.parametrize(
        "value",
        [
            Path("runs"),
            argparse.Namespace(lr=0.1),
            np.float64(0.5),
            np.zeros(2),
            torch.__version__,
            frozenset(),
            nn.Linear(1, 1),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_what_could_not_be_loaded_is_named(self, tmp_path: Path, value: object) -> None:
        path = saved_epochs(tmp_path, 1)
        kind = type(value)
        with pytest.raises(TypeError) as error:
            checkpoint.save(path, {"args": {"list": [0, value]}})
        assert "state['args']['list'][1]" in str(error.value)
        assert f"{kind.__module__}.{kind.__qualname__}" in str(error.value)
        assert checkpoint.load(path)["epoch"] == 1
        assert names_in(tmp_path) == ["last.pt"]

    def test_keys_are_checked_too(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"the key .*'runs'.* of state\['args'\]"):
            checkpoint.save(tmp_path / "last.pt", {"args": {Path("runs"): 1}})

    @pytest.mark.parametrize("name", ["format", "version"])
    def test_the_names_of_the_marker_are_reserved(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match=f"'{name}'"):
            checkpoint.save(tmp_path / "last.pt", {name: 1})


class TestTwoGenerations:
    def test_the_replaced_checkpoint_is_kept(self, tmp_path: Path) -> None:
        path = saved_epochs(tmp_path, 1)
        assert names_in(tmp_path) == ["last.pt"]
        saved_epochs(tmp_path, 2, 3)
        assert names_in(tmp_path) == ["last.previous.pt", "last.pt"]
        assert checkpoint.load(path)["epoch"] == 3
        assert checkpoint.load(checkpoint.previous_path(path))["epoch"] == 2

    def test_it_is_kept_where_there_are_no_hard_links(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def link(source: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
        path = saved_epochs(tmp_path, 1, 2, 3)
        assert names_in(tmp_path) == ["last.previous.pt", "last.pt"]
        assert checkpoint.load(checkpoint.previous_path(path))["epoch"] == 2

    def test_latest_is_the_last_one(self, tmp_path: Path) -> None:
        path = saved_epochs(tmp_path, 1, 2)
        state, used, warning = checkpoint.load_latest(tmp_path)
        assert (state["epoch"], used, warning) == (2, path, None)

    @pytest.mark.parametrize("damage", ["missing", "empty", "flipped"])
    def test_a_damaged_one_gives_way_to_the_previous(self, tmp_path: Path, damage: str) -> None:
        path = saved_epochs(tmp_path, 1, 2)
        if damage == "missing":
            path.unlink()
        elif damage == "empty":
            path.write_bytes(b"")
        else:
            flip_bit(path, path.read_bytes().index(torch.full((100,), 2.0).numpy().tobytes()))
        state, used, warning = checkpoint.load_latest(tmp_path)
        assert state["epoch"] == 1
        assert used == checkpoint.previous_path(path)
        assert warning is not None
        assert str(path) in warning
        assert str(used) in warning

    def test_two_damaged_ones_are_both_named(self, tmp_path: Path) -> None:
        path = saved_epochs(tmp_path, 1, 2)
        path.write_bytes(b"")
        checkpoint.previous_path(path).write_bytes(b"PK\x03\x04")
        with pytest.raises(CheckpointError) as error:
            checkpoint.load_latest(tmp_path)
        assert f"{path} is empty" in str(error.value)
        assert f"{checkpoint.previous_path(path)} is truncated" in str(error.value)

    def test_other_names_have_their_own_generations(self, tmp_path: Path) -> None:
        saved_epochs(tmp_path, 1, 2)
        checkpoint.save(tmp_path / "model_best.pt", {"epoch": 7})
        state, used, warning = checkpoint.load_latest(tmp_path, "model_best.pt")
        assert (state["epoch"], used.name, warning) == (7, "model_best.pt", None)


class TestDamage:
    """Each fault gets a message with the file's name and the kind of fault."""

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"last\.pt does not exist"):
            checkpoint.load(tmp_path / "last.pt")

    def test_a_directory(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.load(tmp_path)

    def test_empty(self, tmp_path: Path) -> None:
        path = tmp_path / "last.pt"
        path.touch()
        with pytest.raises(CheckpointError, match=r"last\.pt is empty"):
            checkpoint.load(path)

    def test_cut_off_anywhere(self, tmp_path: Path) -> None:
        path = saved_epochs(tmp_path, 1)
        content = path.read_bytes()
        for length in range(4, len(content), 7):
            path.write_bytes(content[:length])
            with pytest.raises(CheckpointError, match=r"last\.pt is truncated or damaged"):
                checkpoint.load(path)

    def test_a_flipped_bit_of_a_weight(self, tmp_path: Path) -> None:
        path = saved_epochs(tmp_path, 1)
        weight = torch.full((100,), 1.0)
        flip_bit(path, path.read_bytes().index(weight.numpy().tobytes()) + 3)
        # The reason for the checksum test: torch reads the file and returns another weight.
        assert not torch.equal(torch.load(path, weights_only=True)["weight"], weight)
        with pytest.raises(CheckpointError, match=r"last\.pt is damaged: wrong checksum.*data/0"):
            checkpoint.load(path)

    def test_a_flipped_bit_anywhere_is_found_or_harmless(self, tmp_path: Path) -> None:
        path = saved_epochs(tmp_path, 1)
        expected = torch.full((100,), 1.0)
        content = path.read_bytes()
        draw = random.Random(0)
        found = 0
        for position in range(0, len(content), 3):
            path.write_bytes(content)
            flip_bit(path, position, draw.randrange(8))
            try:
                state = checkpoint.load(path)
            except CheckpointError:
                found += 1
            else:
                assert state["epoch"] == 1, position
                assert torch.equal(state["weight"], expected), position
        assert found > 100

    def test_a_tensor_marked_as_a_directory(self, tmp_path: Path) -> None:
        path = saved_epochs(tmp_path, 1)
        # A member's attributes stand 8 bytes before its name in the table at the end of the file;
        # with this bit set, torch returns uninitialised memory, and no checksum is wrong.
        flip_bit(path, path.read_bytes().rindex(b"archive/data/0") - 8, bit=4)
        with zipfile.ZipFile(path) as archive:
            assert archive.getinfo("archive/data/0").external_attr == 0x10
            assert archive.testzip() is None
        with pytest.raises(CheckpointError, match="damaged or foreign"):
            checkpoint.load(path)


class Bomb:
    """An object whose unpickling makes a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.directory),)


class TestForeignFiles:
    def test_code_is_named_and_never_run(self, tmp_path: Path) -> None:
        path, trace = tmp_path / "last.pt", tmp_path / "trace"
        torch.save({"format": checkpoint.FORMAT, "version": 1, "model": Bomb(trace)}, path)
        with pytest.raises(
            CheckpointError, match=rf"last\.pt is not loaded.*{os.mkdir.__module__}"
        ):
            checkpoint.load(path)
        assert not trace.exists()
        torch.load(path, weights_only=False)
        assert trace.exists(), "the file was no danger, so the test proves nothing"

    def test_a_plain_pickle_is_not_run(self, tmp_path: Path) -> None:
        path, trace = tmp_path / "last.pt", tmp_path / "trace"
        path.write_bytes(pickle.dumps(Bomb(trace)))
        with pytest.raises(CheckpointError, match=r"not an archive of torch\.save"):
            checkpoint.load(path)
        assert not trace.exists()

    def test_the_refusal_does_not_explain_how_to_load_it(self, tmp_path: Path) -> None:
        path = tmp_path / "last.pt"
        torch.save({"args": argparse.Namespace()}, path)
        with pytest.raises(CheckpointError, match=r"argparse\.Namespace") as error:
            checkpoint.load(path)
        assert "weights_only" not in str(error.value)

    def test_what_claims_more_than_there_is_is_not_unpacked(self, tmp_path: Path) -> None:
        path = tmp_path / "last.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(1 << 24))
        assert path.stat().st_size < 1 << 16
        with (
            mock.patch.object(zipfile.ZipFile, "testzip", side_effect=AssertionError),
            pytest.raises(CheckpointError, match="compressed or claim more than there is"),
        ):
            checkpoint.load(path)

    @pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
    @pytest.mark.parametrize("name", ["archive/data/0", "archive/DATA/0"])
    def test_two_parts_of_one_name(self, tmp_path: Path, name: str) -> None:
        path = saved_epochs(tmp_path, 1)
        with zipfile.ZipFile(path, "a") as archive:
            part = zipfile.ZipInfo(name)
            archive.writestr(part, bytes(400))
            part.external_attr = 0
        with pytest.raises(CheckpointError, match="two of its parts have one name"):
            checkpoint.load(path)

    @pytest.mark.parametrize("kind", [bytearray, torch.Tensor, torch.FloatTensor])
    def test_an_object_of_a_claimed_size_is_not_made(self, tmp_path: Path, kind: type) -> None:
        class Claim:
            def __reduce__(self) -> tuple[type, tuple[int]]:
                return kind, (10,)

        path = tmp_path / "last.pt"
        torch.save({"format": checkpoint.FORMAT, "version": 1, "model": Claim()}, path)
        torch.load(path, weights_only=True)  # torch makes it, of any size
        with pytest.raises(CheckpointError, match=f"makes a {kind.__name__} of any size"):
            checkpoint.load(path)

    def test_an_archive_of_another_program(self, tmp_path: Path) -> None:
        path = tmp_path / "last.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo("readme.txt"), "hello")
        with pytest.raises(CheckpointError, match=r"last\.pt cannot be loaded|damaged or foreign"):
            checkpoint.load(path)

    @pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.ones(2)], ids=repr)
    def test_a_checkpoint_of_another_program(self, tmp_path: Path, content: object) -> None:
        path = tmp_path / "last.pt"
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="not a checkpoint of ours"):
            checkpoint.load(path)

    def test_a_later_version(self, tmp_path: Path) -> None:
        path = tmp_path / "last.pt"
        torch.save({"format": checkpoint.FORMAT, "version": 2}, path)
        with pytest.raises(CheckpointError, match="version 2, but this program reads version 1"):
            checkpoint.load(path)


def dies_at(step: int, directory: Path) -> Callable[[str, tuple[object, ...]], None]:
    """An audit hook that kills its process just before the given use of the directory."""
    steps = itertools.count()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if any(str(directory) in str(argument) for argument in arguments) and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def exit_of_fork(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Run ``work`` in a fork, killed after so many seconds if given; return its exit status."""
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


def kill_before_every_step(directory: Path, damage_last: bool) -> int:
    """Kill a save before each of its uses of the directory in turn; return how many there were."""
    for step in itertools.count():
        run = directory / str(step)
        run.mkdir()
        path = saved_epochs(run, 1, 2)
        if damage_last:
            path.write_bytes(path.read_bytes()[:-1])

        def work(step: int = step, run: Path = run) -> None:
            sys.addaudithook(dies_at(step, run))
            saved_epochs(run, 3)

        status = exit_of_fork(work)
        state, used, warning = checkpoint.load_latest(run)
        assert torch.equal(state["weight"], torch.full((100,), float(state["epoch"])))
        assert state["epoch"] >= (1 if damage_last else 2), (step, used, warning)
        if status == 0:
            assert state["epoch"] == 3
            return step
        assert status == -signal.SIGKILL
        # Whatever was left behind, the next save works and clears it away.
        saved_epochs(run, 4)
        assert checkpoint.load(path)["epoch"] == 4
        assert names_in(run) == ["last.previous.pt", "last.pt"]
    raise AssertionError("unreachable")


def kill_at_random_moments(directory: Path, kills: int) -> None:
    """Kill a process that does nothing but save, again and again."""
    draw = random.Random(0)
    weight = torch.arange(1_000_000.0)

    def save_forever(first: int) -> None:
        for epoch in itertools.count(first):
            checkpoint.save(directory / "last.pt", {"epoch": epoch, "weight": weight})

    checkpoint.save(directory / "last.pt", {"epoch": 0, "weight": weight})
    newest = 0
    for _ in range(kills):
        work = functools.partial(save_forever, newest + 1)
        status = exit_of_fork(work, kill_after=draw.uniform(0.01, 0.1))
        assert status == -signal.SIGKILL
        state, _, _ = checkpoint.load_latest(directory)
        assert state["epoch"] >= newest
        assert torch.equal(state["weight"], weight)
        newest = state["epoch"]
    assert newest > 0, "no save ever finished, so the test proves nothing"


@needs_fork
class TestKilledProcess:
    """A process killed at any moment leaves a good checkpoint, and no later state is lost.

    The forks are made from a process of their own, because the one that runs the tests has threads.
    """

    @pytest.fixture
    def fresh_process(self) -> Iterator[ProcessPoolExecutor]:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as executor:
            yield executor

    @pytest.mark.parametrize("damage_last", [False, True], ids=["last-good", "last-damaged"])
    def test_before_every_step(
        self, tmp_path: Path, fresh_process: ProcessPoolExecutor, damage_last: bool
    ) -> None:
        steps = fresh_process.submit(kill_before_every_step, tmp_path, damage_last).result()
        # Open, link, two renamings and two removals at the least.
        assert steps >= 6

    def test_at_random_moments(self, tmp_path: Path, fresh_process: ProcessPoolExecutor) -> None:
        fresh_process.submit(kill_at_random_moments, tmp_path, 10).result()


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Let every write beyond so many bytes of a file fail, as on a full disk."""
    resource = pytest.importorskip("resource", reason="a POSIX limit makes the write fail")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_failure_changes_nothing(
    directory: Path, fault: AbstractContextManager[object], code: int
) -> None:
    path = saved_epochs(directory, 1, 2)
    checkpoint.save_weights(directory / "model.safetensors", {"weight": torch.ones(100)}, {})
    before = {name: (directory / name).read_bytes() for name in names_in(directory)}
    with fault:
        with pytest.raises(OSError) as error:
            checkpoint.save(path, {"weight": torch.zeros(1000)})
        assert error.value.errno == code
        with pytest.raises(OSError):
            checkpoint.save_weights(
                directory / "model.safetensors", {"weight": torch.zeros(1000)}, {}
            )
    assert {name: (directory / name).read_bytes() for name in names_in(directory)} == before


class TestFailedWrite:
    """An error while saving leaves what was there, and no temporary file."""

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_full_disk(self, tmp_path: Path, call: str) -> None:
        full = OSError(errno.ENOSPC, "No space left on device")
        fault = mock.patch.object(os, call, side_effect=full)
        assert_failure_changes_nothing(tmp_path, fault, errno.ENOSPC)

    def test_a_write_that_stops_halfway(self, tmp_path: Path) -> None:
        assert_failure_changes_nothing(tmp_path, file_size_limit(2000), errno.EFBIG)

    @pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes to any directory"
    )
    def test_a_read_only_directory(self, tmp_path: Path) -> None:
        @contextmanager
        def read_only() -> Iterator[None]:
            tmp_path.chmod(0o555)
            try:
                yield
            finally:
                tmp_path.chmod(0o755)

        assert_failure_changes_nothing(tmp_path, read_only(), errno.EACCES)

    def test_an_interrupt(self, tmp_path: Path) -> None:
        path = saved_epochs(tmp_path, 1)
        with (
            mock.patch.object(os, "fsync", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            saved_epochs(tmp_path, 2)
        assert checkpoint.load(path)["epoch"] == 1
        assert names_in(tmp_path) == ["last.pt"]


class TestAtomicWrite:
    def test_the_name_appears_with_the_whole_content(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        with checkpoint.atomic_write(path) as file:
            file.write(b"{}")
            file.flush()
            assert not path.exists()
        assert path.read_bytes() == b"{}"
        assert names_in(tmp_path) == ["config.json"]

    def test_an_error_in_the_block_keeps_the_old_content(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_bytes(b"old")
        with pytest.raises(ZeroDivisionError), checkpoint.atomic_write(path) as file:
            file.write(b"half of the n")
            raise ZeroDivisionError
        assert path.read_bytes() == b"old"
        assert names_in(tmp_path) == ["config.json"]

    def test_what_a_killed_process_left_is_removed(self, tmp_path: Path) -> None:
        (tmp_path / ".config[1].json.0123abcd.tmp").write_bytes(b"half")
        (tmp_path / ".other.json.0123abcd.tmp").write_bytes(b"not ours")
        with checkpoint.atomic_write(tmp_path / "config[1].json") as file:
            file.write(b"{}")
        assert names_in(tmp_path) == [".other.json.0123abcd.tmp", "config[1].json"]

    @pytest.mark.skipif(os.name == "nt", reason="Windows keeps open files from being removed")
    def test_two_writers_do_not_mix(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        with pytest.raises(FileNotFoundError), checkpoint.atomic_write(path) as first:
            first.write(b"first")
            with checkpoint.atomic_write(path) as second:
                second.write(b"second")
        assert path.read_bytes() == b"second"

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
    def test_permissions_are_those_of_an_ordinary_file(self, tmp_path: Path) -> None:
        (tmp_path / "ordinary").touch()
        path = saved_epochs(tmp_path, 1)
        assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def draw_from_all() -> list[float]:
    """Draw from each global generator; the normal draws leave half a pair behind in its state."""
    return [
        torch.rand(()).item(),
        torch.randn(3)[0].item(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
    ]


class TestRandomState:
    def test_round_trip_through_a_file(self, tmp_path: Path) -> None:
        draw_from_all()
        checkpoint.save(tmp_path / "last.pt", checkpoint.rng_state())
        expected = [draw_from_all() for _ in range(3)]
        draw_from_all()
        checkpoint.set_rng_state(checkpoint.load(tmp_path / "last.pt"))
        assert [draw_from_all() for _ in range(3)] == expected

    def test_devices_that_are_absent_are_left_out(self) -> None:
        state = checkpoint.rng_state()
        devices = torch.cuda.device_count()
        state["cuda"] = [torch.get_rng_state()] * (devices + 1)
        expected = torch.rand(3)
        with mock.patch.object(torch.cuda, "set_rng_state") as set_on_device:
            checkpoint.set_rng_state(state)
        assert torch.equal(torch.rand(3), expected)
        assert set_on_device.call_count == devices

    def test_cuda_is_not_started(self) -> None:
        with (
            mock.patch.object(torch.cuda, "is_initialized", return_value=False),
            mock.patch.object(torch.cuda, "get_rng_state_all", side_effect=AssertionError),
        ):
            assert checkpoint.rng_state()["cuda"] == []

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda_round_trip(self, tmp_path: Path) -> None:
        torch.rand(3, device="cuda")
        checkpoint.save(tmp_path / "last.pt", checkpoint.rng_state())
        expected = torch.rand(3, device="cuda")
        checkpoint.set_rng_state(checkpoint.load(tmp_path / "last.pt", map_location="cuda"))
        assert torch.equal(torch.rand(3, device="cuda"), expected)


class TestWeights:
    def test_round_trip(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        shared = torch.rand(4, 3, 5, 5)
        state = {
            "channels_last": shared.to(memory_format=torch.channels_last),
            "tied": shared,
            "also_tied": shared,
            "view": shared[1:, 0],
            "transposed": shared.transpose(0, 3),
            "expanded": torch.rand(3, 1).expand(3, 4),
            "parameter": nn.Parameter(torch.rand(2)),
            "bfloat16": torch.rand(3).bfloat16(),
            "scalar": torch.tensor(7),
            "none": torch.empty(0, 4),
        }
        checkpoint.save_weights(path, state, {"model": "capsnet", "epoch": "3"})
        tensors, metadata = checkpoint.load_weights(path)
        assert metadata == {"model": "capsnet", "epoch": "3"}
        assert tensors.keys() == state.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == state[name].dtype
            assert tensor.is_contiguous()
            assert torch.equal(tensor, state[name]), name

    def test_no_metadata(self, tmp_path: Path) -> None:
        checkpoint.save_weights(tmp_path / "model.safetensors", {"weight": torch.ones(1)}, {})
        assert checkpoint.load_weights(tmp_path / "model.safetensors")[1] == {}

    def test_the_model_is_not_touched(self, tmp_path: Path) -> None:
        model = nn.Conv2d(3, 4, 5).to(memory_format=torch.channels_last)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        checkpoint.save_weights(tmp_path / "model.safetensors", model.state_dict(), {})
        assert model.weight.is_contiguous(memory_format=torch.channels_last)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name

    @pytest.mark.parametrize("kept", [0, 5, 0.5, 0.99])
    def test_cut_off(self, tmp_path: Path, kept: float) -> None:
        path = tmp_path / "model.safetensors"
        checkpoint.save_weights(path, {"weight": torch.rand(100)}, {})
        content = path.read_bytes()
        path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not a usable"):
            checkpoint.load_weights(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="does not exist"):
            checkpoint.load_weights(tmp_path / "model.safetensors")
