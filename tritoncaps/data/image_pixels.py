"""The pixels of image files, all of one size and of as many channels as they need."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor

from tritoncaps.data.image_layout import listed
from tritoncaps.data.sets import DatasetError

T = TypeVar("T")

# Pillow recognizes a file by its content, so a .png may hold a JPEG. No other reader is tried.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
_BITS_PER_SAMPLE = 258  # a tag of TIFF

# The size of images that differ in size, or that are larger than `_LARGEST_OWN` on a side.
_USUAL, _LARGEST_OWN = 32, 64


def choose_size(files: Sequence[Path], root: Path) -> tuple[int, int]:
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
            # Nothing is passed over: an error that names every damaged image, or else this one.
            read_images(files, usual, root)
            raise
        if common not in (None, (height, width)):
            return usual
        common = (height, width)
    return common or usual


def read_images(files: Sequence[Path], size: tuple[int, int], root: Path) -> Tensor:
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
            f"{listed(broken)}. Repair or remove them"
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


def read_image(path: Path, paper: str = "white") -> Tensor:
    """Read one image in its own size, as `read_images` does.

    What is transparent shows the paper.

    Raises:
        DatasetError: the file is missing, or no image.
    """
    if not path.is_file():
        problem = "is a folder: give its images" if path.is_dir() else "does not exist"
        raise DatasetError(f"{path} {problem}")
    pixels = _try_to_read(path, None, paper)
    if isinstance(pixels, str):
        raise DatasetError(f"{path} cannot be read ({pixels})")
    return pixels


def _try_to_read(path: Path, size: tuple[int, int] | None, paper: str = "white") -> Tensor | str:
    """Return the pixels of an image, or what is wrong with it."""
    from PIL import UnidentifiedImageError

    try:
        return _read(path, size, paper)
    except UnidentifiedImageError:
        if not path.stat().st_size:
            return "empty"
        return f"not an image of the formats {', '.join(_FORMATS)}"
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # Decoders of damaged files raise anything.
        return str(error) or type(error).__name__


def _read(path: Path, size: tuple[int, int] | None, paper: str) -> Tensor:
    """Read one image as bytes, (1, H, W) if it is grey and (3, H, W) otherwise."""
    from PIL import Image, ImageOps
    from PIL.TiffImagePlugin import TiffImageFile

    with Image.open(path, formats=_FORMATS) as opened:
        # A JPEG many times larger than needed is decoded at a fraction of its size.
        if size is not None:
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
        image = Image.alpha_composite(Image.new("RGBA", image.size, paper), image)
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    height, width = size or (image.height, image.width)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)  # It is antialiased.
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = rearrange(flat, "(h w c) -> c h w", h=height, w=width)
    return pixels[:1] if bool((pixels == pixels[:1]).all()) else pixels


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
