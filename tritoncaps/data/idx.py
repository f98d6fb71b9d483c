"""Read image sets in IDX format, the format of MNIST, and check every byte.

torchvision verifies a file only when it downloads it. Later it accepts any content of the right
shape, even labels that do not match the images. Here the files are verified each time they are
read, whoever put them there.
"""

import gzip
import hashlib
import io
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from tritoncaps.data.files import REMEDY, DataFile, find_file, open_file, refuse
from tritoncaps.data.sets import DatasetError, ImageSet


def read_idx(
    folder: Path, files: Sequence[DataFile], num_classes: int, verify: bool
) -> tuple[ImageSet, ImageSet]:
    """Read the training set and the test set from four IDX files, all of which must be there.

    Args:
        folder: where the files are, plain or as .gz.
        files: training images (N, H, W) and labels (N,), then test images and labels, all uint8.
        num_classes: labels are in 0 .. num_classes − 1.
        verify: accept only the published files, by shape and SHA-256. Without it, accept any
            well-formed files.

    Raises:
        DatasetError: a file is truncated, foreign or altered, or labels do not fit their images.
    """
    train = read_image_set(folder, files[0], files[1], num_classes, verify)
    test = read_image_set(folder, files[2], files[3], num_classes, verify)
    return train, test


def read_image_set(
    folder: Path, images: DataFile, labels: DataFile, num_classes: int, verify: bool
) -> ImageSet:
    """Read one file of images and the file of its labels. See `read_idx`."""
    pixels = _read_array(folder, images, verify)
    classes = _read_array(folder, labels, verify).to(torch.int64)
    if len(pixels) != len(classes):
        raise DatasetError(
            f"{folder / images.name} has {len(pixels)} images but {labels.name} beside it has "
            f"{len(classes)} labels. Delete the one that does not belong there, {REMEDY}."
        )
    if int(classes.max()) >= num_classes:
        refuse(folder / labels.name, f"labels in 0 .. {num_classes - 1}", f"{int(classes.max())}")
    return ImageSet(rearrange(pixels, "n h w -> n 1 h w"), classes)


def _read_array(folder: Path, file: DataFile, verify: bool) -> Tensor:
    path = find_file(folder, file) or folder / file.name
    try:
        with open_file(path) as stream:
            return _parse(path, stream, file, verify)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        refuse(path, f"a complete gzip file of {file.name}", f"an error in it ({error})")


def _parse(path: Path, stream: io.BufferedIOBase, file: DataFile, verify: bool) -> Tensor:
    """Parse unsigned bytes in IDX format: a magic number, the size of each axis, the bytes."""
    axes = len(file.shape)
    # Two zero bytes, 0x08 for unsigned bytes, and the number of axes.
    magic = 0x0800 + axes
    header_size = 4 + 4 * axes
    header = stream.read(header_size)
    if len(header) < header_size:
        refuse(path, f"{header_size + math.prod(file.shape)} bytes", f"{len(header)}")
    found_magic, *sizes = struct.unpack(f">{1 + axes}I", header)
    if found_magic != magic:
        refuse(path, f"the IDX magic number {magic:#010x} ({axes} axes)", f"{found_magic:#010x}")
    shape = tuple(sizes)
    if verify and shape != file.shape:
        refuse(path, f"the shape {file.shape}", f"{shape}")
    size = math.prod(shape)
    # Ask for one byte too many. This reveals a file that is too long and makes gzip check its CRC,
    # while a hostile .gz still cannot unpack to more. Without verification the size is no limit,
    # so everything is read.
    content = bytearray(stream.read(size + 1 if verify else -1))
    if len(content) != size:
        more = " or more" if verify and len(content) > size else ""
        refuse(path, f"{header_size + size} bytes", f"{header_size + len(content)}{more}")
    if size == 0:
        refuse(path, "at least one entry", f"the shape {shape}")
    if verify:
        found = hashlib.sha256(header + content).hexdigest()
        if found != file.sha256:
            refuse(path, f"the published content (SHA-256 {file.sha256})", f"another ({found})")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)
