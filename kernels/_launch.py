"""Launch configurations: pure functions of shape, dtype and the device's shared memory.

No kernel is autotuned: a choice by timing would change the order of additions from run to run. The
rules below give their reasons; a measured table may replace what they choose, see `load_table`.

No rule looks at the batch size. The tiling decides the order of additions, so a batch row gets the
same bits from a kernel whatever stands beside it in the batch.
"""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


class UnsupportedShape(Exception):
    """No launch configuration fits the shape. Raised before anything is launched."""


@dataclass(frozen=True)
class Config:
    """The tiling of a kernel; a field that the kernel has no use for keeps its default."""

    num_warps: int
    num_stages: int = 1
    groups: int = 1  # groups of input capsules in a tile, one a warp
    block_b: int = 1
    block_i: int = 1
    block_j: int = 1
    block_p: int = 1
    block_d: int = 1
    block_rows: int = 1
    splits: int = 1  # programs that share the input capsules of a batch tile
    tiles: int = 1  # tiles of input capsules that one of them walks over


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cdiv(n: int, divisor: int) -> int:
    """n / divisor, rounded up."""
    return -(-n // divisor)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one: Triton launches on the current device."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def row_config(D: int) -> Config:
    """Whole rows of D in a program, some 2048 values of them: 16 a thread, in four 16-byte loads."""
    block_d = next_power_of_2(D)
    if block_d > 16384:
        raise UnsupportedShape(f"a row of D={D} does not fit into one program (at most 16384)")
    return Config(
        num_warps=4 if block_d <= 2048 else 8,
        block_rows=max(2048 // block_d, 1),
        block_d=block_d,
    )


def dot_precision(tensor: Tensor) -> str:
    return "ieee"


def split(tiles: int, limit: int) -> tuple[int, int]:
    """Splits and tiles a split: at most `limit` splits, none of them empty."""
    tiles_each = cdiv(tiles, limit)
    return cdiv(tiles, tiles_each), tiles_each


def fused_pass_config(I: int, P: int, J: int, D: int, dtype, device) -> Config:
    block_d = max(next_power_of_2(D), 16)
    block_p = next_power_of_2(P)
    k = max(1024 // block_d, 16, block_p)
    block_i = k // block_p
    groups = 8
    splits, tiles = split(cdiv(I, groups * block_i), 24)
    return Config(num_warps=8, groups=groups, block_b=16, block_i=block_i, block_p=block_p, block_d=block_d, block_rows=max(1024//block_d,1), splits=splits, tiles=tiles)


def weight_gradient_config(I: int, P: int, J: int, D: int, dtype, device) -> Config:
    block_d = max(next_power_of_2(D), 16)
    block_p = next_power_of_2(P)
    k = max(2048 // block_d, 16, block_p)
    return Config(num_warps=4, block_b=32, block_i=k // block_p, block_p=block_p, block_d=block_d)
