"""Run directories: nothing is overwritten, the right run is found, and logs survive crashes."""

import csv
import errno
import json
import os
import re
from datetime import datetime
from pathlib import Path
from unittest import mock

import filelock
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import run_directory
from engine.run_directory import MetricsLog, RunDirectoryError, find_run, locked, new_directory


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(path, age=0, name="last.safetensors"):
    """Make a directory with a file in place of a checkpoint, written `age` seconds ago."""
    run = Path(path)
    run.mkdir(parents=True, exist_ok=True)
    (run / name).write_bytes(b"checkpoint")
    written = 1_700_000_000 - age
    os.utime(run / name, (written, written))
    return run


def contents(directory):
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class TestLocked:
    def test_a_second_holder_is_refused_by_name(self):
        Path("run").mkdir()
        with locked(Path("run")):
            second = locked(Path("run"))
            with pytest.raises(RunDirectoryError, match="run is in use: another process"):
                second.__enter__()
        with locked(Path("run")):  # the lock was released
            pass

    def test_a_file_system_without_locks_is_reported(self, monkeypatch, capsys):
        Path("run").mkdir()
        refused = mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
        monkeypatch.setattr(filelock.FileLock, "acquire", refused)
        with locked(Path("run")):
            assert capsys.readouterr().err == "warning: run cannot be locked on its file system\n"
        monkeypatch.setattr(
            filelock.FileLock, "acquire", mock.Mock(side_effect=OSError(errno.EROFS, "Read-only"))
        )
        with pytest.raises(OSError, match="Read-only"), locked(Path("run")):
            pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_log_on_a_full_disk_names_its_file():
    log = MetricsLog(Path("metrics.jsonl"), 0)
    log.close()
    log._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115 (closed below)
    with pytest.raises(OSError, match=r"No space left on device: 'metrics\.jsonl'"):
        log.write({"step": 0})
    with pytest.raises(OSError, match=r"No space left on device: 'metrics\.jsonl'"):
        log.close()


class TestNewDirectory:
    def test_the_one_asked_for_is_created_with_its_parents(self):
        assert new_directory("a/b/c", "capsnet", "digits") == Path("a/b/c")
        assert Path("a/b/c").is_dir()

    def test_an_empty_one_is_taken(self):
        Path("empty").mkdir()
        assert new_directory("empty", "capsnet", "digits") == Path("empty")

    def test_one_with_a_run_is_refused_with_the_way_to_continue(self):
        run = make_run("run")
        before = contents(run)
        with pytest.raises(RunDirectoryError, match=r"run is not empty.*--resume run, or choose"):
            new_directory("run", "capsnet", "digits")
        assert contents(run) == before

    @pytest.mark.parametrize("name", ["thesis.tex", ".hidden", "args.json"])
    def test_one_with_anything_else_is_refused_without_advice_that_fails(self, name):
        Path("mine").mkdir()
        Path("mine", name).write_text("mine")
        with pytest.raises(RunDirectoryError, match="mine is not empty") as caught:
            new_directory("mine", "capsnet", "digits")
        assert "--resume" not in str(caught.value)
        assert contents(Path("mine")) == {f"mine/{name}": b"mine"}

    def test_a_run_cut_off_before_its_first_checkpoint_starts_again(self):
        Path("run").mkdir()
        for name in ("args.json", "metrics.jsonl", ".lock", ".last.safetensors.0123abcd.tmp"):
            Path("run", name).write_text("begun")
        assert new_directory("run", "capsnet", "digits", resuming=True) == Path("run")
        with pytest.raises(RunDirectoryError, match="run is not empty"):
            new_directory("run", "capsnet", "digits")
        Path("run", "thesis.tex").write_text("mine")
        with pytest.raises(RunDirectoryError, match="run is not empty"):
            new_directory("run", "capsnet", "digits", resuming=True)

    @pytest.mark.parametrize("path", ["file", "file/below"])
    def test_a_file_in_its_place_is_an_error_that_names_it(self, path):
        Path("file").write_text("a file")
        with pytest.raises(RunDirectoryError, match=f"--output-dir {path}: "):
            new_directory(path, "capsnet", "digits")

    def test_without_one_it_is_named_after_model_data_and_time(self):
        before = datetime.now().replace(microsecond=0)
        path = new_directory(None, "deep_capsnet", "fashion-mnist")
        stamp = re.fullmatch(r"runs/deep_capsnet-fashion-mnist-(\d{8}-\d{6})", path.as_posix())
        assert stamp is not None
        assert before <= datetime.strptime(stamp[1], "%Y%m%d-%H%M%S") <= datetime.now()
        assert path.is_dir()

    def test_runs_that_start_in_the_same_second_do_not_share_one(self):
        moment = datetime(2024, 5, 6, 7, 8, 9)
        with mock.patch.object(run_directory, "datetime", mock.Mock(now=lambda: moment)):
            paths = [new_directory(None, "capsnet", "digits") for _ in range(3)]
        names = [path.name for path in paths]
        first = "capsnet-digits-20240506-070809"
        assert names == [first, f"{first}-2", f"{first}-3"]
        # --resume auto finds each of them.
        for age, path in enumerate(reversed(paths)):
            make_run(path, age=10 - age)
            assert find_run("auto", None, "capsnet") == path

    def test_a_file_named_runs_is_an_error(self):
        Path("runs").write_text("a file")
        with pytest.raises(RunDirectoryError, match="cannot be created"):
            new_directory(None, "capsnet", "digits")

    @pytest.mark.skipif(os.name == "nt", reason="Windows needs a privilege for a symbolic link")
    def test_runs_on_a_disk_that_is_gone_is_an_error(self):
        Path("runs").symlink_to("/nowhere/at/all")
        with pytest.raises(RunDirectoryError, match="cannot be created"):
            new_directory(None, "capsnet", "digits")


class TestFindRun:
    def test_auto_finds_nothing_where_there_is_nothing(self):
        assert find_run("auto", None, "capsnet") is None
        assert find_run("auto", "not-there", "capsnet") is None

    def test_auto_takes_the_run_whose_checkpoint_is_the_newest(self):
        make_run("runs/capsnet-digits-20240101-000000", age=20)
        newest = make_run("runs/capsnet-mnist-20230101-000000", age=5)
        make_run("runs/capsnet-digits-20250101-000000", age=10)
        assert find_run("auto", None, "capsnet") == newest

    def test_auto_ignores_runs_of_another_model(self):
        plain = make_run("runs/capsnet-digits-20240101-000000", age=20)
        deep = make_run("runs/deep_capsnet-digits-20240101-000000")
        assert find_run("auto", None, "capsnet") == plain
        assert find_run("auto", None, "deep_capsnet") == deep

    def test_auto_ignores_runs_without_a_checkpoint(self):
        older = make_run("runs/capsnet-digits-20240101-000000")
        make_run("runs/capsnet-digits-20240102-000000", name="args.json")
        assert find_run("auto", None, "capsnet") == older

    def test_auto_finds_a_run_with_only_its_previous_checkpoint(self):
        run = make_run("runs/capsnet-digits-20240101-000000", name="last.previous.safetensors")
        assert find_run("auto", None, "capsnet") == run

    def test_auto_looks_only_in_the_output_directory_if_one_is_given(self):
        make_run("runs/capsnet-digits-20240101-000000")
        assert find_run("auto", "mine", "capsnet") is None
        mine = make_run("mine", age=1000)
        assert find_run("auto", "mine", "capsnet") == mine

    def test_a_path_is_a_run_or_a_file_in_one(self):
        run = make_run("run")
        assert find_run("run", None, "capsnet") == run
        assert find_run("run/last.safetensors", None, "capsnet") == run
        make_run("shared", name="model_best.safetensors")
        assert find_run("shared/model_best.safetensors", None, "capsnet") == Path("shared")

    def test_a_run_to_test_needs_no_state_to_continue_from(self):
        run = make_run("runs/capsnet-digits-20240101-000000", name="model_best.safetensors")
        for resume in ("auto", str(run)):
            assert find_run(resume, None, "capsnet", "model_best.safetensors") == run
        with pytest.raises(RunDirectoryError, match=r"there is no last\.safetensors in runs/caps"):
            find_run(str(run), None, "capsnet")

    @pytest.mark.parametrize("path", ["not-there", "empty", "not-there/last.safetensors"])
    def test_a_path_without_a_checkpoint_is_an_error(self, path):
        Path("empty").mkdir()
        with pytest.raises(RunDirectoryError, match=f"--resume {path}: there is no "):
            find_run(path, None, "capsnet")


class TestTables:
    def test_summary_gives_back_every_number_exactly(self):
        rows = [
            {"epoch": 1, "train_loss": 1 / 3, "seconds": 0.25},
            {"epoch": 2, "train_loss": 1e-17, "seconds": 12.0},
        ]
        run_directory.write_summary(Path("summary.csv"), rows)
        with open("summary.csv", newline="") as file:
            read = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        assert read == rows
        assert Path("summary.csv").read_text().startswith("epoch,train_loss,seconds\n1,")

    @pytest.mark.parametrize("name", ["summary.csv", "config.json"])
    def test_a_failed_write_leaves_the_old_file(self, name):
        Path(name).write_text("the old one")
        with (
            mock.patch("os.replace", side_effect=OSError("disk failed")),
            pytest.raises(OSError, match="disk failed"),
        ):
            if name == "summary.csv":
                run_directory.write_summary(Path(name), [{"epoch": 1}])
            else:
                run_directory.write_json(Path(name), {"epoch": 1})
        assert contents(Path()) == {name: b"the old one"}

    def test_json_is_indented_and_ends_its_last_line(self):
        run_directory.write_json(Path("config.json"), {"model": "capsnet", "sides": (28, 28)})
        text = Path("config.json").read_text()
        assert text.startswith('{\n  "model": "capsnet"') and text.endswith("}\n")
        assert json.loads(text) == {"model": "capsnet", "sides": [28, 28]}


class TestMetricsLog:
    PATH = Path("metrics.jsonl")

    def records(self):
        return [json.loads(line) for line in self.PATH.read_text().splitlines()]

    def test_a_record_is_in_the_file_as_soon_as_it_is_written(self):
        log = MetricsLog(self.PATH, 0)
        log.write({"step": 0, "loss": 0.5})
        # A process that is killed here would not have closed the file.
        assert self.records() == [{"step": 0, "loss": 0.5}]
        log.close()

    def test_a_new_run_begins_with_an_empty_file(self):
        MetricsLog(self.PATH, 0).close()
        assert self.PATH.read_text() == ""

    @given(
        steps=st.lists(st.integers(0, 30), max_size=8, unique=True).map(sorted),
        before_step=st.integers(0, 32),
        cut=st.integers(0, 60),
    )
    def test_after_a_crash_it_holds_the_whole_records_before_the_step(
        self, steps, before_step, cut
    ):
        """The crash cuts off the end of the file anywhere, even in the middle of a record."""
        self.PATH.unlink(missing_ok=True)
        log = MetricsLog(self.PATH, 0)
        for step in steps:
            log.write({"step": step, "loss": step / 3})
        log.close()
        content = self.PATH.read_bytes()
        kept = content[: max(0, len(content) - cut)]
        self.PATH.write_bytes(kept)
        # A record is whole even if the end of its line is missing.
        whole = [record for record in steps if f'"loss": {record / 3}}}'.encode() in kept]

        log = MetricsLog(self.PATH, before_step)
        log.write({"step": before_step, "loss": 1.0})
        log.close()
        expected = [step for step in whole if step < before_step]
        assert self.records() == [
            *({"step": step, "loss": step / 3} for step in expected),
            {"step": before_step, "loss": 1.0},
        ]

    def test_what_a_power_cut_leaves_is_dropped(self):
        self.PATH.write_bytes(b'{"step": 0}\n' + bytes(100) + b"\n{")
        MetricsLog(self.PATH, 10).close()
        assert self.records() == [{"step": 0}]
