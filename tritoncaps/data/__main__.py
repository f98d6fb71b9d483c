"""Say which data sets there are, and which of them are in a folder.

    python -m tritoncaps.data list                  # names, sizes, sources, licences
    python -m tritoncaps.data check data            # what the folder "data" has, and if it is right
    python -m tritoncaps.data check data svhn       # the same for some sets
    python -m tritoncaps.data show svhn data        # draw 16 images of each part in svhn.png

A set is "there" once all its files were read as for training. `check` ends with 1 if one is
damaged, and says what is missing, where it comes from and where to put it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from tritoncaps.data.files import DataFile
from tritoncaps.data.load import folder_of, has_files, load_dataset
from tritoncaps.data.registry import REGISTRY, Entry
from tritoncaps.data.sets import DatasetError


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns 1 if a data set is damaged, else 0."""
    description, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tritoncaps.data",
        description=description,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("list", help="describe every data set")
    check = commands.add_parser("check", help="read the data sets in a folder")
    check.add_argument("data_dir", type=Path, metavar="DIR", help="the --data-dir of the examples")
    check.add_argument(
        "names", nargs="*", metavar="NAME", help="data sets (default: all that have files)"
    )
    show = commands.add_parser("show", help="draw 16 training images and 16 test images")
    show.add_argument("name", metavar="NAME", choices=list(REGISTRY), help="a data set")
    show.add_argument("data_dir", nargs="?", type=Path, metavar="DIR", help="(default: data)")
    show.add_argument("--output", type=Path, metavar="PNG", help="(default: NAME.png)")
    given = parser.parse_args(arguments)
    if given.command == "list":
        for name, entry in REGISTRY.items():
            print(_described(name, entry))
        return 0
    if given.command == "show":
        return _show(given.name, given.data_dir, given.output or Path(f"{given.name}.png"))
    data_dir = given.data_dir.expanduser()
    if not data_dir.is_dir():
        print(f"There is no folder {data_dir}.", file=sys.stderr)
    unknown = [name for name in given.names if name not in REGISTRY]
    if unknown:
        parser.error(f"no data set is called {unknown[0]!r}; there are {', '.join(REGISTRY)}")
    names = given.names or [name for name, entry in REGISTRY.items() if entry.files]
    return max([_check(name, data_dir) for name in names])


def _described(name: str, entry: Entry) -> str:
    channels, height, width = entry.shape
    lines = [
        f"{name}: {entry.title}, {len(entry.class_names)} classes, {channels} x {height} x {width}",
        f"    source   {entry.source}",
        f"    licence  {entry.licence}",
    ]
    if entry.files:
        how = "downloaded" if entry.mirrors else "not downloaded, to be put there"
        lines.append(f"    files    {_listed(entry.files)}, plain or as .gz")
        lines.append(f"    folder   {entry.folder}, {how}")
    return "\n".join(lines)


def _listed(files: Sequence[DataFile]) -> str:
    return ", ".join(file.name for file in files)


def _check(name: str, data_dir: Path) -> int:
    """Print what is there of a data set. Returns 1 if it is damaged."""
    entry, folder = REGISTRY[name], folder_of(name, data_dir)
    try:
        is_there = has_files(name, data_dir)
        is_there |= any((data_dir / other).exists() for other in entry.refused)
        if entry.files and not is_there:
            remedy = f"Put {_listed(entry.files)} into {folder}, plain or as .gz"
            if entry.mirrors:
                remedy += ", or let an example download them"
            print(f"{name}: not there. {remedy}. Source: {entry.source}")
            return 0
        dataset = load_dataset(name, data_dir, download=False)
    except DatasetError as error:
        print(f"{name}: {error} Source: {entry.source}")
        return 1
    print(f"{name}: there, {len(dataset.train):,} + {len(dataset.test):,} images. {dataset.note}")
    return 0


def _show(name: str, data_dir: Path | None, output: Path) -> int:
    """Draw training images from all over the set, and below them test images."""
    try:
        from PIL import Image

        dataset = load_dataset(name, data_dir, download=False)
        rows = [_side_by_side(_sixteen(part.images)) for part in (dataset.train, dataset.test)]
        Image.fromarray(torch.cat(rows).numpy()).save(output)
    except DatasetError as error:
        print(f"{name}: {error}")
        return 1
    except (ImportError, OSError, ValueError) as error:  # a ValueError: of an unknown extension
        print(f"{output} was not written: {error}")
        return 1
    print(f"{output}: 16 training images, and below them 16 test images. {dataset.note}")
    return 0


def _sixteen(images: Tensor) -> Tensor:
    """Take 16 images evenly, since neighbours may show one object."""
    return images[:: max(1, len(images) // 16)][:16]


def _side_by_side(images: Tensor) -> Tensor:
    """Put images, (N, C, H, W), into one row, (H, W', 3). Of a stereo pair the first is taken."""
    colours = images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
    framed = F.pad(colours, (1, 1, 1, 1), value=128)
    return rearrange(framed, "n c h w -> h (n w) c").contiguous()


if __name__ == "__main__":
    sys.exit(main())
