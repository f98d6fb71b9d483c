"""Checkpoints that survive a crash and never run foreign code.

A run directory holds two generations of each file, ``last.safetensors`` and
``last.previous.safetensors``. A new one is written to a temporary file, flushed to disk and renamed
into place. So at any moment one of the two is a complete checkpoint, whatever kills the process.
The files are safetensors with a SHA-256 of their contents, which is checked before anything is used
(see `tritoncaps._files`).

Example:
    >>> import tempfile, torch
    >>> from engine import checkpoint
    >>> run = tempfile.mkdtemp()
    >>> checkpoint.save(f"{run}/last.safetensors", {"epoch": 3, "model": {"weight": torch.ones(2)}})
    >>> state, path, warning = checkpoint.load_latest(run)
    >>> state["epoch"], path.name, warning
    (3, 'last.safetensors', None)
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tritoncaps._files import (
    CheckpointError,
    naming,
    read_sealed,
    sync_directory,
    temporary_name,
    write_sealed,
)

Content = TypeVar("Content")


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run to `path`, and keep the file it replaces as the previous one.

    Args:
        path: the file to write. Its directory must exist and have one writer at a time.
        state: tensors and plain values (None, bool, int, float, str), nested in dicts, lists and
            tuples.

    Raises:
        TypeError: an entry would not come back as it is: a path, a namespace, a numpy scalar.
        OSError: the file cannot be written. The old one is untouched.
    """
    with _keeping_previous(Path(path)):
        write_sealed(path, {}, state, function="save", argument="state")


def load(path: str | Path) -> dict[str, Any]:
    """Return the state that `save` wrote to `path`.

    Its tensors are on the CPU. A parameter comes back as a plain tensor, and an OrderedDict as a
    dict; all other types are kept.

    Raises:
        CheckpointError: the file is missing, unreadable, empty, damaged or not written by `save`.
    """
    weights, state = read_sealed(path)
    if weights:
        raise CheckpointError(
            f"{path} holds weights alone, not the state of a run; read it with load_weights"
        )
    return state


def load_latest(
    directory: str | Path, name: str = "last.safetensors"
) -> tuple[dict[str, Any], Path, str | None]:
    """Load the newest good checkpoint of a run: `name`, or else the one it replaced.

    Returns:
        The state, the file it came from, and a warning to show if that file is not `name`.

    Raises:
        CheckpointError: neither can be used; the message says why for both.
    """
    return _latest(Path(directory) / name, load)


def save_weights(
    path: str | Path, state_dict: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write a model's weights to a file that can be shared; otherwise as `save`.

    Args:
        path: the file to write.
        state_dict: the weights, as ``model.state_dict()`` returns them.
        header: plain values. With ``model`` and ``model_kwargs``, the arguments of `create_model`,
            the file is all that `tritoncaps.models.load_model` needs.
    """
    with _keeping_previous(Path(path)):
        write_sealed(path, state_dict, header, function="save_weights")


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights, on the CPU, and the header that `save_weights` wrote.

    Raises:
        CheckpointError: as in `load`.
    """
    weights, header = read_sealed(path)
    if not weights:
        raise CheckpointError(f"{path} holds no weights alone; read the state of a run with load")
    return weights, header


def load_latest_weights(
    directory: str | Path, name: str = "model_best.safetensors"
) -> tuple[tuple[dict[str, Tensor], dict[str, Any]], Path, str | None]:
    """Load the newest good weights of a run, as `load_latest` does a state."""
    return _latest(Path(directory) / name, load_weights)


def previous_path(path: str | Path) -> Path:
    """Return where a replaced file is kept: ``a.safetensors`` → ``a.previous.safetensors``."""
    path = Path(path)
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def rng_state() -> dict[str, Any]:
    """Return the state of every global random generator, in a form that `save` accepts.

    These are torch's on the CPU and on each CUDA device, Python's, and numpy's if numpy is loaded.
    CUDA is not initialized for this.
    """
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
    }
    if (numpy := sys.modules.get("numpy")) is not None:
        drawn = numpy.random.get_state(legacy=False)
        inner = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in drawn["state"].items()}
        state["numpy"] = {**drawn, "state": inner}
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` returned, except for CUDA devices that this machine lacks."""
    torch.set_rng_state(state["torch"])
    for device, device_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(device_state, device)
    random.setstate(state["python"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])


@contextmanager
def _keeping_previous(path: Path) -> Iterator[None]:
    """Keep the file that the block replaces under the previous name."""
    previous = previous_path(path)
    outgoing = temporary_name(previous)
    try:
        # The new file is in place before the old one takes the previous name. In the other order, a
        # damaged file could replace the only good one.
        replaces = path.exists()
        if replaces:
            with naming(path):
                _give_second_name(path, outgoing)
        yield
        if replaces:
            os.replace(outgoing, previous)
            sync_directory(path.parent)
    finally:
        with suppress(OSError):
            outgoing.unlink(missing_ok=True)


def _give_second_name(path: Path, other: Path) -> None:
    """Link the file to a second name, or copy it where the file system has no hard links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)
        with other.open("rb+") as file:
            os.fsync(file.fileno())


def _latest(path: Path, read: Callable[[Path], Content]) -> tuple[Content, Path, str | None]:
    try:
        return read(path), path, None
    except CheckpointError as error:
        problem = error
    previous = previous_path(path)
    try:
        content = read(previous)
    except CheckpointError as error:
        raise CheckpointError(f"no usable checkpoint: {problem}; {error}") from error
    return content, previous, f"{problem}; continuing from the one before, {previous}"
