"""Calls a function of the library: pointers, sizes, threads."""

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from tritoncaps._native._library import library, threads

_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "f": ctypes.c_float}
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


@cache
def function(name: str, dtype: torch.dtype, signature: str) -> Callable[..., int]:
    """`tritoncaps_<name>` for a dtype. A letter of the signature: pointer, int or float."""
    native = library()
    if native is None:
        raise RuntimeError(f"{name}: the native library is not built")
    found = getattr(native, f"tritoncaps_{name}_{_SUFFIX[dtype]}")
    found.argtypes = [_TYPES[letter] for letter in signature]
    found.restype = ctypes.c_int
    return found


@lru_cache(maxsize=256)
def sizes(*n: int) -> Any:
    """Turn sizes into an array of int64."""
    return (ctypes.c_int64 * len(n))(*n)


@lru_cache(maxsize=256)
def numbers(*x: float) -> Any:
    """Turn numbers into an array of float32."""
    return (ctypes.c_float * len(x))(*x)


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor, which must outlive the call."""
    return None if tensor is None else tensor.data_ptr()


def raised(tensor: Tensor | None) -> Tensor | None:
    """Make a tensor contiguous and float32."""
    return None if tensor is None else tensor.float().contiguous()


def empty_like_float(tensor: Tensor | None) -> Tensor | None:
    """Allocate the gradient of a tensor, float32."""
    return None if tensor is None else tensor.new_empty(tensor.shape, dtype=torch.float32)


def lowered(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Round a gradient to the dtype of its tensor."""
    return None if grad is None else grad.to(dtype)


def workers(products: int) -> int:
    """How many threads are worth starting for so many multiplications."""
    return 1 if products < 200_000 else threads()


def check(done: int, name: str) -> None:
    """Raise if the call found no memory."""
    if not done:
        raise MemoryError(f"{name}: no memory for its temporaries")
