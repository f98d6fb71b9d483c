"""The library, while nothing builds it yet: its path is in the environment."""

import ctypes
import os
from functools import cache

import torch


@cache
def library() -> ctypes.CDLL | None:
    """Load the library, or None."""
    path = os.environ.get("TRITONCAPS_LIBRARY")
    return None if path is None else ctypes.CDLL(path)


def threads() -> int:
    """How many threads a call may use."""
    return torch.get_num_threads()
