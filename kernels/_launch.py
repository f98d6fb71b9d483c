"""What every launch needs to know: the target, the types, the precision and the measured table.

Each kernel's launch rule is at the top of its own file. It is a pure function of shape, dtype and
target that returns launch keywords. No kernel is autotuned, because a choice by timing would change
the order of additions from run to run. A measured table can replace a rule's choice for a shape.
See `load_table`.

No rule looks at the batch size. The tiling decides the order of additions, so a kernel gives a
batch row the same bits whatever else is in the batch.
"""

import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from tritoncaps.kernels._patches import Patches


class UnsupportedShape(Exception):  # noqa: N818 - a refusal, not an error
    """No launch fits the shape. Raised before anything is launched."""


@dataclass(frozen=True)
class Target:
    """A device as the rules see it: its architecture and a program's shared memory in bytes."""

    architecture: str
    shared_memory: int


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def device_of(tensor: Tensor | Patches) -> AbstractContextManager[object]:
    """Make the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def target_of(tensor: Tensor | Patches) -> Target:
    """The target that a tensor's kernels are compiled for."""
    if not tensor.is_cuda:
        # Interpreted: nothing limits a tile here, so assume what every target has.
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
    """How products of `dtype` inputs are formed.

    float32 follows `torch.get_float32_matmul_precision()`. "highest" means float32. On NVIDIA it is
    formed from three TF32 products, with a third of the instructions of float32 multiply-adds.
    "high" and "medium" allow one TF32 product. TF32 holds every 16-bit input exactly. AMD's matrix
    units multiply float32 directly.
    """
    if dtype == torch.float64 or not target.architecture.startswith("sm"):
        return "ieee"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "tf32x3"
    return "tf32"


def holds_operands(target: Target) -> bool:
    """Whether a matrix product keeps its operands in registers, which leaves fewer for the rest.

    The matrix units of Hopper and of the larger Blackwells read shared memory. Those of other
    NVIDIA GPUs do not. AMD has twice the registers.
    """
    return target.architecture.startswith("sm") and not target.architecture.startswith(
        ("sm90", "sm10")
    )


def strides(tensor: Tensor | None, axes: int) -> tuple[int, ...]:
    """The tensor's strides, or zeros where there is no tensor."""
    return (0,) * axes if tensor is None else tensor.stride()


def divide(I: int, tile: int, max_splits: int) -> tuple[int, int]:
    """Splits and tiles per split: as few tiles as `max_splits` allows, then as few splits.

    Without input capsules there is one tile, which adds nothing.
    """
    tiles = max(triton.cdiv(I, tile), 1)
    tiles_each = triton.cdiv(tiles, max_splits)
    return triton.cdiv(tiles, tiles_each), tiles_each


def pose_blocks(P: int, D: int) -> tuple[int, int]:
    """BLOCK_P and BLOCK_D of a part of the weight, whose products have an inner dimension of 16.

    Raises:
        UnsupportedShape: one pair of poses has more values than a warp can hold.
    """
    block_p = triton.next_power_of_2(max(P, 1))
    block_d = max(triton.next_power_of_2(max(D, 1)), 16)
    if max(block_p, 16) * block_d > 4096:
        raise UnsupportedShape(f"a weight of P={P} × D={D} for one pair; a warp holds 4096 values")
    return block_p, block_d


def with_all_registers(launch: dict[str, int], target: Target) -> dict[str, int]:
    """Let NVIDIA's assembler use every register that the warps leave free.

    Without this it may spill a few values to make room for one more program. A launch that has a
    limit of its own keeps it.
    """
    if not target.architecture.startswith("sm"):
        return launch
    return {"maxnreg": min(65536 // (32 * launch["num_warps"]), 255), **launch}


# The measured table -------------------------------------------------------------------------------

_table: dict[str, dict[str, int]] = {}

# The keywords that a table may set. BLOCK_P and BLOCK_D are not choices: they hold a whole pose.
_POWERS = ("num_warps", "GROUPS", "BLOCK_B", "BLOCK_I", "BLOCK_J", "BLOCK_ROWS")
_TUNABLE = (*_POWERS, "num_stages", "MAX_SPLITS", "MAX_RUN")


def load_table(path: str | Path) -> None:
    """Let measured launches replace the rules' choices.

    The file is JSON: {"<rule> <architecture> <dtype> I1152 P8 J10 D16": {"BLOCK_I": 8, …}, …}. Its
    keywords replace the rule's. Any tiling gives the right result. MAX_SPLITS limits the programs
    that share the input capsules of a batch tile.

    Raises:
        ValueError: an entry sets a keyword that is not a choice, such as BLOCK_D, which follows
            from the shape. Or a value is not a power of two (num_stages and MAX_SPLITS: not an
            int ≥ 1).
    """
    table = json.loads(Path(path).read_text())
    for name, launch in table.items():
        for keyword, value in launch.items():
            if keyword not in _TUNABLE:
                raise ValueError(
                    f"load_table: {path}: {name!r} sets {keyword!r}, "
                    f"but a table may set {', '.join(_TUNABLE)}"
                )
            if type(value) is not int or value < 1 or (value & (value - 1) and keyword in _POWERS):
                kind = "a power of two" if keyword in _POWERS else "an int >= 1"
                raise ValueError(
                    f"load_table: {path}: {name!r} sets {keyword}={value!r}, must be {kind}"
                )
    _table.update(table)


if "TRITONCAPS_LAUNCH_TABLE" in os.environ:
    load_table(os.environ["TRITONCAPS_LAUNCH_TABLE"])


def measured(
    rule: str, launch: dict[str, int], target: Target, dtype: torch.dtype, **extents: int
) -> dict[str, int]:
    """Return the rule's choice, replaced by the table's entry for this shape if there is one.

    Raises:
        ValueError: the entry sets a keyword that this rule does not use.
    """
    shape = " ".join(f"{axis}{extent}" for axis, extent in extents.items())
    name = f"{rule} {target.architecture} {str(dtype).removeprefix('torch.')} {shape}"
    return with_all_registers(_look_up(name, launch), target)


def _look_up(name: str, launch: dict[str, int]) -> dict[str, int]:
    entry = _table.get(name, {})
    if unknown := entry.keys() - launch.keys():
        raise ValueError(
            f"load_table: {name!r} sets {sorted(unknown)}, but this rule sets {sorted(launch)}"
        )
    return {**launch, **entry}
