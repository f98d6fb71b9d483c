"""Train a capsule network on handwritten digits.

    python examples/train_mnist.py                                  # the deep capsule network
    python examples/train_mnist.py --model capsnet --epochs 10      # Sabour's CapsNet
    python examples/train_mnist.py --dataset mnist --data-dir ~/data
    python examples/train_mnist.py --resume auto                    # go on where it stopped
    python examples/train_mnist.py --eval-only --resume runs/NAME   # test a trained model
    torchrun --standalone --nproc-per-node 8 examples/train_mnist.py --batch-size 1024

Without MNIST and without a network it trains on the 1,797 digits that scikit-learn brings along.
What a run writes is listed in engine/run_directory.py; beside it stand the pictures curves.png,
reconstructions.png, perturbations.png and confusion.png.
"""

import argparse
import shlex
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from engine import checkpoint, figures, run_directory
from engine.distributed import World, join
from engine.flags import (
    add_data_flags,
    add_machine_flags,
    add_max_shift,
    add_recipe_flags,
    add_validation_fraction,
    new_parser,
    positive,
)
from engine.run_directory import RunDirectoryError
from engine.runtime import (
    Runtime,
    choose_runtime,
    describe_environment,
    make_deterministic,
    require,
)
from engine.training import Evaluation, Schedule, Trainer, TrainingError
from tritoncaps.data import (
    Batches,
    Dataset,
    DatasetError,
    ImageSet,
    load_dataset,
    split_validation,
    to_float,
)
from tritoncaps.models import create_model, list_models

# The default number of epochs: small sets converge in fewer steps than MNIST has in one epoch.
EPOCHS = {"mnist": 30, "fashion-mnist": 30, "digits": 15}

# What a resumed run may not change: the result would be neither the old run nor a new one.
FIXED = (
    "model", "dataset", "batch_size", "lr", "gamma", "warmup_steps", "max_shift", "seed",
    "validation_fraction", "primary_iterations", "secondary_iterations", "hidden_capsules",
)  # fmt: skip

# How far each dimension of a capsule is moved for perturbations.png (Sabour 2017, figure 4).
OFFSETS = [step * 0.05 for step in range(-5, 6)]


def parse_arguments(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the flags."""
    parser = new_parser(__doc__)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", choices=list_models(), default="deep_capsnet", help="the network to train"
    )
    model.add_argument(
        "--primary-iterations",
        type=positive,
        default=3,
        metavar="R",
        help="iterations of the main route, the only one of capsnet",
    )
    model.add_argument(
        "--secondary-iterations",
        type=positive,
        default=3,
        metavar="R",
        help="iterations of the secondary route of deep_capsnet",
    )
    model.add_argument(
        "--hidden-capsules",
        type=positive,
        default=10,
        metavar="N",
        help="capsules between the two routes of deep_capsnet",
    )

    data = add_data_flags(parser)
    add_validation_fraction(data, "model_best")
    add_max_shift(data)

    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs",
        type=positive,
        metavar="N",
        help=f"passes over the training images (default: {EPOCHS['mnist']}, on digits "
        f"{EPOCHS['digits']})",
    )
    add_recipe_flags(training)
    training.add_argument(
        "--seed", type=int, default=1, help="of the weights, the order and the shifts"
    )

    run = add_machine_flags(parser, "runs/<model>-<dataset>-<time>")
    run.add_argument(
        "--resume",
        metavar="PATH|auto",
        help="continue a run; auto: the newest one of this --model",
    )
    run.add_argument("--eval-only", action="store_true", help="test the model of --resume")
    run.add_argument("--tensorboard", action="store_true", help="log to TensorBoard as well")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status of the program."""
    parser, args = parse_arguments(argv)
    try:
        with join() as world, ExitStack() as stack:
            if args.dry_run:
                directory = stack.enter_context(tempfile.TemporaryDirectory())
                args.output_dir = str(Path(directory) / "run")
            return run(parser, args, argv, world, stack)
    except (
        DatasetError, RunDirectoryError, TrainingError, checkpoint.CheckpointError, ValueError,
        OSError, ModuleNotFoundError,
    ) as error:  # fmt: skip
        print(f"train_mnist.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntrain_mnist.py: interrupted; what was saved before stays", file=sys.stderr)
        return 130


def run(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    argv: list[str] | None,
    world: World,
    stack: ExitStack,
) -> int:
    """Tell the story of one run: setup, data, model, training, test, pictures.

    `stack` holds the run directory until the end.
    """
    # -- setup: where to run, and what to continue from
    require("matplotlib", "safetensors", *(["tensorboard"] if args.tensorboard else []))
    state, resumed_from = None, None
    if args.resume or args.eval_only:
        state, resumed_from = world.from_main(lambda: find_state(args, stack))
    if state is not None:
        args = merge_arguments(parser, args, state["args"], argv)
    if args.deterministic:
        make_deterministic()
    torch.manual_seed(args.seed)
    runtime = choose_runtime(args.device, args.precision, world)
    if args.batch_size < world.size:
        raise ValueError(
            f"--batch-size {args.batch_size}: each of {world.size} processes needs an image of it"
        )

    # -- data: whole on the device, as uint8
    with world.first_on_each_machine():
        dataset = load_dataset(args.dataset, args.data_dir, download=args.download)
    if len(set(found := world.gather(dataset.name))) > 1:
        raise DatasetError(
            f"--dataset {args.dataset}: the {world.size} processes found {', '.join(found)}; name "
            "one, and put it where all of them find it"
        )
    train, validation = split_validation(dataset.train, args.validation_fraction, args.seed)
    test = dataset.test
    epochs = args.epochs or EPOCHS[dataset.name]
    if args.dry_run:
        train, validation, test = (
            head(part, 2 * args.batch_size) for part in (train, validation, test)
        )
        epochs = 1
    train, validation, test = (part.to(runtime.device) for part in (train, validation, test))
    batches = Batches(train, args.batch_size, seed=args.seed, max_shift=args.max_shift)

    # -- model and optimiser
    model_kwargs = model_arguments(args, dataset)
    model = runtime.place(create_model(args.model, **model_kwargs))
    schedule = Schedule(args.lr, args.gamma, args.warmup_steps)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)

    # -- the run directory, and what is about to happen
    if resumed_from is not None:
        directory = resumed_from if resumed_from.is_dir() else resumed_from.parent
    else:
        directory = world.from_main(lambda: begin_run(args, dataset.name, stack))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"device      {runtime.describe()}")
    print(f"data        {dataset.note}")
    sizes = f"{len(train):,} to train, {len(validation):,} to validate, {len(test):,} to test"
    print(f"            {sizes}")
    print(f"model       {args.model}, {parameters:,} parameters")
    print(f"results     {directory}", flush=True)

    resolved = {"dataset": dataset.name, "epochs": epochs, "model_kwargs": model_kwargs}
    saved_args = {**vars(args), **resolved}
    trainer = Trainer(
        model,
        optimizer,
        schedule,
        runtime,
        directory,
        saved_args,
        test_batch_size=args.test_batch_size,
        log_interval=args.log_interval,
        checkpoint_interval=args.checkpoint_interval,
        compile_model=args.torchcompile,
    )
    world.seed_apart(args.seed)
    if state is not None:
        trainer.load_state(state)

    if args.eval_only:
        report(f"test of epoch {trainer.progress.epoch}", trainer.evaluate(test), test)
        return 0

    # -- training
    if world.is_main:
        if args.tensorboard:
            trainer.on_metrics = tensorboard_writer(directory, trainer.progress.step)
        environment = describe_environment(runtime)
        run_directory.write_json(
            directory / "args.json", {"args": saved_args, "environment": environment}
        )
    if state is not None:
        done = f"{trainer.progress.epoch} epochs and {trainer.progress.batch} batches"
        print(f"resuming    after {done}")
    each = f" ({args.batch_size / world.size:.4g} on each process)" if world.size > 1 else ""
    print(
        f"training    {epochs} epochs of {len(batches)} batches of {args.batch_size}{each}, "
        f"seed {args.seed}",
        flush=True,
    )
    if not trainer.fit(batches, validation, test, epochs):
        command = f"python examples/train_mnist.py --resume {shlex.quote(str(directory))}"
        print("stopped" if args.dry_run else f"stopped and saved; go on with: {command}")
        return 130

    # -- the test set, at last: the final model, and the one that the validation set chose
    report("final model", trainer.evaluate(test), test)
    best = world.from_main(lambda: load_latest(directory, "model_best.pt"))
    model.load_state_dict(best["model"])
    evaluation = trainer.evaluate(test)
    epoch = best["progress"]["best_epoch"]
    report(f"best model (epoch {epoch}, by validation)", evaluation, test)

    # -- pictures
    if world.is_main:
        draw_figures(trainer, dataset, test, evaluation, directory)
    if args.dry_run:
        print("dry run: everything works; nothing was kept")
    else:
        print(f"pictures, checkpoints and tables are in {directory}")
    return 0


def begin_run(args: argparse.Namespace, dataset: str, stack: ExitStack) -> Path:
    """Create the directory of a new run, and hold it."""
    directory = run_directory.new_directory(
        args.output_dir, args.model, dataset, resuming=args.resume is not None
    )
    stack.enter_context(run_directory.locked(directory))
    return directory


def find_state(
    args: argparse.Namespace, stack: ExitStack
) -> tuple[dict[str, Any] | None, Path | None]:
    """Load the checkpoint that --resume means, from a run that is held before it is read.

    (None, None) where "auto" finds none.
    """
    if not args.resume:
        raise ValueError("--eval-only needs a model to test: add --resume PATH or --resume auto")
    if args.dry_run:
        raise ValueError("--dry-run tries a new run and keeps nothing: leave out --resume")
    directory = run_directory.find_run(args.resume, args.output_dir, args.model)
    if directory is None:
        if args.eval_only:
            raise RunDirectoryError("--resume auto: there is no run to test")
        print("resuming    nothing to resume, this is a new run")
        return None, None
    if args.output_dir and Path(args.output_dir).resolve() != directory.resolve():
        raise ValueError(f"--resume continues in {directory}: leave out --output-dir")
    if not args.eval_only:
        stack.enter_context(run_directory.locked(directory))
    if args.resume.endswith(".pt"):
        state = checkpoint.load(args.resume)
    else:
        state = load_latest(directory, "model_best.pt" if args.eval_only else "last.pt")
    if missing := [name for name in ("args", "progress") if not isinstance(state.get(name), dict)]:
        raise checkpoint.CheckpointError(
            f"--resume {args.resume}: the checkpoint is not one of this program, it has no "
            f"{' and no '.join(missing)}"
        )
    if state["progress"]["best_epoch"] and not args.eval_only:
        # It is needed at the end: better that it is missed now.
        load_latest(directory, "model_best.pt")
    return state, directory


def load_latest(directory: Path, name: str) -> dict[str, Any]:
    """Load a checkpoint of a run, or the one before it with a warning."""
    state, _, warning = checkpoint.load_latest(directory, name)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    return state


def merge_arguments(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    saved: dict[str, Any],
    argv: list[str] | None,
) -> argparse.Namespace:
    """Take the flags of the resumed run where none are given now; some may not be changed."""
    keep = ("resume", "eval_only", "dry_run", "output_dir")
    parser.set_defaults(**{k: v for k, v in saved.items() if k in vars(args) and k not in keep})
    merged = parser.parse_args(argv)
    if missing := [name for name in (*FIXED, "data_dir") if name not in saved]:
        raise checkpoint.CheckpointError(
            f"--resume {args.resume}: the checkpoint is not one of this program or version, its "
            f"flags lack {', '.join(missing)}"
        )
    if merged.dataset == "auto":
        merged.dataset = saved["dataset"]
    if args.data_dir != merged.data_dir:
        # A path that comes from the checkpoint is read, never written to.
        merged.download = False
    for name in FIXED:
        if getattr(merged, name) != saved[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(merged, name)} differs from the resumed "
                f"run's {saved[name]}: start a new run for that"
            )
    return merged


def model_arguments(args: argparse.Namespace, dataset: Dataset) -> dict[str, Any]:
    """Turn flags and data set into the arguments of `create_model`."""
    _, channels, height, width = dataset.train.images.shape
    shared = {
        "num_classes": len(dataset.class_names),
        "in_channels": channels,
        "image_size": (height, width),
    }
    if args.model == "capsnet":
        return {**shared, "iterations": args.primary_iterations}
    return {
        **shared,
        "hidden_capsules": args.hidden_capsules,
        "primary_iterations": args.primary_iterations,
        "secondary_iterations": args.secondary_iterations,
    }


def head(images: ImageSet, count: int) -> ImageSet:
    """Take the first images of a set."""
    return images.subset(range(min(count, len(images))))


def tensorboard_writer(directory: Path, steps_done: int) -> Any:
    """Build a callback that logs to TensorBoard in the run directory.

    Points after `steps_done` steps are hidden: a resumed run draws them again.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory / "tensorboard"), purge_step=steps_done + 1)

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def report(what: str, evaluation: Evaluation, test: ImageSet) -> None:
    """Print the test accuracy, and what it means in images."""
    wrong = round((1 - evaluation.accuracy) * len(test))
    print(
        f"{what}: test accuracy {100 * evaluation.accuracy:.2f} % ({wrong} of {len(test):,} wrong)",
        flush=True,
    )


def draw_figures(
    trainer: Trainer, dataset: Dataset, test: ImageSet, evaluation: Evaluation, directory: Path
) -> None:
    """Draw curves, reconstructions, perturbations and confusions."""
    title = f"{trainer.args['model']} on {dataset.title}"
    names = dataset.class_names
    labels = test.labels.cpu()
    figures.plot_curves(trainer.rows, directory / "curves.png", title)

    # Two images of each class.
    chosen = torch.cat([(labels == label).nonzero()[:2, 0] for label in range(len(names))])
    images = to_float(test.images[chosen.to(test.images.device)])
    output = trainer.predict(images)
    figures.plot_reconstructions(
        images.cpu(),
        output.reconstruction.float().cpu(),
        labels[chosen],
        output.activations.argmax(dim=1).cpu(),
        directory / "reconstructions.png",
        f"{title}: test images over their reconstructions",
        names,
    )

    # The first image that is classified right; the dimensions of its longest capsule.
    right = int((evaluation.predictions == labels).int().argmax())
    label = int(labels[right])
    poses = trainer.predict(to_float(test.images[right : right + 1])).poses
    figures.plot_perturbations(
        perturbed(trainer.model, trainer.runtime, poses, label),
        OFFSETS,
        directory / "perturbations.png",
        f"{title}: the dimensions of a capsule of class {names[label]}",
    )

    matrix = torch.zeros(len(names), len(names), dtype=torch.int64)
    matrix.index_put_((labels, evaluation.predictions), torch.tensor(1), accumulate=True)
    figures.plot_confusion(matrix, directory / "confusion.png", f"{title}, test set", names)


@torch.inference_mode()
def perturbed(model: Any, runtime: Runtime, poses: torch.Tensor, label: int) -> torch.Tensor:
    """Decode one capsule with each dimension moved by each offset; (D, steps, C, H, W)."""
    D = poses.shape[-1]
    offsets = torch.tensor(OFFSETS, device=poses.device)
    moved = poses.float().repeat(D * len(OFFSETS), 1, 1).unflatten(0, (D, len(OFFSETS)))
    for dimension in range(D):
        moved[dimension, :, label, dimension] += offsets
    target = torch.full((D * len(OFFSETS),), label, device=poses.device)
    with runtime.autocast():
        images = model.decoder(moved.flatten(0, 1), target)
    return images.float().unflatten(0, (D, len(OFFSETS))).cpu()


if __name__ == "__main__":
    sys.exit(main())
