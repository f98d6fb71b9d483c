"""The flags of all programs, each one field of a frozen dataclass.

The command line, args.json, the shared recipe of an experiment and the check of what a resumed run
may not change all come from these fields. A new flag is one new field.

Example:
    >>> from engine.flags import Machine, Output, Recipe, parse
    >>> recipe, machine, output = parse("Train.", ["--epochs=3"], Recipe, Machine, Output)
    >>> recipe.epochs, machine.device
    (3, 'auto')
"""

import argparse
import ast
import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from tritoncaps.data import Dataset, list_datasets
from tritoncaps.data.registry import REGISTRY
from tritoncaps.models import list_models


def flag(default: Any, help: str, *short: str, fixed: bool = True, **options: Any) -> Any:
    """Declare a flag.

    Args:
        default: its default, which also gives its type; ... for a positional argument.
        help: one line for --help.
        short: a second name, such as "-b".
        fixed: in a recipe: whether a resumed run has to keep it.
        options: other arguments of `argparse.ArgumentParser.add_argument`. In a dict,
            `shortcuts` maps further flags that fill it to arguments of their own.
    """
    shortcuts = options.pop("shortcuts", {})
    if isinstance(default, bool):
        options["action"] = argparse.BooleanOptionalAction if default else "store_true"
    elif isinstance(default, (int, float)):
        options.setdefault("type", type(default))
    options["help"] = help
    metadata = {
        "default": default, "names": short, "fixed": fixed, "options": options,
        "shortcuts": shortcuts,
    }  # fmt: skip
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=MISSING if default is ... else default, metadata=metadata)


def positive(text: str) -> int:
    """Read an int of at least 1 that torch takes for a size."""
    value = int(text)
    if not 1 <= value < 2**31:
        limit = ">= 1" if value < 1 else f"<= {2**31 - 1}"
        raise argparse.ArgumentTypeError(f"must be {limit}, got {value}")
    return value


class KeyValues(argparse.Action):
    """Adds KEY=VALUE ... to a dict; a value is a Python literal, or else a str.

    A shortcut, such as ``--gradient last``, adds what ``gradient=last`` does.
    """

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Store what the flag was given."""
        pairs: dict[str, Any] = {}
        if self.const is not None:  # a shortcut
            pairs = {self.const: True if self.nargs == 0 else values}
            values = ()
        for text in values:
            key, equals, value = text.partition("=")
            if not (equals and key.isidentifier()):
                raise argparse.ArgumentError(self, f"expected KEY=VALUE, got {text!r}")
            try:
                pairs[key] = ast.literal_eval(value)
                json.dumps(pairs[key])  # args.json keeps it
            except (ValueError, TypeError, SyntaxError):
                pairs[key] = value
        before = getattr(namespace, self.dest)
        for key, value in pairs.items():
            if before.get(key, value) != value and key not in self.default:
                raise argparse.ArgumentError(
                    self, f"{key} is given twice, as {before[key]} and as {value}"
                )
        setattr(namespace, self.dest, {**before, **pairs})


class Sides(argparse.Action):
    """Reads one side of a square, or height and width, into a list of both."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Store what the flag was given."""
        if len(values) > 2:
            raise argparse.ArgumentError(self, f"expected SIDE or HEIGHT WIDTH, got {values}")
        setattr(namespace, self.dest, [values[0], values[-1]])


# Options of flags that count something.
COUNT: dict[str, Any] = {"type": positive, "metavar": "N"}
STEPS: dict[str, Any] = {"type": positive, "metavar": "STEPS"}


# The defaults that depend on the data set: those of MNIST and the like, and what is different for
# others. A few images, as scikit-learn's digits, need more steps to draw what they show.
_DEFAULTS = {
    "batch_size": 128, "decoder_lr_factor": 1.0, "reconstruction_weight": 0.0005,
    "max_shift": Dataset.max_shift, "crop": Dataset.crop,
}  # fmt: skip
_FEW = {"batch_size": 32, "decoder_lr_factor": 3.0, "reconstruction_weight": 0.02}
_OF_DATASET: dict[str, dict[str, Any]] = {
    name: {"max_shift": entry.max_shift, "crop": entry.crop} for name, entry in REGISTRY.items()
}
_OF_DATASET["digits"] |= _FEW
_OF_DATASET["affine-digits"] |= _FEW


def _default(name: str) -> str:
    """Name the defaults of a flag, for its help."""
    usual = _DEFAULTS[name]
    where: dict[Any, list[str]] = {}
    for data, values in _OF_DATASET.items():
        if values.get(name, usual) != usual:
            where.setdefault(values[name], []).append(data)
    others = (f"; on {', '.join(names)} {value}" for value, names in where.items())
    return f"(default: {usual}{''.join(others)})"


@dataclass(frozen=True)
class Recipe:
    """What the result depends on. A resumed run may change the number of epochs alone."""

    # A field whose default depends on the data set is None until `on` fills it in.

    model: str = flag("deep_capsnet", "the network to train", choices=list_models(classifiers=True))
    model_kwargs: dict[str, Any] = flag(
        {},
        "arguments of the network, such as iterations=2 of capsnet (default: the network's own)",
        action=KeyValues,
        nargs="+",
        metavar="KEY=VALUE",
        shortcuts={
            "gradient": {
                "choices": ["full", "last"],
                "help": "through all routing iterations or the last alone (default: full)",
            },
            "learned_prior": {"nargs": 0, "help": "train routing priors too (default: no)"},
        },
    )
    dataset: str = flag(
        "auto",
        "auto: MNIST if it is there or can be downloaded, else digits; "
        "folder: your own images, those of each class in a subfolder of --data-dir",
        choices=["auto", *list_datasets()],
    )
    image_size: list[int] | None = flag(
        None,
        "resize the images of --dataset folder to this, or to a height and a width (default: their "
        "own size if they are equal and at most 64 a side, else 32)",
        action=Sides,
        nargs="+",
        type=positive,
        metavar="SIDE",
    )
    limit_train: int | None = flag(
        None, "use N training images, the classes in proportion (default: all)", **COUNT
    )
    limit_test: int | None = flag(
        None, "use N test images, the classes in proportion (default: all)", **COUNT
    )
    validation_fraction: float = flag(
        0.1,
        "share of the training images held out to choose the best epoch, unless the data set has "
        "a validation set",
        metavar="F",
    )
    max_shift: int = flag(
        None,
        f"shift each training image by up to this much {_default('max_shift')}",
        type=int,
        metavar="PIXELS",
    )
    crop: int = flag(
        None,
        "test on windows with this side from the middle of the images, and train on windows up to "
        f"--max-shift from there; 0: whole images {_default('crop')}",
        type=int,
        metavar="PIXELS",
    )
    rotation: float = flag(
        0.0,
        "rotate each training image by a normal random angle with this standard deviation",
        metavar="DEGREES",
    )
    scaling: float = flag(
        0.0,
        "enlarge or shrink each training image by exp(x), x normal with this standard deviation",
        metavar="F",
    )
    one_cycle: bool = flag(
        False,
        "raise the learning rate to --lr over 3 of 10 steps and lower it to 0 by the last one, in "
        "place of --gamma and --warmup-steps; a resumed run then keeps --epochs",
    )
    epochs: int | None = flag(
        None,
        "passes over the training images; a larger number continues a finished run "
        "(default: 30, on digits 5)",
        fixed=False,
        **COUNT,
    )
    batch_size: int = flag(None, f"images per step {_default('batch_size')}", "-b", **COUNT)
    lr: float = flag(1e-3, "learning rate of Adam")
    decoder_lr_factor: float = flag(
        None,
        f"factor on the learning rate of the decoder {_default('decoder_lr_factor')}",
        type=float,
        metavar="F",
    )
    gamma: float = flag(0.9, "factor on the learning rate after every epoch")
    weight_decay: float = flag(
        0.0, "decay of the weights, decoupled from the gradient as in AdamW", metavar="F"
    )
    warmup_steps: int = flag(
        50, "steps over which the learning rate rises to its full value", metavar="N"
    )
    loss: str = flag(
        "auto",
        "auto: cross-entropy for a network with logits, else margin",
        choices=["auto", "cross-entropy", "margin", "spread"],
    )
    reconstruction_weight: float = flag(
        None,
        "weight of the reconstruction's squared error in the loss "
        f"{_default('reconstruction_weight')}",
        type=float,
        metavar="W",
    )
    seed: int = flag(1, "decides the weights, the order of the images and their shifts")

    def on(self, dataset: str, epochs: int) -> "Recipe":
        """Fill in a data set, and its defaults where no flag was given."""
        defaults: dict[str, Any] = {"epochs": epochs, **_DEFAULTS, **_OF_DATASET.get(dataset, {})}
        missing = {name: v for name, v in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, dataset=dataset, **missing)


@dataclass(frozen=True)
class Machine:
    """Where it runs. The results are the same everywhere, up to rounding."""

    data_dir: str | None = flag(None, "directory of the data sets (default: data)", metavar="DIR")
    download: bool = flag(True, "download a missing data set")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    precision: str = flag(
        "auto",
        "auto: bf16 convolutions where the hardware is faster in it",
        choices=["auto", "fp32", "bf16"],
    )
    deterministic: bool = flag(False, "the same bits from run to run on the same machine")
    torchcompile: bool = flag(False, "use torch.compile")
    test_batch_size: int = flag(500, "images per batch in evaluations", **COUNT)


@dataclass(frozen=True)
class Output:
    """Where the results go, and how often they are written."""

    output_dir: str | None = flag(
        None, "where the results go (default: a name below runs/)", metavar="DIR"
    )
    dry_run: bool = flag(False, "try everything once, keep nothing")
    log_interval: int = flag(10, "steps between two records of metrics.jsonl", **STEPS)
    checkpoint_interval: int | None = flag(
        None, "steps between two checkpoints within an epoch (default: only after epochs)", **STEPS
    )


# The fields of a recipe that a program does not need if it trains nothing.
NO_TRAINING = frozenset(entry.name for entry in fields(Recipe)) - {
    "dataset",
    "image_size",
    "crop",
    "limit_test",
}


def models_flag(names: Sequence[str], choices: Sequence[str]) -> Any:
    """Declare the flag that chooses networks, by default `names`."""
    return flag(tuple(names), "which networks", nargs="+", choices=choices)


def seeds_flag() -> Any:
    """Declare the flag that repeats every run of an experiment."""
    return flag(1, "train each with seeds 1 .. N", **COUNT)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a help text that does not mention it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def parse(
    doc: str | None,
    argv: Sequence[str] | None,
    *groups: type[Any],
    leave_out: Collection[str] = (),
    **defaults: Any,
) -> tuple[Any, ...]:
    """Read a command line into one instance of each dataclass.

    Args:
        doc: the docstring of the program; its first line is the description.
        argv: the command line, or None for that of the process.
        groups: the dataclasses.
        leave_out: fields that are not flags of this program.
        defaults: replace the defaults of the fields; names that are no field are ignored.

    Raises:
        SystemExit: the command line is wrong, or asks for help.
    """
    parser = argparse.ArgumentParser(
        description=(doc or "").strip().splitlines()[0], formatter_class=_HelpFormatter
    )
    for group in groups:
        box = parser.add_argument_group(group.__name__.lower(), group.__doc__)
        for entry in fields(group):
            if entry.name in leave_out:
                continue
            options, default = dict(entry.metadata["options"]), entry.metadata["default"]
            if default is ...:
                box.add_argument(entry.name, **options)
                continue
            if entry.name in defaults:
                default = defaults[entry.name]
                options["help"] = options["help"].partition(" (default")[0]
            flags = (*entry.metadata["names"], flag_name(entry.name))
            action = box.add_argument(*flags, default=default, **options)
            for name, own in entry.metadata["shortcuts"].items():
                shared = {"action": type(action), "dest": entry.name, "default": default}
                box.add_argument(flag_name(name), const=name, **shared, **own)
    values = {**defaults, **vars(parser.parse_args(argv))}
    return tuple(
        group(**{entry.name: values[entry.name] for entry in fields(group) if entry.name in values})
        for group in groups
    )


def flag_name(name: str) -> str:
    """Return the flag of a field."""
    return f"--{name.replace('_', '-')}"


def as_dict(*groups: Any) -> dict[str, Any]:
    """Collect the fields of several dataclasses, as for args.json."""
    return {name: value for group in groups for name, value in dataclasses.asdict(group).items()}


def check_numbers(recipe: Recipe) -> None:
    """Refuse a number that no run can use.

    Raises:
        ValueError: there is one; the message names its flag.
    """
    weights = "decoder_lr_factor", "reconstruction_weight", "weight_decay", "rotation", "scaling"
    check_limit(recipe, "> 0 and finite", "lr", "gamma")
    check_limit(recipe, ">= 0 and finite", *weights)
    check_limit(recipe, ">= 0", "max_shift", "crop", "warmup_steps")
    check_limit(recipe, "in -2**63 .. 2**63 - 1", "seed")


_LIMITS: dict[str, Callable[[float], bool]] = {
    "> 0 and finite": lambda x: 0 < x < math.inf,
    ">= 0 and finite": lambda x: 0 <= x < math.inf,
    ">= 0": lambda x: x >= 0,
    "in 0 .. 16": lambda x: 0 <= x <= 16,
    "in -2**63 .. 2**63 - 1": lambda x: -(2**63) <= x < 2**63,
}


def check_limit(recipe: Any, limit: str, *names: str) -> None:
    """Refuse a flag beyond its limit, one of `_LIMITS`.

    Raises:
        ValueError: there is one; the message names its flag.
    """
    for name in names:
        if not _LIMITS[limit](value := getattr(recipe, name)):
            raise ValueError(f"{flag_name(name)} {value} must be {limit}")


def check_max_shift(max_shift: int, height: int, width: int) -> None:
    """Refuse to shift images of this size until nothing is left of them.

    Raises:
        ValueError: the shift is not less than both sides.
    """
    if max_shift >= min(height, width):
        raise ValueError(
            f"--max-shift {max_shift} must be less than the side of the images, {height}x{width}"
        )


def first_difference(recipe: Recipe, before: Mapping[str, Any]) -> str | None:
    """Return the first field of a recipe that a resumed run has to keep but that has changed.

    Values are compared as JSON, which has no tuples.
    """
    for entry in fields(recipe):
        is_fixed = entry.metadata["fixed"] or (entry.name == "epochs" and recipe.one_cycle)
        if is_fixed and entry.name in before:
            value = getattr(recipe, entry.name)
            if json.dumps(value) != json.dumps(before[entry.name]):
                return entry.name
    return None
