"""The frame of the experiments: many training runs that share one recipe and one directory.

An experiment is a list of cells. Each cell is one training run, in a run directory of its own under
the output directory, with a result.json when it is finished. The same command again does not run a
finished cell again, goes on with one that was stopped, and adds those that are new: more seeds, a
larger grid, more epochs. It refuses a directory that was made by another recipe.

experiment.json     the recipe: the flags that all cells share
<cell>/             what a run writes, see run_directory.py, and result.json
*.csv, *.json       the tables
*.png               the pictures
"""

import argparse
import csv
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from torch import nn

from engine import baseline, checkpoint
from engine.distributed import require_one_process
from engine.run_directory import (
    RunDirectoryError,
    has_checkpoint,
    locked,
    write_json,
    write_summary,
)
from engine.runtime import (
    Runtime,
    choose_runtime,
    describe_environment,
    make_deterministic,
    require,
)
from engine.tasks import Source, Task
from engine.training import Schedule, Trainer, TrainingError
from tritoncaps.data import (
    Batches,
    Dataset,
    DatasetError,
    ImageSet,
    load_dataset,
    split_validation,
    stratified_subset,
)

# What makes two runs comparable: all cells of an experiment share it.
RECIPE = (
    "dataset", "limit_train", "limit_test", "batch_size", "lr", "gamma", "warmup_steps",
    "max_shift", "validation_fraction", "precision",
)  # fmt: skip

# A dry run takes this many images and no more.
DRY_RUN_IMAGES = 32


@dataclass(frozen=True)
class Cell:
    """One training run of an experiment. `name` is its directory; the rest is what it varies."""

    name: str
    model: str
    seed: int = 1
    primary_iterations: int = 3
    secondary_iterations: int = 3
    train_size: int | None = None


@dataclass
class Job:
    """What one cell trains: the network, what it is asked, and the images.

    `curve` says whether the test set is evaluated after every epoch, or once at the end.
    """

    model: nn.Module
    model_kwargs: dict[str, Any]
    train: Source
    validation: ImageSet | Source | None
    test: ImageSet | Source
    loss: nn.Module | None = None
    task: Task | None = None
    curve: bool = True


def run_program(
    program: str,
    story: Callable[[argparse.Namespace], int],
    args: argparse.Namespace,
) -> int:
    """Tell the story of an experiment; returns the exit status: 0, 2 (error), 130 (interrupted)."""
    try:
        if args.dry_run:
            with tempfile.TemporaryDirectory() as directory:
                args.output_dir = str(Path(directory) / "run")
                status = story(args)
            if status == 0:
                print("dry run: everything works; nothing was kept")
            return status
        return story(args)
    except (
        DatasetError, RunDirectoryError, TrainingError, checkpoint.CheckpointError, ValueError,
        OSError, ModuleNotFoundError,
    ) as error:  # fmt: skip
        print(f"{program}.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\n{program}.py: interrupted; what was saved stays, the same command goes on",
            file=sys.stderr,
        )
        return 130


class Experiment:
    """Device, data and output directory of an experiment, and its runs.

    Args:
        program: the name of the script, without ".py".
        args: its flags.
        recipe: names of flags of its own that all cells share, beside `RECIPE`.
        variant: a part of the name of the default output directory.

    Raises:
        DatasetError, ValueError: the data or the device are not there.
        RunDirectoryError: the output directory cannot be used, or belongs to another recipe.
    """

    def __init__(
        self,
        program: str,
        args: argparse.Namespace,
        recipe: Sequence[str] = (),
        variant: str = "",
    ) -> None:
        require("matplotlib", "safetensors")
        require_one_process(program)
        if args.deterministic:
            make_deterministic()
        self.program = program
        self.args = args
        self.runtime: Runtime = choose_runtime(args.device, args.precision)
        if args.dry_run:
            _shorten(args)
        dataset = load_dataset(args.dataset, args.data_dir, download=args.download)
        self.dataset = _limited(dataset, vars(args).get("limit_train"), args.limit_test)
        self.train_images = self.dataset.train.to(self.runtime.device)
        self.test_images = self.dataset.test.to(self.runtime.device)
        resolved = {"dataset": dataset.name, "precision": self.runtime.precision}
        flags = {**vars(args), **resolved}
        self.recipe = {name: flags[name] for name in (*RECIPE, *recipe) if name in flags}
        name = "-".join(filter(None, (program, variant, dataset.name)))
        self.directory = Path(args.output_dir or f"runs/{name}")
        _open_directory(self.directory, {"experiment": program, "recipe": self.recipe})
        sizes = f"{len(self.dataset.test):,} to test"
        if "limit_train" in args:
            sizes = f"{len(self.dataset.train):,} to train on, {sizes}"
        print(f"device      {self.runtime.describe()}")
        print(f"data        {dataset.note}")
        print(f"            {sizes}")
        print(f"results     {self.directory}", flush=True)

    def fix(self, name: str, value: Any) -> None:
        """Add to the recipe what only the data can tell.

        Raises:
            RunDirectoryError: the directory was made with another value.
        """
        marker = self.directory / "experiment.json"
        content = json.loads(marker.read_text())
        before = content["recipe"].setdefault(name, value)
        if before != value:
            raise RunDirectoryError(
                f"--output-dir {self.directory} was made with {_flag(name, before)}, not "
                f"{_flag(name, value)}: repeat its flags, or choose another directory"
            )
        self.recipe[name] = value
        write_json(marker, content)

    @property
    def where(self) -> str:
        """The device in a few words, for the titles of pictures."""
        return self.runtime.describe()

    def environment(self) -> dict[str, Any]:
        """Versions, device and commit, for the tables."""
        return describe_environment(self.runtime)

    # cells

    def train(
        self, cells: Sequence[Cell], make_job: Callable[[Cell], Job]
    ) -> list[dict[str, Any]] | None:
        """Have every cell trained; returns the result of each, or None where it was stopped.

        A result is what result.json holds: the cell, its accuracies and times, and where it ran.

        Raises:
            TrainingError: a cell cannot go on; the message names it.
            RunDirectoryError: a cell was trained for more epochs than are asked for now.
        """
        if self.args.dry_run:
            # One of each network, and the last one, which is often the largest.
            kinds = {cell.model: cell for cell in reversed(cells)}
            cells = [cell for cell in cells if cell in (*kinds.values(), cells[-1])]
        results = []
        for number, cell in enumerate(cells, 1):
            title = f"[{number}/{len(cells)}] {cell.name}"
            result = self._finished(cell)
            if result is not None:
                print(f"{title}: finished before, {_result_line(result)}", flush=True)
            else:
                print(f"{title}: training to epoch {self.args.epochs}", flush=True)
                directory = self.directory / cell.name
                job = make_job(cell)
                directory.mkdir(exist_ok=True)
                try:
                    with locked(directory):
                        result = self._train_cell(cell, job)
                except TrainingError as error:
                    raise TrainingError(f"{cell.name}: {error}") from error
                if result is None:
                    if not self.args.dry_run:
                        print("stopped and saved; go on with the same command:")
                        print(f"  {shlex.join(['python', *sys.argv])}")
                    return None
                print(f"{title}: {_result_line(result)}", flush=True)
            results.append(result)
        return results

    def curve(self, result: dict[str, Any]) -> list[float]:
        """Return the test accuracy of every epoch of a finished cell."""
        with (self.directory / result["name"] / "summary.csv").open(newline="") as file:
            accuracies = [float(row["test_accuracy"]) for row in csv.DictReader(file)]
        return accuracies[: result["epochs"]]

    def _finished(self, cell: Cell) -> dict[str, Any] | None:
        path = self.directory / cell.name / "result.json"
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(path.read_text())
        self._check_epochs(cell, result["epochs"])
        return result if result["epochs"] == self.args.epochs else None

    def _check_epochs(self, cell: Cell, trained: int) -> None:
        """Refuse a cell that is past the epochs that are asked for: it cannot go back."""
        if trained > self.args.epochs:
            raise RunDirectoryError(
                f"{cell.name} in {self.directory} was trained for {trained} epochs, not "
                f"{self.args.epochs}: give --epochs {trained} or another --output-dir"
            )

    def _train_cell(self, cell: Cell, job: Job) -> dict[str, Any] | None:
        """Train a cell, from where it was stopped; returns its result, or None if it is stopped."""
        args, directory = self.args, self.directory / cell.name
        saved_args = {
            "hidden_capsules": 10,  # which train_mnist.py --eval-only asks for
            **vars(args),
            **self.recipe,
            **asdict(cell),
            "output_dir": str(directory),
            "model_kwargs": job.model_kwargs,
        }
        trainer = Trainer(
            job.model,
            torch.optim.Adam(job.model.parameters(), lr=args.lr, fused=True),
            Schedule(args.lr, args.gamma, args.warmup_steps),
            self.runtime,
            directory,
            saved_args,
            loss=job.loss,
            task=job.task,
            test_batch_size=args.test_batch_size,
            log_interval=args.log_interval,
            checkpoint_interval=args.checkpoint_interval,
            compile_model=args.torchcompile,
        )
        if has_checkpoint(directory):
            state, _, warning = checkpoint.load_latest(directory)
            if warning:
                print(f"warning: {warning}", file=sys.stderr)
            trainer.load_state(state)
            progress = trainer.progress
            self._check_epochs(cell, progress.epoch)
            print(f"resuming    after {progress.epoch} epochs and {progress.batch} batches")
        environment = self.environment()
        write_json(directory / "args.json", {"args": saved_args, "environment": environment})
        curve = job.test if job.curve else None
        if not trainer.fit(job.train, job.validation, curve, args.epochs):
            return None
        if not job.curve:
            trainer.rows[-1]["test_accuracy"] = trainer.evaluate(job.test).accuracy
        result = {
            **asdict(cell),
            "parameters": sum(p.numel() for p in job.model.parameters() if p.requires_grad),
            **accuracies(trainer.rows, trainer.progress.best_epoch),
            "device": environment["gpu"] or environment["processor"],
            "threads": environment["threads"],
            "precision": environment["precision"],
            "commit": environment["commit"],
        }
        write_json(directory / "result.json", result)
        # The second generation of each checkpoint is as large as the first, and there are many
        # cells. More epochs go on with the first.
        for path in directory.glob("*.previous.pt"):
            path.unlink()
        return result

    # what a cell trains

    def make_job(self, cell: Cell) -> Job:
        """Build what a cell of ordinary classification trains."""
        train, validation = self.split(cell.seed)
        args = self.args
        batches = Batches(train, args.batch_size, seed=cell.seed, max_shift=args.max_shift)
        return self.classification(cell, batches, validation)

    def classification(
        self, cell: Cell, train: Source, validation: ImageSet | None, *, curve: bool = True
    ) -> Job:
        """Build a job of classification on these images."""
        model, kwargs = self.build(cell, tuple(train.images.images.shape[1:]))
        loss = baseline.network_loss(cell.model)
        return Job(model, kwargs, train, validation, self.test_images, loss, curve=curve)

    def split(self, seed: int) -> tuple[ImageSet, ImageSet | None]:
        """Hold out the validation set: all images and None where its share is 0."""
        fraction = self.args.validation_fraction
        if fraction == 0:
            return self.train_images, None
        return split_validation(self.train_images, fraction, seed)

    def build(self, cell: Cell, shape: Sequence[int]) -> tuple[nn.Module, dict[str, Any]]:
        """Build the network of a cell from its seed, for images (C, H, W); and its arguments."""
        channels, height, width = shape
        kwargs: dict[str, Any] = {
            "num_classes": len(self.dataset.class_names),
            "in_channels": channels,
            "image_size": (height, width),
        }
        if cell.model == "capsnet":
            kwargs["iterations"] = cell.primary_iterations
        elif cell.model == "deep_capsnet":
            kwargs["primary_iterations"] = cell.primary_iterations
            kwargs["secondary_iterations"] = cell.secondary_iterations
        torch.manual_seed(cell.seed)
        return self.runtime.place(baseline.create_network(cell.model, **kwargs)), kwargs

    # tables

    def write_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a table twice: <name>.csv, and <name>.json with the recipe that made it."""
        write_summary(self.directory / f"{name}.csv", rows)
        content = {"experiment": self.program, "recipe": self.recipe, "rows": rows}
        write_json(self.directory / f"{name}.json", content)


def accuracies(rows: Sequence[dict[str, Any]], best_epoch: int) -> dict[str, Any]:
    """Sum up the epochs of a run.

    `test_accuracy` is that of the model that the validation set chose, or of the last one where
    there is none. `highest_test_accuracy` is the highest of all epochs: it is chosen by the test
    set itself, as the paper's best is, and so a little too high. Accuracies that were not measured
    are None. Training alone counts as time.
    """
    last = rows[-1]
    tested = [row for row in rows if "test_accuracy" in row]
    highest = max(tested, key=lambda row: float(row["test_accuracy"]))
    chosen = rows[best_epoch - 1].get("test_accuracy") if best_epoch else last["test_accuracy"]
    return {
        "epochs": last["epoch"],
        "chosen_epoch": best_epoch,
        "test_accuracy": chosen,
        "final_test_accuracy": last["test_accuracy"],
        "highest_test_accuracy": highest["test_accuracy"],
        "highest_epoch": highest["epoch"],
        "train_accuracy": last["train_accuracy"],
        "seconds_per_epoch": round(median(float(row["seconds"]) for row in rows), 2),
    }


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation, None of a single value."""
    return mean(values), stdev(values) if len(values) > 1 else None


def percent(value: float, spread: float | None = None) -> str:
    """Format a share as "99.44 %", with its spread as "99.44 ± 0.05 %"."""
    if spread is None:
        return f"{100 * value:.2f} %"
    return f"{100 * value:.2f} ± {100 * spread:.2f} %"


def _result_line(result: dict[str, Any]) -> str:
    return (
        f"test accuracy {percent(result['test_accuracy'])} after epoch {result['chosen_epoch']} "
        f"of {result['epochs']}, {result['seconds_per_epoch']:.3g} s an epoch"
    )


def _shorten(args: argparse.Namespace) -> None:
    """Change the flags to those of a dry run."""
    args.limit_test = DRY_RUN_IMAGES
    if "epochs" in args:
        args.limit_train, args.epochs, args.warmup_steps = 2 * DRY_RUN_IMAGES, 1, 1
        args.batch_size = min(args.batch_size, DRY_RUN_IMAGES)


def _limited(dataset: Dataset, limit_train: int | None, limit_test: int | None) -> Dataset:
    """Keep so many images of a data set; the same ones whatever the seed."""
    parts = []
    for flag, images, limit in (
        ("--limit-train", dataset.train, limit_train),
        ("--limit-test", dataset.test, limit_test),
    ):
        if limit is not None and limit > len(images):
            raise ValueError(f"{flag} {limit}: {dataset.title} has {len(images):,} such images")
        parts.append(images if limit is None else stratified_subset(images, limit, seed=0))
    return Dataset(
        dataset.name, dataset.title, parts[0], parts[1], dataset.class_names, dataset.note
    )


def _open_directory(directory: Path, content: dict[str, Any]) -> None:
    """Create the output directory, or check that it was made by the same recipe."""
    marker = directory / "experiment.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not marker.is_file():
            if any(directory.iterdir()):
                raise RunDirectoryError(
                    f"--output-dir {directory} is not empty and holds no experiment, and nothing "
                    "is ever overwritten: choose another directory"
                )
            write_json(marker, content)
            return
        if list(directory.iterdir()) == [marker]:  # no run began
            write_json(marker, content)
        found = json.loads(marker.read_text())
    except OSError as error:
        raise RunDirectoryError(f"--output-dir {directory}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise RunDirectoryError(f"{marker} is damaged: choose another directory") from error
    if found["experiment"] != content["experiment"]:
        raise RunDirectoryError(
            f"--output-dir {directory} belongs to {found['experiment']}.py: choose another"
        )
    for name, value in content["recipe"].items():
        before = found["recipe"].get(name)
        # As JSON, which knows no tuples.
        if json.dumps(before) != json.dumps(value):
            raise RunDirectoryError(
                f"--output-dir {directory} was made with {_flag(name, before)}, not "
                f"{_flag(name, value)}: repeat its flags, or choose another directory"
            )


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return f"no {flag}" if value is None else f"{flag} {value}"
