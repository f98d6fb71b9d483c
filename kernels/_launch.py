"""Launch configurations: pure functions of shape, dtype and target, each with its reasons.

No kernel is autotuned: a choice by timing would change the order of additions from run to run. What
the rules choose for a shape can be replaced by a measured table, see `load_table`.

No rule looks at the batch size. The tiling decides the order of additions, so a batch row gets the
same bits from a kernel whatever stands beside it in the batch.
"""

import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor


class UnsupportedShape(Exception):  # noqa: N818 - a shape is refused, nothing has gone wrong
    """No launch configuration fits the shape. Raised before anything is launched."""


@dataclass(frozen=True)
class Target:
    """What the rules know of a device: its architecture and a program's shared memory in bytes."""

    architecture: str
    shared_memory: int


@dataclass(frozen=True)
class Config:
    """The tiling of a kernel. A field that the kernel has no use for keeps its default."""

    num_warps: int
    num_stages: int = 1
    groups: int = 1  # groups of input capsules in a tile
    block_b: int = 1
    block_i: int = 1
    block_p: int = 1
    block_j: int = 1
    block_d: int = 1
    block_n: int = 1
    block_rows: int = 1
    max_splits: int = 1  # programs that may share the input capsules of a batch tile

    def options(self, target: Target) -> dict[str, int]:
        """Triton's launch options.

        Told that all registers may be used, NVIDIA's assembler does not spill a few of them to make
        room for one more program.
        """
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if target.architecture.startswith("sm"):
            options["maxnreg"] = min(65536 // (32 * self.num_warps), 255)
        return options

    def divide(self, I: int) -> tuple[int, int]:
        """Splits, and tiles a split: as few tiles as `max_splits` allows, then as few splits."""
        tiles = cdiv(I, self.groups * self.block_i)
        tiles_each = cdiv(tiles, self.max_splits)
        return cdiv(tiles, tiles_each), tiles_each


# Facts --------------------------------------------------------------------------------------------


def cdiv(n: int, divisor: int) -> int:
    """n / divisor, rounded up."""
    return -(-n // divisor)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current, as Triton launches on the current device."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def target_of(tensor: Tensor) -> Target:
    """The target that a tensor's kernels are compiled for."""
    if not tensor.is_cuda:
        # Interpreted: nothing limits a tile, so take what every target has.
        return Target("interpreter", 65536)
    return _cuda_target(tensor.device.index)


@cache
def _cuda_target(index: int) -> Target:
    driver = triton.runtime.driver.active
    with torch.cuda.device(index):
        gpu = driver.get_current_target()
    architecture = gpu.arch if gpu.backend == "hip" else f"sm{gpu.arch}"
    return Target(architecture, driver.utils.get_device_properties(index)["max_shared_mem"])


def dot_precision(dtype: torch.dtype, target: Target) -> str:
    """How products are formed, for inputs of `dtype`.

    float32 follows `torch.get_float32_matmul_precision()`: "highest" is float32, on NVIDIA by three
    TF32 products, which cost a third of the instructions of float32 multiply-adds; the other two
    allow TF32. TF32 holds every 16-bit input exactly. AMD's matrix units multiply float32 as it is.
    """
    if dtype == torch.float64 or not target.architecture.startswith("sm"):
        return "ieee"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "tf32x3"
    return "tf32"


# Rules --------------------------------------------------------------------------------------------

_table: dict[str, dict[str, int]] = {}

# What a table may choose. block_p and block_d are not choices: they hold a whole pose.
_POWERS = ("num_warps", "groups", "block_b", "block_i", "block_j", "block_rows")
_TUNABLE = (*_POWERS, "num_stages", "max_splits")


def load_table(path: str | Path) -> None:
    """Let measured configurations replace those of the rules.

    The file is JSON: {"<rule> <architecture> <dtype> I1152 P8 J10 D16": {"block_i": 8, …}, …}. The
    fields named there replace the rule's; any tiling gives the right result.

    Raises:
        ValueError: an entry sets a field that is not a choice, such as block_d, which follows from
            the shape, or a value that is not a power of two (max_splits: not an int ≥ 1).
    """
    table = json.loads(Path(path).read_text())
    for name, fields in table.items():
        for field, value in fields.items():
            if field not in _TUNABLE:
                raise ValueError(
                    f"load_table: {path}: {name!r} sets {field!r}, "
                    f"but a table may set {', '.join(_TUNABLE)}"
                )
            if type(value) is not int or value < 1 or (value & (value - 1) and field in _POWERS):
                kind = "a power of two" if field in _POWERS else "an int >= 1"
                raise ValueError(
                    f"load_table: {path}: {name!r} sets {field}={value!r}, must be {kind}"
                )
    _table.update(table)


if "TRITONCAPS_LAUNCH_TABLE" in os.environ:
    load_table(os.environ["TRITONCAPS_LAUNCH_TABLE"])


def _measured(rule: str, config: Config, target: Target, dtype: torch.dtype, shape: str) -> Config:
    name = f"{rule} {target.architecture} {str(dtype).removeprefix('torch.')} {shape}"
    return replace(config, **_table.get(name, {}))


def row_config(D: int) -> Config:
    """Whole rows in a program, about 1024 values: 8 a thread, of every slot that is added up."""
    block_d = power_of_2(D)
    if block_d > 16384:
        raise UnsupportedShape(f"a row of D={D} values; a program holds at most 16384")
    return Config(
        num_warps=4 if block_d <= 2048 else 8,
        block_d=block_d,
        block_rows=max(1024 // block_d, 1),
    )


def prediction_vectors_config(P: int, J: int, D: int, dtype: torch.dtype) -> Config:
    """Tiles of 64 × 64 values of û, which 128 threads hold 32 each (16 for float64)."""
    block = 64 if accumulation_dtype(dtype) == torch.float32 else 32
    if 65535 * block < J * D:
        raise UnsupportedShape(f"J·D = {J * D} columns; a grid covers at most {65535 * block}")
    return Config(
        num_warps=4,
        block_b=block,
        block_n=min(max(power_of_2(J * D), 16), block),
        block_p=min(max(power_of_2(P), 16), 32),
    )


def dynamic_routing_config(I: int, J: int, D: int, dtype: torch.dtype, target: Target) -> Config:
    """The passes over a given û.

    block_i: a tile's block_i·J·D values stay under 32 KiB, so that the tiles of all programs on a
    processor are in its first-level cache when the second sweep asks for them. block_j: 2048 values
    in the registers of 8 warps (1024 of float64), at most a quarter of them beyond the last j.
    max_splits: every program adds up the slots of all splits, so that their number squared times
    B·J·D is read; 16 keeps this far below û.
    """
    block_d = power_of_2(D)
    values = 2048 if accumulation_dtype(dtype) == torch.float32 else 1024
    if block_d > values:
        raise UnsupportedShape(f"poses of D={D}; a program holds at most {values}")
    fits = max(4 * values // max(J * D, 1), 1)
    block_i = min(1 << (fits.bit_length() - 1), power_of_2(I), values // block_d)
    block_j = min(values // (block_i * block_d), power_of_2(J))
    while block_j > 1 and cdiv(J, block_j) * block_j > 1.25 * J:
        block_j //= 2
    config = Config(
        num_warps=8,
        block_i=block_i,
        block_j=block_j,
        block_d=block_d,
        block_rows=min(max(1024 // block_d, 1), power_of_2(J)),
        max_splits=16,
    )
    return _measured("dynamic_routing", config, target, dtype, f"I{I} J{J} D{D}")


def _fused_blocks(P: int, D: int, values: int) -> tuple[int, int, int]:
    """block_i, block_p and block_d of a weight tile (P·I, D) of about `values` values."""
    block_p, block_d = power_of_2(P), max(power_of_2(D), 16)
    if max(block_p, 16) * block_d > 4096:
        raise UnsupportedShape(f"a weight of P={P} × D={D} for one pair; a warp holds 4096 values")
    return max(values // block_d, 16, block_p) // block_p, block_p, block_d


def fused_dynamic_routing_config(
    I: int, P: int, J: int, D: int, dtype: torch.dtype, target: Target, *, backward: bool
) -> Config:
    """The passes of the fused routing.

    block_b: 16, the rows of one matrix instruction; more rows would leave a batch of 128 too few
    programs. block_i: a warp's slice of the weight has 512 values (256 of float64), the most for
    which the backward, which also holds du and two projections, keeps everything in registers; a
    pose pair P × D beyond that spills, more the larger it is, up to where it is refused.
    groups: 8 warps, with a group each, and few input capsules spread over them. num_stages: the
    first sweep fetches the weight of the next j during this one if the buffers fit into shared
    memory; the second, which uses it in two products, does not, nor does the backward, where the
    addresses no longer fit into registers.
    max_splits: as in `dynamic_routing_config`. At the MNIST shape it gives 12 splits of 3 tiles, 96
    programs at B = 128; no device has yet told whether more, smaller ones would be faster.
    """
    is_wide = accumulation_dtype(dtype) == torch.float64
    block_i, block_p, block_d = _fused_blocks(P, D, 256 if is_wide else 512)
    block_i = min(block_i, max(16 // block_p, power_of_2(cdiv(I, 8))))
    groups = min(power_of_2(cdiv(I, block_i)), 8)
    buffer = groups * block_i * block_p * block_d * (8 if is_wide else 4)
    while groups > 1 and 2 * buffer > target.shared_memory:
        groups, buffer = groups // 2, buffer // 2
    fetch_ahead = not backward and 4 * buffer <= target.shared_memory
    config = Config(
        num_warps=groups,
        num_stages=3 if fetch_ahead else 1,
        groups=groups,
        block_b=16,
        block_i=block_i,
        block_p=block_p,
        block_d=block_d,
        block_rows=max(groups * (64 if is_wide else 128) // block_d, 1),
        max_splits=16,
    )
    rule = "fused_dynamic_routing_bwd" if backward else "fused_dynamic_routing_fwd"
    return _measured(rule, config, target, dtype, f"I{I} P{P} J{J} D{D}")


def weight_gradient_config(
    I: int, P: int, J: int, D: int, dtype: torch.dtype, target: Target
) -> Config:
    """dW of one tile and one j: 1024 values (512 of float64), summed in registers.

    With I·P·J·D/1024 programs there is work for every processor, and 32 batch rows at a time are
    what the two projections beside dW leave room for in 4 warps; 16 for a tile of fewer rows, whose
    warps hold parts of the projections twice.
    """
    is_wide = accumulation_dtype(dtype) == torch.float64
    block_i, block_p, block_d = _fused_blocks(P, D, 512 if is_wide else 1024)
    block_i = min(block_i, max(16 // block_p, power_of_2(I)))
    config = Config(
        num_warps=4,
        block_b=32 if block_i * block_p >= 64 else 16,
        block_i=block_i,
        block_p=block_p,
        block_d=block_d,
    )
    return _measured("weight_gradient", config, target, dtype, f"I{I} P{P} J{J} D{D}")
