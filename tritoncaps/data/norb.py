"""Read smallNORB: photographs of toys from many viewpoints, in the binary format of its authors.

The names of the files end in .mat, but they have nothing to do with Matlab. All numbers are
little-endian: a magic number for the type, the number of axes, the size of each axis (at least
three are written, whatever the number of axes), then the content, row by row.
"""

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tritoncaps.data.files import Content, DataFile, read_array, refuse, remedy
from tritoncaps.data.sets import DatasetError
from tritoncaps.data.views import ViewSet

# The magic numbers of the two types that smallNORB has.
_TYPES = {0x1E3D4C55: torch.uint8, 0x1E3D4C54: torch.int32}
# The columns of an info file and their values: instance, elevation, azimuth, lighting.
_LIMITS = (("instances", 10), ("elevations", 9), ("azimuths", 36), ("lightings", 6))
# The instances of each class in the training set, and those in the test set.
_INSTANCES = ((4, 6, 7, 8, 9), (0, 1, 2, 3, 5))
# Images are averaged in parts, which keeps the memory small.
_PART = 1000


def read_norb(
    folder: Path, files: Sequence[DataFile], num_classes: int, verify: bool
) -> tuple[ViewSet, ViewSet]:
    """Read the training set and the test set from six files, all of which must be there.

    The images are stereo pairs, so they have two channels. Each 2×2 pixels are averaged, as in
    Hinton, Sabour, Frosst: Matrix Capsules with EM Routing (2018): 96×96 becomes 48×48. This takes
    1 GB of memory for a moment, and the two sets together 224 MB.

    Args:
        folder: where the files are, plain or as .gz.
        files: images (N, 2, H, W), categories (N,) and info (N, 4) of the training set, then of the
            test set.
        num_classes: categories are in 0 .. num_classes − 1.
        verify: accept only files of these shapes, with the published instances in each set. Without
            it, accept any well-formed files.

    Raises:
        DatasetError: a file is truncated or foreign, or its content does not fit the others.
    """
    parts = files[:3], files[3:]
    train, test = (_read_set(folder, part, num_classes, verify) for part in parts)
    if verify:
        for part, images, expected in zip(parts, (train, test), _INSTANCES, strict=True):
            found = tuple(images.view("instance").unique().tolist())
            if not set(found) <= set(expected):
                refuse(folder / part[2].name, part[2], f"the instances {expected}", f"{found}")
    return train, test


def _read_set(folder: Path, files: Sequence[DataFile], num_classes: int, verify: bool) -> ViewSet:
    pixels, categories, info = (read_array(folder, file, _header, verify) for file in files)
    for file, array in zip(files[1:], (categories, info), strict=True):
        if len(array) != len(pixels):
            raise DatasetError(
                f"{folder / files[0].name} has {len(pixels)} images but {file.name} beside it has "
                f"{len(array)} entries. Delete the one that does not belong there, {remedy(file)}."
            )
    path = folder / files[0].name
    if pixels.dtype != torch.uint8:
        refuse(path, files[0], "pixels of one byte", "int32")
    if min(pixels.shape[2:]) < 2:
        refuse(path, files[0], "images of 2x2 pixels or more", f"the shape {tuple(pixels.shape)}")
    _check_range(folder, files[1], "categories", categories, num_classes)
    if tuple(info.shape[1:]) != (4,):
        refuse(folder / files[2].name, files[2], "4 columns", f"the shape {tuple(info.shape)}")
    for column, (name, count) in enumerate(_LIMITS):
        _check_range(folder, files[2], name, info[:, column], count)
    views = info.to(torch.int64)
    # The elevations are 30, 35, ... 70 degrees, and the azimuths are written in tens of degrees.
    views[:, 1] = 30 + 5 * views[:, 1]
    views[:, 2] *= 10
    return ViewSet(_halved(pixels), categories.to(torch.int64), views)


def _check_range(folder: Path, file: DataFile, name: str, values: Tensor, count: int) -> None:
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest >= count:
        found = f"{lowest if lowest < 0 else highest}"
        refuse(folder / file.name, file, f"{name} in 0 .. {count - 1}", found)


def _halved(pixels: Tensor) -> Tensor:
    """Average each 2×2 pixels; the last row or column of an odd number is left out."""
    parts = [
        torch.nn.functional.avg_pool2d(part.float(), 2).round().to(torch.uint8)
        for part in pixels.split(_PART)
    ]
    return torch.cat(parts)


def _header(path: Path, stream: io.BufferedIOBase, file: DataFile) -> Content:
    """Read what comes before the content."""
    axes = len(file.shape)
    size = 8 + 4 * max(3, axes)
    header = stream.read(size)
    if len(header) < size:
        refuse(path, file, f"at least {size} bytes", f"{len(header)}")
    magic, found_axes, *sizes = struct.unpack(f"<Ii{size // 4 - 2}i", header)
    if magic not in _TYPES:
        known = " or ".join(f"{number:#x}" for number in _TYPES)
        refuse(path, file, f"the magic number {known}", f"{magic:#x}")
    if found_axes != axes:
        refuse(path, file, f"{axes} axes", f"{found_axes}")
    if min(sizes[:axes]) < 1:
        refuse(path, file, "at least one entry", f"the shape {tuple(sizes[:axes])}")
    return Content(header, _TYPES[magic], tuple(sizes[:axes]))
