"""The published files of a data set: how they are found, opened and refused."""

import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from tritoncaps.data.sets import DatasetError


@dataclass(frozen=True)
class DataFile:
    """A published file of one array.

    Args:
        name: its name in the folder of the data set. `name`.gz is read as well.
        shape: the shape of the array.
        sha256: the checksum of its uncompressed content, or "" if it is not known.
        download: the name under which the mirrors serve it. A `name`.gz is unpacked.
        download_hash: the checksum of what they serve, in pooch's notation: "md5:0123…".
    """

    name: str
    shape: tuple[int, ...]
    sha256: str = ""
    download: str = ""
    download_hash: str = ""

    @property
    def checksum(self) -> tuple[str, str] | None:
        """Name and checksum of the uncompressed content, or None if none is known.

        What the mirrors serve uncompressed has the checksum of the download.
        """
        if self.sha256:
            return "SHA-256", self.sha256
        if self.download == self.name and self.download_hash:
            algorithm, checksum = self.download_hash.split(":")
            return algorithm.upper(), checksum
        return None


class Content(NamedTuple):
    """What the header of a file says about the array that follows it."""

    header: bytes
    dtype: torch.dtype
    shape: tuple[int, ...]


# Reads the header of a file from its beginning, given its path for errors; refuses a foreign one.
Header = Callable[[Path, io.BufferedIOBase, DataFile], Content]


def find_file(folder: Path, file: DataFile) -> Path | None:
    """Return the path of a file, uncompressed or as .gz, or None if there is none.

    Raises:
        DatasetError: the folder cannot be read.
    """
    for path in (folder / file.name, folder / f"{file.name}.gz"):
        try:
            if path.is_file():
                return path
        except OSError as error:
            _unreadable(path, error)
    return None


def open_file(path: Path) -> io.BufferedIOBase:
    """Open a file for reading. A .gz is unpacked in memory, so nothing is written to disk."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


@contextmanager
def opened(path: Path, file: DataFile) -> Iterator[io.BufferedIOBase]:
    """Open a file for reading, and refuse it if it cannot be read to its end.

    Raises:
        DatasetError: the system refuses to read it, or its compression is damaged.
    """
    try:
        with open_file(path) as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        refuse(path, file, f"a complete gzip file of {file.name}", f"an error in it ({error})")
    except OSError as error:
        _unreadable(path, error)


def check_content(path: Path, file: DataFile, content: bytes) -> None:
    """Refuse uncompressed content other than the published one, if its checksum is known.

    Raises:
        DatasetError: the content is another one.
    """
    if file.checksum is None:
        return
    name, expected = file.checksum
    found = hashlib.new(name.replace("-", ""), content).hexdigest()
    if found != expected:
        refuse(path, file, f"the published content ({name} {expected})", f"another ({found})")


def read_array(folder: Path, file: DataFile, read_header: Header, verify: bool) -> Tensor:
    """Read an array that fills the rest of a file behind its header, little-endian.

    Args:
        folder: where the file is, plain or as .gz.
        file: the published file.
        read_header: reads the header.
        verify: accept only the published file, by shape and by checksum if that is known. Without
            it, accept any well-formed one.

    Raises:
        DatasetError: the file is truncated, foreign or altered.
    """
    path = find_file(folder, file) or folder / file.name
    with opened(path, file) as stream:
        return _read_content(path, stream, read_header(path, stream, file), file, verify)


def _read_content(
    path: Path, stream: io.BufferedIOBase, expected: Content, file: DataFile, verify: bool
) -> Tensor:
    header, dtype, shape = expected
    if verify and shape != file.shape:
        refuse(path, file, f"the shape {file.shape}", f"{shape}")
    size = math.prod(shape) * dtype.itemsize
    # Ask for one byte too many. This reveals a file that is too long and makes gzip check its CRC,
    # while a hostile .gz still cannot unpack to more. Without verification the size is no limit,
    # so everything is read.
    content = bytearray(stream.read(size + 1 if verify else -1))
    if len(content) != size:
        more = " or more" if verify and len(content) > size else ""
        refuse(path, file, f"{len(header) + size} bytes", f"{len(header) + len(content)}{more}")
    if size == 0:
        refuse(path, file, "at least one entry", f"the shape {shape}")
    if verify:
        check_content(path, file, header + content)
    return torch.frombuffer(content, dtype=dtype).reshape(shape)


def _unreadable(path: Path, error: OSError) -> NoReturn:
    reason = error.strerror or str(error)
    raise DatasetError(
        f"{path} cannot be read: {reason}. Correct that, or give another data_dir."
    ) from error


def remedy(file: DataFile) -> str:
    """Say what to do once a file is deleted."""
    again = " or run again with downloading allowed" if file.download else ""
    return f"then put the published file there{again}"


def refuse(path: Path, file: DataFile, expected: str, found: str) -> NoReturn:
    """Raise the `DatasetError` for a damaged or foreign file."""
    raise DatasetError(
        f"{path} is damaged or not what its name says: expected {expected}, it has {found}. "
        f"Delete it, {remedy(file)}."
    )
