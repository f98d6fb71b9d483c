"""The MNIST example as its users see it: flags, files, messages and exit codes.

The program runs in this process, with small networks on a few of the embedded digits; in a process
of its own where signals are tested. What holds for the loop alone is in test_training.py.
"""

import contextlib
import csv
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import train_mnist
from engine import checkpoint, run_directory, training
from engine.distributed import World
from tritoncaps import models
from tritoncaps.data import Dataset, load_dataset
from tritoncaps.layers import ReconstructionDecoder

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[..., int]

# Three epochs of three batches, the last of them smaller.
BATCHES = 3
NEW = (
    "--model=capsnet", "--device=cpu", "--precision=fp32", "--epochs=3", "--batch-size=32",
    "--test-batch-size=32", "--lr=0.003", "--warmup-steps=2", "--log-interval=1",
)  # fmt: skip
FILES = {
    "args.json", "summary.csv", "metrics.jsonl", "last.pt", "last.previous.pt", "model_best.pt",
    "model_best.previous.pt", "model_best.safetensors", "config.json", ".lock",
}  # fmt: skip
PICTURES = {"curves.png", "reconstructions.png", "perturbations.png", "confusion.png"}


def small_model(name: str, **kwargs: Any) -> nn.Module:
    """The named model, a thousand times smaller."""
    channels: dict[str, Any] = {"capsnet": 8, "deep_capsnet": (8, 8)}
    model = models.create_model(name, channels=channels[name], capsule_types=2, **kwargs)
    model.decoder = ReconstructionDecoder(10, 16, (1, 28, 28), hidden=(16, 32))
    return model


def few_digits(train: int = 90, test: int = 40) -> Dataset:
    digits = load_dataset("digits")
    return Dataset(
        digits.name,
        digits.title,
        digits.train.subset(range(train)),
        digits.test.subset(range(test)),
        digits.class_names,
        "a few digits",
    )


def patch_program(
    set_attribute: Callable[[Any, str, Any], None], dataset: Dataset, *, pictures: bool = False
) -> None:
    """Make the program small: its networks, and its data."""
    set_attribute(train_mnist, "create_model", small_model)
    set_attribute(train_mnist, "load_dataset", lambda name, data_dir, download: dataset)
    if not pictures:
        set_attribute(train_mnist, "draw_figures", lambda *args: None)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return few_digits()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> Run:
    """Run the program in an empty directory, without pictures."""
    monkeypatch.chdir(tmp_path)
    patch_program(monkeypatch.setattr, dataset)

    def run(*flags: str) -> int:
        return train_mnist.main(list(flags))

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> tuple[Path, str]:
    """A run from beginning to end, with pictures: its directory, and what it printed."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        patch_program(monkeypatch.setattr, dataset, pictures=True)
        assert train_mnist.main([*NEW, "--output-dir", str(directory)]) == 0
    return directory, printed.getvalue()


@pytest.fixture
def a_run(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    shutil.copytree(finished[0], tmp_path / "a run")
    return tmp_path / "a run"


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ask the next runs to stop when so many steps are done."""
    inner = training.Trainer._step

    def step(self: training.Trainer, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        result = inner(self, images, labels)
        self._stop_requested |= self.progress.step + 1 == steps
        return result

    monkeypatch.setattr(training.Trainer, "_step", step)


def snapshot(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a directory, with its content and time."""
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file()
    }


def summary(directory: Path) -> list[dict[str, str]]:
    with (directory / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


def assert_equal_tensors(a: Any, b: Any) -> None:
    """Assert that nested values are equal, tensors to the last bit."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_tensors(a[key], b[key])
    else:
        assert a == b


def assert_same_training(a: Path, b: Path) -> None:
    """Assert that two runs have the same weights, optimiser, tables and logs."""
    for name in ("last.pt", "model_best.pt"):
        first, second = checkpoint.load(a / name), checkpoint.load(b / name)
        for part in ("model", "optimizer"):
            assert_equal_tensors(first[part], second[part])
        assert_equal_tensors(first["rng"]["torch"], second["rng"]["torch"])
    assert [without(row, "seconds") for row in summary(a)] == [
        without(row, "seconds") for row in summary(b)
    ]
    assert [without(record, "images_per_second") for record in metrics(a)] == [
        without(record, "images_per_second") for record in metrics(b)
    ]


def accuracy_of(line: str) -> str:
    found = re.search(r"test accuracy [\d.]+ % \(\d+ of 40 wrong\)", line)
    assert found is not None, line
    return found[0]


class TestRun:
    def test_it_writes_every_file_and_nothing_else(self, finished: tuple[Path, str]) -> None:
        assert {path.name for path in finished[0].iterdir()} == FILES | PICTURES

    def test_it_says_first_what_it_will_do(self, finished: tuple[Path, str]) -> None:
        directory, printed = finished
        parameters = sum(p.numel() for p in small_model("capsnet").parameters())
        assert printed.splitlines()[:6] == [
            "device      cpu (1 threads), precision fp32",
            "data        a few digits",
            "            81 to train, 9 to validate, 40 to test",
            f"model       capsnet, {parameters:,} parameters",
            f"results     {directory}",
            "training    3 epochs of 3 batches of 32, seed 1",
        ]

    def test_it_prints_the_final_and_the_best_model(self, finished: tuple[Path, str]) -> None:
        directory, printed = finished
        rows = summary(directory)
        best = checkpoint.load(directory / "model_best.pt")["progress"]["best_epoch"]
        for title, row in (
            ("final model: ", rows[-1]),
            (f"best model (epoch {best}, by validation): ", rows[best - 1]),
        ):
            share = float(row["test_accuracy"])
            result = f"test accuracy {100 * share:.2f} % ({round(40 * (1 - share))} of 40 wrong)"
            assert f"{title}{result}\n" in printed
        assert printed.count("\nepoch ") == 3

    def test_the_tables_have_every_epoch_and_step(self, finished: tuple[Path, str]) -> None:
        assert [row["epoch"] for row in summary(finished[0])] == ["1", "2", "3"]
        records = metrics(finished[0])
        assert [record["step"] for record in records] == list(range(9))
        assert set(records[0]) == {
            "step", "epoch", "loss", "accuracy", "learning_rate", "images_per_second",
        }  # fmt: skip

    def test_the_arguments_and_the_environment_are_written_down(
        self, finished: tuple[Path, str]
    ) -> None:
        directory, _ = finished
        content = json.loads((directory / "args.json").read_text())
        args, environment = content["args"], content["environment"]
        assert args["model"] == "capsnet" and args["lr"] == 0.003 and args["seed"] == 1
        # What was chosen, not what was asked for.
        assert args["dataset"] == "digits" and args["epochs"] == 3
        assert environment["torch_build"] == torch.__version__
        assert environment["python"] == sys.version.split()[0]
        assert (environment["device"], environment["precision"]) == ("cpu", "fp32")
        assert {"tritoncaps", "processor", "gpu", "threads", "commit"} <= environment.keys()
        # The flags are all there, and make the same run again.
        _, parsed = train_mnist.parse_arguments([])
        assert vars(parsed).keys() | {"model_kwargs"} == args.keys()

    @pytest.mark.parametrize("name", sorted(PICTURES))
    def test_the_pictures_show_something(self, finished: tuple[Path, str], name: str) -> None:
        from matplotlib.image import imread

        picture = imread(finished[0] / name)[..., :3]
        assert picture.shape[0] > 200 and picture.shape[1] > 200
        assert 0.02 < (picture != picture[0, 0]).any(-1).mean() < 0.98

    @pytest.mark.parametrize("model", ["capsnet", "deep_capsnet"])
    def test_what_is_shared_rebuilds_the_model(
        self,
        run: Run,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        model: str,
    ) -> None:
        """config.json and the weights give the same lengths; the models are the real ones here."""
        tiny = few_digits(train=12, test=4)
        monkeypatch.setattr(train_mnist, "create_model", models.create_model)
        monkeypatch.setattr(train_mnist, "load_dataset", lambda *args, **kwargs: tiny)
        flags = ("--primary-iterations=2", "--secondary-iterations=1", "--hidden-capsules=4")
        assert run(*NEW, f"--model={model}", *flags, "--epochs=1", "--output-dir=run") == 0
        best = checkpoint.load(tmp_path / "run/model_best.pt")
        original = models.create_model(model, **best["args"]["model_kwargs"])
        original.load_state_dict(best["model"])

        config = training.read_config(tmp_path / "run")
        assert config["model"] == model
        rebuilt = models.create_model(config["model"], **config["model_kwargs"])
        weights, _ = checkpoint.load_weights(tmp_path / "run/model_best.safetensors")
        rebuilt.load_state_dict(weights)
        images = tiny.test.images / 255
        with torch.no_grad():
            assert torch.equal(rebuilt(images).activations, original(images).activations)
        if model == "capsnet":
            assert rebuilt.routing.iterations == 2
        else:
            assert rebuilt.primary_routing.iterations == 2
            assert rebuilt.secondary_routing.iterations == 1
            assert rebuilt.primary_routing.out_capsules == 4

    def test_the_deep_network_in_bf16(
        self, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ("--model=deep_capsnet", "--precision=bf16", "--epochs=1", "--deterministic")
        try:
            assert run(*NEW, *flags, "--output-dir=run") == 0
        finally:
            torch.use_deterministic_algorithms(False)
        assert "precision bf16" in capsys.readouterr().out
        state = checkpoint.load(tmp_path / "run/last.pt")
        assert all(tensor.dtype is torch.float32 for tensor in state["model"].values())

    def test_deterministic_is_repeated_bit_for_bit(
        self, run: Run, tmp_path: Path, device: torch.device
    ) -> None:
        """On a GPU where there is one, in the precision of long runs, by both networks."""
        try:
            for model in models.list_models():
                for name in ("first", "second"):
                    flags = ("--precision=bf16", "--epochs=1", "--deterministic")
                    where = (f"--device={device}", f"--output-dir={model}-{name}")
                    assert run(*NEW, f"--model={model}", *flags, *where) == 0
                assert_same_training(tmp_path / f"{model}-first", tmp_path / f"{model}-second")
        finally:
            torch.use_deterministic_algorithms(False)

    def test_without_flags_the_data_set_chooses_the_epochs_and_the_time_the_directory(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_after(monkeypatch, 1)
        assert run("--device=cpu", "--batch-size=32") == 130
        (directory,) = tmp_path.joinpath("runs").iterdir()
        assert directory.name.startswith("deep_capsnet-digits-")
        assert json.loads((directory / "args.json").read_text())["args"]["epochs"] == 15

    def test_the_same_seed_gives_the_same_bits_and_another_does_not(
        self, run: Run, tmp_path: Path, finished: tuple[Path, str]
    ) -> None:
        assert run(*NEW, "--output-dir=same") == 0
        assert_same_training(tmp_path / "same", finished[0])
        assert run(*NEW, "--seed=2", "--epochs=1", "--output-dir=other") == 0
        assert metrics(tmp_path / "other")[0]["loss"] != metrics(finished[0])[0]["loss"]

    def test_the_seed_and_the_shift_reach_the_batches(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = mock.Mock(wraps=train_mnist.Batches)
        monkeypatch.setattr(train_mnist, "Batches", made)
        flags = ("--seed=7", "--max-shift=1", "--epochs=1", "--output-dir=run")
        assert run(*NEW, *flags) == 0
        ((_, batch_size), options) = made.call_args
        assert (batch_size, options) == (32, {"seed": 7, "max_shift": 1})

    def test_pictures_survive_a_model_that_is_always_wrong(
        self, tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        patch_program(monkeypatch.setattr, dataset, pictures=True)
        inner = training.Trainer.evaluate

        def evaluate(self: training.Trainer, images: Any) -> training.Evaluation:
            wrong = (images.labels + 1) % 10
            return training.Evaluation(inner(self, images).loss, 0.0, wrong)

        monkeypatch.setattr(training.Trainer, "evaluate", evaluate)
        assert run_main(*NEW, "--epochs=1", "--output-dir=run") == 0
        assert {path.name for path in Path("run").glob("*.png")} == PICTURES

    def test_what_moves_a_perturbed_capsule(self, tmp_path: Path) -> None:
        """Each dimension of the one capsule is moved by each offset, and nothing else."""
        model = small_model("capsnet")
        poses = torch.randn(1, 10, 16) * 0.2
        runtime = train_mnist.Runtime(torch.device("cpu"), "fp32")
        images = train_mnist.perturbed(model, runtime, poses, label=3)
        assert images.shape == (16, 11, 1, 28, 28)
        assert pytest.approx([-0.25, -0.2, 0.0, 0.25]) == [
            train_mnist.OFFSETS[step] for step in (0, 1, 5, 10)
        ]
        for dimension, step in ((0, 0), (7, 3), (15, 10)):
            moved = poses.clone()
            moved[0, 3, dimension] += train_mnist.OFFSETS[step]
            with torch.no_grad():
                expected = model.decoder(moved, torch.tensor([3]))
            torch.testing.assert_close(images[dimension, step], expected[0])
        # The middle column is the reconstruction itself, sixteen times.
        for dimension in range(1, 16):
            torch.testing.assert_close(images[dimension, 5], images[0, 5])


def run_main(*flags: str) -> int:
    return train_mnist.main(list(flags))


class TestLearning:
    def test_a_small_network_learns_the_digits(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Guessing gives 10 %. 98 % were seen with each of the seeds 1 to 5, where 95 % will do."""

        def create(name: str, **kwargs: Any) -> nn.Module:
            model = models.CapsNet(channels=16, capsule_types=4, **kwargs)
            model.decoder = ReconstructionDecoder(10, 16, (1, 28, 28), hidden=(64, 128))
            return model

        monkeypatch.setattr(train_mnist, "create_model", create)
        monkeypatch.setattr(train_mnist, "draw_figures", lambda *args: None)
        flags = ("--model=capsnet", "--dataset=digits", "--device=cpu", "--precision=fp32")
        recipe = ("--epochs=4", "--batch-size=32", "--lr=0.003", "--max-shift=1")
        run = tmp_path / "run"
        assert run_main(*flags, *recipe, f"--output-dir={run}") == 0
        rows = summary(run)
        assert float(rows[-1]["test_accuracy"]) >= 0.95
        assert float(rows[-1]["train_loss"]) < 0.25 * float(rows[0]["train_loss"])
        found = re.search(r"best model .*: test accuracy ([\d.]+) %", capsys.readouterr().out)
        assert found is not None and float(found[1]) >= 95


class TestResume:
    @pytest.mark.parametrize("steps", [1, 3, 5])
    def test_a_stopped_run_goes_on_as_if_it_had_not_been(
        self,
        run: Run,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        finished: tuple[Path, str],
        steps: int,
    ) -> None:
        """Stopped in the first epoch, at the end of it, and in the second."""
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            assert run(*NEW, "--output-dir=my run") == 130
        # The directory is quoted as a shell wants it.
        command = "python examples/train_mnist.py --resume 'my run'"
        assert f"stopped and saved; go on with: {command}\n" in capsys.readouterr().out
        # No flag but this one is needed.
        assert run("--resume", "my run") == 0
        done = f"resuming    after {steps // 3} epochs and {steps % 3} batches\n"
        assert done in capsys.readouterr().out
        assert_same_training(tmp_path / "my run", finished[0])

    def test_with_more_epochs_a_finished_run_goes_on(
        self, run: Run, tmp_path: Path, finished: tuple[Path, str]
    ) -> None:
        assert run(*NEW, "--epochs=2", "--output-dir=run") == 0
        assert run("--resume=run", "--epochs=3") == 0
        assert_same_training(tmp_path / "run", finished[0])
        # The number is remembered.
        assert run("--resume=run") == 0
        assert json.loads((tmp_path / "run/args.json").read_text())["args"]["epochs"] == 3

    def test_auto_takes_the_newest_run(
        self, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], a_run: Path
    ) -> None:
        for name, age in (("20240101-000000", 10), ("20230101-000000", 0)):
            copy = tmp_path / "runs" / f"capsnet-digits-{name}"
            shutil.copytree(a_run, copy)
            written = 1_700_000_000 - age
            os.utime(copy / "last.pt", (written, written))
            os.utime(copy / "last.previous.pt", (written - 100, written - 100))
        assert run("--resume=auto", "--model=capsnet") == 0
        out = capsys.readouterr().out
        assert "results     runs/capsnet-digits-20230101-000000\n" in out
        assert "resuming    after 3 epochs and 0 batches\n" in out

    def test_auto_begins_a_run_where_there_is_none(
        self, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(*NEW, "--resume=auto", "--epochs=1") == 0
        assert "resuming    nothing to resume, this is a new run\n" in capsys.readouterr().out
        assert len(list(tmp_path.glob("runs/capsnet-digits-*/last.pt"))) == 1

    def test_the_same_command_again_and_again_reaches_the_end(
        self,
        run: Run,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        finished: tuple[Path, str],
    ) -> None:
        """As a scheduler does that kills a job without warning and starts it again."""
        command = (*NEW, "--dataset=auto", "--output-dir=run", "--resume=auto")
        inner = training.Trainer._step
        left = 0

        def step(self: training.Trainer, *args: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal left
            left -= 1
            if left < 0:
                raise MemoryError
            return inner(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(training.Trainer, "_step", step)
            for steps in (0, 2, 5, 4):
                left = steps
                with pytest.raises(MemoryError):
                    run(*command)
        assert run(*command) == 0
        assert_same_training(tmp_path / "run", finished[0])

    @pytest.mark.parametrize(
        "flag",
        [
            "--model=deep_capsnet", "--dataset=mnist", "--batch-size=16", "--lr=0.001",
            "--gamma=0.5", "--warmup-steps=3", "--max-shift=1", "--seed=2",
            "--validation-fraction=0.2", "--primary-iterations=2", "--secondary-iterations=2",
            "--hidden-capsules=4",
        ],
    )  # fmt: skip
    def test_a_flag_that_would_change_the_run_is_refused_by_name(
        self, run: Run, a_run: Path, capsys: pytest.CaptureFixture[str], flag: str
    ) -> None:
        before = snapshot(a_run)
        assert run(f"--resume={a_run}", flag, "--epochs=5") == 2
        name, value = flag.split("=")
        error = capsys.readouterr().err
        assert re.fullmatch(
            f"train_mnist.py: error: {name} {value} differs from the resumed run's .*\n", error
        )
        assert snapshot(a_run) == before

    def test_every_flag_that_may_not_change_was_tried(self) -> None:
        (marker,) = (
            mark
            for mark in self.test_a_flag_that_would_change_the_run_is_refused_by_name.pytestmark
            if mark.name == "parametrize"
        )
        tried = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in marker.args[1]}
        assert tried == set(train_mnist.FIXED)

    def test_the_flags_of_the_run_may_be_given_again(
        self, run: Run, a_run: Path, finished: tuple[Path, str]
    ) -> None:
        again = ("--dataset=auto", "--test-batch-size=7", "--log-interval=5")
        assert run(*NEW, *again, f"--resume={a_run}", f"--output-dir={a_run}") == 0
        assert_same_training(a_run, finished[0])

    @pytest.mark.parametrize("flags", [(), ("--data-dir=elsewhere",)])
    def test_a_data_directory_named_by_the_checkpoint_is_read_alone(
        self, run: Run, a_run: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
    ) -> None:
        state = checkpoint.load(a_run / "last.pt")
        state["args"]["data_dir"] = "of the checkpoint"
        checkpoint.save(a_run / "last.pt", state)
        asked = []

        def load(name: str, data_dir: str, download: bool) -> Dataset:
            asked.append((data_dir, download))
            return few_digits()

        monkeypatch.setattr(train_mnist, "load_dataset", load)
        assert run(f"--resume={a_run}", *flags) == 0
        assert asked == [("elsewhere", True) if flags else ("of the checkpoint", False)]

    def test_a_checkpoint_of_another_program_is_refused(
        self, run: Run, a_run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        state = checkpoint.load(a_run / "last.pt")
        del state["args"]["gamma"]
        checkpoint.save(a_run / "last.pt", state)
        assert run(f"--resume={a_run}") == 2
        assert "its flags lack gamma" in capsys.readouterr().err

    def test_a_checkpoint_that_is_no_run_is_refused(
        self, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        checkpoint.save(tmp_path / "last.pt", {"epoch": 3, "args": [1]})
        assert run(f"--resume={tmp_path}") == 2
        expected = f"--resume {tmp_path}: the checkpoint is not one of this program, it has no args"
        assert f"{expected} and no progress" in capsys.readouterr().err

    def test_a_run_in_use_is_neither_read_nor_changed(
        self, run: Run, a_run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = snapshot(a_run)
        with run_directory.locked(a_run):
            assert run(f"--resume={a_run}", "--epochs=9") == 2
        assert f"error: {a_run} is in use: another process" in capsys.readouterr().err
        assert snapshot(a_run) == before

    def test_processes_with_different_data_refuse_to_go_on(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Other(World):
            def gather(self, value: Any) -> list[Any]:
                return [value, "mnist"]

        monkeypatch.setattr(train_mnist, "join", lambda: contextlib.nullcontext(Other()))
        assert run(*NEW) == 2
        assert "--dataset auto: the 1 processes found digits, mnist" in capsys.readouterr().err

    def test_another_output_directory_is_refused(
        self, run: Run, a_run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(f"--resume={a_run}", "--output-dir=elsewhere") == 2
        assert "leave out --output-dir" in capsys.readouterr().err
        assert not Path("elsewhere").exists()

    def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
        self,
        run: Run,
        a_run: Path,
        capsys: pytest.CaptureFixture[str],
        finished: tuple[Path, str],
    ) -> None:
        content = bytearray((a_run / "last.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (a_run / "last.pt").write_bytes(content)
        assert run(f"--resume={a_run}") == 0
        captured = capsys.readouterr()
        assert re.match(r"warning: .*last\.pt is damaged.*last\.previous\.pt\n", captured.err)
        assert "resuming    after 2 epochs and 0 batches\n" in captured.out
        assert_same_training(a_run, finished[0])

    def test_two_damaged_checkpoints_are_an_error_that_names_both(
        self, run: Run, a_run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("last.pt", "last.previous.pt"):
            (a_run / name).write_bytes((a_run / name).read_bytes()[:-1000])
        before = snapshot(a_run)
        assert run(f"--resume={a_run}") == 2
        error = capsys.readouterr().err
        assert error.startswith("train_mnist.py: error: no usable checkpoint: ")
        assert "last.pt is truncated" in error and "last.previous.pt is truncated" in error
        assert error.count("\n") == 1
        assert snapshot(a_run) == before

    def test_a_best_model_that_is_gone_is_missed_at_once(
        self, run: Run, a_run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """And not at the end, after a night of training."""
        alone = a_run.parent / "alone"
        alone.mkdir()
        shutil.copy(a_run / "last.pt", alone)
        assert run(f"--resume={alone / 'last.pt'}", "--epochs=100") == 2
        assert "model_best.pt does not exist" in capsys.readouterr().err
        assert {path.name for path in alone.iterdir()} == {"last.pt", ".lock"}

    def test_a_damaged_best_model_is_reported_by_the_epoch_it_is_of(
        self, run: Run, a_run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The one before it is not the final model either, and is tested itself."""
        epoch = checkpoint.load(a_run / "model_best.previous.pt")["progress"]["best_epoch"]
        rows = summary(a_run)
        accuracies = [f"{100 * float(rows[n - 1]['test_accuracy']):.2f} %" for n in (epoch, 3)]
        assert accuracies[0] != accuracies[1]
        (a_run / "model_best.pt").write_bytes(b"")
        assert run(f"--resume={a_run}") == 0
        captured = capsys.readouterr()
        assert "warning: " in captured.err and "model_best.pt is empty" in captured.err
        title = f"best model (epoch {epoch}, by validation)"
        assert f"{title}: test accuracy {accuracies[0]} " in captured.out
        assert f"final model: test accuracy {accuracies[1]} " in captured.out

    @pytest.mark.parametrize("path", ["nowhere", "nowhere/last.pt"])
    def test_a_run_that_is_not_there_is_an_error(
        self, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str
    ) -> None:
        assert run(f"--resume={path}") == 2
        assert f"--resume {path}: there is no checkpoint" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


class TestNothingIsLost:
    def test_a_directory_that_is_not_empty_is_not_touched(
        self, run: Run, a_run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = snapshot(a_run)
        assert run(*NEW, f"--output-dir={a_run}") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"train_mnist.py: error: --output-dir {a_run} is not empty")
        assert snapshot(a_run) == before

    def test_a_loss_that_is_not_finite_stops_with_batch_and_epoch(
        self, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(*NEW, "--lr=1e30", "--warmup-steps=0", "--output-dir=run") == 2
        error = capsys.readouterr().err
        assert re.fullmatch(
            r"train_mnist\.py: error: the loss of batch 2 of 3 is nan, in epoch 1 .*\n", error
        )
        # What was saved before the first step is as good as new.
        state = checkpoint.load(tmp_path / "run/last.pt")
        assert state["progress"]["step"] == 0
        assert all(tensor.isfinite().all() for tensor in state["model"].values())

    def test_a_full_disk_leaves_the_checkpoint_and_a_line(
        self,
        run: Run,
        a_run: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        before = (a_run / "last.pt").read_bytes()

        def fsync(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            assert run(f"--resume={a_run}", "--epochs=4") == 2
        assert capsys.readouterr().err == (
            f"train_mnist.py: error: [Errno 28] No space left on device: '{a_run / 'args.json'}'\n"
        )
        assert (a_run / "last.pt").read_bytes() == before
        assert run(f"--resume={a_run}", "--epochs=4") == 0

    def test_ctrl_c_while_the_data_load_is_no_traceback(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        interrupt = mock.Mock(side_effect=KeyboardInterrupt)
        monkeypatch.setattr(train_mnist, "load_dataset", interrupt)
        assert run(*NEW) == 130
        assert capsys.readouterr().err == (
            "\ntrain_mnist.py: interrupted; what was saved before stays\n"
        )


class TestEvalOnly:
    @pytest.fixture
    def best(self, finished: tuple[Path, str]) -> tuple[int, str]:
        """The epoch of the best model, and its test accuracy as the run printed it."""
        (line,) = (line for line in finished[1].splitlines() if line.startswith("best model"))
        found = re.search(r"epoch (\d+)", line)
        assert found is not None
        return int(found[1]), accuracy_of(line)

    def test_a_run_is_tested_by_its_best_model_and_left_as_it_is(
        self,
        run: Run,
        a_run: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        best: tuple[int, str],
    ) -> None:
        before = snapshot(tmp_path)
        assert run("--eval-only", f"--resume={a_run}") == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == f"test of epoch {best[0]}: {best[1]}"
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize("name", ["last.pt", "last.previous.pt", "model_best.pt"])
    def test_a_checkpoint_is_tested_itself(
        self, run: Run, a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        shutil.copy(a_run / name, tmp_path / "copied.pt")
        before = snapshot(tmp_path)
        assert run("--eval-only", "--resume=copied.pt") == 0
        epoch = checkpoint.load(a_run / name)["progress"]["epoch"]
        last = capsys.readouterr().out.splitlines()[-1]
        wrong = round(40 * (1 - float(summary(a_run)[epoch - 1]["test_accuracy"])))
        assert last.startswith(f"test of epoch {epoch}: ") and f"({wrong} of 40 wrong)" in last
        assert snapshot(tmp_path) == before

    def test_nothing_is_written_for_a_run_with_tensorboard_either(
        self, run: Run, a_run: Path, tmp_path: Path
    ) -> None:
        state = checkpoint.load(a_run / "model_best.pt")
        state["args"]["tensorboard"] = True
        checkpoint.save(a_run / "model_best.pt", state)
        before = snapshot(tmp_path)
        assert run("--eval-only", f"--resume={a_run}") == 0
        assert snapshot(tmp_path) == before

    def test_a_damaged_best_model_is_passed_over_with_a_warning(
        self, run: Run, a_run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (a_run / "model_best.pt").write_bytes(b"")
        assert run("--eval-only", f"--resume={a_run}") == 0
        assert "model_best.pt is empty" in capsys.readouterr().err

    def test_it_needs_a_run(
        self, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--eval-only") == 2
        assert "add --resume PATH" in capsys.readouterr().err
        assert run("--eval-only", "--resume=auto") == 2
        assert "there is no run to test" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_the_labels_of_the_test_set_have_no_part_in_predictions(
        self, run: Run, a_run: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In the pictures too: with other labels, the same lengths and reconstructions."""
        drawn: list[tuple[Tensor, Tensor]] = []
        inner = training.Trainer.predict

        def predict(self: training.Trainer, images: Tensor) -> Any:
            output = inner(self, images)
            drawn.append((output.activations, output.reconstruction))
            return output

        monkeypatch.setattr(training.Trainer, "predict", predict)
        assert run("--eval-only", f"--resume={a_run}") == 0
        permuted = Dataset(
            dataset.name,
            dataset.title,
            dataset.train,
            type(dataset.test)(dataset.test.images, dataset.test.labels.roll(1)),
            dataset.class_names,
            dataset.note,
        )
        monkeypatch.setattr(train_mnist, "load_dataset", lambda *args, **kwargs: permuted)
        assert run("--eval-only", f"--resume={a_run}") == 0
        assert len(drawn) == 4  # twice two batches
        for before, after in zip(drawn[:2], drawn[2:], strict=True):
            assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


class TestDryRun:
    def test_it_tries_everything_and_keeps_nothing(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        dataset: Dataset,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        patch_program(monkeypatch.setattr, dataset, pictures=True)
        here, temporary = tmp_path / "here", tmp_path / "temporary"
        here.mkdir()
        temporary.mkdir()
        monkeypatch.chdir(here)
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        drawn: set[str] = set()
        inner = train_mnist.draw_figures

        def draw(trainer: Any, *args: Any) -> None:
            inner(trainer, *args)
            drawn.update(path.name for path in trainer.directory.iterdir())

        monkeypatch.setattr(train_mnist, "draw_figures", draw)
        flags = ("--batch-size=8", "--epochs=100", "--output-dir=kept", "--dry-run")
        assert run_main(*NEW, *flags) == 0
        out = capsys.readouterr().out
        # Two batches of each set.
        assert "16 to train, 9 to validate, 16 to test" in out and "1 epochs of 2 batches" in out
        assert out.endswith("dry run: everything works; nothing was kept\n")
        assert drawn >= PICTURES | {"last.pt", "model_best.safetensors"}
        assert list(here.iterdir()) == list(temporary.iterdir()) == []

    def test_it_does_not_touch_a_run(
        self, run: Run, a_run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = snapshot(a_run)
        assert run("--dry-run", f"--resume={a_run}") == 2
        assert "leave out --resume" in capsys.readouterr().err
        assert snapshot(a_run) == before

    def test_an_interrupted_one_does_not_ask_to_be_continued(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stop_after(monkeypatch, 1)
        assert run(*NEW, "--batch-size=8", "--dry-run") == 130
        assert capsys.readouterr().out.endswith("\nstopped\n")


class TestWrongFlags:
    @pytest.mark.parametrize(
        "flag, message",
        [
            ("--epochs=0", "argument --epochs: must be >= 1, got 0"),
            ("--epochs=many", "argument --epochs: invalid positive value: 'many'"),
            ("--batch-size=-1", "argument -b/--batch-size: must be >= 1, got -1"),
            ("--log-interval=0", "argument --log-interval: must be >= 1, got 0"),
            ("--primary-iterations=0", "argument --primary-iterations: must be >= 1, got 0"),
            ("--model=resnet", "argument --model: invalid choice: 'resnet'"),
            ("--dataset=imagenet", "argument --dataset: invalid choice: 'imagenet'"),
            ("--precision=fp8", "argument --precision: invalid choice: 'fp8'"),
            ("--lr=fast", "argument --lr: invalid float value: 'fast'"),
            ("--unknown", "unrecognized arguments: --unknown"),
        ],
    )
    def test_what_the_parser_refuses(
        self, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, message: str
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            run(*NEW, flag)
        assert caught.value.code == 2
        assert f"error: {message}" in capsys.readouterr().err.splitlines()[-1]
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "flag, message",
        [
            ("--device=nonsense", "--device nonsense: not available here"),
            ("--device=cuda:99", "--device cuda:99: not available here"),
            ("--validation-fraction=0", "0.0 holds out 0 of 90 images"),
            ("--validation-fraction=1", "1.0 holds out 90 of 90 images"),
            ("--validation-fraction=-0.5", "-0.5 holds out -45 of 90 images"),
            ("--max-shift=-1", "max_shift must be >= 0, got -1"),
            ("--lr=-1", "lr must be a positive number, got -1.0"),
            ("--lr=nan", "lr must be a positive number, got nan"),
            ("--gamma=0", "gamma must be a positive number, got 0.0"),
            ("--warmup-steps=-1", "warmup_steps must be >= 0, got -1"),
            ("--seed=100000000000000000000", "Overflow"),
        ],
    )
    def test_what_is_found_later_is_a_line_and_leaves_no_directory(
        self, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, message: str
    ) -> None:
        assert run(*NEW, flag) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"train_mnist\.py: error: .*\n", error) and message in error
        assert list(tmp_path.iterdir()) == []

    def test_data_that_are_missing_are_a_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert run_main("--device=cpu", "--dataset=mnist", "--no-download") == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"train_mnist\.py: error: MNIST is not complete .*\n", error)
        assert list(tmp_path.iterdir()) == []


GATE = """
import sys
import torch
import test_train_mnist
import train_mnist
from tritoncaps.data import Dataset, ImageSet

class Gate(train_mnist.Batches):
    def epoch(self, epoch, start=0):
        for number, batch in enumerate(super().epoch(epoch, start), start):
            if (epoch, number) == (1, 1):
                print("at the gate", flush=True)
                sys.stdin.readline()
            yield batch

train_mnist.Batches = Gate
train, test = (ImageSet(*pair) for pair in torch.load("digits.pt"))
dataset = Dataset("digits", "digits", train, test, tuple("0123456789"), "a few digits")
test_train_mnist.patch_program(setattr, dataset)
torch.set_num_threads(1)
sys.exit(train_mnist.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals between processes")
class TestSignals:
    """A process of its own waits in the second batch of the second epoch for a signal."""

    @pytest.fixture
    def process(self, tmp_path: Path, dataset: Dataset) -> Iterator[subprocess.Popen[str]]:
        sets = [(part.images, part.labels) for part in (dataset.train, dataset.test)]
        torch.save(sets, tmp_path / "digits.pt")
        folders = [Path(train_mnist.__file__).parent, Path(__file__).parent]
        path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, "-c", GATE, *NEW, "--output-dir=run"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            wait_for(process.stdout, "at the gate")
            yield process
            process.kill()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
    def test_it_finishes_the_batch_saves_and_can_be_continued(
        self,
        process: subprocess.Popen[str],
        number: signal.Signals,
        run: Run,
        tmp_path: Path,
        finished: tuple[Path, str],
    ) -> None:
        process.send_signal(number)
        out, error = process.communicate("go on\n", timeout=120)
        assert process.returncode == 130
        assert error == f"\n{number.name}: finishing the batch, then saving\n"
        assert out.endswith("go on with: python examples/train_mnist.py --resume run\n")
        progress = checkpoint.load(tmp_path / "run/last.pt")["progress"]
        assert (progress["epoch"], progress["batch"]) == (1, 2)
        assert run("--resume=run") == 0
        assert_same_training(tmp_path / "run", finished[0])

    def test_a_second_ctrl_c_does_not_wait(
        self, process: subprocess.Popen[str], tmp_path: Path
    ) -> None:
        process.send_signal(signal.SIGINT)
        wait_for(process.stderr, "SIGINT: finishing the batch, then saving")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 130
        assert error == "\ntrain_mnist.py: interrupted; what was saved before stays\n"
        progress = checkpoint.load(tmp_path / "run/last.pt")["progress"]
        assert (progress["epoch"], progress["batch"]) == (1, 0)

    def test_a_process_that_is_killed_loses_no_epoch(
        self,
        process: subprocess.Popen[str],
        run: Run,
        tmp_path: Path,
        finished: tuple[Path, str],
    ) -> None:
        process.kill()
        process.wait(timeout=120)
        assert run("--resume=run") == 0
        assert_same_training(tmp_path / "run", finished[0])


def wait_for(stream: IO[str] | None, expected: str) -> None:
    """Read lines up to the expected one."""
    assert stream is not None
    seen = []
    for line in stream:
        seen.append(line)
        if line.rstrip("\n") == expected:
            return
    pytest.fail(f"the process ended without {expected!r}: {''.join(seen)}")


class TestOptions:
    def test_a_missing_package_is_said_before_anything_is_done(
        self, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with mock.patch("importlib.util.find_spec", return_value=None):
            assert run(*NEW, "--output-dir=run") == 2
        assert "matplotlib is not installed" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_tensorboard_draws_each_point_once(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also those that a crash cost, which the resumed run draws again."""
        pytest.importorskip("tensorboard", reason="tensorboard is optional")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        inner = training.Trainer._step

        def step(self: training.Trainer, *args: Tensor) -> tuple[Tensor, Tensor]:
            if self.progress.step == 5:
                raise MemoryError
            return inner(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(training.Trainer, "_step", step)
            with pytest.raises(MemoryError):
                run(*NEW, "--tensorboard", "--output-dir=run")
        # The flag is remembered.
        assert run("--resume=run") == 0
        events = EventAccumulator(str(tmp_path / "run/tensorboard"))
        events.Reload()
        points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        assert [event.step for event in points["loss"]] == list(range(1, 10))
        assert [event.step for event in points["validation_accuracy"]] == [3, 6, 9]
        assert [event.step for event in points["learning_rate"]] == list(range(1, 10))
        losses = [record["loss"] for record in metrics(tmp_path / "run")]
        assert [event.value for event in points["loss"]] == pytest.approx(losses)

    @pytest.mark.skipif(
        not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))),
        reason="torch.compile needs a C++ compiler on a CPU",
    )
    # torch 2.13 compiles with a module of its own that it has deprecated.
    @pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
    def test_torchcompile_trains_alike(self, run: Run, tmp_path: Path) -> None:
        """Some 15 s, most in the compiler, though the sizes of the batches are all the same."""
        flags = ("--epochs=1", "--batch-size=27", "--primary-iterations=1")
        assert run(*NEW, *flags, "--output-dir=eager") == 0
        assert run(*NEW, *flags, "--torchcompile", "--output-dir=run") == 0
        losses, expected = (
            [record["loss"] for record in metrics(tmp_path / name)] for name in ("run", "eager")
        )
        assert len(losses) == 3
        assert losses == pytest.approx(expected, rel=1e-4)
        # The names of the weights are those of the model, not of a compiled one.
        weights, _ = checkpoint.load_weights(tmp_path / "run/model_best.safetensors")
        assert set(weights) == set(small_model("capsnet").state_dict())

    def test_the_help_names_every_flag(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            run_main("--help")
        assert caught.value.code == 0
        out = capsys.readouterr().out
        _, args = train_mnist.parse_arguments([])
        assert all(f"--{name.replace('_', '-')}" in out for name in vars(args))
        assert "None" not in out
