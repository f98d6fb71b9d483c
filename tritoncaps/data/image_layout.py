"""Which files a folder of images holds: its parts, their classes, and the images of each class."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tritoncaps.data.sets import DatasetError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Names of the parts of a data set, in lower case.
_PARTS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip

# What archives, Python and file servers leave behind.
_LEFTOVERS = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "lost+found"}

_LAYOUT = (
    "Each class needs a subfolder of its own that holds its images, such as {0}/cat/1.png and "
    "{0}/dog/1.png"
)
_SHOWN = 5


@dataclass
class ClassFiles:
    """The images below one folder, and how many files of other types there are, by suffix."""

    folder: Path
    images: list[Path]
    others: Counter[str]


def find_parts(root: Path) -> dict[str, Path]:
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


def find_classes(folder: Path) -> dict[str, ClassFiles]:
    """Return the classes of a part by name, in the order of their labels."""
    folders = _subfolders(folder)
    if not folders:
        inside = sum(1 for _ in _visible(folder))
        files = f"has {_plural(inside)} but no subfolders" if inside else "is empty"
        raise DatasetError(f"{folder} {files}. {_LAYOUT.format(folder)}")
    # A link to one of these adds nothing: it leads back up, or from one class into another.
    known = {*folder.resolve().parents, *(path.resolve() for path in (folder, *folders))}
    return {path.name: _find_images(path, known) for path in folders}


def _find_images(folder: Path, known: set[Path]) -> ClassFiles:
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
    return ClassFiles(folder, images, others)


def check_classes(parts: dict[str, dict[str, ClassFiles]], folders: dict[str, Path]) -> None:
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
                    f"{folders[part]} {problem} the classes {listed(difference)}, which {folder} "
                    f"{other}: {remedy}, or remove their folders"
                )
    for classes in parts.values():
        for one in classes.values():
            if not one.images:
                held = f"only {counted(one.others)}" if one.others else "nothing"
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


def listed(items: Sequence[str]) -> str:
    """Name the first few items, and say how many more there are."""
    more = f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def counted(others: Counter[str]) -> str:
    """Count files of other types, and name their suffixes."""
    kinds = ", ".join(kind for kind, _ in others.most_common(_SHOWN))
    return f"{_plural(others.total())} of other types: {kinds}"


def _plural(count: int) -> str:
    return f"{count:,} {'file' if count == 1 else 'files'}"
