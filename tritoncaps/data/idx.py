"""Read image sets in IDX format, the format of MNIST, and check every byte.

torchvision verifies a file only when it downloads it. Later it accepts any content of the right
shape, even labels that do not match the images. Here the files are verified each time they are
read, whoever put them there.
"""

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange

from tritoncaps.data.files import Content, DataFile, read_array, refuse, remedy
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


def read_emnist(
    folder: Path, files: Sequence[DataFile], num_classes: int, verify: bool
) -> tuple[ImageSet, ImageSet]:
    """Read files of EMNIST by `read_idx`. Their images are transposed: rows are columns."""
    train, test = read_idx(folder, files, num_classes, verify)
    return _transposed(train), _transposed(test)


def _transposed(images: ImageSet) -> ImageSet:
    return ImageSet(rearrange(images.images, "n c w h -> n c h w").contiguous(), images.labels)


def read_image_set(
    folder: Path, images: DataFile, labels: DataFile, num_classes: int, verify: bool
) -> ImageSet:
    """Read one file of images and the file of its labels. See `read_idx`."""
    pixels = read_array(folder, images, _header, verify)
    classes = read_array(folder, labels, _header, verify).to(torch.int64)
    if len(pixels) != len(classes):
        raise DatasetError(
            f"{folder / images.name} has {len(pixels)} images but {labels.name} beside it has "
            f"{len(classes)} labels. Delete the one that does not belong there, {remedy(labels)}."
        )
    if int(classes.max()) >= num_classes:
        path, found = folder / labels.name, f"{int(classes.max())}"
        refuse(path, labels, f"labels in 0 .. {num_classes - 1}", found)
    return ImageSet(rearrange(pixels, "n h w -> n 1 h w"), classes)


def _header(path: Path, stream: io.BufferedIOBase, file: DataFile) -> Content:
    """Read the header of unsigned bytes in IDX format: a magic number, the size of each axis."""
    axes = len(file.shape)
    # Two zero bytes, 0x08 for unsigned bytes, and the number of axes.
    magic = 0x0800 + axes
    size = 4 + 4 * axes
    header = stream.read(size)
    if len(header) < size:
        refuse(path, file, f"at least {size} bytes", f"{len(header)}")
    found_magic, *sizes = struct.unpack(f">{1 + axes}I", header)
    if found_magic != magic:
        refuse(
            path, file, f"the IDX magic number {magic:#010x} ({axes} axes)", f"{found_magic:#010x}"
        )
    return Content(header, torch.uint8, tuple(sizes))
