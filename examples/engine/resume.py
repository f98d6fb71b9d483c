"""What --resume means: which checkpoint to load, and which flags of its run still hold."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from engine import checkpoint
from engine.flags import Machine, Output, Recipe, first_difference, flag_name
from engine.run_directory import BEST, LAST, RunDirectoryError, find_run, latest, locked
from engine.runner import FROM_DATA
from tritoncaps._files import CheckpointError, read_sealed

# Flags that are not taken over from the resumed run.
_OF_NOW = ("resume", "eval_only", "dry_run", "output_dir")


@dataclass
class Start:
    """What a run continues from: the flags and the state of an earlier one, or weights to test.

    `config` describes the images that the network takes.
    """

    directory: Path
    args: dict[str, Any]
    epoch: int
    weights: dict[str, Tensor]
    state: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)


def find_start(
    resume: str | None, eval_only: bool, recipe: Recipe, output: Output, stack: ExitStack
) -> Start | None:
    """Load what --resume names; None where "auto" finds no run.

    The run is locked before it is read, and unlocked by `stack`.

    Raises:
        ValueError: the flags contradict each other.
        RunDirectoryError: there is no checkpoint, or another process trains in the directory.
        CheckpointError: the checkpoint is damaged, or not one of this program.
    """
    if not resume:
        raise ValueError("--eval-only needs a model to test: add --resume PATH or --resume auto")
    if output.dry_run:
        raise ValueError("--dry-run tries a new run and keeps nothing: leave out --resume")
    name = BEST if eval_only else LAST
    directory = find_run(resume, output.output_dir, recipe.model, name)
    if directory is None:
        if eval_only:
            raise RunDirectoryError("--resume auto: there is no run to test")
        print("resuming    nothing to resume, this is a new run")
        return None
    if output.output_dir and Path(output.output_dir).resolve() != directory.resolve():
        raise ValueError(f"--resume continues in {directory}: leave out --output-dir")
    if not eval_only:
        stack.enter_context(locked(directory))
    weights: dict[str, Tensor] = {}
    if Path(resume).is_file():
        weights, header = read_sealed(resume)
    elif eval_only:
        weights, header = latest(checkpoint.load_latest_weights(directory))
    else:
        header = latest(checkpoint.load_latest(directory))
    if weights and not eval_only:
        raise CheckpointError(
            f"--resume {resume} holds weights alone: test them with --eval-only, or continue the "
            f"run with --resume {directory}"
        )
    needed = ("model", "model_kwargs", "dataset", "epoch") if weights else ("args", "progress")
    if missing := [name for name in needed if name not in header]:
        raise CheckpointError(
            f"--resume {resume}: the checkpoint is not one of this program, it has no "
            f"{' and no '.join(missing)}"
        )
    if weights:
        args = {**_flags_beside(directory), **{name: header[name] for name in needed[:3]}}
        return Start(directory, _own(args), header["epoch"], weights, None, header)
    epoch = header["progress"]["epoch"]
    if epoch and not eval_only:
        # The best model is needed at the end. If it is gone, say so now.
        latest(checkpoint.load_latest_weights(directory))
    args, config = header["args"], header.get("config", {})
    return Start(directory, _own(args), epoch, header["model"], header, config)


def _flags_beside(directory: Path) -> dict[str, Any]:
    """Read the flags in args.json, where there is one: those for the machine still hold."""
    path = directory / "args.json"
    try:
        flags: dict[str, Any] = json.loads(path.read_text())["args"] if path.is_file() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): remove it, and give the flags of the run again"
        ) from error
    return flags


def _own(args: dict[str, Any]) -> dict[str, Any]:
    """Leave out the arguments of the network that the images determine: no flag gave them."""
    kwargs = args.get("model_kwargs", {})
    if args.get("dataset") == "folder" and "image_size" in kwargs:
        args = {**args, "image_size": list(kwargs["image_size"])}
    return {**args, "model_kwargs": {k: v for k, v in kwargs.items() if k not in FROM_DATA}}


def merge_flags(
    read: Callable[..., tuple[Any, Recipe, Machine, Output]], start: Start, resume: str
) -> tuple[Any, Recipe, Machine, Output]:
    """Use the flags of the resumed run where the command line gives none.

    `read` reads the command line with other defaults, and `resume` is the flag, for errors.

    Raises:
        ValueError: a flag is given that would change the run.
        CheckpointError: the flags of the run are not those of this program.
    """
    saved = start.args
    if start.state is not None:
        needed = [entry.name for entry in fields(Recipe)] + ["data_dir"]
        if missing := [name for name in needed if name not in saved]:
            raise CheckpointError(
                f"--resume {resume}: the checkpoint is not one of this program or version, its "
                f"flags lack {', '.join(missing)}"
            )
    _, _, given, _ = read()
    what, recipe, machine, output = read(**{k: v for k, v in saved.items() if k not in _OF_NOW})
    if recipe.dataset == "auto":
        recipe = replace(recipe, dataset=saved["dataset"])
    if given.data_dir != machine.data_dir:
        # A path that comes from a checkpoint is read from, but never written to.
        machine = replace(machine, download=False)
    if start.state is None:  # a test may change all other flags
        saved = {name: saved[name] for name in ("model", "model_kwargs", "dataset")}
    if name := first_difference(recipe, saved):
        value, before = getattr(recipe, name), saved[name]
        raise ValueError(
            f"{flag_name(name)} {value} differs from the resumed run's {before}: start a new run "
            "for that"
        )
    return what, recipe, machine, output
