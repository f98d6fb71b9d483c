"""The training loop of all examples, also for models of your own (docs/own-model.md).

`Trainer.fit` trains epoch by epoch, evaluates, keeps checkpoints and stops cleanly when asked to. A
run that is interrupted anywhere and resumed ends with the same bits as one that is not: the order
and the moves of the images depend only on (seed, epoch), the learning rate only on the step, and
everything else is in the checkpoint. Several processes (see distributed.py) run the same loop, each
on its share of every batch, and add up their sums before they use them.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import checkpoint
from engine.run_directory import (
    BEST,
    LAST,
    MetricsLog,
    has_checkpoint,
    latest,
    write_json,
    write_summary,
)
from engine.runtime import Runtime, choose_runtime
from engine.tables import best_epoch, counted, percent
from engine.tasks import Source, Task
from tritoncaps._files import CheckpointError
from tritoncaps.data import Batches, ImageSet
from tritoncaps.layers import dead_layers

# Several processes agree on a stop once in this many batches.
_AGREE_EVERY = 10

# The images on which capsule layers are measured before a run.
_PROBED = 16

_ESTIMATE_AFTER_SECONDS = 5.0


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and why."""


@dataclass(frozen=True)
class Evaluation:
    """Means over a set of images, and the classes predicted for each, on the CPU.

    `predictions` has shape (N,), or (N, 2) where an image shows two classes.
    """

    loss: float
    accuracy: float
    predictions: Tensor


@dataclass(frozen=True)
class Schedule:
    """The learning rate: a linear warm-up over the first steps, and a factor `gamma` per epoch.

    At first the capsules of all classes are too long together, or too short, so all are pushed the
    same way. At the full rate that saturates them, and training stalls.
    """

    lr: float = 1e-3
    gamma: float = 0.9
    warmup_steps: int = 50

    def __post_init__(self) -> None:
        for name in ("lr", "gamma"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"Schedule: {name} must be a positive number, got {value}")
        if self.warmup_steps < 0:
            raise ValueError(f"Schedule: warmup_steps must be >= 0, got {self.warmup_steps}")

    def __call__(self, step: int, epoch: int) -> float:
        """Return the rate of a step in an epoch; both count from 0 over the whole run."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.lr * warmup * self.gamma**epoch


@dataclass(frozen=True)
class OneCycle:
    """One cycle of the learning rate: up to `lr` in 3 of 10 steps, then down to almost 0.

    Both ways follow a cosine, from lr/25 and to lr/250,000. Small networks reach in 15 epochs what
    takes 150 at a falling rate. Smith, Topin: Super-Convergence (2018).

    Args:
        lr: the highest rate.
        steps: of the whole run, which cannot be continued beyond them.
    """

    lr: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"OneCycle: lr must be a positive number, got {self.lr}")
        if self.steps < 1:
            raise ValueError(f"OneCycle: steps must be >= 1, got {self.steps}")

    def __call__(self, step: int, epoch: int) -> float:
        """Return the rate of a step, counted from 0 over the whole run."""
        peak = 0.3 * self.steps
        if step < peak:
            start, end, way = self.lr / 25, self.lr, step / peak
        else:
            start, end, way = self.lr, self.lr / 250_000, (step - peak) / (self.steps - peak)
        return end + (start - end) * (1 + math.cos(math.pi * min(way, 1.0))) / 2


@dataclass
class Progress:
    """How far a run has come; `loss_sum` and `correct` are sums over the epoch so far."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{counted(self.epoch, 'epoch')} and {counted(self.batch, 'batch', 'batches')}"


class Trainer:
    """Trains one model in one run directory.

    Args:
        model: called as model(images, target), returns a `CapsuleOutput` or the like.
        directory: where the run's files go; created if it is missing.
        task: loss and answer; by default one class per image, by the capsule loss.
        schedule: the learning rate of each step.
        optimizer: any torch optimiser over the model's parameters; by default Adam. The rate of a
            parameter group is that of the schedule × its "lr_factor", if it has one.
        runtime: device and precision; by default the best there is.
        args: the flags of the run, plain values, kept in every checkpoint.
        config: describes the model to others, plain values, in config.json and with the weights.
            `tritoncaps.models.load_model` needs "model" and "model_kwargs". A resumed run must have
            the same "images", if both name them.
        test_batch_size: images per batch in evaluations.
        log_interval: steps between two records of metrics.jsonl.
        checkpoint_interval: steps between two checkpoints within an epoch; None for one after each
            epoch only.

    Attributes:
        call: what a training step calls: the model, until you set a compiled one. An evaluation
            calls the model itself: it is not worth another compilation.
        on_metrics: called with (step, {name: value}) for every record and epoch, for a tracker.
        more_columns: called with ("validation" or "test", `Evaluation`) after every epoch; what it
            returns, {name: number}, joins the row of the epoch.
        rows: one dict per epoch, as in summary.csv.

    Example:
        >>> import tempfile
        >>> from engine.training import Trainer
        >>> from tritoncaps.data import Batches, load_dataset
        >>> from tritoncaps.models import CapsNet
        >>> digits = load_dataset("digits")
        >>> trainer = Trainer(CapsNet(channels=8, capsule_types=2), tempfile.mkdtemp())
        >>> batches = Batches(digits.train.subset(range(64)), batch_size=32, seed=1)
        >>> trainer.fit(batches, digits.test.subset(range(32)), epochs=1)  # doctest: +ELLIPSIS
        epoch 1/1: loss ..., accuracy ... %; validation ... % (... s, best so far)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        directory: str | Path,
        *,
        task: Task | None = None,
        schedule: Schedule | OneCycle | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        runtime: Runtime | None = None,
        args: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        test_batch_size: int = 500,
        log_interval: int = 10,
        checkpoint_interval: int | None = None,
    ) -> None:
        self.runtime = choose_runtime() if runtime is None else runtime
        self.model = self.runtime.place(model)
        self.world = self.runtime.world
        self.call: Callable[..., Any] = self.world.wrap(model, self.runtime.device)
        self.task = Task() if task is None else task
        self.schedule = Schedule() if schedule is None else schedule
        if optimizer is None:
            optimizer = torch.optim.Adam(model.parameters(), lr=self.schedule.lr, fused=True)
        self.optimizer = optimizer
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.args = dict(args or {})
        self.config = dict(config or {})
        self.test_batch_size = test_batch_size
        self.log_interval = log_interval
        self.checkpoint_interval = checkpoint_interval
        self.on_metrics: Callable[[int, dict[str, float]], None] = lambda step, values: None
        self.more_columns: Callable[[str, Evaluation], dict[str, float]] = lambda split, found: {}
        self.progress = Progress()
        self.rows: list[dict[str, Any]] = []
        self._stop_requested = False
        self._estimated = False

    # checkpoints

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs. Collective."""
        rng, *others = self.world.gather(checkpoint.rng_state())
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "rows": self.rows,
            "args": self.args,
            "config": self.config,
            "rng": rng,
            "rng_of_others": others,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned.

        Raises:
            CheckpointError: it belongs to another model, optimiser or program, or to other images.
        """
        known, now = (config.get("images") for config in (state.get("config", {}), self.config))
        if None not in (known, now) and known != now:
            raise CheckpointError(
                f"the run in {self.directory} was trained on {known}, but --data-dir holds {now}: "
                "give the folder as it was, or start a new run"
            )
        with self._refusing():
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._match_layouts()
            self.progress = Progress(**state["progress"])
            self.rows = state["rows"]
            # A process that is new keeps the seed it has.
            generators = [state["rng"], *state.get("rng_of_others", [])]
            if self.world.rank < len(generators):
                checkpoint.set_rng_state(generators[self.world.rank])

    def _match_layouts(self) -> None:
        """Give the optimiser's tensors the strides of their parameters; a file does not keep them.

        A fused optimiser goes through memory in order, whatever the strides. If a weight is
        channels-last and its momentum is not, it silently pairs the wrong elements.
        """
        for parameter, entries in self.optimizer.state.items():
            for name, value in entries.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights to evaluate.

        Raises:
            CheckpointError: they belong to another model.
        """
        with self._refusing():
            self.model.load_state_dict(weights)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Report whatever goes wrong with a foreign checkpoint in one line."""
        try:
            yield
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"the checkpoint in {self.directory} does not fit {type(self.model).__name__} and "
                f"this program: {str(error).splitlines()[-1].strip()}"
            ) from error

    def resume(self) -> bool:
        """Continue from the last checkpoint in the directory; False if there is none. Collective.

        Raises:
            CheckpointError: none can be used.
        """
        if not self.world.from_main(lambda: has_checkpoint(self.directory)):
            return False
        self.load_state(
            self.world.from_main(lambda: latest(checkpoint.load_latest(self.directory)))
        )
        return True

    # training

    def fit(
        self,
        train: Source,
        validation: ImageSet | Source | None = None,
        test: ImageSet | Source | None = None,
        *,
        epochs: int,
    ) -> bool:
        """Train up to `epochs` epochs; returns False if a signal stopped it. Collective.

        Args:
            train: the batches of an epoch.
            validation: chooses the best epoch; without it the last one counts as the best.
            test: evaluated after every epoch for the curve; it chooses nothing.
            epochs: counted from the start of the run, resumed or not.

        Raises:
            TrainingError: the loss or a weight is not finite.
        """
        opened: Any = nullcontext()
        if self.world.is_main:
            opened = closing(MetricsLog(self.directory / "metrics.jsonl", self.progress.step))
        with opened as log, self._stop_on_signals():
            if self.progress.step == 0:
                self._warn_of_dead_layers(train)
                # So that a run killed in its first epoch can be resumed too.
                self._save_last()
            while self.progress.epoch < epochs:
                if not self._train_epoch(train, epochs, log):
                    return False
                self._finish_epoch(train, validation, test, epochs)
                if self.world.any(self._stop_requested):  # during the evaluation
                    return False
        return True

    def _warn_of_dead_layers(self, train: Source) -> None:
        """Name the capsule layers that start too short to learn. Collective."""
        images = self.world.share(next(train.epoch(0))[0])[:_PROBED]
        images = images.contiguous(memory_format=torch.channels_last)
        with self.runtime.autocast():
            dead = dead_layers(_Called(self.task, self.model), images)
        if dead and self.world.is_main:
            found = ", ".join(
                f"{layer.name.removeprefix('model.')} (mean length {layer.length:.1g})"
                for layer in dead
            )
            print(
                f"warning: these layers start with capsules too short to learn: {found}. "
                "Before training, call tritoncaps.layers.calibrate(model, images)",
                file=sys.stderr,
            )

    def _train_epoch(self, train: Source, epochs: int, log: MetricsLog | None) -> bool:
        """Train the rest of an epoch; returns False if it was stopped and saved."""
        progress = self.progress
        self.model.train()
        sums = _Sums(progress, self.runtime)
        begun, first_batch, seconds = time.perf_counter(), progress.batch, progress.seconds
        with self._bar(f"epoch {progress.epoch + 1}/{epochs}", len(train), first_batch) as bar:
            for images, labels in train.epoch(progress.epoch, progress.batch):
                sums.add(*self._step(images, labels))
                progress.batch += 1
                progress.step += 1
                bar.update()
                is_last = progress.batch == len(train)
                is_logged = is_last or progress.step % self.log_interval == 0
                is_stopping = is_saved = not is_last and self._is_stopping()
                if self.checkpoint_interval is not None and not is_last:
                    is_saved |= progress.step % self.checkpoint_interval == 0
                if not (is_logged or is_saved):
                    continue
                self._read(sums, len(train))
                elapsed = time.perf_counter() - begun
                progress.seconds = seconds + elapsed
                if is_logged:
                    self._report(train, epochs, elapsed, first_batch, bar, log)
                if is_saved:
                    self._check_parameters()
                    self._save_last()
                if is_stopping:
                    return False
        self._check_parameters()
        return True

    def _is_stopping(self) -> bool:
        """Whether to stop after this step; a signal reaches processes at different steps."""
        if self.world.size == 1:
            return self._stop_requested
        return self.progress.step % _AGREE_EVERY == 0 and self.world.any(self._stop_requested)

    def _read(self, sums: "_Sums", batches: int) -> None:
        """Read the sums of the epoch so far, and refuse a loss that is not finite."""
        progress = self.progress
        totals = self.world.sum(torch.stack([sums.loss, sums.correct]))
        progress.loss_sum, correct = totals.tolist()
        if not math.isfinite(progress.loss_sum):
            # Each process counted its finite losses; the lowest count ends before the bad batch.
            first = min(self.world.gather(int(sums.finite.item()))) + 1
            raise self._not_finite(f"the loss of batch {first} of {batches} is {progress.loss_sum}")
        progress.correct = int(correct)

    def _step(self, images: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
        """Take one step; returns this process's sum of the loss and number of right answers."""
        rate = self.schedule(self.progress.step, self.progress.epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1)
        count = len(images)
        images, labels = self.world.share(images), self.world.share(labels)
        images = images.contiguous(memory_format=torch.channels_last)
        with self.runtime.autocast():
            output = self.task.run(self.call, images, labels)
        self.task.step = self.progress.step
        loss = self.task.loss(output, labels, images)
        self.optimizer.zero_grad(set_to_none=True)
        # DDP averages over processes. Weight each by the size of its share.
        share = len(images) * self.world.size / count
        (loss if share == 1 else loss * share).backward()
        self.optimizer.step()
        correct = self.task.correct(output, labels).sum()
        return loss.detach().to(self.runtime.sum_dtype) * len(images), correct

    def _finish_epoch(
        self,
        train: Source,
        validation: ImageSet | Source | None,
        test: ImageSet | Source | None,
        epochs: int,
    ) -> None:
        progress = self.progress
        row: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "train_loss": progress.loss_sum / len(train.images),
            "train_accuracy": progress.correct / len(train.images),
        }
        for split, images in (("validation", validation), ("test", test)):
            if images is not None:
                evaluation = self.evaluate(images)
                row[f"{split}_loss"] = evaluation.loss
                row[f"{split}_accuracy"] = evaluation.accuracy
                row |= self.more_columns(split, evaluation)
        row["learning_rate"] = self.schedule(progress.step - 1, progress.epoch)
        row["seconds"] = round(progress.seconds, 2)
        self.rows.append(row)
        is_best = best_epoch(self.rows) is row
        progress.epoch += 1
        progress.batch, progress.loss_sum, progress.correct, progress.seconds = 0, 0.0, 0, 0.0
        # The full state comes last: if a crash comes first, a resumed run writes the rest again.
        if self.world.is_main:
            write_summary(self.directory / "summary.csv", self.rows)
        if is_best:
            self._save_best()
        self._save_last()
        if self.world.is_main:
            # The metrics of the last batch had the learning rate.
            self.on_metrics(
                progress.step, {k: v for k, v in row.items() if k not in ("epoch", "learning_rate")}
            )
        self._say(_epoch_line(row, epochs, is_best and validation is not None))

    def _save_last(self) -> None:
        state = self.state()
        if self.world.is_main:
            checkpoint.save(self.directory / LAST, state)

    def _save_best(self) -> None:
        if not self.world.is_main:
            return
        row = self.rows[-1]
        best = {"epoch": row["epoch"], "validation": row.get("validation_accuracy")}
        header = {**self.config, **best}
        checkpoint.save_weights(self.directory / BEST, self.model.state_dict(), header)
        write_json(self.directory / "config.json", {**self.config, "best": best})

    def _check_parameters(self) -> None:
        """Refuse to save weights that the last step spoilt: no loss has shown it yet."""
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise self._not_finite(f"{name} is not finite")

    @torch.inference_mode()
    def evaluate(self, images: ImageSet | Source) -> Evaluation:
        """Evaluate a set, or the first epoch of a source, without labels. Collective."""
        self.model.eval()
        self.task.step = None
        sums = _Sums(Progress(), self.runtime)
        predictions = []
        if isinstance(images, ImageSet):
            images = Batches(images, self.test_batch_size, seed=0, shuffle=False)
        for batch, labels in images.epoch(0):
            batch, labels = self.world.share(batch), self.world.share(labels)
            output = self.predict(batch)
            loss = self.task.loss(output, labels, batch)
            correct = self.task.correct(output, labels).sum()
            sums.add(loss.to(self.runtime.sum_dtype) * len(batch), correct)
            predictions.append(self.task.predictions(output))
        # The shares of all processes, batch by batch.
        shares = self.world.gather([share.cpu() for share in predictions])
        predicted = torch.cat([share for batch in zip(*shares, strict=True) for share in batch])
        loss_sum, correct = self.world.sum(torch.stack([sums.loss, sums.correct])).tolist()
        return Evaluation(loss_sum / len(predicted), int(correct) / len(predicted), predicted)

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Any:
        """Run the model on float images, (B, C, H, W), without a label, as `evaluate` does."""
        self.model.eval()
        images = images.contiguous(memory_format=torch.channels_last)
        with self.runtime.autocast():
            return self.task.run(self.model, images)

    # reports

    def _not_finite(self, what: str) -> TrainingError:
        progress = self.progress
        remedy = "start a new run with a lower --lr"
        if self.runtime.precision != "fp32":
            remedy += ", or continue this one with --precision fp32"
        return TrainingError(
            f"{what}, in epoch {progress.epoch + 1} (found at step {progress.step}). Nothing was "
            f"saved since the last checkpoint; {remedy}"
        )

    def _report(
        self,
        train: Source,
        epochs: int,
        elapsed: float,
        first_batch: int,
        bar: Any,
        log: MetricsLog | None,
    ) -> None:
        """Log and show how the epoch goes; once, after a few seconds, say how long the run takes.

        `elapsed` are the seconds since `first_batch`, with which this process started the epoch.
        """
        progress = self.progress
        seen = min(progress.batch * train.batch_size, len(train.images))
        here = seen - first_batch * train.batch_size
        values = {
            "loss": progress.loss_sum / seen,
            "accuracy": progress.correct / seen,
            "learning_rate": self.schedule(progress.step - 1, progress.epoch),
            "images_per_second": here / elapsed,
        }
        if log is not None:
            log.write({"step": progress.step - 1, "epoch": progress.epoch + 1, **values})
            self.on_metrics(progress.step, values)
        bar.set_postfix_str(
            f"loss {values['loss']:.4f}, accuracy {percent(values['accuracy'])}, "
            f"{values['images_per_second']:.0f} images/s"
        )
        if not self._estimated and elapsed >= _ESTIMATE_AFTER_SECONDS:
            self._estimated = True
            per_batch = elapsed / (progress.batch - first_batch)
            left = len(train) * (epochs - progress.epoch) - progress.batch
            self._say(
                f"about {_duration(per_batch * len(train))} an epoch, "
                f"{_duration(per_batch * left)} to go (evaluations not counted)"
            )

    def _bar(self, title: str, total: int, first: int) -> Any:
        """Return a progress bar, which is shown on a terminal only."""
        return tqdm(
            total=total,
            initial=first,
            desc=title,
            leave=False,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}",
            disable=not (self.world.is_main and sys.stderr.isatty()),
        )

    def _say(self, message: str) -> None:
        tqdm.write(message)
        sys.stdout.flush()

    # signals

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """Finish the batch on Ctrl-C, SIGTERM or a lost terminal; a second Ctrl-C stops at once."""
        self._stop_requested = False

        def request_stop(number: int, frame: FrameType | None) -> None:
            self._stop_requested = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Not with print, which may be what the signal interrupted.
            message = f"\n{signal.Signals(number).name}: finishing the batch, then saving\n"
            with suppress(OSError):
                os.write(2, message.encode())

        numbers = [signal.SIGINT, signal.SIGTERM]
        # Windows has no SIGHUP, and nohup wants it ignored.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, request_stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Called(nn.Module):
    """A model as its task runs it, without a target."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, images: Tensor) -> Any:
        return self.task.run(self.model, images)


class _Sums:
    """Sums over the batches of an epoch. They stay on the device: reading one waits for it.

    Each process sums its own shares; the main one starts from the checkpoint. `finite` counts the
    batches before the first loss that is not finite.
    """

    def __init__(self, progress: Progress, runtime: Runtime) -> None:
        def number(value: float) -> Tensor:
            return torch.tensor(value, dtype=runtime.sum_dtype, device=runtime.device)

        self.loss = number(progress.loss_sum if runtime.world.is_main else 0.0)
        self.correct = number(progress.correct if runtime.world.is_main else 0.0)
        self.finite = number(progress.batch)

    def add(self, loss: Tensor, correct: Tensor) -> None:
        self.loss += loss
        self.correct += correct
        self.finite += self.loss.isfinite()


def _epoch_line(row: dict[str, Any], epochs: int, is_best: bool) -> str:
    parts = [f"loss {row['train_loss']:.4f}, accuracy {percent(row['train_accuracy'])}"]
    for split in ("validation", "test"):
        if f"{split}_accuracy" in row:
            parts.append(f"{split} {percent(row[f'{split}_accuracy'])}")
    best = ", best so far" if is_best else ""
    title = f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"
    return f"{title}: {'; '.join(parts)} ({_duration(row['seconds'])}{best})"


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 5940:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
