"""Read CIFAR-10 in its binary form: records of a label and three planes of 32×32 pixels.

The other form of CIFAR-10, "python version", consists of pickles. Reading a pickle can run any
code, so it is not read here.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import torch

from tritoncaps.data.files import Content, DataFile, read_array, refuse
from tritoncaps.data.sets import ImageSet

_PLANES = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32


def read_cifar(
    folder: Path, files: Sequence[DataFile], num_classes: int, verify: bool
) -> tuple[ImageSet, ImageSet]:
    """Read the training set and the test set, all files of which must be there.

    Args:
        folder: where the files are, plain or as .gz.
        files: the batches of the training set, then that of the test set.
        num_classes: labels are in 0 .. num_classes − 1.
        verify: accept only files of 10,000 images. Without it, accept any number of them.

    Raises:
        DatasetError: a file is truncated or foreign.
    """
    batches = [_read_batch(folder, file, num_classes, verify) for file in files]
    train = ImageSet(
        torch.cat([batch.images for batch in batches[:-1]]),
        torch.cat([batch.labels for batch in batches[:-1]]),
    )
    return train, batches[-1]


def _read_batch(folder: Path, file: DataFile, num_classes: int, verify: bool) -> ImageSet:
    records = read_array(folder, file, _header, verify)
    labels = records[:, 0].to(torch.int64)
    if int(labels.max()) >= num_classes:
        refuse(
            folder / file.name, file, f"labels in 0 .. {num_classes - 1}", f"{int(labels.max())}"
        )
    return ImageSet(records[:, 1:].reshape(-1, *_PLANES).contiguous(), labels)


def _header(path: Path, stream: io.BufferedIOBase, file: DataFile) -> Content:
    """Count the records: there is no header."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if size == 0 or size % RECORD:
        refuse(path, file, f"records of {RECORD} bytes", f"{size} bytes")
    return Content(b"", torch.uint8, (size // RECORD, RECORD))
