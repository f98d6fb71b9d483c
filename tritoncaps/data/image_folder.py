"""Read a folder of images that has one subfolder for each class.

The layout is that of torchvision's ImageFolder, and on a clean folder both find the same classes,
labels and order. Folders of real users are not clean. ImageFolder takes `.git` for a class, follows
a link that leads back up until the system stops it, and meets a damaged file in the middle of the
training. Here every file is read once, before anything is trained. Only Pillow is needed.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from tritoncaps.data.image_layout import check_classes, counted, find_classes, find_parts
from tritoncaps.data.image_pixels import choose_size, read_images
from tritoncaps.data.sets import Dataset, DatasetError, ImageSet


def read_folder(root: Path, image_size: tuple[int, int] | None) -> Dataset:
    """Read a folder. `load_dataset` describes the layout, and what happens to the images.

    Args:
        root: the folder.
        image_size: (height, width) of the images in the data set, or None to choose it.

    Raises:
        DatasetError: the layout is another one, images are broken, or they do not fit into memory.
    """
    try:
        import PIL  # noqa: F401 (its absence is reported before the folder is searched)
    except ImportError as error:
        raise DatasetError(
            f"images are read by Pillow, which cannot be imported ({error}): "
            'pip install "tritoncaps[train]"'
        ) from error
    folders = find_parts(root)
    parts = {part: find_classes(folder) for part, folder in folders.items()}
    names = tuple(parts["train"])
    check_classes(parts, folders)
    files = [path for part in parts.values() for one in part.values() for path in one.images]
    size = image_size or choose_size(files, root)
    images = read_images(files, size, root)

    sets, first = {}, 0
    for part, classes in parts.items():
        counts = torch.tensor([len(classes[name].images) for name in names])
        labels = torch.arange(len(names)).repeat_interleave(counts)
        sets[part] = ImageSet(images[first : first + len(labels)], labels)
        first += len(labels)
    if len(sets) == 1:
        train, test = _split(sets["train"], names, root)
        tested = "tested on a fifth of each class"
    else:
        # Without a test set, the validation set takes its place.
        role = "test" if "test" in sets else "validation"
        train, test = sets["train"], sets.pop(role)
        tested = f"tested on {folders[role].name}/"
    validation = sets.get("validation")
    if validation is not None:
        tested += f", validated on {folders['validation'].name}/"
    others = sum((one.others for part in parts.values() for one in part.values()), Counter())
    skipped = f"; skipped {counted(others)}" if others else ""
    colours = "grey" if images.shape[1] == 1 else "RGB"
    return Dataset(
        name="folder",
        title=root.resolve().name,
        train=train,
        test=test,
        class_names=names,
        note=f"{len(names)} classes in {root}, {colours}, {size[0]}x{size[1]}, {tested}{skipped}",
        validation=validation,
    )


def _split(images: ImageSet, names: Sequence[str], root: Path) -> tuple[ImageSet, ImageSet]:
    """Take a fifth of each class for the test, at least one image, always the same."""
    generator = torch.Generator().manual_seed(0)
    test = torch.zeros(len(images), dtype=torch.bool)
    for label, name in enumerate(names):
        members = (images.labels == label).nonzero().squeeze(1)
        if len(members) == 1:
            raise DatasetError(
                f"{root / name} has 1 image, but one is needed for training and one for the test: "
                "add images of this class, or remove the folder"
            )
        chosen = torch.randperm(len(members), generator=generator)[: max(1, len(members) // 5)]
        test[members[chosen]] = True
    return images.subset(~test), images.subset(test)
