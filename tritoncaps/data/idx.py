"""MNIST and Fashion-MNIST: their files, read and checked.

torchvision's folders and file names are kept, so that one copy serves both. The files are read
here and not by torchvision, for two reasons. torchvision checks a file when it downloads it and
never again: it takes any content of the right shape, and labels that do not match the images. And
it cannot always be imported. So torchvision does the downloading, see `download.py`, and every byte
that is used has been checked here, whoever put it there.
"""

import gzip
import hashlib
import io
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from einops import rearrange
from torch import Tensor

from tritoncaps.data.sets import DatasetError, ImageSet


@dataclass(frozen=True)
class IdxFile:
    """A published file of bytes in IDX format: its name, axes, and SHA-256 when uncompressed."""

    name: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class IdxSet:
    """A published data set of four IDX files; `folder` is also the name of torchvision's class."""

    name: str
    title: str
    folder: str
    class_names: tuple[str, ...]
    train_images: IdxFile
    train_labels: IdxFile
    test_images: IdxFile
    test_labels: IdxFile

    @property
    def files(self) -> tuple[IdxFile, ...]:
        """The four files."""
        return self.train_images, self.train_labels, self.test_images, self.test_labels


def _published(name: str, title: str, folder: str, names: tuple[str, ...], *sums: str) -> IdxSet:
    return IdxSet(
        name,
        title,
        folder,
        names,
        IdxFile("train-images-idx3-ubyte", (60000, 28, 28), sums[0]),
        IdxFile("train-labels-idx1-ubyte", (60000,), sums[1]),
        IdxFile("t10k-images-idx3-ubyte", (10000, 28, 28), sums[2]),
        IdxFile("t10k-labels-idx1-ubyte", (10000,), sums[3]),
    )


_REMEDY = "then put the published file there or run again with downloading allowed"

# The sums are of the uncompressed content, since the same content is found in several gzip files.
# MNIST's were computed from the files. Fashion-MNIST's are the ones that several projects publish
# independently of each other, all the same; they have not been computed again here.
IDX_SETS = {
    "mnist": _published(
        "mnist",
        "MNIST",
        "MNIST",
        tuple("0123456789"),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion-mnist": _published(
        "fashion-mnist",
        "Fashion-MNIST",
        "FashionMNIST",
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}


def find_file(folder: Path, file: IdxFile) -> Path | None:
    """Return where a file lies, uncompressed or as .gz, or None."""
    for path in (folder / file.name, folder / f"{file.name}.gz"):
        if path.is_file():
            return path
    return None


def read_image_set(
    folder: Path, images: IdxFile, labels: IdxFile, num_classes: int, *, verify: bool
) -> ImageSet:
    """Read and check a file of images and the file of its labels, both of which must be there.

    A .gz is unpacked in memory: nothing is written, so nothing half-written can be left behind.

    Args:
        folder: where the files lie.
        images: the file of images, uint8 (N, H, W).
        labels: the file of labels, uint8 (N,).
        num_classes: labels lie in 0 .. num_classes − 1.
        verify: take the published files alone, by shape and SHA-256; else any well-formed pair.

    Raises:
        DatasetError: a file is truncated, foreign or altered, or the two do not belong together.
    """
    pixels = _read_idx(folder, images, verify=verify)
    classes = _read_idx(folder, labels, verify=verify).to(torch.int64)
    if len(pixels) != len(classes):
        raise DatasetError(
            f"{folder / images.name} has {len(pixels)} images but {labels.name} beside it has "
            f"{len(classes)} labels. Delete the one that does not belong there, {_REMEDY}."
        )
    if int(classes.max()) >= num_classes:
        _fail(folder / labels.name, f"labels in 0 .. {num_classes - 1}", f"{int(classes.max())}")
    return ImageSet(rearrange(pixels, "n h w -> n 1 h w"), classes)


def _read_idx(folder: Path, file: IdxFile, *, verify: bool) -> Tensor:
    path = find_file(folder, file) or folder / file.name
    try:
        with _open(path) as stream:
            return _parse(path, stream, file, verify=verify)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        _fail(path, f"a complete gzip file of {file.name}", f"an error in it ({error})")


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _parse(path: Path, stream: io.BufferedIOBase, file: IdxFile, *, verify: bool) -> Tensor:
    """Read an IDX file of unsigned bytes: a magic number, the size of each axis, the bytes."""
    axes = len(file.shape)
    # Two zero bytes, 0x08 for unsigned bytes, and the number of axes.
    magic = 0x0800 + axes
    header_size = 4 + 4 * axes
    header = stream.read(header_size)
    if len(header) < header_size:
        _fail(path, f"{header_size + math.prod(file.shape)} bytes", f"{len(header)}")
    found_magic, *sizes = struct.unpack(f">{1 + axes}I", header)
    if found_magic != magic:
        _fail(path, f"the IDX magic number {magic:#010x} ({axes} axes)", f"{found_magic:#010x}")
    shape = tuple(sizes)
    if verify and shape != file.shape:
        _fail(path, f"the shape {file.shape}", f"{shape}")
    size = math.prod(shape)
    # One byte more than there should be: it shows a file that is too long, makes gzip compare its
    # check sum, and bounds what a hostile .gz can unpack to. A size that is not the published one
    # bounds nothing.
    content = bytearray(stream.read(size + 1 if verify else -1))
    if len(content) != size:
        more = " or more" if verify and len(content) > size else ""
        _fail(path, f"{header_size + size} bytes", f"{header_size + len(content)}{more}")
    if size == 0:
        _fail(path, "at least one entry", f"the shape {shape}")
    if verify:
        found = hashlib.sha256(header + content).hexdigest()
        if found != file.sha256:
            _fail(path, f"the published content (SHA-256 {file.sha256})", f"another ({found})")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)


def _fail(path: Path, expected: str, found: str) -> NoReturn:
    raise DatasetError(
        f"{path} is damaged or not what its name says: expected {expected}, it has {found}. "
        f"Delete it, {_REMEDY}."
    )
