"""The one runner: it trains recipes, each in a run directory of its own.

train_mnist.py runs one recipe. An experiment runs many similar ones below one directory, and each
leaves a result.json when it is finished. The same command again skips finished runs, continues one
that was stopped, and adds new ones: more seeds, a larger grid, more epochs. It refuses a directory
that was made by another recipe.

experiment.json     what all recipes share
<name>/             a run, see run_directory.py, and its result.json
*.csv, *.json       the tables
*.png               the pictures
"""

import csv
import inspect
import json
import math
import shlex
import sys
import tempfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import baseline
from engine.distributed import World, require_one_process
from engine.flags import Machine, Output, Recipe, as_dict, check_max_shift, check_numbers, parse
from engine.run_directory import (
    RunDirectoryError,
    check_directory,
    finish,
    locked,
    open_experiment,
    write_json,
    write_summary,
)
from engine.runtime import choose_runtime, describe_environment, make_deterministic, require
from engine.tables import accuracies, percent
from engine.tasks import CrossEntropy, Source, Spread, Task
from engine.training import Evaluation, OneCycle, Schedule, Trainer, TrainingError
from tritoncaps._files import CheckpointError
from tritoncaps.data import (
    Batches,
    Dataset,
    DatasetError,
    ImageSet,
    centre_crop,
    load_dataset,
    split_validation,
    stratified_subset,
)

# Arguments of a network that the images determine.
FROM_DATA = ("num_classes", "in_channels", "image_size")

# The fields of a recipe in which the runs of an experiment differ.
VARIED = ("model", "model_kwargs", "seed")

# The margin of the spread loss rises for so many epochs.
_RISING_EPOCHS = 5


class Stopped(Exception):  # noqa: N818 (no error)
    """A signal stopped the training, and it was saved."""


@dataclass
class Job:
    """What one run trains: a network, its task, and the images.

    `config` describes the network, and `more_columns` adds to the row of an epoch, see `Trainer`.
    With `curve` the test set is evaluated after every epoch, otherwise once at the end.
    """

    model: nn.Module
    config: dict[str, Any]
    task: Task
    train: Source
    validation: ImageSet | Source | None
    test: ImageSet | Source
    curve: bool = True
    more_columns: Callable[[str, Evaluation], dict[str, float]] | None = None


def run_program(
    program: str, tell: Callable[..., int | None], *flags: Any, interrupted: str
) -> int:
    """Call `tell`, what a program does; returns its exit status: 0, 2 (error), 130 (interrupted).

    `tell` takes `flags`, which `parse` returned, `Output` last. In a dry run it gets a directory
    that is removed afterwards. `interrupted` is what to say after a Ctrl-C.
    """
    *others, output = flags
    try:
        if not output.dry_run:
            return tell(*flags) or 0
        check_directory(output.output_dir)
        with tempfile.TemporaryDirectory() as directory:
            output = replace(output, output_dir=str(Path(directory) / "run"))
            status = tell(*others, output) or 0
        if status == 0:
            print("dry run: everything works; nothing was kept")
        return status
    except (
        DatasetError, RunDirectoryError, TrainingError, CheckpointError, ValueError,
        OSError, ModuleNotFoundError,
    ) as error:  # fmt: skip
        print(f"{program}.py: error: {error}", file=sys.stderr)
        return 2
    except Stopped:
        return 130
    except KeyboardInterrupt:
        print(f"\n{program}.py: interrupted; {interrupted}", file=sys.stderr)
        return 130


def run_experiment(
    program: str,
    doc: str | None,
    tell: Callable[..., None],
    argv: Sequence[str] | None,
    *groups: type[Any],
    leave_out: Collection[str] = VARIED,
    **defaults: Any,
) -> int:
    """Read the flags of an experiment, see `parse`, and run it; returns the exit status."""
    flags = parse(doc, argv, *groups, Machine, Output, leave_out=leave_out, **defaults)
    again = "what was saved stays, the same command goes on"
    return run_program(program, tell, *flags, interrupted=again)


class Runner:
    """A device and images, and the training of recipes on them.

    The attribute `recipe` is that of the flags, with the data set and number of epochs filled in.

    Raises:
        DatasetError, ValueError: the data or the device are not there.
    """

    # The largest batch in a dry run.
    dry_run_batch: float = math.inf

    def __init__(
        self, recipe: Recipe, machine: Machine, output: Output, world: World | None = None
    ) -> None:
        require("matplotlib")
        if machine.deterministic:
            make_deterministic()
        self.machine, self.output = machine, output
        self.runtime = choose_runtime(machine.device, machine.precision, world)
        world = self.runtime.world
        size = (recipe.image_size[0], recipe.image_size[1]) if recipe.image_size else None
        with world.first_on_each_machine():
            try:
                dataset = load_dataset(
                    recipe.dataset, machine.data_dir, image_size=size, download=machine.download
                )
            except (DatasetError, ValueError) as error:
                raise DatasetError(f"--dataset {recipe.dataset}: {error}") from error
        if len(set(found := world.gather(dataset.name))) > 1:
            raise DatasetError(
                f"--dataset {recipe.dataset}: the {world.size} processes found {', '.join(found)}; "
                "name one, and put it where all of them find it"
            )
        recipe = recipe.on(dataset.name, dataset.epochs)
        check_numbers(recipe)
        height, width = dataset.train.images.shape[2:]
        check_max_shift(recipe.max_shift, height, width)
        if recipe.crop > min(height, width):
            raise ValueError(
                f"--crop {recipe.crop}: the images are {height}x{width}; give at most "
                f"{min(height, width)}"
            )
        if recipe.batch_size < world.size:
            raise ValueError(
                f"--batch-size {recipe.batch_size}: {world.size} processes need an image each"
            )
        if output.dry_run:
            recipe = _shortened(recipe, dataset, self.dry_run_batch)
        self.recipe, self.epochs = recipe, recipe.epochs or dataset.epochs
        if dataset.name == "folder":
            # Another run of this recipe must not choose another size.
            self.recipe = replace(self.recipe, image_size=[height, width])
        dataset = limited(dataset, recipe.limit_train, recipe.limit_test)
        self.whole_test_images = dataset.test
        self.dataset = replace(dataset, test=centre_crop(dataset.test, recipe.crop))
        self.train_images = self.dataset.train.to(self.runtime.device)
        self.test_images = self.dataset.test.to(self.runtime.device)

    def describe(self, *sizes: str) -> None:
        """Print the device and the data set."""
        print(f"device      {self.runtime.describe()}")
        print(f"data        {self.dataset.note}")
        print(f"            {', '.join([*sizes, f'{len(self.test_images):,} to test'])}")

    # what is trained

    def split(self, recipe: Recipe) -> tuple[ImageSet, ImageSet | None]:
        """Return the images to train on and those to choose the best epoch by."""
        if self.dataset.validation is not None:
            validation = centre_crop(self.dataset.validation, recipe.crop)
            return self.train_images, validation.to(self.runtime.device)
        fraction, count = recipe.validation_fraction, len(self.train_images)
        if not math.isfinite(fraction) or not 0 < round(fraction * count) < count:
            raise ValueError(
                f"--validation-fraction {fraction} holds out {fraction * count:.0f} of {count:,} "
                "images, but both parts need at least one"
            )
        train, held_out = split_validation(self.train_images, fraction, recipe.seed)
        return train, centre_crop(held_out, recipe.crop)

    def build(self, recipe: Recipe, image_shape: Sequence[int]) -> tuple[nn.Module, dict[str, Any]]:
        """Build a network from its seed, for images (C, H, W); returns it and its description.

        Raises:
            ValueError: an argument in --model-kwargs is unknown or wrong.
        """
        check_model_kwargs(recipe)
        names = list(self.dataset.class_names)
        kwargs = {
            "num_classes": len(names),
            "in_channels": image_shape[0],
            "image_size": tuple(image_shape[1:]),
            **recipe.model_kwargs,
        }
        torch.manual_seed(recipe.seed)
        try:
            model = baseline.create_network(recipe.model, **kwargs)
        except (TypeError, ValueError) as error:
            if recipe.image_size and "image_size" in str(error):
                size = " ".join(map(str, image_shape[1:]))
                raise ValueError(f"--image-size {size}: {error}") from error
            if not recipe.model_kwargs:
                raise
            given = " ".join(f"{key}={value}" for key, value in recipe.model_kwargs.items())
            raise ValueError(f"--model-kwargs {given}: {error}") from error
        config = {
            "model": recipe.model,
            "model_kwargs": kwargs,
            "dataset": self.dataset.name,
            "class_names": names,
            "scaling": "pixels / 255",
        }
        if self.dataset.name == "folder":
            config["images"] = identified(self.dataset)
        return self.runtime.place(model), config

    def classification(
        self,
        recipe: Recipe,
        images: ImageSet | None = None,
        *,
        curve: bool = True,
    ) -> Job:
        """Return the job of classifying: `images`, or all that are not held out."""
        validation = None
        if images is None:
            images, validation = self.split(recipe)
        batches = Batches(
            images,
            recipe.batch_size,
            seed=recipe.seed,
            max_shift=recipe.max_shift,
            rotation=recipe.rotation,
            scaling=recipe.scaling,
            crop=recipe.crop or None,
        )
        model, config = self.build(recipe, self.test_images.images.shape[1:])
        task = _task(recipe, len(batches))
        return Job(model, config, task, batches, validation, self.test_images, curve)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW, which is Adam without weight decay; the decoder has a rate of its own."""
        decoder = getattr(model, "decoder", None)
        apart = set() if decoder is None else set(decoder.parameters())
        recipe, parameters = self.recipe, list(model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p not in apart]},
            {
                "params": [p for p in parameters if p in apart],
                "lr_factor": recipe.decoder_lr_factor,
            },
        ]
        return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)

    def schedule(self, job: Job) -> Schedule | OneCycle:
        """Return the learning rate of each step of a job."""
        recipe = self.recipe
        if recipe.one_cycle:
            return OneCycle(recipe.lr, steps=self.epochs * len(job.train))
        return Schedule(recipe.lr, recipe.gamma, recipe.warmup_steps)

    def trainer(self, job: Job, directory: Path, args: Mapping[str, Any]) -> Trainer:
        """Build the trainer of a job; `args` are its flags."""
        # All arguments of the network: `load_model` needs them.
        args = {**args, "model_kwargs": job.config["model_kwargs"]}
        trainer = Trainer(
            job.model,
            directory,
            task=job.task,
            schedule=self.schedule(job),
            optimizer=self.optimizer(job.model),
            runtime=self.runtime,
            args=args,
            config=job.config,
            test_batch_size=self.machine.test_batch_size,
            log_interval=self.output.log_interval,
            checkpoint_interval=self.output.checkpoint_interval,
        )
        if job.more_columns is not None:
            trainer.more_columns = job.more_columns
        if self.machine.torchcompile:
            trainer.call = torch.compile(trainer.call)
        return trainer

    def train(self, job: Job, trainer: Trainer) -> bool:
        """Train a job to its last epoch; returns False if it was stopped early. Collective."""
        if self.runtime.world.is_main:
            content = {"args": trainer.args, "environment": describe_environment(self.runtime)}
            write_json(trainer.directory / "args.json", content)
        curve = job.test if job.curve else None
        return trainer.fit(job.train, job.validation, curve, epochs=self.epochs)


class Experiment(Runner):
    """Runs of many recipes, below one directory.

    `what` holds the flags of this program alone, for args.json. `varied` names the fields in which
    the recipes differ, or that have no effect here.
    """

    dry_run_batch = 16

    def __init__(
        self,
        program: str,
        recipe: Recipe,
        machine: Machine,
        output: Output,
        what: Any,
        varied: Collection[str] = VARIED,
    ) -> None:
        require_one_process(program)
        super().__init__(recipe, machine, output)
        self.program, self.what, self.varied = program, what, {*varied, "epochs"}
        self.shared: dict[str, Any] = {}
        self.directory = Path()

    def split(self, recipe: Recipe) -> tuple[ImageSet, ImageSet | None]:
        """Hold out the validation set, or nothing where its share is 0."""
        if recipe.validation_fraction == 0:
            return self.train_images, None
        return super().split(recipe)

    def open(self, variant: str = "", *, trains: bool = True, **shared: Any) -> None:
        """Create the output directory, or check that it was made by the same recipe.

        `variant` becomes a part of its default name. `shared` is what else the results depend on.

        Raises:
            RunDirectoryError: it cannot be used, or belongs to another recipe.
        """
        recipe = {k: v for k, v in as_dict(self.recipe).items() if k not in self.varied}
        if self.recipe.one_cycle:  # no run can go on after its cycle
            recipe["epochs"] = self.epochs
        self.shared = {**recipe, "precision": self.runtime.precision, **shared}
        if self.dataset.name == "folder":
            folder = Path(str(self.machine.data_dir)).expanduser()
            self.shared["data_dir"] = str(folder.resolve())
        name = "-".join(filter(None, (self.program, variant, self.dataset.name)))
        self.directory = Path(self.output.output_dir or f"runs/{name}")
        open_experiment(self.directory, self.program, self.shared)
        self.describe(*([f"{len(self.train_images):,} to train on"] if trains else []))
        print(f"results     {self.directory}", flush=True)

    def run(
        self, recipes: Mapping[str, Recipe], make_job: Callable[[Any], Job] | None = None
    ) -> list[dict[str, Any]]:
        """Train every recipe in the directory of its name; returns one result for each.

        A result is what result.json holds: the recipe, its accuracies and times, and where it ran.

        Raises:
            Stopped: a signal stopped the training.
            TrainingError: a run cannot go on; the message names it.
            RunDirectoryError: a run was trained for more epochs than are asked for now.
        """
        if self.output.dry_run:
            # One for each network, and the last one, which is often the largest.
            kinds = {recipe.model: name for name, recipe in reversed([*recipes.items()])}
            kept = {*kinds.values(), [*recipes][-1]}
            recipes = {name: recipe for name, recipe in recipes.items() if name in kept}
        results = []
        for number, (name, recipe) in enumerate(recipes.items(), 1):
            title = f"[{number}/{len(recipes)}] {name}"
            result = self._finished(name)
            if result is not None:
                print(f"{title}: finished before, {_result_line(result)}", flush=True)
            else:
                print(f"{title}: training to epoch {self.epochs}", flush=True)
                job = (make_job or self.classification)(recipe)
                (self.directory / name).mkdir(exist_ok=True)
                try:
                    with locked(self.directory / name):
                        result = self._train(name, recipe, job)
                except TrainingError as error:
                    raise TrainingError(f"{name}: {error}") from error
                print(f"{title}: {_result_line(result)}", flush=True)
            results.append(result)
        return results

    def epochs_of(self, result: Mapping[str, Any]) -> list[dict[str, float]]:
        """Return the summary of a finished run, a row for each epoch."""
        with (self.directory / result["name"] / "summary.csv").open(newline="") as file:
            rows = [
                {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)
            ]
        return rows[: result["epochs"]]

    def curves(self, results: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        """Return the test accuracy of finished runs by epoch."""
        return [[row["test_accuracy"] for row in self.epochs_of(result)] for result in results]

    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a table as <name>.csv, and as <name>.json with the recipe that made it."""
        write_summary(self.directory / f"{name}.csv", rows)
        content = {"experiment": self.program, "recipe": self.shared, "rows": rows}
        write_json(self.directory / f"{name}.json", content)

    def _finished(self, name: str) -> dict[str, Any] | None:
        path = self.directory / name / "result.json"
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(path.read_text())
        self._check_epochs(name, result["epochs"])
        return result if result["epochs"] == self.epochs else None

    def _check_epochs(self, name: str, trained: int) -> None:
        """Refuse a run that has more epochs than are asked for: it cannot go back."""
        if trained > self.epochs:
            raise RunDirectoryError(
                f"{name} in {self.directory} was trained for {trained} epochs, not "
                f"{self.epochs}: give --epochs {trained} or another --output-dir"
            )

    def _train(self, name: str, recipe: Recipe, job: Job) -> dict[str, Any]:
        """Train a recipe, from where it was stopped; returns its result."""
        directory = self.directory / name
        output = replace(self.output, output_dir=str(directory))
        args = {**as_dict(self.what, recipe, self.machine, output), **self.shared}
        trainer = self.trainer(job, directory, args)
        if trainer.resume():
            self._check_epochs(name, trainer.progress.epoch)
            print(f"resuming    after {trainer.progress}")
        if not self.train(job, trainer):
            if not self.output.dry_run:
                print("stopped and saved; go on with the same command:")
                print(f"  {shlex.join(['python', *sys.argv])}")
            raise Stopped
        if not job.curve:
            trainer.rows[-1]["test_accuracy"] = trainer.evaluate(job.test).accuracy
        environment = describe_environment(self.runtime)
        result = {
            "name": name,
            **{k: v for k, v in as_dict(recipe).items() if k in self.varied - {"model_kwargs"}},
            **recipe.model_kwargs,
            "parameters": count_parameters(job.model),
            **accuracies(trainer.rows),
            "device": environment["gpu"] or environment["processor"],
            **{name: environment[name] for name in ("threads", "precision", "commit")},
        }
        write_json(directory / "result.json", result)
        finish(directory)
        return result


def check_model_kwargs(recipe: Recipe) -> None:
    """Refuse arguments that the network does not have, or that the images determine."""
    if not recipe.model_kwargs:
        return
    with torch.device("meta"):
        network = type(baseline.create_network(recipe.model))
    known = inspect.signature(network).parameters
    for name in recipe.model_kwargs:
        if name in FROM_DATA:
            raise ValueError(f"--model-kwargs {name}: the images decide it, leave it out")
        if name not in known:
            free = ", ".join(name for name in known if name not in FROM_DATA)
            raise ValueError(
                f"--model-kwargs {name}: {recipe.model} has no such argument, it has {free}"
            )


def identified(dataset: Dataset) -> str:
    """Return a text that tells images and labels from others, as its user reads it."""
    parts = [dataset.train, dataset.validation, dataset.test]
    sets = [part for part in parts if part is not None]
    checksum = 0
    for tensor in (tensor for part in sets for tensor in (part.images, part.labels)):
        checksum = zlib.crc32(tensor.contiguous().numpy().data, checksum)
    return f"{sum(map(len, sets)):,} images with the checksum {checksum:08x}"


def count_parameters(model: nn.Module) -> int:
    """Count the numbers that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _result_line(result: Mapping[str, Any]) -> str:
    return (
        f"test accuracy {percent(result['test_accuracy'])} after epoch {result['chosen_epoch']} "
        f"of {result['epochs']}, {result['seconds_per_epoch']:.3g} s an epoch"
    )


def _task(recipe: Recipe, batches: int) -> Task:
    """Return the loss of --loss, for epochs of so many batches."""
    has_logits = recipe.model in baseline.WITH_LOGITS
    if recipe.loss == "spread":
        return Spread(_RISING_EPOCHS * batches, recipe.reconstruction_weight)
    if recipe.loss == "margin" or (recipe.loss == "auto" and not has_logits):
        return Task(recipe.reconstruction_weight)
    if not has_logits:
        raise ValueError(
            f"--loss {recipe.loss}: {recipe.model} returns no logits; use --loss margin or spread"
        )
    return CrossEntropy()


def _shortened(recipe: Recipe, dataset: Dataset, largest_batch: float) -> Recipe:
    """Shorten a recipe to a dry run: two batches to train, one to validate, two to test."""
    batch_size = int(min(recipe.batch_size, largest_batch))
    fraction = recipe.validation_fraction
    return replace(
        recipe,
        limit_train=min(3 * batch_size, len(dataset.train)),
        limit_test=min(2 * batch_size, len(dataset.test)),
        validation_fraction=1 / 3 if 0 < fraction < 1 else fraction,
        batch_size=batch_size,
        epochs=1,
        warmup_steps=1,
    )


def limited(dataset: Dataset, limit_train: int | None, limit_test: int | None) -> Dataset:
    """Keep only so many images of a data set, the same ones for every seed."""
    parts: dict[str, Any] = {}
    for part, limit in (("train", limit_train), ("test", limit_test)):
        images: ImageSet = getattr(dataset, part)
        if limit is not None and limit > len(images):
            raise ValueError(
                f"--limit-{part} {limit}: {dataset.title} has {len(images):,} such images"
            )
        parts[part] = images if limit is None else stratified_subset(images, limit, seed=0)
    validation = dataset.validation
    if limit_test is not None and validation is not None and limit_test < len(validation):
        parts["validation"] = stratified_subset(validation, limit_test, seed=0)
    return replace(dataset, **parts)
