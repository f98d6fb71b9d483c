"""Read a folder of images that has one subfolder for each class.

The layout is that of torchvision's ImageFolder, and on a clean folder both find the same classes,
labels and order. Folders of real users are not clean. ImageFolder takes `.git` for a class, follows
a link that leads back up until the system stops it, and meets a damaged file in the middle of the
training. Here every file is read once, before anything is trained. Only Pillow is needed.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor

from tritoncaps.data.sets import Dataset, DatasetError, ImageSet

T = TypeVar("T")

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Pillow recognizes a file by its content, so a .png may hold a JPEG. No other reader is tried.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
_BITS_PER_SAMPLE = 258  # a tag of TIFF

# Names of the parts of a data set, in lower case.
_PARTS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip

# What archives, Python and file servers leave behind.
_LEFTOVERS = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "lost+found"}

# The size of images that differ in size, or that are larger than `_LARGEST_OWN` on a side.
_USUAL, _LARGEST_OWN = 32, 64

_LAYOUT = (
    "Each class needs a subfolder of its own that holds its images, such as {0}/cat/1.png and "
    "{0}/dog/1.png"
)
_SHOWN = 5


@dataclass
class _Class:
    """The images below one folder, and how many files of other types there are, by suffix."""

    folder: Path
    images: list[Path]
    others: Counter[str]


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
    folders = _find_parts(root)
    parts = {part: _find_classes(folder) for part, folder in folders.items()}
    names = tuple(parts["train"])
    _check_classes(parts, folders)
    files = [path for part in parts.values() for one in part.values() for path in one.images]
    size = image_size or _choose_size(files, root)
    images = _read_all(files, size, root)

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
    skipped = f"; skipped {_counted(others)}" if others else ""
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


# -- which files there are


def _find_parts(root: Path) -> dict[str, Path]:
    """Return the folder of each part, of "train" alone where `root` itself holds the classes."""
    folders = _subfolders(root)
    found: dict[str, list[Path]] = {}
    for folder in folders:
        if (part := _PARTS.get(folder.name.lower())) is not None:
            found.setdefault(part, []).append(folder)
    are_parts = bool(folders) and sum(map(len, found.values())) == len(folders)
    # A folder "train" with images of its own is a class beside others, such as "bus".
    if not are_parts and not any(map(_subfolders, found.get("train", []))):
        return {"train": root}
    for same in found.values():
        if len(same) > 1:
            names = " and ".join(f"{folder.name}/" for folder in same)
            raise DatasetError(f"{root} has {names}, which mean the same: keep one of them")
    if "train" not in found:
        names = " and ".join(f"{folder.name}/" for folder in folders)
        raise DatasetError(
            f"{root} has {names} but no train/: add it, or give the folder of the classes itself"
        )
    return {part: found[part][0] for part in ("train", "validation", "test") if part in found}


def _find_classes(folder: Path) -> dict[str, _Class]:
    """Return the classes of a part by name, in the order of their labels."""
    folders = _subfolders(folder)
    if not folders:
        inside = sum(1 for _ in _visible(folder))
        files = f"has {_plural(inside)} but no subfolders" if inside else "is empty"
        raise DatasetError(f"{folder} {files}. {_LAYOUT.format(folder)}")
    # A link to one of these adds nothing: it leads back up, or from one class into another.
    known = {*folder.resolve().parents, *(path.resolve() for path in (folder, *folders))}
    return {path.name: _find_images(path, known) for path in folders}


def _find_images(folder: Path, known: set[Path]) -> _Class:
    """Search a folder and those in it, in ImageFolder's order."""
    pending, seen, files = [folder], set(known), []
    while pending:
        for path in _visible(pending.pop()):
            if not os.path.isdir(path):
                # A pipe or the like would wait for a writer. A broken link is named as damaged.
                if os.path.isfile(path) or not os.path.exists(path):
                    files.append(path)
            elif (real := path.resolve()) not in seen:
                seen.add(real)
                pending.append(path)
    files.sort(key=lambda path: (str(path.parent), path.name))
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    others = Counter(
        path.suffix or path.name for path in files if path.suffix.lower() not in SUFFIXES
    )
    return _Class(folder, images, others)


def _check_classes(parts: dict[str, dict[str, _Class]], folders: dict[str, Path]) -> None:
    """Refuse a single class, a class without images, and parts that differ in their classes."""
    train, folder = parts["train"], folders["train"]
    if len(train) == 1:
        (name,) = train
        inside = _subfolders(folder / name)
        hint = f". Did you mean {folder / name}, which has subfolders?" if inside else ""
        raise DatasetError(
            f"{folder} has one class, {name}, but at least two are needed{hint or ': add another'}"
        )
    for part, classes in parts.items():
        for difference, problem, remedy in (
            ([name for name in train if name not in classes], "lacks", "add images of them"),
            ([name for name in classes if name not in train], "has", "add them to the training"),
        ):
            if difference:
                other = "has" if problem == "lacks" else "lacks"
                raise DatasetError(
                    f"{folders[part]} {problem} the classes {_listed(difference)}, which {folder} "
                    f"{other}: {remedy}, or remove their folders"
                )
    for classes in parts.values():
        for one in classes.values():
            if not one.images:
                held = f"only {_counted(one.others)}" if one.others else "nothing"
                raise DatasetError(
                    f"{one.folder} has no images ({held}): add images of this class, or remove the "
                    f"folder. Images are files with the suffixes {', '.join(SUFFIXES)}"
                )


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if os.path.isdir(path)]


def _visible(folder: Path) -> Iterator[Path]:
    """List a folder in order of the names, without what is hidden or left behind by a system."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        raise DatasetError(f"the folder {folder} does not exist: check data_dir") from None
    except NotADirectoryError:
        raise DatasetError(
            f"{folder} is a file: data_dir must be a folder. An archive has to be unpacked first"
        ) from None
    except OSError as error:
        raise DatasetError(f"the folder {folder} cannot be read: {error.strerror}") from error
    for name in names:
        if not name.startswith(".") and name not in _LEFTOVERS:
            yield folder / name


# -- what is in them


def _choose_size(files: Sequence[Path], root: Path) -> tuple[int, int]:
    """Return (height, width): that of the images if they are small and equal, else the usual."""
    from PIL import Image, ImageOps

    usual, common = (_USUAL, _USUAL), None
    for path in files:
        try:
            with Image.open(path, formats=_FORMATS) as image:
                if max(image.size) > _LARGEST_OWN:
                    return usual
                is_square = image.width == image.height
                width, height = (image if is_square else ImageOps.exif_transpose(image)).size
        except Exception:
            _read_all(files, usual, root)  # raises an error that names every damaged image
            raise
        if common not in (None, (height, width)):
            return usual
        common = (height, width)
    return common or usual


def _read_all(files: Sequence[Path], size: tuple[int, int], root: Path) -> Tensor:
    """Read images as (N, C, H, W), with C = 1 if all are grey and 3 otherwise."""
    images = _allocate(len(files), 1, size)
    broken = []
    # Pillow decodes outside the lock of the interpreter, so threads are enough.
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        results = pool.map(partial(_try_to_read, size=size), files)
        for index, pixels in enumerate(_with_progress(results, len(files))):
            if isinstance(pixels, str):
                broken.append(f"{files[index].relative_to(root)} ({pixels})")
                continue
            if len(pixels) > images.shape[1]:
                grey, images = images, _allocate(len(files), 3, size)
                images[:index] = grey[:index]
            images[index] = pixels
    if broken:
        raise DatasetError(
            f"{len(broken):,} of {len(files):,} images in {root} cannot be read: "
            f"{_listed(broken)}. Repair or remove them"
        )
    return images


def _allocate(count: int, channels: int, size: tuple[int, int]) -> Tensor:
    """Return memory for images, or refuse if it leaves no room for a training beside it."""
    needed = count * channels * size[0] * size[1]
    memory = _memory()
    if memory is not None and needed > memory / 2:
        raise DatasetError(
            f"{count:,} images of {channels}x{size[0]}x{size[1]} bytes take {needed / 1e9:,.1f} "
            f"GB, more than half of this machine's {memory / 1e9:,.1f} GB: give a smaller "
            "image_size, or fewer images"
        )
    return torch.empty(count, channels, *size, dtype=torch.uint8)


def _memory() -> int | None:
    """Return the memory of the machine in bytes, or None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _try_to_read(path: Path, size: tuple[int, int]) -> Tensor | str:
    """Return the pixels of an image, or what is wrong with it."""
    from PIL import UnidentifiedImageError

    try:
        return _read(path, size)
    except UnidentifiedImageError:
        return "not an image" if path.stat().st_size else "empty"
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # Decoders of damaged files raise anything.
        return str(error) or type(error).__name__


def _read(path: Path, size: tuple[int, int]) -> Tensor:
    """Read one image as bytes, (1, H, W) if it is grey and (3, H, W) otherwise."""
    from PIL import Image, ImageOps
    from PIL.TiffImagePlugin import TiffImageFile

    height, width = size
    with Image.open(path, formats=_FORMATS) as opened:
        # A JPEG many times larger than needed is decoded at a fraction of its size.
        opened.draft(None, (2 * max(size), 2 * max(size)))
        of_16_bits = opened.mode.startswith("I;16") or opened.format in ("PNG", "PPM")
        # Pillow reads the values of a TIFF of 12 bits as they are, and their white is 4095.
        tags = opened.tag_v2 if isinstance(opened, TiffImageFile) else {}
        of_12_bits = tags.get(_BITS_PER_SAMPLE) == (12,)
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I") and of_16_bits:
        # `convert` alone would clip at 255.
        scale = 255 / (4095 if of_12_bits else 65535)
        image = image.convert("I").point(lambda value: value * scale + 0.5).convert("L")
    elif image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits have no fixed white, save it with 8 or 16")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)  # It is antialiased.
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = rearrange(flat, "(h w c) -> c h w", h=height, w=width)
    return pixels[:1] if bool((pixels == pixels[:1]).all()) else pixels


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


# -- how it is told


def _with_progress(results: Iterable[T], count: int) -> Iterable[T]:
    """Show a progress bar, on a terminal and from the second second on."""
    try:
        from tqdm import tqdm
    except ImportError:
        return results
    bar: Iterable[T] = tqdm(
        results, "reading", count, unit=" images", delay=1, leave=False, disable=None
    )
    return bar


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _counted(others: Counter[str]) -> str:
    kinds = ", ".join(kind for kind, _ in others.most_common(_SHOWN))
    return f"{_plural(others.total())} of other types: {kinds}"


def _plural(count: int) -> str:
    return f"{count:,} {'file' if count == 1 else 'files'}"
