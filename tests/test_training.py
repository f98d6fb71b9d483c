"""The training loop: resumed equals uninterrupted, an honest choice of the best, clean stops.

The models are small, and so are the data; bits are compared on the CPU, in one thread.
"""

import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import checkpoint, training
from engine.runtime import Runtime, choose_runtime, describe_environment, make_deterministic
from engine.training import Evaluation, Schedule, Trainer, TrainingError
from tritoncaps._environment import commit_of
from tritoncaps.data import Batches, ImageSet, load_dataset
from tritoncaps.layers import ReconstructionDecoder
from tritoncaps.losses import CapsuleLoss
from tritoncaps.models import CapsNet

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Runtime(torch.device("cpu"), "fp32")
SCHEDULE = Schedule(0.003, 0.8, 4)
# The batches of an epoch below; the last one is not full.
BATCHES = 6


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_dataset("digits").train


@pytest.fixture(scope="module")
def train(digits: ImageSet) -> Batches:
    return Batches(digits.subset(range(90)), 16, seed=1, max_shift=2)


@pytest.fixture(scope="module")
def validation(digits: ImageSet) -> ImageSet:
    return digits.subset(range(90, 130))


@pytest.fixture(scope="module")
def test(digits: ImageSet) -> ImageSet:
    return digits.subset(range(130, 170))


def small_model(seed: int = 1) -> CapsNet:
    torch.manual_seed(seed)
    model = CapsNet(channels=8, capsule_types=2)
    model.decoder = ReconstructionDecoder(10, 16, (1, 28, 28), hidden=(16, 32))
    return model


def new_trainer(
    directory: Path,
    *,
    schedule: Schedule = SCHEDULE,
    runtime: Runtime = CPU,
    log_interval: int = 1,
    kind: type[Trainer] = Trainer,
) -> Trainer:
    directory.mkdir(exist_ok=True)
    model = runtime.place(small_model())
    return kind(
        model,
        torch.optim.Adam(model.parameters(), fused=True),
        schedule,
        runtime,
        directory,
        {"model": "capsnet", "model_kwargs": {"num_classes": 10, "image_size": (28, 28)}},
        test_batch_size=16,
        log_interval=log_interval,
    )


def resumed_trainer(directory: Path, **options: Any) -> Trainer:
    trainer = new_trainer(directory, **options)
    # A new process starts from any random state.
    torch.manual_seed(999)
    trainer.load_state(checkpoint.load_latest(directory)[0])
    return trainer


def without_time(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without its measured times, the only entries that two runs do not share."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in state["rows"]]
    return {**state, "rows": rows, "progress": {**state["progress"], "seconds": None}}


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Assert that two nested values are the same to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert a == b, where


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without the measured speed."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in records]


def summary(directory: Path) -> list[dict[str, str]]:
    with (directory / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(a: Path, b: Path) -> None:
    """Assert that two run directories hold the same run, except for how long it took."""
    for name in ("last.pt", "model_best.pt"):
        pair = (without_time(checkpoint.load(run / name)) for run in (a, b))
        assert_same(*pair, name)
    for name in ("model_best.safetensors", "config.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert metrics(a) == metrics(b)
    tables = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in summary(run)] for run in (a, b)
    ]
    assert tables[0] == tables[1]


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, train: Batches, validation: ImageSet, test: ImageSet
) -> Path:
    """Three epochs in one go."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert new_trainer(directory).fit(train, validation, test, 3)
    return directory


class TestRun:
    def test_the_log_has_every_step_once(self, uninterrupted: Path) -> None:
        records = metrics(uninterrupted)
        assert [record["step"] for record in records] == list(range(3 * BATCHES))
        assert [record["epoch"] for record in records] == [1] * 6 + [2] * 6 + [3] * 6
        expected = [SCHEDULE(step, step // BATCHES) for step in range(3 * BATCHES)]
        assert [record["learning_rate"] for record in records] == expected

    def test_the_log_interval_thins_the_log(
        self, tmp_path: Path, train: Batches, validation: ImageSet, uninterrupted: Path
    ) -> None:
        assert new_trainer(tmp_path, log_interval=4).fit(train, validation, None, 2)
        # Every fourth step, and the last one of each epoch.
        records = metrics(tmp_path)
        assert [record["step"] for record in records] == [3, 5, 7, 11]
        # How often it is written changes nothing that is written.
        dense = metrics(uninterrupted)
        assert records == [dense[record["step"]] for record in records]

    def test_the_summary_has_a_row_an_epoch(self, uninterrupted: Path) -> None:
        rows = summary(uninterrupted)
        assert list(rows[0]) == [
            "epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy",
            "test_loss", "test_accuracy", "learning_rate", "seconds",
        ]  # fmt: skip
        assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
        # The last record of an epoch is over the whole epoch, as the row is.
        last = metrics(uninterrupted)[BATCHES - 1 :: BATCHES]
        assert [float(row["train_loss"]) for row in rows] == [record["loss"] for record in last]
        assert [float(row["train_accuracy"]) for row in rows] == [r["accuracy"] for r in last]
        assert all(float(row["seconds"]) > 0 for row in rows)

    def test_the_mean_of_an_epoch_counts_every_image_once(
        self, tmp_path: Path, train: Batches, validation: ImageSet
    ) -> None:
        """Also those of the last batch, which is smaller."""
        trainer = new_trainer(tmp_path)
        steps: list[tuple[float, int, int]] = []
        inner = trainer._step

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            loss, correct = inner(images, labels)
            steps.append((loss.item(), int(correct), len(labels)))
            return loss, correct

        trainer._step = step  # type: ignore[method-assign]
        assert trainer.fit(train, validation, None, 1)
        losses, hits, counts = zip(*steps, strict=True)
        assert counts == (16, 16, 16, 16, 16, 10)
        assert trainer.rows[0]["train_loss"] == pytest.approx(sum(losses) / 90, rel=1e-12)
        assert trainer.rows[0]["train_accuracy"] == sum(hits) / 90

    def test_without_a_test_set_none_is_reported(
        self, tmp_path: Path, train: Batches, validation: ImageSet, capsys: pytest.CaptureFixture
    ) -> None:
        assert new_trainer(tmp_path).fit(train, validation, None, 1)
        assert "test" not in (tmp_path / "summary.csv").read_text()
        assert "test" not in capsys.readouterr().out

    def test_it_learns_by_what_the_schedule_says(
        self, tmp_path: Path, train: Batches, validation: ImageSet
    ) -> None:
        trainer = new_trainer(tmp_path, schedule=Schedule(0.004, 0.5, 0))
        rates: list[float] = []
        inner = trainer.optimizer.step
        trainer.optimizer.step = lambda: (  # type: ignore[method-assign]
            rates.append(trainer.optimizer.param_groups[0]["lr"]),
            inner(),
        )
        assert trainer.fit(train, validation, None, 2)
        assert rates == [0.004] * BATCHES + [0.002] * BATCHES

    def test_the_tracker_gets_every_record_and_epoch(
        self, tmp_path: Path, train: Batches, validation: ImageSet
    ) -> None:
        trainer = new_trainer(tmp_path, log_interval=3)
        seen: list[tuple[int, set[str]]] = []
        trainer.on_metrics = lambda step, values: seen.append((step, set(values)))
        assert trainer.fit(train, validation, None, 1)
        record = {"loss", "accuracy", "learning_rate", "images_per_second"}
        epoch = {"train_loss", "train_accuracy", "validation_loss", "validation_accuracy"}
        assert seen == [(3, record), (6, record), (6, epoch | {"seconds"})]

    def test_the_model_called_may_be_a_compiled_one(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        train: Batches,
        validation: ImageSet,
    ) -> None:
        """`call` serves the steps alone: an evaluation is not worth another compilation."""
        trainer = new_trainer(tmp_path)
        modes: list[bool] = []

        class Compiled:
            """Without a length, like what torch.compile returns: `compiled or model` fails."""

            def __len__(self) -> int:
                raise TypeError("no length")

            def __call__(self, *args: Tensor) -> Any:
                modes.append(trainer.model.training)
                return trainer.model(*args)

        monkeypatch.setattr(torch, "compile", lambda model: Compiled())
        trainer = Trainer(
            trainer.model,
            trainer.optimizer,
            trainer.schedule,
            CPU,
            tmp_path,
            trainer.args,
            compile_model=True,
        )
        assert trainer.fit(train, validation, None, 1)
        assert modes == [True] * BATCHES


class TestResume:
    """A run that was interrupted anywhere is, once resumed, the run that was not."""

    @pytest.mark.parametrize("step", [1, 3, 6, 12, 17])
    def test_after_a_stop(
        self,
        tmp_path: Path,
        train: Batches,
        validation: ImageSet,
        test: ImageSet,
        uninterrupted: Path,
        step: int,
    ) -> None:
        """A stop is asked for in the given step; epochs end with steps 6, 12 and 18."""
        trainer = new_trainer(tmp_path)
        inner = trainer._step

        def step_and_ask(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            result = inner(images, labels)
            # `progress.step` is counted up after the step.
            trainer._stop_requested = trainer.progress.step + 1 == step
            return result

        trainer._step = step_and_ask  # type: ignore[method-assign]
        assert not trainer.fit(train, validation, test, 3)
        saved = checkpoint.load(tmp_path / "last.pt")["progress"]
        assert (saved["step"], saved["epoch"], saved["batch"]) == (step, step // 6, step % 6)
        assert resumed_trainer(tmp_path).fit(train, validation, test, 3)
        assert_same_run(tmp_path, uninterrupted)

    def test_after_a_stop_between_any_two_lines(
        self,
        tmp_path: Path,
        train: Batches,
        validation: ImageSet,
    ) -> None:
        """The signal comes just before the flag is read for the n-th time, whichever line that is.

        The log is written but at the end of an epoch, so that no sum is up to date by chance.
        """
        reference = tmp_path / "reference"
        assert new_trainer(reference, log_interval=100).fit(train, validation, None, 2)
        for number in range(1, 100):

            class Interrupted(Trainer):
                reads = 0
                stop_at = number

                @property
                def _stop_requested(self) -> bool:
                    self.reads += 1
                    return self.reads >= self.stop_at

                @_stop_requested.setter
                def _stop_requested(self, value: bool) -> None:
                    pass

            run = tmp_path / f"run-{number}"
            trainer = new_trainer(run, log_interval=100, kind=Interrupted)
            if trainer.fit(train, validation, None, 2):
                break
            if number % 3 == 0:
                assert resumed_trainer(run, log_interval=100).fit(train, validation, None, 2)
                assert_same_run(run, reference)
        # It is read once an epoch and once a batch, but for the last: there is nothing to stop.
        assert number == 2 * BATCHES + 1

    def test_after_many_stops(
        self,
        tmp_path: Path,
        train: Batches,
        validation: ImageSet,
        test: ImageSet,
        uninterrupted: Path,
    ) -> None:
        """A stop after every single batch."""
        finished = False
        starts = 0
        while not finished:
            trainer = new_trainer(tmp_path) if starts == 0 else resumed_trainer(tmp_path)
            trainer.on_metrics = lambda step, values, t=trainer: setattr(t, "_stop_requested", True)
            finished = trainer.fit(train, validation, test, 3)
            starts += 1
        assert starts > BATCHES
        assert_same_run(tmp_path, uninterrupted)

    @pytest.mark.parametrize("step", [1, 4, 6, 9])
    def test_after_a_crash(
        self,
        tmp_path: Path,
        train: Batches,
        validation: ImageSet,
        test: ImageSet,
        uninterrupted: Path,
        step: int,
    ) -> None:
        """In the first epoch too, before any epoch was saved."""
        trainer = new_trainer(tmp_path)

        def crash(at: int, values: dict[str, float]) -> None:
            if at == step:
                raise MemoryError

        trainer.on_metrics = crash
        with pytest.raises(MemoryError):
            trainer.fit(train, validation, test, 3)
        assert len(metrics(tmp_path)) == step
        resumed = resumed_trainer(tmp_path)
        assert resumed.progress.step == (0 if step <= 6 else 6)
        assert resumed.fit(train, validation, test, 3)
        assert_same_run(tmp_path, uninterrupted)

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize(
        "place, epoch", [("evaluate", 3), ("_save_best", 1), ("_save_last", 3)]
    )
    def test_after_a_crash_at_the_end_of_an_epoch(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        train: Batches,
        validation: ImageSet,
        test: ImageSet,
        uninterrupted: Path,
        place: str,
        epoch: int,
        when: str,
    ) -> None:
        """Whatever of the epoch's files was written, the resumed run leaves them all right."""
        trainer = new_trainer(tmp_path)
        assert trainer.fit(train, validation, test, epoch - 1)

        inner = getattr(trainer, place)

        def crash(*args: Any) -> None:
            if when == "after":
                inner(*args)
            raise MemoryError

        monkeypatch.setattr(trainer, place, crash)
        with pytest.raises(MemoryError):
            trainer.fit(train, validation, test, 3)
        monkeypatch.undo()
        assert resumed_trainer(tmp_path).fit(train, validation, test, 3)
        assert_same_run(tmp_path, uninterrupted)

    def test_with_more_epochs_it_goes_on(
        self,
        tmp_path: Path,
        train: Batches,
        validation: ImageSet,
        test: ImageSet,
        uninterrupted: Path,
    ) -> None:
        assert new_trainer(tmp_path).fit(train, validation, test, 2)
        assert resumed_trainer(tmp_path).fit(train, validation, test, 3)
        assert_same_run(tmp_path, uninterrupted)

    def test_a_finished_run_is_left_as_it_is(
        self, tmp_path: Path, train: Batches, validation: ImageSet, uninterrupted: Path
    ) -> None:
        run = tmp_path / "run"
        shutil.copytree(uninterrupted, run)
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        assert resumed_trainer(run).fit(train, validation, None, 3)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before

    def test_the_time_of_an_epoch_is_that_of_its_parts(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        train: Batches,
        validation: ImageSet,
    ) -> None:
        """Every batch takes 10 s by a clock that stands still otherwise."""
        clock = 0.0
        monkeypatch.setattr(training.time, "perf_counter", lambda: clock)
        inner = Trainer._step

        def step(self: Trainer, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal clock
            clock += 10.0
            self._stop_requested = self.progress.step == 3
            return inner(self, images, labels)

        monkeypatch.setattr(Trainer, "_step", step)
        assert not new_trainer(tmp_path).fit(train, validation, None, 1)
        clock = 1e6
        trainer = resumed_trainer(tmp_path)
        assert trainer.fit(train, validation, None, 1)
        assert trainer.rows[0]["seconds"] == 60.0
        # The speed is that of the resumed part: two batches, 16 and 10 images, in 20 s.
        last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["images_per_second"] == 26 / 20


class TestForeignState:
    """A checkpoint that is intact, but not of this model or this program, is refused by name."""

    @pytest.mark.parametrize("damage, message", [
        (lambda s: s["model"].pop("conv.bias"), 'Missing key.*"conv.bias"'),
        (lambda s: s["model"].update({"conv.bias": torch.zeros(9)}), "size mismatch for conv.bias"),
        (lambda s: s["optimizer"]["param_groups"][0]["params"].pop(), "parameter group"),
        (lambda s: s["progress"].update(kind="other"), "unexpected keyword argument 'kind'"),
        (lambda s: s.pop("rows"), "'rows'"),
        (lambda s: s.pop("rng"), "'rng'"),
        (lambda s: s.update(rng={"torch": 1}), "'int' object"),
    ], ids=["missing", "shape", "optimizer", "progress", "rows", "no-rng", "rng"])  # fmt: skip
    def test_it_is_refused(
        self,
        tmp_path: Path,
        uninterrupted: Path,
        damage: Callable[[dict[str, Any]], object],
        message: str,
    ) -> None:
        state = checkpoint.load(uninterrupted / "last.pt")
        damage(state)
        trainer = new_trainer(tmp_path)
        expected = (
            f"the checkpoint in {tmp_path} does not fit CapsNet and this program: .*{message}"
        )
        with pytest.raises(checkpoint.CheckpointError, match=expected):
            trainer.load_state(state)


class TestCheckpointInterval:
    def test_checkpoints_within_an_epoch(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        train: Batches,
        validation: ImageSet,
        test: ImageSet,
        uninterrupted: Path,
    ) -> None:
        """Written every so many steps and after every epoch; they change nothing else."""
        trainer = new_trainer(tmp_path)
        trainer.checkpoint_interval = 4
        written: list[int] = []
        inner = checkpoint.save

        def save(path: Path, state: dict[str, Any]) -> None:
            if path.name == "last.pt":
                written.append(state["progress"]["step"])
            inner(path, state)

        monkeypatch.setattr(checkpoint, "save", save)
        assert trainer.fit(train, validation, test, 3)
        assert written == [0, 4, 6, 8, 12, 16, 18]
        assert_same_run(tmp_path, uninterrupted)

    def test_a_run_goes_on_from_one(
        self, tmp_path: Path, train: Batches, validation: ImageSet, test: ImageSet,
        uninterrupted: Path,
    ) -> None:  # fmt: skip
        """The power fails at step 11, three steps after the last checkpoint."""
        trainer = new_trainer(tmp_path)
        trainer.checkpoint_interval = 4
        inner = trainer._step

        def fail(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            if trainer.progress.step == 11:
                raise ConnectionAbortedError
            return inner(images, labels)

        trainer._step = fail  # type: ignore[method-assign]
        with pytest.raises(ConnectionAbortedError):
            trainer.fit(train, validation, test, 3)
        resumed = resumed_trainer(tmp_path)
        assert resumed.progress.step == 8
        assert resumed.fit(train, validation, test, 3)
        assert_same_run(tmp_path, uninterrupted)


class TestSeed:
    def test_the_same_seed_gives_the_same_bits_and_another_does_not(
        self,
        tmp_path: Path,
        train: Batches,
        validation: ImageSet,
        test: ImageSet,
        uninterrupted: Path,
    ) -> None:
        assert new_trainer(tmp_path).fit(train, validation, test, 3)
        assert_same_run(tmp_path, uninterrupted)
        other = tmp_path / "other"
        batches = Batches(train.images, 16, seed=2, max_shift=2)
        assert new_trainer(other).fit(batches, validation, test, 3)
        assert metrics(other)[0]["loss"] != metrics(uninterrupted)[0]["loss"]


class TestBestModel:
    """The validation set chooses; the test set, scripted to disagree, has no say."""

    def fit(
        self,
        directory: Path,
        train: Batches,
        validation: ImageSet,
        test: ImageSet,
        quality: list[tuple[float, float]],
    ) -> list[dict[str, Tensor]]:
        """Train epochs of scripted (accuracy, loss); returns the weights after each of them."""
        trainer = new_trainer(directory)
        weights: list[dict[str, Tensor]] = []

        def evaluate(images: ImageSet) -> Evaluation:
            epoch = trainer.progress.epoch
            if images is validation:
                weights.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
                accuracy, loss = quality[epoch]
                return Evaluation(loss, accuracy, torch.empty(0))
            accuracy, loss = quality[len(quality) - 1 - epoch]
            return Evaluation(-loss, 1 - accuracy, torch.empty(0))

        trainer.evaluate = evaluate  # type: ignore[method-assign]
        assert trainer.fit(train, validation, test, len(quality))
        return weights

    @pytest.mark.parametrize(
        "quality, best",
        [
            ([(0.2, 1.0), (0.6, 1.0), (0.5, 0.1)], 2),
            ([(0.6, 1.0), (0.5, 0.5), (0.4, 0.1)], 1),
            ([(0.2, 1.0), (0.5, 0.9), (0.6, 2.0)], 3),
            ([(0.6, 0.3), (0.6, 0.2), (0.6, 0.25)], 2),
            ([(0.6, 0.3), (0.6, 0.3), (0.6, 0.3)], 1),
            ([(0.0, 9.0), (0.0, 9.0), (0.0, 8.0)], 3),
        ],
        ids=["accuracy", "first", "last", "tie-by-loss", "all-equal", "accuracy-0"],
    )
    def test_it_is_the_first_with_the_best_accuracy_then_loss(
        self,
        tmp_path: Path,
        train: Batches,
        validation: ImageSet,
        test: ImageSet,
        quality: list[tuple[float, float]],
        best: int,
    ) -> None:
        weights = self.fit(tmp_path, train, validation, test, quality)
        state = checkpoint.load(tmp_path / "model_best.pt")
        assert state["progress"]["epoch"] == state["progress"]["best_epoch"] == best
        assert len(state["rows"]) == best
        assert_same(dict(state["model"]), weights[best - 1], "model_best.pt")
        shared, metadata = checkpoint.load_weights(tmp_path / "model_best.safetensors")
        assert_same(shared, weights[best - 1], "model_best.safetensors")
        assert metadata == {"format": "pt"}
        config = training.read_config(tmp_path)
        assert config["best"] == {"epoch": best, "validation": quality[best - 1][0]}
        assert checkpoint.load(tmp_path / "last.pt")["progress"]["best_epoch"] == best

    def test_it_is_remembered_over_a_resume(
        self,
        tmp_path: Path,
        train: Batches,
        validation: ImageSet,
        test: ImageSet,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.fit(tmp_path, train, validation, test, [(0.6, 0.3)])
        trainer = resumed_trainer(tmp_path)
        worse = Evaluation(0.4, 0.6, torch.empty(0))
        monkeypatch.setattr(trainer, "evaluate", lambda images: worse)
        assert trainer.fit(train, validation, test, 2)
        assert checkpoint.load(tmp_path / "model_best.pt")["progress"]["epoch"] == 1


class TestNotFinite:
    """What went wrong is named, and no good checkpoint is replaced by a spoilt one."""

    FILES = ("last.pt", "last.previous.pt", "model_best.pt", "summary.csv", "config.json")

    @pytest.fixture
    def trainer(self, tmp_path: Path, train: Batches, validation: ImageSet) -> Trainer:
        """A run with one good epoch."""
        trainer = new_trainer(tmp_path)
        assert trainer.fit(train, validation, None, 1)
        return trainer

    def assert_stops(
        self, trainer: Trainer, train: Batches, validation: ImageSet, message: str
    ) -> None:
        before = {name: (trainer.directory / name).read_bytes() for name in self.FILES}
        with pytest.raises(TrainingError, match=message):
            trainer.fit(train, validation, None, 3)
        assert {name: (trainer.directory / name).read_bytes() for name in self.FILES} == before
        assert all(math.isfinite(record["loss"]) for record in metrics(trainer.directory))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_stops_the_run(
        self, trainer: Trainer, train: Batches, validation: ImageSet, value: float
    ) -> None:
        class Spoilt(CapsuleLoss):
            def forward(self, *args: Any) -> Tensor:
                loss = super().forward(*args)
                return loss * value if trainer.progress.step == 8 else loss

        trainer.loss = Spoilt()
        message = rf"the loss of batch 3 of 6 is {value}, in epoch 2 .*lower --lr$"
        self.assert_stops(trainer, train, validation, message)

    def test_the_batch_is_named_that_was_the_first(
        self, trainer: Trainer, train: Batches, validation: ImageSet
    ) -> None:
        trainer.log_interval = 4
        trainer.schedule = Schedule(1e30, 1.0, 0)
        # The first step is taken from a finite loss.
        message = r"the loss of batch 2 of 6 is nan, in epoch 2 \(found at step 8\)"
        self.assert_stops(trainer, train, validation, message)

    def test_one_image_that_is_nan_stops_the_run(
        self,
        trainer: Trainer,
        monkeypatch: pytest.MonkeyPatch,
        train: Batches,
        validation: ImageSet,
    ) -> None:
        trainer.log_interval = 5
        inner = train.epoch

        def spoilt(epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            for number, (images, labels) in enumerate(inner(epoch, start)):
                if number == 2:
                    images[5] = math.nan
                yield images, labels

        monkeypatch.setattr(train, "epoch", spoilt)
        message = r"the loss of batch 3 of 6 is nan, in epoch 2 \(found at step 10\)"
        self.assert_stops(trainer, train, validation, message)

    @pytest.mark.parametrize("step", [9, 12])
    def test_weights_are_not_saved_though_the_loss_was_fine(
        self, trainer: Trainer, train: Batches, validation: ImageSet, step: int
    ) -> None:
        """The last step before a checkpoint, in or at the end of an epoch, spoils a weight."""
        inner = trainer._step

        def spoil(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            result = inner(images, labels)
            if trainer.progress.step + 1 == step:
                with torch.no_grad():
                    trainer.model.conv.weight[0, 0, 0, 0] = math.nan
                trainer._stop_requested = step == 9
            return result

        trainer._step = spoil  # type: ignore[method-assign]
        message = rf"conv\.weight is not finite, in epoch 2 \(found at step {step}\)"
        self.assert_stops(trainer, train, validation, message)

    def test_the_remedy_depends_on_the_precision(
        self, tmp_path: Path, train: Batches, validation: ImageSet
    ) -> None:
        bf16 = Runtime(torch.device("cpu"), "bf16")
        trainer = new_trainer(tmp_path / "bf16", runtime=bf16, schedule=Schedule(1e30, 1.0, 0))
        with pytest.raises(TrainingError, match=r"lower --lr, or continue .* --precision fp32$"):
            trainer.fit(train, validation, None, 1)


class TestEvaluation:
    def test_it_is_the_loss_and_accuracy_over_all_images(
        self, tmp_path: Path, test: ImageSet
    ) -> None:
        trainer = new_trainer(tmp_path)
        evaluation = trainer.evaluate(test)  # batches of 16, 16 and 8
        with torch.no_grad():
            images = test.images / 255
            activations, _, reconstruction, _ = trainer.model(images)
            loss = CapsuleLoss()(activations, test.labels, reconstruction, images)
        predicted = activations.argmax(dim=1)
        assert torch.equal(evaluation.predictions, predicted)
        assert evaluation.accuracy == int((predicted == test.labels).sum()) / 40
        assert evaluation.loss == pytest.approx(loss.item(), rel=1e-5)

    def test_the_decoder_sees_no_label(self, tmp_path: Path, test: ImageSet) -> None:
        """With other labels there are the same predictions and reconstructions, bit for bit."""
        trainer = new_trainer(tmp_path)
        outputs: list[Any] = []
        arguments: list[int] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            arguments.append(len(args) + len(kwargs))
            outputs.append((output.activations.clone(), output.reconstruction.clone()))

        trainer.model.register_forward_hook(record, with_kwargs=True)
        shuffled = ImageSet(test.images, test.labels.roll(1))
        assert not torch.equal(shuffled.labels, test.labels)
        right, wrong = trainer.evaluate(test), trainer.evaluate(shuffled)
        assert arguments == [1] * 6
        assert_same(outputs[:3], outputs[3:])
        assert torch.equal(right.predictions, wrong.predictions)
        assert right.loss != wrong.loss

    def test_the_reconstruction_is_that_of_the_longest_capsule(
        self, tmp_path: Path, test: ImageSet
    ) -> None:
        trainer = new_trainer(tmp_path)
        images = test.images / 255
        output = trainer.predict(images)
        with torch.no_grad():
            drawn = trainer.model.decoder(output.poses, output.activations.argmax(dim=1))
        assert torch.equal(output.reconstruction, drawn)

    def test_it_does_not_change_the_training(
        self,
        tmp_path: Path,
        train: Batches,
        validation: ImageSet,
        test: ImageSet,
        uninterrupted: Path,
    ) -> None:
        """Neither through the random state nor through the mode of the model."""
        trainer = new_trainer(tmp_path)
        inner = trainer._step

        def evaluate_and_step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            assert trainer.model.training
            state = torch.get_rng_state()
            trainer.evaluate(validation)
            assert not trainer.model.training
            assert torch.equal(torch.get_rng_state(), state)
            trainer.model.train()
            return inner(images, labels)

        trainer._step = evaluate_and_step  # type: ignore[method-assign]
        assert trainer.fit(train, validation, test, 3)
        assert_same_run(tmp_path, uninterrupted)


SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class TestSignals:
    @pytest.fixture(autouse=True)
    def handlers_are_put_back(self) -> Iterator[None]:
        before = [signal.getsignal(number) for number in SIGNALS]
        yield
        assert [signal.getsignal(number) for number in SIGNALS] == before

    def raise_at(self, trainer: Trainer, step: int, *numbers: signal.Signals) -> None:
        inner = trainer._step

        def raising(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            if trainer.progress.step == step:
                for number in numbers:
                    signal.raise_signal(number)
            return inner(images, labels)

        trainer._step = raising  # type: ignore[method-assign]

    @pytest.mark.parametrize("number", SIGNALS, ids=lambda s: s.name)
    def test_a_signal_finishes_the_batch_and_saves(
        self,
        tmp_path: Path,
        train: Batches,
        validation: ImageSet,
        capfd: pytest.CaptureFixture,
        number: signal.Signals,
    ) -> None:
        trainer = new_trainer(tmp_path)
        self.raise_at(trainer, 7, number)
        # Under nohup SIGHUP is ignored, by the tests' own process too.
        handled = signal.signal(number, signal.default_int_handler)
        try:
            assert not trainer.fit(train, validation, None, 3)
        finally:
            signal.signal(number, handled)
        assert checkpoint.load(tmp_path / "last.pt")["progress"]["step"] == 8
        assert capfd.readouterr().err == f"\n{number.name}: finishing the batch, then saving\n"

    def test_a_second_ctrl_c_stops_at_once(
        self, tmp_path: Path, train: Batches, validation: ImageSet
    ) -> None:
        trainer = new_trainer(tmp_path)
        self.raise_at(trainer, 7, signal.SIGINT, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(train, validation, None, 3)
        assert checkpoint.load(tmp_path / "last.pt")["progress"]["step"] == 6

    @pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
    def test_nohup_is_respected(self, tmp_path: Path, train: Batches, validation: ImageSet) -> None:
        trainer = new_trainer(tmp_path)
        self.raise_at(trainer, 2, signal.SIGHUP)
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            assert trainer.fit(train, validation, None, 1)
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_sigterm_may_come_twice(
        self, tmp_path: Path, train: Batches, validation: ImageSet
    ) -> None:
        trainer = new_trainer(tmp_path)
        self.raise_at(trainer, 7, signal.SIGTERM, signal.SIGTERM)
        assert not trainer.fit(train, validation, None, 3)
        assert checkpoint.load(tmp_path / "last.pt")["progress"]["step"] == 8

    @pytest.mark.parametrize("epochs, finished", [(3, False), (1, True)])
    def test_a_signal_in_the_evaluation_ends_the_run_with_the_epoch(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        train: Batches,
        validation: ImageSet,
        epochs: int,
        finished: bool,
    ) -> None:
        """No batch of the next epoch is begun; a run that was at its end is finished."""
        trainer = new_trainer(tmp_path)

        def evaluate(images: ImageSet) -> Evaluation:
            signal.raise_signal(signal.SIGTERM)
            return Trainer.evaluate(trainer, images)

        monkeypatch.setattr(trainer, "evaluate", evaluate)
        assert trainer.fit(train, validation, None, epochs) is finished
        saved = checkpoint.load(tmp_path / "last.pt")["progress"]
        assert (saved["step"], saved["epoch"]) == (6, 1)

    def test_a_stop_does_not_linger(
        self, tmp_path: Path, train: Batches, validation: ImageSet
    ) -> None:
        """The same trainer can go on."""
        trainer = new_trainer(tmp_path)
        self.raise_at(trainer, 2, signal.SIGTERM)
        assert not trainer.fit(train, validation, None, 1)
        assert trainer.fit(train, validation, None, 1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestReports:
    def test_elsewhere_than_on_a_terminal_an_epoch_is_a_line(
        self, tmp_path: Path, train: Batches, validation: ImageSet, test: ImageSet,
        capsys: pytest.CaptureFixture,
    ) -> None:  # fmt: skip
        trainer = new_trainer(tmp_path)
        assert trainer.fit(train, validation, test, 2)
        captured = capsys.readouterr()
        assert captured.err == ""
        first, second = captured.out.splitlines()
        row = trainer.rows[0]
        assert first == (
            f"epoch 1/2: loss {row['train_loss']:.4f}, "
            f"accuracy {100 * row['train_accuracy']:.2f} %; "
            f"validation {100 * row['validation_accuracy']:.2f} %; "
            f"test {100 * row['test_accuracy']:.2f} % "
            f"({training._duration(row['seconds'])}, best so far)"
        )
        assert second.startswith("epoch 2/2: ")

    def test_on_a_terminal_there_is_a_bar(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        train: Batches,
        validation: ImageSet,
    ) -> None:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        assert new_trainer(tmp_path).fit(train, validation, None, 1)
        text = terminal.getvalue()
        assert "epoch 1/1 " in text and "100%" in text
        row = metrics(tmp_path)[-1]
        shown = f"loss {row['loss']:.4f}, accuracy {100 * row['accuracy']:.2f} %, "
        assert shown in text and " images/s" in text

    def test_the_time_left_is_said_once(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        train: Batches,
        validation: ImageSet,
        capsys: pytest.CaptureFixture,
    ) -> None:
        """Every batch takes 2 s: after the third there have been 5 s, and 15 are left of 18."""
        trainer = new_trainer(tmp_path)
        clock = iter(range(0, 1000, 2))
        monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(clock)))
        assert trainer.fit(train, validation, None, 3)
        said = [line for line in capsys.readouterr().out.splitlines() if "to go" in line]
        assert said == ["about 12 s an epoch, 30 s to go (evaluations not counted)"]

    @pytest.mark.parametrize(
        "seconds, text",
        [(0.4, "0 s"), (59.6, "60 s"), (99.4, "99 s"), (99.6, "2 min"), (5939, "99 min"),
         (5941, "1.7 h"), (86400, "24.0 h")],
    )  # fmt: skip
    def test_durations_read_well(self, seconds: float, text: str) -> None:
        assert training._duration(seconds) == text


class TestSchedule:
    def test_it_warms_up_linearly_then_decays_by_epoch(self) -> None:
        schedule = Schedule(lr=0.1, gamma=0.5, warmup_steps=4)
        rates = [schedule(step, epoch=0) for step in range(6)]
        assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
        assert [schedule(100, epoch) for epoch in range(4)] == [0.1, 0.05, 0.025, 0.0125]
        # A warm-up longer than an epoch goes on in the next.
        assert schedule(2, epoch=1) == pytest.approx(0.0375)

    def test_without_a_warm_up_the_first_step_has_the_full_rate(self) -> None:
        assert Schedule(lr=0.1, gamma=0.9, warmup_steps=0)(0, 0) == 0.1

    @pytest.mark.parametrize("name", ["lr", "gamma"])
    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    def test_rates_that_train_nothing_are_refused(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"{name} must be a positive number, got {value}"):
            Schedule(**{"lr": 0.1, "gamma": 0.9, "warmup_steps": 0, name: value})  # type: ignore[arg-type]

    def test_a_negative_warm_up_is_refused(self) -> None:
        with pytest.raises(ValueError, match="warmup_steps must be >= 0, got -1"):
            Schedule(0.1, 0.9, -1)


class TestRuntime:
    @pytest.mark.parametrize(
        "capabilities, expected",
        [
            ({"amx_bf16": True, "avx512_bf16": True}, "bf16"),
            ({"amx_bf16": False, "avx512_bf16": True}, "bf16"),
            ({"amx_bf16": True, "avx512_bf16": False}, "bf16"),
            ({"amx_bf16": False, "avx512_bf16": False, "avx2": True}, "fp32"),
            ({"architecture": "aarch64", "neon": True}, "fp32"),
            ({}, "fp32"),
        ],
    )
    def test_a_cpu_computes_in_bf16_where_it_can(
        self, monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], expected: str
    ) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        assert choose_runtime("cpu").precision == expected
        # What the user says counts.
        assert choose_runtime("cpu", "fp32").precision == "fp32"
        assert choose_runtime("cpu", "bf16").precision == "bf16"

    def test_a_torch_that_does_not_tell_means_fp32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        assert choose_runtime("cpu").precision == "fp32"

    @pytest.mark.parametrize("supported, expected", [(True, "bf16"), (False, "fp32")])
    def test_a_gpu_computes_in_bf16_where_it_does_not_emulate_it(
        self, monkeypatch: pytest.MonkeyPatch, supported: bool, expected: str
    ) -> None:
        """A GPU that only emulates it says so, and is slower in it than in fp32."""
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: including_emulation or supported,
        )
        monkeypatch.setattr(
            torch.accelerator,
            "current_accelerator",
            lambda check_available: torch.device("cuda"),
        )
        chosen = choose_runtime()
        assert (chosen.device.type, chosen.precision) == ("cuda", expected)
        assert chosen.sum_dtype is torch.float64

    def test_apples_gpus_get_no_float64(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps")
        )
        chosen = choose_runtime()
        assert (chosen.device.type, chosen.precision) == ("mps", "fp32")
        assert chosen.sum_dtype is torch.float32

    def test_float64_appears_nowhere_but_in_the_sums(
        self, tmp_path: Path, train: Batches, validation: ImageSet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the sums in float32, as for MPS, an epoch makes no float64 tensor at all."""

        class NoFloat64(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                result = func(*args, **(kwargs or {}))
                for tensor in torch.utils._pytree.tree_leaves(result):
                    if isinstance(tensor, Tensor):
                        assert tensor.dtype is not torch.float64, func
                return result

        monkeypatch.setattr(Runtime, "sum_dtype", torch.float32)
        trainer = new_trainer(tmp_path)
        with NoFloat64():
            assert trainer.fit(train, validation, None, 1)

    def test_without_an_accelerator_auto_is_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
        assert choose_runtime().device == torch.device("cpu")

    @pytest.mark.parametrize("device", ["nonsense", "", "cuda:99", "hpu", "vulkan"])
    def test_a_device_that_is_not_there_is_named(self, device: str) -> None:
        with pytest.raises(ValueError, match=f"--device {device}: not available here") as caught:
            choose_runtime(device)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_bf16_is_for_convolutions_and_fp32_for_routing_and_loss(
        self, tmp_path: Path, test: ImageSet, precision: str
    ) -> None:
        chosen = choose_runtime("cpu", precision)
        trainer = new_trainer(tmp_path, runtime=chosen)
        kinds: dict[str, torch.dtype] = {}
        for name, module in trainer.model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):

                def record(_: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                    kinds[name] = output.dtype

                module.register_forward_hook(record)
        lengths: list[torch.dtype] = []
        inner = trainer.loss.forward

        def loss(*args: Tensor) -> Tensor:
            lengths.append(args[0].dtype)
            return inner(*args)

        trainer.loss.forward = loss  # type: ignore[method-assign]
        loss_sum, _ = trainer._step(test.images[:8] / 255, test.labels[:8])
        expected = torch.bfloat16 if precision == "bf16" else torch.float32
        assert len(kinds) == 5 and set(kinds.values()) == {expected}
        assert lengths == [torch.float32] and loss_sum.dtype is torch.float64
        assert {p.grad.dtype for p in trainer.model.parameters()} == {torch.float32}

    def test_convolutions_are_placed_with_channels_last(self) -> None:
        model = CPU.place(small_model())
        weight = model.primary.conv.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
        # Four axes alone do not make a kernel of a convolution.
        assert model.routing.weight.ndim == 4 and model.routing.weight.is_contiguous()

    def test_deterministic_is_what_torch_says_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        # Set, so that monkeypatch removes it again.
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        try:
            make_deterministic()
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.backends.cudnn.benchmark
            # The user's choice is kept.
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
            make_deterministic()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        finally:
            torch.use_deterministic_algorithms(False)


class TestEnvironment:
    def test_it_tells_versions_and_machine(self) -> None:
        environment = describe_environment(Runtime(torch.device("cpu"), "bf16"))
        assert str(torch.__version__).startswith(environment["torch"])
        assert environment["torch_build"] == str(torch.__version__)
        assert (environment["device"], environment["gpu"]) == ("cpu", None)
        assert environment["precision"] == "bf16"
        assert environment["threads"] == 1
        assert environment["processor"] and environment["platform"]
        assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
        json.dumps(environment)

    @pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
    def test_the_commit_is_that_of_the_checkout(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # No user's or machine's configuration has a part in it, nor a repository above.
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv("TRITONCAPS_COMMIT", raising=False)
        source = tmp_path / "source.py"
        assert commit_of(tmp_path) is None
        monkeypatch.setenv("TRITONCAPS_COMMIT", "abc")
        assert commit_of(tmp_path) == "abc"

        def git(*arguments: str) -> str:
            identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
            command = ["git", *identity, *arguments]
            return subprocess.run(
                command, cwd=tmp_path, check=True, capture_output=True, text=True
            ).stdout.strip()

        source.write_text("one")
        results = tmp_path / "benchmarks" / "results"
        results.mkdir(parents=True)
        (results / "ops.json").write_text("one")
        git("init", "-q")
        git("add", ".")
        git("commit", "-q", "-m", "one")
        # A tag does not take its place.
        git("tag", "-a", "v1", "-m", "one")
        (results / "ops.json").write_text("two")  # nor do results
        for folder in (tmp_path, results.parent):
            assert commit_of(folder) == git("rev-parse", "HEAD")[:12]
        source.write_text("two")
        for folder in (tmp_path, results.parent):
            assert commit_of(folder) == git("rev-parse", "HEAD")[:12] + "+"

    def test_without_git_there_is_no_commit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(*args: Any, **kwargs: Any) -> None:
            raise FileNotFoundError("git")

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.delenv("TRITONCAPS_COMMIT", raising=False)
        assert commit_of(Path(__file__).parent) is None
