"""The published files of a data set: how they are found, opened and refused."""

import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tritoncaps.data.sets import DatasetError

REMEDY = "then put the published file there or run again with downloading allowed"


@dataclass(frozen=True)
class DataFile:
    """A published file of one array.

    Args:
        name: its name in the folder of the data set. `name`.gz is read as well.
        shape: the shape of the array.
        sha256: the checksum of its uncompressed content.
        download: the name under which the mirrors serve it. A `name`.gz is unpacked.
        download_hash: the checksum of what they serve, in pooch's notation: "md5:0123…".
    """

    name: str
    shape: tuple[int, ...]
    sha256: str
    download: str
    download_hash: str


def find_file(folder: Path, file: DataFile) -> Path | None:
    """Return the path of a file, uncompressed or as .gz, or None if there is none."""
    for path in (folder / file.name, folder / f"{file.name}.gz"):
        if path.is_file():
            return path
    return None


def open_file(path: Path) -> io.BufferedIOBase:
    """Open a file for reading. A .gz is unpacked in memory, so nothing is written to disk."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def refuse(path: Path, expected: str, found: str) -> NoReturn:
    """Raise the `DatasetError` for a damaged or foreign file."""
    raise DatasetError(
        f"{path} is damaged or not what its name says: expected {expected}, it has {found}. "
        f"Delete it, {REMEDY}."
    )
