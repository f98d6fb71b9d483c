"""Read SVHN, house numbers in Google Street View, from the Matlab files of its authors."""

from collections.abc import Sequence
from pathlib import Path

import torch

from tritoncaps.data.files import DataFile, find_file, refuse
from tritoncaps.data.matlab import read_matlab
from tritoncaps.data.sets import ImageSet


def read_svhn(
    folder: Path, files: Sequence[DataFile], num_classes: int, verify: bool
) -> tuple[ImageSet, ImageSet]:
    """Read the training set and the test set, both files of which must be there.

    Args:
        folder: where the files are, plain or as .gz.
        files: the file of the training set and that of the test set. Their shape is that of X,
            (H, W, 3, N). y, (N, 1), has 1 .. 9 for these digits and 10 for 0.
        num_classes: 10.
        verify: accept only the published files, by shape and MD5. Without it, accept any
            well-formed files.

    Raises:
        DatasetError: a file is truncated, foreign or altered.
    """
    train, test = (_read_file(folder, file, num_classes, verify) for file in files)
    return train, test


def _read_file(folder: Path, file: DataFile, num_classes: int, verify: bool) -> ImageSet:
    path = find_file(folder, file) or folder / file.name
    arrays = read_matlab(path, file, ("X", "y"), verify)
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if len(arrays) < 2:
        refuse(path, file, "the arrays X and y", " and ".join(arrays) or "none of them")
    X, y = arrays["X"], arrays["y"]
    if verify and X.shape != file.shape:
        refuse(path, file, f"the shape {file.shape}", f"{shapes['X']}")
    if X.dtype != torch.uint8 or X.ndim != 4 or X.shape[2] != 3 or y.shape != (X.shape[3], 1):
        found = f"X {shapes['X']}, {X.dtype}, and y {shapes['y']}"
        refuse(path, file, "X (H, W, 3, N) of bytes and y (N, 1)", found)
    wrong = y[~torch.isin(y, torch.arange(1, num_classes + 1).to(y.dtype))]
    if len(wrong):
        refuse(path, file, f"labels in 1 .. {num_classes}", f"{wrong[0].item()}")
    labels = y[:, 0].to(torch.int64) % num_classes
    return ImageSet(X.permute(3, 2, 0, 1).contiguous(), labels)
