"""Train a capsule network on handwritten digits, or on a folder of your own images.

    python examples/train_mnist.py                                  # the deep capsule network
    python examples/train_mnist.py --model capsnet --epochs 10      # Sabour's CapsNet
    python examples/train_mnist.py --model capsnet --model-kwargs iterations=1 gradient=last
    python examples/train_mnist.py --dataset mnist --data-dir ~/data
    python examples/train_mnist.py --dataset folder --data-dir PATH --image-size 32
    python examples/train_mnist.py --resume auto                    # continue the last run
    python examples/train_mnist.py --eval-only --resume runs/NAME   # test a trained model
    torchrun --standalone --nproc-per-node 8 examples/train_mnist.py --batch-size 1024

If MNIST is neither there nor can be downloaded, it trains on the 1,797 digits that come with
scikit-learn. docs/training.md says how a folder of your own images is laid out.

engine/run_directory.py lists what a run writes; curves.png and confusion.png show how it went, and
reconstructions.png, perturbations.png or routing.png what the network makes of an image. To train a
model of your own, see docs/own-model.md.
"""

import functools
import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import checkpoint, pictures
from engine.distributed import join
from engine.flags import COUNT, Machine, Output, Recipe, as_dict, flag, parse
from engine.resume import find_start, merge_flags
from engine.run_directory import LAST, finish, latest, locked, new_directory, tensorboard_writer
from engine.runner import Runner, count_parameters, run_program
from engine.runtime import require
from engine.tables import counted
from engine.trained import check_images
from engine.training import Evaluation, Trainer
from tritoncaps.data import Batches, crops


@dataclass(frozen=True)
class Run:
    """What to do."""

    resume: str | None = flag(
        None, "continue a run; auto: the newest one of this --model", metavar="PATH|auto"
    )
    eval_only: bool = flag(False, "test the model of --resume")
    test_crops: int = flag(
        1,
        "with --crop: also test the average of N×N windows, up to --max-shift from the middle",
        **COUNT,
    )
    tensorboard: bool = flag(False, "log to TensorBoard as well")


def read_flags(argv: list[str] | None, **defaults: Any) -> tuple[Any, ...]:
    """Read the command line."""
    left_out = ("limit_train", "limit_test")
    known = {name: value for name, value in defaults.items() if name not in left_out}
    return parse(__doc__, argv, Run, Recipe, Machine, Output, leave_out=left_out, **known)


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status of the program."""
    read = functools.partial(read_flags, argv)
    tell = functools.partial(train, read)
    return run_program("train_mnist", tell, *read(), interrupted="what was saved before stays")


def train(read: Any, run: Run, recipe: Recipe, machine: Machine, output: Output) -> int:
    """Do one run: setup, data, model, training, test, pictures."""
    require("matplotlib", *(["tensorboard"] if run.tensorboard else []))
    # `stack` keeps the run directory locked until the end.
    with join() as world, ExitStack() as stack:
        # -- what to continue from
        start = None
        if run.resume or run.eval_only:
            start = world.from_main(
                lambda: find_start(run.resume, run.eval_only, recipe, output, stack)
            )
        if start is not None:
            run, recipe, machine, output = merge_flags(read, start, str(run.resume))

        # -- device, images and model
        runner = Runner(recipe, machine, output, world)
        recipe = runner.recipe
        if start is not None:
            check_images(start.directory, start.config, runner.dataset)
        if run.test_crops > 1 and not recipe.crop:
            raise ValueError(f"--test-crops {run.test_crops} needs --crop, the side of a window")
        margin = max(runner.whole_test_images.images.shape[2:]) - recipe.crop
        places = min(2 * recipe.max_shift, margin) + 1
        if run.test_crops > places:
            raise ValueError(
                f"--test-crops {run.test_crops}: with --crop {recipe.crop} and --max-shift "
                f"{recipe.max_shift} there are only {places}x{places} windows; give at most "
                f"{places}"
            )
        job = runner.classification(recipe)

        # -- the run directory, and what is about to happen
        def begin() -> Path:
            directory = new_directory(
                output.output_dir, recipe.model, recipe.dataset, resuming=run.resume is not None
            )
            stack.enter_context(locked(directory))
            return directory

        directory = world.from_main(begin) if start is None else start.directory
        held_out = len(job.validation.images) if job.validation else 0
        runner.describe(f"{len(job.train.images):,} to train", f"{held_out:,} to validate")
        print(f"model       {recipe.model}, {count_parameters(job.model):,} parameters")
        print(f"results     {directory}", flush=True)
        trainer = runner.trainer(job, directory, as_dict(recipe, machine, output, run))
        world.seed_apart(recipe.seed)

        if run.eval_only:
            assert start is not None
            trainer.load_weights(start.weights)
            test(f"test of epoch {start.epoch}", runner, trainer, run.test_crops)
            return 0

        # -- training
        if start is not None:
            assert start.state is not None
            trainer.load_state(start.state)
            print(f"resuming    after {trainer.progress}")
        batches = f"{counted(len(job.train), 'batch', 'batches')} of {recipe.batch_size}"
        if world.size > 1:
            batches += f" ({recipe.batch_size / world.size:.4g} on each process)"
        epochs = counted(runner.epochs, "epoch")
        print(f"training    {epochs} of {batches}, seed {recipe.seed}", flush=True)
        if run.tensorboard and world.is_main:
            trainer.on_metrics = tensorboard_writer(directory, trainer.progress.step)
        if not runner.train(job, trainer):
            command = f"python examples/train_mnist.py --resume {shlex.quote(str(directory))}"
            stopped = "stopped" if output.dry_run else "stopped and saved; go on with: "
            print(stopped if output.dry_run else stopped + command)
            return 130

        # -- the test set: the final model, and the one that the validation set chose
        test("final model", runner, trainer, run.test_crops)
        weights, header = world.from_main(lambda: latest(checkpoint.load_latest_weights(directory)))
        trainer.load_weights(weights)
        best = f"best model (epoch {header['epoch']}, by validation)"
        evaluation = test(best, runner, trainer, run.test_crops)

        # -- pictures
        if world.is_main:
            title = f"{recipe.model} on {runner.dataset.title}"
            pictures.draw(trainer, runner.dataset, runner.test_images, evaluation, title)
            finish(directory)
        if not output.dry_run:
            size = f"{(directory / LAST).stat().st_size / 1e6:,.0f} MB"
            print(f"pictures, checkpoints and tables are in {directory}")
            print(f"{LAST} ({size}) is needed only to train on: delete it to save space")
    return 0


def test(what: str, runner: Runner, trainer: Trainer, count: int) -> Evaluation:
    """Test a model, print its accuracy and how many images were wrong."""
    evaluation = trainer.evaluate(runner.test_images)
    report(what, evaluation.predictions, runner)
    if count > 1:
        predictions = averaged(runner, trainer, count)
        report(f"{what}, average of {count}x{count} crops", predictions, runner)
    return evaluation


@torch.inference_mode()
def averaged(runner: Runner, trainer: Trainer, count: int) -> Tensor:
    """Predict the class of each test image from count × count windows of it.

    What is averaged are the activations, or the softmax of the logits, which do not saturate. Each
    process does all of it.
    """
    side, reach = runner.recipe.crop, runner.recipe.max_shift
    whole = runner.whole_test_images.to(runner.runtime.device)
    predictions = []
    for images, _ in Batches(whole, trainer.test_batch_size, seed=0, shuffle=False).epoch(0):
        outputs = [trainer.predict(window) for window in crops(images, side, count, reach)]
        scores = [
            output.activations if output.logits is None else output.logits.softmax(dim=1)
            for output in outputs
        ]
        predictions.append(torch.stack(scores).sum(dim=0).argmax(dim=1).cpu())
    return torch.cat(predictions)


def report(what: str, predictions: Tensor, runner: Runner) -> None:
    """Print the test accuracy, and how many images were wrong."""
    count = len(predictions)
    wrong = int((predictions != runner.test_images.labels.cpu()).sum())
    accuracy = 100 * (count - wrong) / count
    print(f"{what}: test accuracy {accuracy:.2f} % ({wrong} of {count:,} wrong)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
