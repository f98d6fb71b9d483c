"""Slices of input capsules that stay in the cache, and buffers for their temporaries."""

import math

import torch
from torch import Tensor

# The temporaries of a slice: a level-2 cache for each thread. An accelerator on this path gets
# more, because there few launches matter more than the cache.
_BYTES_PER_THREAD = 1 << 20
_ACCELERATOR_BYTES = 1 << 28


def slice_bytes(device: torch.device) -> int:
    """How large the temporaries of one slice may be."""
    is_cpu = device.type == "cpu"
    return _BYTES_PER_THREAD * torch.get_num_threads() if is_cpu else _ACCELERATOR_BYTES


def slices(count: int, bytes_each: int, device: torch.device) -> list[slice]:
    """Slices of `count` capsules, about equal in size. Each fits, or is a single capsule."""
    fitting = max(1, slice_bytes(device) // max(1, bytes_each))
    size = math.ceil(count / max(1, math.ceil(count / fitting)))
    return [slice(start, min(start + size, count)) for start in range(0, count, max(1, size))]


def buffer_for(parts: list[slice], elements_each: int, like: Tensor) -> Tensor:
    """A flat buffer for the largest slice. A fresh one for each slice would cost page faults."""
    return like.new_empty(max(map(length, parts), default=0) * elements_each)


def view(buffer: Tensor, *shape: int) -> Tensor:
    """The beginning of a flat buffer, viewed in a shape."""
    return buffer[: math.prod(shape)].view(shape)


def length(part: slice) -> int:
    return int(part.stop - part.start)
