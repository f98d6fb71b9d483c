"""Slices of images and capsules that stay in the cache, and buffers for their temporaries."""

import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Used if the system does not say: level 2 of a common desktop core, level 3 of a small machine.
_DEFAULT_CACHE_BYTES = {2: 1 << 20, 3: 8 << 20}
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # of Linux
# For an accelerator on this path, where few launches matter more than the cache.
_ACCELERATOR_BYTES = 1 << 28


@cache
def cache_bytes(level: int) -> int:
    """Size of the first processor's level-2 or level-3 cache."""
    try:
        for index in _CACHES.glob("index*"):
            if (index / "level").read_text().strip() == str(level):
                size = int((index / "size").read_text().strip().removesuffix("K")) << 10
                return size if size > 0 else _DEFAULT_CACHE_BYTES[level]
    except (OSError, ValueError):
        pass
    return _DEFAULT_CACHE_BYTES[level]


def chunk_bytes(device: torch.device) -> int:
    """How large the temporary of one chunk may be: the level-2 caches of the threads in use."""
    if device.type != "cpu":
        return _ACCELERATOR_BYTES
    return cache_bytes(2) * torch.get_num_threads()


def group_bytes(device: torch.device) -> int:
    """How large the temporaries of a group of images may be: 3/8 of the level-3 cache.

    The rest is left to the weight and its gradient.
    """
    if device.type != "cpu":
        return _ACCELERATOR_BYTES
    return 3 * cache_bytes(3) // 8


def fitting_slices(count: int, elements_each: int, like: Tensor) -> list[slice]:
    """Slices of `count` capsules, about equal in size. Each fits a chunk or is a single capsule."""
    capsule_bytes = max(1, elements_each) * like.element_size()
    return slices(count, even_size(count, chunk_bytes(like.device) // capsule_bytes))


def even_size(count: int, largest: int) -> int:
    """The size that makes the fewest about equal slices: at most `largest`, and at least 1."""
    return max(1, math.ceil(count / max(1, math.ceil(count / max(1, largest)))))


def slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def length(part: slice) -> int:
    return int(part.stop - part.start)


def longest(parts: list[slice]) -> int:
    return max(map(length, parts), default=0)


def buffers(count: int, elements: int, like: Tensor) -> tuple[Tensor, ...]:
    """Flat buffers for the largest slice. A fresh buffer for each slice would cost page faults."""
    return like.new_empty(count, elements).unbind()


def view(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The beginning of a flat buffer, viewed in a shape."""
    return buffer[: math.prod(shape)].view(shape)
