"""Read affNIST: MNIST under affine maps, in the Matlab files of its author.

The protocol is that of Sabour 2017, section 5.2: train on centred digits, test on mapped ones.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange

from tritoncaps.data.files import DataFile, find_file, refuse
from tritoncaps.data.matlab import read_matlab
from tritoncaps.data.sets import ImageSet

_IMAGE, _LABEL = "affNISTdata.image", "affNISTdata.label_int"
_SIDE = 40


def read_affnist(
    folder: Path, files: Sequence[DataFile], num_classes: int, verify: bool
) -> tuple[ImageSet, ImageSet]:
    """Read the training set and the test set, both files of which must be there.

    Args:
        folder: where the files are, plain or as .gz.
        files: the file of the training set and that of the test set. The shape of each is that of
            its images, (1600, N): a column is an image, row by row.
        num_classes: labels are in 0 .. num_classes − 1.
        verify: accept only files of these shapes. Without it, accept any number of images.

    Raises:
        DatasetError: a file is truncated or foreign.
    """
    train, test = (_read_file(folder, file, num_classes, verify) for file in files)
    return train, test


def _read_file(folder: Path, file: DataFile, num_classes: int, verify: bool) -> ImageSet:
    path = find_file(folder, file) or folder / file.name
    arrays = read_matlab(path, file, (_IMAGE, _LABEL), verify)
    if len(arrays) < 2:
        refuse(path, file, f"{_IMAGE} and {_LABEL}", " and ".join(arrays) or "none of them")
    pixels, labels = arrays[_IMAGE], arrays[_LABEL]
    shapes = f"{_IMAGE} {tuple(pixels.shape)}, {pixels.dtype}, and {_LABEL} {tuple(labels.shape)}"
    if verify and pixels.shape != file.shape:
        refuse(path, file, f"the shape {file.shape}", f"{tuple(pixels.shape)}")
    if pixels.dtype != torch.uint8 or pixels.ndim != 2 or len(pixels) != _SIDE**2:
        refuse(path, file, f"images ({_SIDE**2}, N) of bytes", shapes)
    if labels.shape != (1, pixels.shape[1]):
        refuse(path, file, f"labels (1, {pixels.shape[1]})", shapes)
    wrong = labels[~torch.isin(labels, torch.arange(num_classes).to(labels.dtype))]
    if len(wrong):
        refuse(path, file, f"labels in 0 .. {num_classes - 1}", f"{wrong[0].item()}")
    images = rearrange(pixels, "(h w) n -> n 1 h w", h=_SIDE)
    return ImageSet(images.contiguous(), labels[0].to(torch.int64))
