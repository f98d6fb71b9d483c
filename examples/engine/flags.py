"""The flags that the programs share: images, recipe, machine and run."""

import argparse

from tritoncaps.data import list_datasets


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text, but where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def positive(text: str) -> int:
    """Read an int of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {value}")
    return value


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """Begin a parser; its description is the first line of the script's docstring."""
    return argparse.ArgumentParser(
        description=(doc or "").strip().splitlines()[0],
        formatter_class=HelpFormatter,
    )


def add_data_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that say where the images come from."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=["auto", *list_datasets()],
        default="auto",
        help="auto: MNIST if it is there or can be downloaded, else digits",
    )
    data.add_argument("--data-dir", default="data", help="where data sets lie")
    data.add_argument(
        "--download",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fetch a data set that is missing",
    )
    return data


def add_limit(data: argparse._ArgumentGroup, part: str) -> None:
    """Add the flag --limit-test or --limit-train."""
    images = {"test": "test", "train": "training"}[part]
    data.add_argument(
        f"--limit-{part}",
        type=positive,
        metavar="N",
        help=f"use N of the {images} images, the classes in proportion (default: all)",
    )


def add_validation_fraction(data: argparse._ArgumentGroup, what: str) -> None:
    """Add the flag that says how many images are held out, and what for."""
    data.add_argument(
        "--validation-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help=f"share of the training images held out to choose {what}",
    )


def add_max_shift(data: argparse._ArgumentGroup) -> None:
    """Add the flag of the augmentation."""
    data.add_argument(
        "--max-shift",
        type=int,
        default=2,
        metavar="PIXELS",
        help="each training image is shifted by up to this much",
    )


def add_recipe_flags(training: argparse._ArgumentGroup) -> None:
    """Add the flags of the optimisation."""
    training.add_argument(
        "-b", "--batch-size", type=positive, default=128, metavar="N", help="images a step"
    )
    add_test_batch_size(training, 500)
    training.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    training.add_argument("--gamma", type=float, default=0.9, help="factor on it every epoch")
    training.add_argument(
        "--warmup-steps",
        type=int,
        default=50,
        metavar="N",
        help="steps over which it rises linearly",
    )


def add_training_flags(
    parser: argparse.ArgumentParser,
    *,
    epochs: int,
    shifts: bool = True,
    holds_out: bool = True,
) -> None:
    """Add the flags of an experiment's data and recipe.

    `epochs` is the default; an experiment that shifts no image, or holds none out, has no flag for
    it.
    """
    data = add_data_flags(parser)
    add_limit(data, "test")
    add_limit(data, "train")
    parser.set_defaults(validation_fraction=0.0, max_shift=0)
    if holds_out:
        add_validation_fraction(data, "an epoch; 0: the last counts")
    if shifts:
        add_max_shift(data)
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs",
        type=positive,
        default=epochs,
        metavar="N",
        help="passes over the training images; more than before goes on with the runs",
    )
    add_recipe_flags(training)


def add_test_batch_size(group: argparse._ArgumentGroup, default: int) -> None:
    """Add the flag that bounds the memory of an evaluation."""
    group.add_argument(
        "--test-batch-size",
        type=positive,
        default=default,
        metavar="N",
        help="images a batch in evaluations",
    )


def add_seeds(group: argparse._ArgumentGroup) -> None:
    """Add the flag that repeats every run."""
    group.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="train each with seeds 1 .. N"
    )


def add_machine_flags(
    parser: argparse.ArgumentParser, output_dir: str = "runs/<experiment>-<dataset>"
) -> argparse._ArgumentGroup:
    """Add the flags that say where it runs and where its results go; returns the last group."""
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    machine.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="auto: bf16 convolutions where the hardware computes in it",
    )
    machine.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits from run to run on the same machine",
    )
    machine.add_argument("--torchcompile", action="store_true", help="use torch.compile")
    run = parser.add_argument_group("run")
    run.add_argument("--output-dir", metavar="DIR", help=f"(default: {output_dir})")
    run.add_argument("--dry-run", action="store_true", help="try everything once, keep nothing")
    run.add_argument(
        "--log-interval",
        type=positive,
        default=10,
        metavar="STEPS",
        help="between two records of metrics.jsonl",
    )
    run.add_argument(
        "--checkpoint-interval",
        type=positive,
        metavar="STEPS",
        help="between two checkpoints within an epoch (default: one after each epoch)",
    )
    return run
