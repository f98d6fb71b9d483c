"""Files that survive a crash, and a file format that reveals damage.

`atomic_write` replaces a file as a whole or not at all. `write_sealed` and `read_sealed` keep
tensors and plain values in an ordinary safetensors file, which any safetensors reader opens. Its
metadata holds three strings beside ``"format": "pt"``:

- ``tritoncaps``: the version of this format
- ``header``: the plain values, as JSON
- ``sha256``: the seal, a hash of everything else: the metadata, the name, dtype, shape and offset
  of each tensor, and the bytes of the tensors

JSON has no tuples and no infinity, and its keys must be strings. So tuples, such floats, dicts with
other keys, and tensors are written as an object with one key: ``{"$tuple": [1, 2]}``,
``{"$float": "nan"}``, ``{"$dict": [[0, "value"]]}`` and ``{"$tensor": "name in the file"}``.

Reading executes nothing. It allocates no more than a small multiple of what the file holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

VERSION = "1"

# What every safetensors release that pyproject.toml allows can write and read.
_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
# Types are compared exactly: numpy's float64 is a float, and torch's version is a str.
_SCALARS = (type(None), bool, int, float, str)


class CheckpointError(RuntimeError):
    """A file cannot be used. The message names it and says what is wrong and what to do."""


# replacing files ----------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing that becomes `path` when the block ends without an error.

    At every instant `path` is either what it was or the complete new file. The temporary file is
    removed whether the block succeeds or fails.

    Raises:
        OSError: the file cannot be written. The error names `path`.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with naming(path, instead_of=temporary):
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_directory(path.parent)
    finally:
        with suppress(OSError):  # a disk that has just become read-only keeps the file
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: str | Path, instead_of: Path | None = None) -> Iterator[None]:
    """Add the file's name to an `OSError` without one, such as that of writing to a full disk.

    It also replaces the name `instead_of`, which means nothing to a user.
    """
    try:
        yield
    except OSError as error:
        is_hidden = instead_of is not None and error.filename == str(instead_of)
        if error.errno is None or (error.filename is not None and not is_hidden):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def temporary_name(path: Path) -> Path:
    """Return a new hidden name beside `path`, and remove what a killed process left there.

    If another process is still writing there, it loses its temporary file and fails with an error.
    Their bytes never mix.
    """
    for leftover in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        with suppress(OSError):
            leftover.unlink()
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether `path` is a leftover of a process that was killed during `atomic_write`."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def sync_directory(directory: Path) -> None:
    """Flush a rename to the disk. Windows cannot open a directory and does not need this."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# sealed files -------------------------------------------------------------------------------------


def write_sealed(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    *,
    function: str = "write_sealed",
    argument: str = "header",
) -> None:
    """Write tensors and a header to a sealed safetensors file, atomically.

    Shared, non-contiguous and channels-last tensors are written as contiguous copies.

    Args:
        path: the file to write; its directory must exist.
        tensors: any number of tensors by name.
        header: plain values in dicts, lists and tuples. A tensor among them is stored under its
            path: ``header["model"]["conv.weight"]`` as ``model.conv.weight``.
        function: the function to name in errors.
        argument: what that function calls its header.

    Raises:
        TypeError: the file could not give an entry back as it was.
        ValueError: a tensor is called ``__metadata__``, a name that safetensors reserves.
        OSError: the file cannot be written. An existing file there is untouched.
    """
    from safetensors.torch import save  # imported late, so that importing the package stays fast

    stored = {name: _copied(value, f"{function}: {name}") for name, value in tensors.items()}
    encoded = _encode(dict(header), f"{function}: {argument}", (), stored)
    if "__metadata__" in stored:
        raise ValueError(f"{function}: no tensor may be called '__metadata__'; rename it")
    table, data = _split(save(stored))
    metadata = {
        "format": "pt",
        "tritoncaps": VERSION,
        "header": json.dumps(encoded, allow_nan=False),
    }
    metadata["sha256"] = _seal(metadata, table, data)
    # Written here, because safetensors orders metadata differently in every process.
    start = json.dumps({"__metadata__": metadata, **table}).encode()
    start += b" " * (-len(start) % 8)
    with atomic_write(path) as file:
        file.write(len(start).to_bytes(8, "little"))
        file.write(start)
        file.write(data)


def read_sealed(
    path: str | Path, *, allow_unsealed: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write_sealed`, after comparing its contents with its seal.

    Args:
        path: the file.
        allow_unsealed: also accept safetensors files of other programs. Their header is empty, and
            a changed bit in them goes unnoticed.

    Returns:
        The tensors, on the CPU, except those that are part of the header; and the header.

    Raises:
        CheckpointError: the file is missing, empty, unreadable, truncated, damaged, foreign or of
            another version.
    """
    from safetensors.torch import load

    path = Path(path)
    content = _read(path)
    try:
        tensors = load(content)
        table, data = _split(content)
    except Exception as error:  # a foreign file can fail in any way
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    metadata = table.pop("__metadata__", {})
    # There are two keys, so that damage to one does not make the file look like another program's.
    if not metadata.keys() & {"tritoncaps", "sha256"}:
        if allow_unsealed:
            return tensors, {}
        raise CheckpointError(
            f"{path} was not written by tritoncaps: it has no seal, so nothing shows whether it is "
            "intact. load_model reads such weights if a config.json lies beside them"
        )
    if (version := metadata.get("tritoncaps", VERSION)) != VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, but this program reads version {VERSION}; "
            "use the tritoncaps release that wrote it"
        )
    seal = metadata.pop("sha256", None)
    if seal != _seal(metadata, table, data):
        raise _damaged(path, "its contents do not match its SHA-256")
    try:
        header = _decode(json.loads(metadata["header"]), tensors)
        return tensors, dict(header)
    except Exception as error:
        raise _damaged(path, f"its header cannot be read: {error}") from error


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged ({problem}); use an earlier copy")


def _read(path: Path) -> bytes:
    """Return the content of a file that may be safetensors. Refuse others unread."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            claimed = int.from_bytes(file.read(8), "little")
            opening = file.read(1)
            if size == 0:
                raise CheckpointError(f"{path} is empty; use an earlier copy")
            if size > 8 and opening != b"{":
                raise CheckpointError(f"{path} is not a safetensors file, and no other is read")
            if 8 + claimed > size:
                raise _damaged(path, f"it has {size} bytes and claims {8 + claimed} or more")
            file.seek(0)
            return file.read()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _split(content: bytes) -> tuple[dict[str, Any], memoryview]:
    """Return the header of a safetensors file, and the bytes of its tensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), memoryview(content)[end:]


def _seal(metadata: Mapping[str, str], table: Mapping[str, Any], data: memoryview) -> str:
    digest = hashlib.sha256(json.dumps([metadata, table], sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()


def _copied(value: object, where: str) -> Tensor:
    """Return a contiguous copy on the CPU."""
    if type(value) not in (Tensor, nn.Parameter):
        raise TypeError(f"{where} is a {_name(value)}; convert it to a torch.Tensor")
    tensor: Tensor = value  # type: ignore[assignment]
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
        kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        raise TypeError(
            f"{where} is a {kind} tensor of {tensor.dtype}, which cannot be stored; "
            "convert it to a strided tensor of real numbers"
        )
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _encode(value: Any, where: str, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """Turn a value into JSON, and move its tensors to `tensors`."""
    kind = type(value)
    if kind is float and not math.isfinite(value):
        return {"$float": str(value)}
    if kind in _SCALARS:
        return value
    if kind in (list, tuple):
        items = [
            _encode(item, f"{where}[{i}]", (*path, str(i)), tensors) for i, item in enumerate(value)
        ]
        return items if kind is list else {"$tuple": items}
    if kind in (dict, OrderedDict):
        for key in value:
            if type(key) not in _SCALARS:
                raise TypeError(
                    f"{where} has the key {key!r}, a {_name(key)}; convert it to a str or an int"
                )
        entries = {
            key: _encode(entry, f"{where}[{key!r}]", (*path, str(key)), tensors)
            for key, entry in value.items()
        }
        if all(isinstance(key, str) and not key.startswith("$") for key in entries):
            return entries
        return {"$dict": [[_encode(k, where, path, tensors), v] for k, v in entries.items()]}
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{where} is a {_name(value)}, which cannot be stored; "
            "convert it to a tensor, a number, a str, a list or a dict"
        )
    name = ".".join(path)
    while name in tensors:  # key "a.b" in "c" collides with key "b" in "a" in "c"
        name += "'"
    tensors[name] = _copied(value, where)
    return {"$tensor": name}


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `_encode`, and take the tensors that it puts back out of `tensors`."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _decode(entry, tensors) for key, entry in value.items()}
    content = value[tag]
    if tag == "$tuple":
        return tuple(_decode(item, tensors) for item in content)
    if tag == "$float":
        return float(content)
    if tag == "$dict":
        return {_decode(key, tensors): _decode(entry, tensors) for key, entry in content}
    if tag == "$tensor":
        return tensors.pop(content)
    raise ValueError(f"unknown entry {tag!r}")


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
