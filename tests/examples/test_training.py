"""The training loop: resuming changes nothing, the best model is chosen honestly, stops are clean.

Models and data are small. Bits are compared on the CPU, in one thread.
"""

import io
import json
import math
import shutil
import signal
import sys

import pytest
import torch
from example_runs import (
    assert_same,
    assert_same_run,
    crash_after,
    metrics,
    small_model,
    stop_after,
    summary,
)

from engine import checkpoint, training
from engine.runtime import Runtime
from engine.tables import best_epoch
from engine.tasks import Task
from engine.training import Evaluation, OneCycle, Schedule, Trainer, TrainingError
from tritoncaps import RoutedCapsules
from tritoncaps.data import Batches, ImageSet
from tritoncaps.layers import capsule_lengths
from tritoncaps.losses import CapsuleLoss
from tritoncaps.models import CapsuleOutput

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Runtime(torch.device("cpu"), "fp32")
SCHEDULE = Schedule(0.003, 0.8, 4)
# The number of batches in an epoch. The last one is not full.
BATCHES = 6


@pytest.fixture(scope="module")
def train(digits):
    return Batches(digits.subset(range(90)), 16, seed=1, max_shift=2)


@pytest.fixture(scope="module")
def validation(digits):
    return digits.subset(range(90, 130))


@pytest.fixture(scope="module")
def test(digits):
    return digits.subset(range(130, 170))


@pytest.fixture(scope="module")
def sets(train, validation, test):
    return train, validation, test


def new_trainer(directory, *, kind=Trainer, schedule=SCHEDULE, runtime=CPU, **options):
    options = {"test_batch_size": 16, "log_interval": 1, **options}
    config = {"model": "capsnet", "model_kwargs": {"num_classes": 10, "image_size": (28, 28)}}
    return kind(
        small_model(), directory, schedule=schedule, runtime=runtime, config=config, **options
    )


def resumed_trainer(directory, **options):
    trainer = new_trainer(directory, **options)
    # A new process starts with an arbitrary random state.
    torch.manual_seed(999)
    assert trainer.resume()
    return trainer


def progress_of(directory):
    return checkpoint.load(directory / "last.safetensors")["progress"]


def before_step(trainer, action):
    """Do something before each step, given the number of the step, from 0."""
    inner = trainer._step

    def step(*args):
        action(trainer.progress.step)
        return inner(*args)

    trainer._step = step


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, sets):
    """Three epochs in one go."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert new_trainer(directory).fit(*sets, epochs=3)
    return directory


class TestRun:
    def test_a_task_is_told_its_step_also_in_a_resumed_run(self, tmp_path, train, validation):
        """The margin of the spread loss depends on it, and is the same in all evaluations."""
        steps = []

        class Recording(Task):
            def loss(self, *args):
                steps.append(self.step)
                return super().loss(*args)

        new_trainer(tmp_path, task=Recording()).fit(train, validation, epochs=1)
        resumed_trainer(tmp_path, task=Recording()).fit(train, validation, epochs=2)
        tested = [None] * math.ceil(len(validation) / 16)
        first, second = range(BATCHES), range(BATCHES, 2 * BATCHES)
        assert steps == [*first, *tested, *second, *tested]

    def test_the_log_has_every_step_once(self, uninterrupted):
        records = metrics(uninterrupted)
        assert [record["step"] for record in records] == list(range(3 * BATCHES))
        assert [record["epoch"] for record in records] == [1] * 6 + [2] * 6 + [3] * 6
        expected = [SCHEDULE(step, step // BATCHES) for step in range(3 * BATCHES)]
        assert [record["learning_rate"] for record in records] == expected

    def test_the_log_interval_thins_the_log(self, tmp_path, train, validation, uninterrupted):
        assert new_trainer(tmp_path, log_interval=4).fit(train, validation, epochs=2)
        # Every fourth step, and the last one of each epoch.
        records = metrics(tmp_path)
        assert [record["step"] for record in records] == [3, 5, 7, 11]
        # How often it is written does not change what is written.
        dense = metrics(uninterrupted)
        assert records == [dense[record["step"]] for record in records]

    def test_the_summary_has_a_row_for_each_epoch(self, uninterrupted):
        rows = summary(uninterrupted)
        assert list(rows[0]) == [
            "epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy",
            "test_loss", "test_accuracy", "learning_rate", "seconds",
        ]  # fmt: skip
        assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
        # The last record of an epoch covers the whole epoch, like the row.
        last = metrics(uninterrupted)[BATCHES - 1 :: BATCHES]
        assert [float(row["train_loss"]) for row in rows] == [record["loss"] for record in last]
        assert [float(row["train_accuracy"]) for row in rows] == [r["accuracy"] for r in last]
        assert all(float(row["seconds"]) > 0 for row in rows)

    def test_the_mean_of_an_epoch_counts_every_image_once(self, tmp_path, train, validation):
        """This includes the last batch, which is smaller."""
        trainer = new_trainer(tmp_path)
        steps = []
        inner = trainer._step

        def step(images, labels):
            loss, correct = inner(images, labels)
            steps.append((loss.item(), int(correct), len(labels)))
            return loss, correct

        trainer._step = step
        assert trainer.fit(train, validation, epochs=1)
        losses, hits, counts = zip(*steps, strict=True)
        assert counts == (16, 16, 16, 16, 16, 10)
        assert trainer.rows[0]["train_loss"] == pytest.approx(sum(losses) / 90, rel=1e-12)
        assert trainer.rows[0]["train_accuracy"] == sum(hits) / 90

    def test_without_a_test_set_none_is_reported(self, tmp_path, train, validation, capsys):
        assert new_trainer(tmp_path).fit(train, validation, epochs=1)
        assert "test" not in (tmp_path / "summary.csv").read_text()
        assert "test" not in capsys.readouterr().out

    def test_it_learns_at_the_rate_of_the_schedule(self, tmp_path, train, validation):
        trainer = new_trainer(tmp_path, schedule=Schedule(0.004, 0.5, 0))
        rates = []
        before_step(trainer, lambda step: None)
        inner = trainer.optimizer.step
        trainer.optimizer.step = lambda: (
            rates.append(trainer.optimizer.param_groups[0]["lr"]),
            inner(),
        )
        assert trainer.fit(train, validation, epochs=2)
        assert rates == [0.004] * BATCHES + [0.002] * BATCHES

    def test_one_cycle_rises_to_the_rate_and_falls_to_nothing(self):
        """As torch's own scheduler has it."""
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        expected = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.004, total_steps=51, cycle_momentum=False
        )
        # torch puts the peak at step 0.3·51 − 1 and the end at step 50.
        cycle = OneCycle(0.004, 50)
        assert cycle(0, 0) == pytest.approx(expected.get_last_lr()[0])
        assert cycle(15, 0) == 0.004
        assert cycle(50, 0) == pytest.approx(0.004 / 250_000)
        rates = [cycle(step, 0) for step in range(51)]
        assert rates[:16] == sorted(rates[:16])
        assert rates[15:] == sorted(rates[15:], reverse=True)
        for step in range(50):
            assert rates[step] == pytest.approx(expected.get_last_lr()[0], abs=2e-4), step
            optimizer.step()
            expected.step()

    def test_the_tracker_gets_every_record_and_epoch(self, tmp_path, train, validation):
        trainer = new_trainer(tmp_path, log_interval=3)
        seen = []
        trainer.on_metrics = lambda step, values: seen.append((step, set(values)))
        assert trainer.fit(train, validation, epochs=1)
        record = {"loss", "accuracy", "learning_rate", "images_per_second"}
        epoch = {"train_loss", "train_accuracy", "validation_loss", "validation_accuracy"}
        assert seen == [(3, record), (6, record), (6, epoch | {"seconds"})]

    def test_a_compiled_model_may_be_called(self, tmp_path, train, validation):
        """It is used only for steps, because an evaluation is not worth another compilation."""
        modes = []

        class Compiled:
            """Has no length, like the result of torch.compile, so `compiled or model` fails."""

            def __init__(self, model):
                self.model = model

            def __len__(self):
                raise TypeError("no length")

            def __call__(self, *args):
                modes.append(self.model.training)
                return self.model(*args)

        trainer = new_trainer(tmp_path)
        trainer.call = Compiled(trainer.call)
        assert trainer.fit(train, validation, epochs=1)
        assert modes == [True] * BATCHES

    def test_another_seed_gives_another_run(self, tmp_path, train, validation, uninterrupted):
        batches = Batches(train.images, 16, seed=2, max_shift=2)
        assert new_trainer(tmp_path).fit(batches, validation, epochs=1)
        assert metrics(tmp_path)[0]["loss"] != metrics(uninterrupted)[0]["loss"]


class TestResume:
    """A run that was interrupted anywhere and resumed equals one that was not interrupted."""

    @pytest.mark.parametrize("step", [1, 3, 6, 12, 17])
    def test_after_a_stop(self, tmp_path, monkeypatch, sets, uninterrupted, step):
        """A stop is requested in the given step. Epochs end with steps 6, 12 and 18."""
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            assert not new_trainer(tmp_path).fit(*sets, epochs=3)
        saved = progress_of(tmp_path)
        assert (saved["step"], saved["epoch"], saved["batch"]) == (step, step // 6, step % 6)
        assert resumed_trainer(tmp_path).fit(*sets, epochs=3)
        assert_same_run(tmp_path, uninterrupted)

    def test_after_a_stop_between_any_two_lines(self, tmp_path, train, validation):
        """The signal comes just before the flag is read for the n-th time, on whatever line.

        The log is written only at the end of an epoch, so no sum is up to date by chance.
        """
        reference = tmp_path / "reference"
        assert new_trainer(reference, log_interval=100).fit(train, validation, epochs=2)
        for number in range(1, 100):

            class Interrupted(Trainer):
                reads = 0
                stop_at = number

                @property
                def _stop_requested(self):
                    self.reads += 1
                    return self.reads >= self.stop_at

                @_stop_requested.setter
                def _stop_requested(self, value):
                    pass

            run = tmp_path / f"run-{number}"
            trainer = new_trainer(run, log_interval=100, kind=Interrupted)
            if trainer.fit(train, validation, epochs=2):
                break
            if number % 3 == 0:
                assert resumed_trainer(run, log_interval=100).fit(train, validation, epochs=2)
                assert_same_run(run, reference)
        # It is read once per epoch and once per batch, except the last, where nothing is to stop.
        assert number == 2 * BATCHES + 1

    def test_after_many_stops(self, tmp_path, sets, uninterrupted):
        """A stop after every single batch."""
        finished = False
        starts = 0
        while not finished:
            trainer = new_trainer(tmp_path) if starts == 0 else resumed_trainer(tmp_path)
            trainer.on_metrics = lambda step, values, t=trainer: setattr(t, "_stop_requested", True)
            finished = trainer.fit(*sets, epochs=3)
            starts += 1
        assert starts > BATCHES
        assert_same_run(tmp_path, uninterrupted)

    @pytest.mark.parametrize("interval", [None, 4], ids=["by-epoch", "every-4-steps"])
    @pytest.mark.parametrize("steps", [1, 5, 11])
    def test_after_a_crash(self, tmp_path, monkeypatch, sets, uninterrupted, steps, interval):
        """This includes the first epoch, before any epoch was saved."""
        with monkeypatch.context() as patch:
            crash_after(patch, steps)
            with pytest.raises(MemoryError):
                new_trainer(tmp_path, checkpoint_interval=interval).fit(*sets, epochs=3)
        assert len(metrics(tmp_path)) == steps
        resumed = resumed_trainer(tmp_path)
        saved = {None: (0, 6), 4: (0, 4, 6, 8)}[interval]
        assert resumed.progress.step == max(step for step in saved if step <= steps)
        assert resumed.fit(*sets, epochs=3)
        assert_same_run(tmp_path, uninterrupted)

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize(
        "place, epoch", [("evaluate", 3), ("_save_best", 1), ("_save_last", 3)]
    )
    def test_after_a_crash_at_the_end_of_an_epoch(
        self, tmp_path, monkeypatch, sets, uninterrupted, place, epoch, when
    ):
        """The resumed run repairs the epoch's files, whichever of them were written."""
        trainer = new_trainer(tmp_path)
        assert trainer.fit(*sets, epochs=epoch - 1)

        inner = getattr(trainer, place)

        def crash(*args):
            if when == "after":
                inner(*args)
            raise MemoryError

        monkeypatch.setattr(trainer, place, crash)
        with pytest.raises(MemoryError):
            trainer.fit(*sets, epochs=3)
        monkeypatch.undo()
        assert resumed_trainer(tmp_path).fit(*sets, epochs=3)
        assert_same_run(tmp_path, uninterrupted)

    def test_with_more_epochs_it_continues(self, tmp_path, sets, uninterrupted):
        assert new_trainer(tmp_path).fit(*sets, epochs=2)
        assert resumed_trainer(tmp_path).fit(*sets, epochs=3)
        assert_same_run(tmp_path, uninterrupted)

    def test_a_finished_run_is_left_unchanged(self, tmp_path, train, validation, uninterrupted):
        run = tmp_path / "run"
        shutil.copytree(uninterrupted, run)
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        assert resumed_trainer(run).fit(train, validation, epochs=3)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before

    def test_without_a_checkpoint_it_says_so(self, tmp_path):
        assert not new_trainer(tmp_path).resume()

    def test_the_time_of_an_epoch_is_the_sum_of_its_parts(
        self, tmp_path, monkeypatch, train, validation
    ):
        """Every batch takes 10 s on a clock that otherwise stands still."""
        clock = 0.0
        monkeypatch.setattr(training.time, "perf_counter", lambda: clock)
        inner = Trainer._step

        def step(self, images, labels):
            nonlocal clock
            clock += 10.0
            self._stop_requested = self.progress.step == 3
            return inner(self, images, labels)

        monkeypatch.setattr(Trainer, "_step", step)
        assert not new_trainer(tmp_path).fit(train, validation, epochs=1)
        clock = 1e6
        trainer = resumed_trainer(tmp_path)
        assert trainer.fit(train, validation, epochs=1)
        assert trainer.rows[0]["seconds"] == 60.0
        # The speed is that of the resumed part: two batches, with 16 and 10 images, in 20 s.
        last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["images_per_second"] == 26 / 20

    def test_checkpoints_within_an_epoch_are_written_in_time(
        self, tmp_path, monkeypatch, sets, uninterrupted
    ):
        """They come every so many steps and after every epoch, and change nothing else."""
        written = []
        inner = checkpoint.save

        def save(path, state):
            written.append(state["progress"]["step"])
            inner(path, state)

        monkeypatch.setattr(checkpoint, "save", save)
        assert new_trainer(tmp_path, checkpoint_interval=4).fit(*sets, epochs=3)
        assert written == [0, 4, 6, 8, 12, 16, 18]
        assert_same_run(tmp_path, uninterrupted)

    @pytest.mark.parametrize("damage, message", [
        (lambda s: s["model"].pop("conv.bias"), 'Missing key.*"conv.bias"'),
        (lambda s: s["model"].update({"conv.bias": torch.zeros(9)}), "size mismatch for conv.bias"),
        (lambda s: s["optimizer"]["param_groups"][0]["params"].pop(), "parameter group"),
        (lambda s: s["progress"].update(kind="other"), "unexpected keyword argument 'kind'"),
        (lambda s: s.pop("rows"), "'rows'"),
        (lambda s: s.pop("rng"), "'rng'"),
        (lambda s: s.update(rng={"torch": 1}), "expected a torch.ByteTensor|'int' object"),
    ], ids=["missing", "shape", "optimizer", "progress", "rows", "no-rng", "rng"])  # fmt: skip
    def test_a_state_of_another_model_or_program_is_refused(
        self, tmp_path, uninterrupted, damage, message
    ):
        state = checkpoint.load(uninterrupted / "last.safetensors")
        damage(state)
        expected = (
            f"the checkpoint in {tmp_path} does not fit CapsNet and this program: .*({message})"
        )
        with pytest.raises(checkpoint.CheckpointError, match=expected):
            new_trainer(tmp_path).load_state(state)


class TestBestModel:
    """The validation set chooses. The test set, scripted to disagree, has no say."""

    def fit(self, directory, train, validation, test, quality):
        """Train epochs of scripted (accuracy, loss). Return the weights after each of them."""
        trainer = new_trainer(directory)
        weights = []

        def evaluate(images):
            epoch = trainer.progress.epoch
            if images is validation:
                weights.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
                accuracy, loss = quality[epoch]
                return Evaluation(loss, accuracy, torch.empty(0))
            accuracy, loss = quality[len(quality) - 1 - epoch]
            return Evaluation(-loss, 1 - accuracy, torch.empty(0))

        trainer.evaluate = evaluate
        assert trainer.fit(train, validation, test, epochs=len(quality))
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
    def test_it_is_the_first_with_the_best_accuracy_then_loss(self, tmp_path, sets, quality, best):
        weights = self.fit(tmp_path, *sets, quality)
        shared, header = checkpoint.load_weights(tmp_path / "model_best.safetensors")
        assert_same(shared, weights[best - 1], "model_best.safetensors")
        assert header == {
            "model": "capsnet",
            "model_kwargs": {"num_classes": 10, "image_size": (28, 28)},
            "epoch": best,
            "validation": quality[best - 1][0],
        }
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["best"] == {"epoch": best, "validation": quality[best - 1][0]}
        rows = checkpoint.load(tmp_path / "last.safetensors")["rows"]
        assert best_epoch(rows)["epoch"] == best

    def test_it_is_remembered_when_a_run_resumes(self, tmp_path, sets, monkeypatch):
        self.fit(tmp_path, *sets, [(0.6, 0.3)])
        trainer = resumed_trainer(tmp_path)
        worse = Evaluation(0.4, 0.6, torch.empty(0))
        monkeypatch.setattr(trainer, "evaluate", lambda images: worse)
        assert trainer.fit(*sets, epochs=2)
        _, header = checkpoint.load_weights(tmp_path / "model_best.safetensors")
        assert header["epoch"] == 1


class TestNotFinite:
    """The error names what went wrong, and no spoilt checkpoint replaces a good one."""

    FILES = (
        "last.safetensors", "last.previous.safetensors", "model_best.safetensors", "summary.csv",
        "config.json",
    )  # fmt: skip

    @pytest.fixture
    def trainer(self, tmp_path, train, validation):
        """A run with one good epoch."""
        trainer = new_trainer(tmp_path)
        assert trainer.fit(train, validation, epochs=1)
        return trainer

    def assert_stops(self, trainer, train, validation, message):
        before = {name: (trainer.directory / name).read_bytes() for name in self.FILES}
        with pytest.raises(TrainingError, match=message):
            trainer.fit(train, validation, epochs=3)
        assert {name: (trainer.directory / name).read_bytes() for name in self.FILES} == before
        assert all(math.isfinite(record["loss"]) for record in metrics(trainer.directory))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_stops_the_run(self, trainer, train, validation, value):
        class Spoilt(Task):
            def loss(self, *args):
                loss = super().loss(*args)
                return loss * value if trainer.progress.step == 8 else loss

        trainer.task = Spoilt()
        message = rf"the loss of batch 3 of 6 is {value}, in epoch 2 .*lower --lr$"
        self.assert_stops(trainer, train, validation, message)

    def test_the_first_bad_batch_is_named(self, trainer, train, validation):
        trainer.log_interval = 4
        trainer.schedule = Schedule(1e30, 1.0, 0)
        # The first step still has a finite loss.
        message = r"the loss of batch 2 of 6 is nan, in epoch 2 \(found at step 8\)"
        self.assert_stops(trainer, train, validation, message)

    def test_one_image_that_is_nan_stops_the_run(self, trainer, monkeypatch, train, validation):
        trainer.log_interval = 5
        inner = train.epoch

        def spoilt(epoch, start=0):
            for number, (images, labels) in enumerate(inner(epoch, start)):
                if number == 2:
                    images[5] = math.nan
                yield images, labels

        monkeypatch.setattr(train, "epoch", spoilt)
        message = r"the loss of batch 3 of 6 is nan, in epoch 2 \(found at step 10\)"
        self.assert_stops(trainer, train, validation, message)

    @pytest.mark.parametrize("step", [9, 12])
    def test_weights_are_not_saved_though_the_loss_was_fine(self, trainer, train, validation, step):
        """The last step before a checkpoint, within or at the end of an epoch, spoils a weight."""
        inner = trainer._step

        def spoil(images, labels):
            result = inner(images, labels)
            if trainer.progress.step + 1 == step:
                with torch.no_grad():
                    trainer.model.conv.weight[0, 0, 0, 0] = math.nan
                trainer._stop_requested = step == 9
            return result

        trainer._step = spoil
        message = rf"conv\.weight is not finite, in epoch 2 \(found at step {step}\)"
        self.assert_stops(trainer, train, validation, message)

    def test_the_remedy_depends_on_the_precision(self, tmp_path, train, validation):
        bf16 = Runtime(torch.device("cpu"), "bf16")
        trainer = new_trainer(tmp_path / "bf16", runtime=bf16, schedule=Schedule(1e30, 1.0, 0))
        with pytest.raises(TrainingError, match=r"lower --lr, or continue .* --precision fp32$"):
            trainer.fit(train, validation, epochs=1)


class TestEvaluation:
    def test_loss_and_accuracy_are_over_all_images(self, tmp_path, test):
        trainer = new_trainer(tmp_path)
        evaluation = trainer.evaluate(test)  # batches of 16, 16 and 8
        with torch.no_grad():
            images = test.images / 255
            activations, _, reconstruction, *_ = trainer.model(images)
            loss = CapsuleLoss()(activations, test.labels, reconstruction, images)
        predicted = activations.argmax(dim=1)
        assert torch.equal(evaluation.predictions, predicted)
        assert evaluation.accuracy == int((predicted == test.labels).sum()) / 40
        assert evaluation.loss == pytest.approx(loss.item(), rel=1e-5)

    def test_the_decoder_sees_no_label(self, tmp_path, test):
        """With other labels, predictions and reconstructions are the same, bit for bit."""
        trainer = new_trainer(tmp_path)
        outputs, arguments = [], []

        def record(module, args, kwargs, output):
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

    def test_the_reconstruction_comes_from_the_longest_capsule(self, tmp_path, test):
        trainer = new_trainer(tmp_path)
        output = trainer.predict(test.images / 255)
        with torch.no_grad():
            drawn = trainer.model.decoder(output.poses, output.activations.argmax(dim=1))
        assert torch.equal(output.reconstruction, drawn)

    def test_it_does_not_change_the_training(self, tmp_path, sets, validation, uninterrupted):
        """It changes neither the random state nor the mode of the model."""
        trainer = new_trainer(tmp_path)

        def evaluate(step):
            assert trainer.model.training
            state = torch.get_rng_state()
            trainer.evaluate(validation)
            assert not trainer.model.training
            assert torch.equal(torch.get_rng_state(), state)
            trainer.model.train()

        before_step(trainer, evaluate)
        assert trainer.fit(*sets, epochs=3)
        assert_same_run(tmp_path, uninterrupted)


SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class TestSignals:
    @pytest.fixture(autouse=True)
    def handlers_are_put_back(self):
        before = [signal.getsignal(number) for number in SIGNALS]
        yield
        assert [signal.getsignal(number) for number in SIGNALS] == before

    def trainer(self, directory, at_step, *numbers):
        """Build a trainer that gets signals in a step."""
        trainer = new_trainer(directory)

        def raise_signals(step):
            if step == at_step:
                for number in numbers:
                    signal.raise_signal(number)

        before_step(trainer, raise_signals)
        return trainer

    @pytest.mark.parametrize("number", SIGNALS, ids=lambda s: s.name)
    def test_a_signal_finishes_the_batch_and_saves(
        self, tmp_path, train, validation, capfd, number
    ):
        trainer = self.trainer(tmp_path, 7, number)
        # Under nohup, SIGHUP is ignored, also by the tests' own process.
        handled = signal.signal(number, signal.default_int_handler)
        try:
            assert not trainer.fit(train, validation, epochs=3)
        finally:
            signal.signal(number, handled)
        assert progress_of(tmp_path)["step"] == 8
        assert capfd.readouterr().err == f"\n{number.name}: finishing the batch, then saving\n"

    def test_a_second_ctrl_c_stops_at_once(self, tmp_path, train, validation):
        trainer = self.trainer(tmp_path, 7, signal.SIGINT, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(train, validation, epochs=3)
        assert progress_of(tmp_path)["step"] == 6

    @pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
    def test_nohup_is_respected(self, tmp_path, train, validation):
        trainer = self.trainer(tmp_path, 2, signal.SIGHUP)
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            assert trainer.fit(train, validation, epochs=1)
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_sigterm_may_come_twice(self, tmp_path, train, validation):
        trainer = self.trainer(tmp_path, 7, signal.SIGTERM, signal.SIGTERM)
        assert not trainer.fit(train, validation, epochs=3)
        assert progress_of(tmp_path)["step"] == 8

    @pytest.mark.parametrize("epochs", [3, 1])
    def test_a_signal_in_the_evaluation_ends_the_run_with_the_epoch(
        self, tmp_path, monkeypatch, train, validation, epochs
    ):
        """No batch of the next epoch starts, and no other run of the program."""
        trainer = new_trainer(tmp_path)

        def evaluate(images):
            signal.raise_signal(signal.SIGTERM)
            return Trainer.evaluate(trainer, images)

        monkeypatch.setattr(trainer, "evaluate", evaluate)
        assert not trainer.fit(train, validation, epochs=epochs)
        saved = progress_of(tmp_path)
        assert (saved["step"], saved["epoch"]) == (6, 1)

    def test_a_stop_does_not_linger(self, tmp_path, train, validation):
        """The same trainer can continue."""
        trainer = self.trainer(tmp_path, 2, signal.SIGTERM)
        assert not trainer.fit(train, validation, epochs=1)
        assert trainer.fit(train, validation, epochs=1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestReports:
    def test_without_a_terminal_an_epoch_is_a_line(self, tmp_path, sets, capsys):
        trainer = new_trainer(tmp_path)
        assert trainer.fit(*sets, epochs=2)
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

    def test_on_a_terminal_there_is_a_bar(self, tmp_path, monkeypatch, train, validation):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        assert new_trainer(tmp_path).fit(train, validation, epochs=1)
        text = terminal.getvalue()
        assert "epoch 1/1 " in text and "100%" in text
        row = metrics(tmp_path)[-1]
        shown = f"loss {row['loss']:.4f}, accuracy {100 * row['accuracy']:.2f} %, "
        assert shown in text and " images/s" in text

    def test_the_time_left_is_said_once(self, tmp_path, monkeypatch, train, validation, capsys):
        """Every batch takes 2 s. After the third, at 5 s, 15 of 18 batches are left."""
        trainer = new_trainer(tmp_path)
        clock = iter(range(0, 1000, 2))
        monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(clock)))
        assert trainer.fit(train, validation, epochs=3)
        said = [line for line in capsys.readouterr().out.splitlines() if "to go" in line]
        assert said == ["about 12 s an epoch, 30 s to go (evaluations not counted)"]

    @pytest.mark.parametrize(
        "seconds, text",
        [(0.4, "0 s"), (59.6, "60 s"), (99.4, "99 s"), (99.6, "2 min"), (5939, "99 min"),
         (5941, "1.7 h"), (86400, "24.0 h")],
    )  # fmt: skip
    def test_durations_read_well(self, seconds, text):
        assert training._duration(seconds) == text


class TestSchedule:
    def test_it_warms_up_linearly_then_decays_by_epoch(self):
        schedule = Schedule(lr=0.1, gamma=0.5, warmup_steps=4)
        rates = [schedule(step, epoch=0) for step in range(6)]
        assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
        assert [schedule(100, epoch) for epoch in range(4)] == [0.1, 0.05, 0.025, 0.0125]
        # A warm-up longer than an epoch continues in the next one.
        assert schedule(2, epoch=1) == pytest.approx(0.0375)

    def test_without_a_warm_up_the_first_step_has_the_full_rate(self):
        assert Schedule(lr=0.1, gamma=0.9, warmup_steps=0)(0, 0) == 0.1

    @pytest.mark.parametrize("name", ["lr", "gamma"])
    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    def test_rates_that_train_nothing_are_refused(self, name, value):
        with pytest.raises(ValueError, match=f"{name} must be a positive number, got {value}"):
            Schedule(**{name: value})

    def test_a_negative_warm_up_is_refused(self):
        with pytest.raises(ValueError, match="warmup_steps must be >= 0, got -1"):
            Schedule(0.1, 0.9, -1)


class Stack(torch.nn.Module):
    """Routings in series behind a linear layer, in train mode with a batch normalisation."""

    def __init__(self, depth):
        super().__init__()
        self.normalise = torch.nn.BatchNorm2d(1)
        self.features = torch.nn.Linear(28 * 28, 10 * 16)
        self.routings = torch.nn.Sequential(*(RoutedCapsules(10, 16, 10, 16) for _ in range(depth)))

    def forward(self, images, target=None):
        u = self.features(self.normalise(images).flatten(1)).unflatten(1, (10, 16))
        poses = self.routings(u / 20)
        return CapsuleOutput(capsule_lengths(poses), poses)


def test_a_run_that_starts_dead_says_so_once(tmp_path, train, capsys):
    torch.manual_seed(0)
    trainer = Trainer(Stack(3), tmp_path, runtime=CPU)
    trainer.fit(train, epochs=1)
    trainer.fit(train, epochs=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: these layers start with capsules too short to learn: routings.1 (mean"
    )
    assert "routings.2 (" in line
    assert "tritoncaps.layers.calibrate(model, images)" in line


def test_dead_layers_are_looked_for_as_the_task_runs_the_model(tmp_path, train, capsys):
    class Scaled(Task):
        def run(self, model, images, target=None):
            return super().run(model, 0 * images, target)

    torch.manual_seed(0)
    model = Stack(1)
    torch.nn.init.zeros_(model.features.bias)
    Trainer(model, tmp_path, task=Scaled(), runtime=CPU).fit(train, epochs=1)
    assert "routings.0 (mean length 0)" in capsys.readouterr().err


def test_looking_for_dead_layers_changes_no_bits(tmp_path, train, monkeypatch):
    directories = tmp_path / "looked", tmp_path / "not"
    for directory in directories:
        torch.manual_seed(0)
        Trainer(Stack(1), directory, runtime=CPU).fit(train, epochs=1)
        monkeypatch.setattr(training, "dead_layers", lambda model, images: [])
    looked, other = (checkpoint.load(directory / "last.safetensors") for directory in directories)
    assert_same(looked["model"], other["model"])
    assert_same(looked["rng"], other["rng"])
