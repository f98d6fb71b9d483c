"""Checkpoints that survive a crash and never run foreign code.

A run directory holds two generations of each checkpoint, ``last.pt`` and ``last.previous.pt``. A
new one is written to a temporary file, brought to the disk and renamed into place, so that at every
instant at least one of the two names is a complete checkpoint, whatever kills the process. Reading
first tests the checksums stored in the file (``torch.load`` does not, and returns wrong weights for
a flipped bit) and then always loads with ``weights_only=True``.

Example:
    >>> import tempfile, torch
    >>> from engine import checkpoint
    >>> run = tempfile.mkdtemp()
    >>> checkpoint.save(f"{run}/last.pt", {"epoch": 3, "model": {"weight": torch.ones(2)}})
    >>> state, path, warning = checkpoint.load_latest(run)
    >>> state["epoch"], path.name, warning
    (3, 'last.pt', None)
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import secrets
import shutil
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

FORMAT = "tritoncaps-checkpoint"
VERSION = 1

# What torch's restricted unpickler gives back as it was. Types are compared exactly: a float64 of
# numpy is a float and torch's version string is a str, yet neither can be read back.
_SCALARS = (
    type(None), bool, int, float, complex, str, bytes,
    torch.Size, torch.dtype, torch.device, Tensor, torch.nn.Parameter,
)  # fmt: skip
_SEQUENCES = (list, tuple)
_MAPPINGS = (dict, OrderedDict)


class CheckpointError(RuntimeError):
    """A file that cannot be used as a checkpoint; the message names it and says what is wrong."""


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` and keep the checkpoint that stood there under the previous name.

    Args:
        path: the file to write. Its directory must exist, and has one writer at a time.
        state: tensors and plain Python values, nested in dicts, lists and tuples.

    Raises:
        TypeError: an entry could not be loaded again: a path, a namespace, a numpy scalar, ...
        ValueError: the state has an entry ``format`` or ``version``, the names that mark the file.
        OSError: the file cannot be written. What stood there is untouched.
    """
    path = Path(path)
    marker = {"format": FORMAT, "version": VERSION}
    if reserved := sorted(marker.keys() & state.keys()):
        raise ValueError(f"save: state has an entry {reserved[0]!r}, which marks the file format")
    _check_loadable(state, "state")
    # Serialised in memory: torch's own writer reports a full disk as "unexpected pos 896 vs 790".
    buffer = io.BytesIO()
    torch.save({**marker, **state}, buffer)

    previous = previous_path(path)
    outgoing = _temporary_name(previous)
    try:
        # The new file takes its place first, and only then the old one takes the previous name. In
        # the other order a damaged last.pt would replace the good previous one a moment too early.
        replaces = path.exists()
        if replaces:
            _second_name(path, outgoing)
        with atomic_write(path) as file:
            file.write(buffer.getbuffer())
        if replaces:
            os.replace(outgoing, previous)
            _sync_directory(path.parent)
    finally:
        with suppress(OSError):
            outgoing.unlink(missing_ok=True)


def load(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Return the state that ``save`` wrote to ``path``, after testing every checksum in the file.

    Nothing in the file is executed, whatever it holds.

    Raises:
        CheckpointError: the file is missing, unreadable, empty, damaged or not one that we wrote.
    """
    path = Path(path)
    try:
        # One open file for both readings, so that what is loaded is what was tested.
        with path.open("rb") as file:
            _check_intact(path, file)
            file.seek(0)
            state = _load_restricted(path, file, map_location)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of ours: it is not marked {FORMAT!r}")
    if (version := state.pop("version", None)) != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {version}, but this program reads version {VERSION}"
        )
    return state


def load_latest(
    directory: str | Path, name: str = "last.pt"
) -> tuple[dict[str, Any], Path, str | None]:
    """Load the newest good checkpoint of a run: ``name``, or else the one that it replaced.

    Returns:
        The state, the file it came from, and a warning to show if that file is not ``name``.

    Raises:
        CheckpointError: neither can be used; the message says why for both.
    """
    path = Path(directory) / name
    try:
        return load(path), path, None
    except CheckpointError as error:
        problem = error
    previous = previous_path(path)
    try:
        state = load(previous)
    except CheckpointError as error:
        raise CheckpointError(f"no usable checkpoint: {problem}; {error}") from error
    return state, previous, f"{problem}; continuing from the one before, {previous}"


def previous_path(path: str | Path) -> Path:
    """Return where ``save`` keeps the file that it replaces: ``last.pt`` → ``last.previous.pt``."""
    path = Path(path)
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def rng_state() -> dict[str, Any]:
    """Return the state of every global random generator, in a form that ``save`` accepts.

    These are torch's on the CPU and on each CUDA device, Python's, and numpy's if numpy is loaded.
    Where the program has not used CUDA yet, it is not started for the purpose.
    """
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "cuda": _cuda_states(),
        "python": random.getstate(),
    }
    if (numpy := sys.modules.get("numpy")) is not None:
        drawn = numpy.random.get_state(legacy=False)
        # The generator's own state holds an array, which the restricted unpickler refuses.
        inner = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in drawn["state"].items()}
        state["numpy"] = {**drawn, "state": inner}
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what ``rng_state`` returned, except for CUDA devices that this machine lacks."""
    # Generators take their state from the CPU, wherever the checkpoint was loaded to.
    torch.set_rng_state(state["torch"].cpu())
    for device, device_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(device_state.cpu(), device)
    random.setstate(state["python"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])


def save_weights(
    path: str | Path, model_state: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a model's state dict as safetensors, the form to share: tensors and text, no code.

    Views, tied and channels-last tensors are written as plain contiguous copies of their values.
    """
    from safetensors.torch import save as serialise

    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model_state.items()
    }
    content = serialise(tensors, dict(metadata))
    with atomic_write(path) as file:
        file.write(content)


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, on the CPU, and the metadata that ``save_weights`` wrote.

    Raises:
        CheckpointError: the file is missing, cut short or not safetensors. The format has no
            checksum, so a change inside a tensor goes unseen.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a usable safetensors file: {error}") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing that becomes ``path`` when the block ends without error.

    At every instant ``path`` is either what it was or the complete new file. The temporary file is
    gone afterwards, whether the block succeeds or fails.

    Raises:
        OSError: the file cannot be written; it names ``path``, which the system's error may not.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    try:
        with naming(path):
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_directory(path.parent)
    finally:
        with suppress(OSError):  # on a disk that has just become read-only it stays
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the name of a file to an `OSError` that has none, as that of a write on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _temporary_name(path: Path) -> Path:
    """Return a fresh hidden name beside ``path``, after removing what a killed process left there.

    Should another process be writing there still, it loses its temporary file and fails with an
    error; the bytes of the two never mix.
    """
    for leftover in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        with suppress(OSError):
            leftover.unlink()
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a file is what a process left that was killed in the middle of `atomic_write`."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def _second_name(path: Path, other: Path) -> None:
    """Give the file a second name, or a copy where the file system has no hard links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)
        with other.open("rb+") as file:
            os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """Bring a renaming to the disk. Windows cannot open a directory, and needs no such step."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_loadable(value: Any, where: str) -> None:
    """Refuse what ``weights_only=True`` would refuse to read back, naming the place."""
    kind = type(value)
    if kind in _MAPPINGS:
        for key, entry in value.items():
            _check_loadable(key, f"the key {key!r} of {where}")
            _check_loadable(entry, f"{where}[{key!r}]")
    elif kind in _SEQUENCES:
        for index, entry in enumerate(value):
            _check_loadable(entry, f"{where}[{index}]")
    elif kind not in _SCALARS:
        raise TypeError(
            f"save: {where} is a {kind.__module__}.{kind.__qualname__}, which cannot be loaded "
            "again safely; convert it to a tensor, a number, a str or a dict"
        )


def _cuda_states() -> list[Tensor]:
    if not torch.cuda.is_initialized():
        return []
    return torch.cuda.get_rng_state_all()


def _check_intact(path: Path, file: BinaryIO) -> None:
    """Test the archive's structure and the checksum of each of its members."""
    start = file.read(4)
    if not start:
        raise CheckpointError(f"{path} is empty")
    if start != b"PK\x03\x04":
        raise CheckpointError(f"{path} is not a checkpoint: it is not an archive of torch.save")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            # Before anything is unpacked: torch.save does not compress, so no part can be larger
            # than the file, and nothing has to be unpacked to find out.
            size = os.fstat(file.fileno()).st_size
            if any(m.compress_type for m in members) or sum(m.file_size for m in members) > size:
                raise zipfile.BadZipFile("its parts are compressed or claim more than there is")
            # Of two parts of one name, torch may read the other one. It also ignores the case.
            if len({member.filename.lower() for member in members}) < len(members):
                raise zipfile.BadZipFile("two of its parts have one name")
            damaged = archive.testzip()
            # The checksums do not cover the attributes, which torch leaves at 0. Of a member marked
            # as a directory it reads nothing, and returns uninitialised memory as the tensor.
            attributes = any(member.external_attr for member in members)
            for member in members:
                if member.filename.endswith("/data.pkl") and damaged is None:
                    _check_claims(archive.read(member))
    # BadZipFile, RuntimeError, NotImplementedError, ...: it depends on where the damage is.
    except Exception as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: wrong checksum (CRC-32) of its part {damaged}")
    if attributes:
        raise CheckpointError(f"{path} is damaged or foreign: torch.save sets no file attributes")


def _check_claims(pickled: bytes) -> None:
    """Refuse what makes an object of a size that is only claimed: no file of ours asks for it.

    The restricted unpickler would call ``bytearray(10**10)`` or ``torch.Tensor(10**10)``.
    """
    for operation, argument, _ in pickletools.genops(pickled):
        name = str(argument).rpartition(" ")[2] if operation.name == "GLOBAL" else ""
        if name.endswith(("bytearray", "Tensor")):
            raise pickle.UnpicklingError(f"it makes a {name} of any size")


def _load_restricted(path: Path, file: BinaryIO, map_location: str | torch.device) -> Any:
    """Read the archive with torch's restricted unpickler: tensors and plain values, no code.

    Torch's own message for a refused file is not passed on: it explains how to load the file all
    the same.
    """
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        problem = error
    except Exception as error:  # a foreign archive can fail in any way
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    unsafe: list[str] = []
    with suppress(Exception):
        file.seek(0)
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if not unsafe:
        raise CheckpointError(f"{path} is not a checkpoint of ours: not plain data") from problem
    raise CheckpointError(
        f"{path} is not loaded: it asks for {', '.join(sorted(unsafe))}, and a file that runs code "
        "when it is loaded can do anything on this computer"
    )
