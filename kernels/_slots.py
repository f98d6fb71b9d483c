"""Sums over the input capsules that cross programs.

Each program of a pass writes its share of a weighted sum to its own slot of a buffer
(slots, B, J, D). The next launch adds up the slots, in a fixed order. No float is ever added
atomically, and the order never depends on timing, so a result is the same to the last bit on every
run.

A row is one vector over D of a contiguous (B, J, D) tensor. Row n belongs to b = n // J.
"""

import triton
import triton.language as tl
from torch import Tensor

from tritoncaps.kernels._tiles import classes, squash_rows, squash_rows_grad
from tritoncaps.kernels.squash import row_launch


@triton.jit
def sum_slots(slots_ptr, offsets, mask, slot_size, SLOTS: tl.constexpr):
    """Add up the same tile of every slot, first to last."""
    total = tl.load(slots_ptr + offsets, mask=mask, other=0.0)
    for slot in tl.static_range(1, SLOTS):
        total += tl.load(slots_ptr + slot * slot_size + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def sum_many_slots(slots_ptr, offsets, mask, slot_size, slots, BLOCK_SLOTS: tl.constexpr):
    """Add up the same tile of every slot, BLOCK_SLOTS side by side, then these.

    A program of this kind has nothing else to do, so its threads share the slots too.
    """
    slot = tl.arange(0, BLOCK_SLOTS)[:, None, None]
    tiles_ptr = slots_ptr + slot * slot_size + offsets[None, :, :]
    exists = (slot < slots) & mask[None, :, :]
    total = tl.load(tiles_ptr, exists, other=0.0)
    for first in range(BLOCK_SLOTS, slots, BLOCK_SLOTS):
        exists = (first + slot < slots) & mask[None, :, :]
        total += tl.load(tiles_ptr + first * slot_size, exists, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def finish_sum(
    s, pose_bias_ptr, n, d, mask, J, D,
    UNIFORM: tl.constexpr, LEAKY: tl.constexpr, HAS_POSE_BIAS: tl.constexpr,
):  # fmt: skip
    """s of an iteration from the sum of its slots: times 1/J if UNIFORM, plus pose bias.

    `pose_bias_ptr` points to a contiguous (J, D). If LEAKY, the uniform coupling is 1/(J + 1).
    """
    if UNIFORM:
        s = s / classes(J, LEAKY)
    if HAS_POSE_BIAS:
        s += tl.load(pose_bias_ptr + n % J * D + d, mask, other=0.0).to(s.dtype)
    return s


@triton.jit
def running_sum(sums_ptr, offsets, mask, slot_size, count):
    """V after `count` iterations: squashed sums of iterations 1 to `count`, added in that order."""
    total = tl.zeros(offsets.shape, dtype=sums_ptr.dtype.element_ty)
    for k in range(count):
        total += squash_rows(tl.load(sums_ptr + k * slot_size + offsets, mask=mask, other=0.0))
    return total


@triton.jit
def advance_running_sum(
    # pointers
    slots_ptr, pose_bias_ptr, sums_ptr, V_ptr,
    # extents
    first_row, last_row, slot_size, J, D, iteration, is_writer,
    # meta-parameters
    SLOTS: tl.constexpr, UNIFORM: tl.constexpr, LEAKY: tl.constexpr, HAS_POSE_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Open forward pass t = `iteration`: finish s⁽ᵗ⁻¹⁾ of some rows and store their V⁽ᵗ⁻¹⁾.

    `V_ptr` is this program's own copy. One writer saves s⁽ᵗ⁻¹⁾ for the backward.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    for row in range(first_row, last_row, BLOCK_ROWS):
        n = row + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (n < last_row) & (d < D)
        offsets = n * D + d
        s = sum_slots(slots_ptr, offsets, mask, slot_size, SLOTS)
        s = finish_sum(s, pose_bias_ptr, n, d, mask, J, D, UNIFORM, LEAKY, HAS_POSE_BIAS)
        V = running_sum(sums_ptr, offsets, mask, slot_size, iteration - 2) + squash_rows(s)
        tl.store(V_ptr + offsets, V, mask=mask)
        if is_writer:
            tl.store(sums_ptr + (iteration - 2) * slot_size + offsets, s, mask=mask)
    # The pass reads V that other threads of the program have written.
    tl.debug_barrier()


@triton.jit
def pull_back(
    # pointers
    slots_ptr, sums_ptr, V_ptr, ds_ptr, next_slot_ptr, saved_V_ptr, saved_ds_ptr,
    # extents
    first_row, last_row, slot_size, D, iteration, is_writer,
    # meta-parameters
    CARRY: tl.constexpr, SQUASHED: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Open backward pass t = `iteration`: ds⁽ᵗ⁾ from the slots of dv⁽ᵗ⁾, and V⁽ᵗ⁻¹⁾, of some rows.

    `V_ptr` and `ds_ptr` are this program's own copies. One writer saves both for the kernel that
    contracts them with û. The slot that the pass adds to starts at zero. If dv⁽ᵗ⁾ is dV⁽ᵗ⁾ (CARRY),
    the writer's slot starts at dv⁽ᵗ⁾ instead, and the next slots then add up to dV⁽ᵗ⁻¹⁾. Unless
    SQUASHED, the slots hold ds⁽ᵗ⁾ itself.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    for row in range(first_row, last_row, BLOCK_ROWS):
        n = row + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (n < last_row) & (d < D)
        offsets = n * D + d
        s = tl.load(sums_ptr + (iteration - 1) * slot_size + offsets, mask=mask, other=0.0)
        dv = sum_slots(slots_ptr, offsets, mask, slot_size, SLOTS).to(s.dtype)
        ds = squash_rows_grad(s, dv) if SQUASHED else dv
        V = running_sum(sums_ptr, offsets, mask, slot_size, iteration - 1)
        tl.store(ds_ptr + offsets, ds, mask=mask)
        tl.store(V_ptr + offsets, V, mask=mask)
        if CARRY:
            tl.store(next_slot_ptr + offsets, tl.where(is_writer, dv, 0.0), mask=mask)
        else:
            tl.store(next_slot_ptr + offsets, tl.zeros_like(dv), mask=mask)
        if is_writer:
            tl.store(saved_ds_ptr + offsets, ds, mask=mask)
            tl.store(saved_V_ptr + offsets, V, mask=mask)
    tl.debug_barrier()


def _launch(D: int, slots: int) -> dict[str, int]:
    """About 2048 values per program: up to 32 slots side by side, of whole rows, 8 at most."""
    launch = row_launch(D)
    room = max(2048 // launch["BLOCK_D"], 1)
    launch["BLOCK_SLOTS"] = min(triton.next_power_of_2(slots), 32, room)
    launch["BLOCK_ROWS"] = min(max(room // launch["BLOCK_SLOTS"], 1), 8)
    return launch


@triton.jit
def _sum_slots_kernel(
    # pointers
    slots_ptr, sum_ptr,
    # extents
    N, D, slots,
    # meta-parameters
    BLOCK_SLOTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add up the slots of BLOCK_ROWS rows."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (n < N) & (d < D)
    offsets = n * D + d
    slot_size = tl.cast(N, tl.int64) * D
    total = sum_many_slots(slots_ptr, offsets, mask, slot_size, slots, BLOCK_SLOTS)
    tl.store(sum_ptr + offsets, total, mask)


@triton.jit
def _squash_slots_kernel(
    # pointers
    slots_ptr, pose_bias_ptr, s_ptr, V_ptr, v_ptr,
    # extents
    N, J, D, slots,
    # meta-parameters
    UNIFORM: tl.constexpr, LEAKY: tl.constexpr, HAS_POSE_BIAS: tl.constexpr, HAS_V: tl.constexpr,
    SQUASHED: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Finish an iteration: s from its slots, and V + squash(s), or s itself unless SQUASHED."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (n < N) & (d < D)
    offsets = n * D + d
    slot_size = tl.cast(N, tl.int64) * D
    s = sum_many_slots(slots_ptr, offsets, mask, slot_size, slots, BLOCK_SLOTS)
    s = finish_sum(s, pose_bias_ptr, n, d, mask, J, D, UNIFORM, LEAKY, HAS_POSE_BIAS)
    tl.store(s_ptr + offsets, s, mask)
    v = squash_rows(s) if SQUASHED else s
    if HAS_V:
        v += tl.load(V_ptr + offsets, mask, other=0.0)
    tl.store(v_ptr + offsets, v, mask)


def write_sum(slots: Tensor, total: Tensor) -> None:
    """Write Σ slots, (slots, B, J, D), to `total`, (B, J, D); both contiguous."""
    B, J, D = total.shape
    launch = _launch(D, slots.shape[0])
    _sum_slots_kernel[(triton.cdiv(B * J, launch["BLOCK_ROWS"]),)](
        slots, total,
        B * J, D, slots.shape[0],
        **launch,
    )  # fmt: skip


def write_result(
    slots: Tensor,
    pose_bias: Tensor | None,
    s: Tensor,
    v: Tensor,
    *,
    uniform: bool,
    leaky: bool,
    output: str = "v",
    V: Tensor | None = None,
) -> None:
    """Write s = Σ slots (times the uniform coupling if uniform) + pose_bias, and v = squash(s).

    Args:
        slots: contiguous, shape (slots, B, J, D).
        pose_bias: contiguous, shape (J, D), or None.
        s, v: contiguous outputs, shape (B, J, D).
        uniform: whether the slots hold Σ_i û_ij, which still lacks the uniform coupling.
        leaky: whether that coupling is 1/(J + 1) instead of 1/J.
        output: "v", or "s" to write s to `v` too.
        V: the squashed sums before s, contiguous, to be added to `v`; it may be `v`. None for zero.
    """
    B, J, D = s.shape
    launch = _launch(D, slots.shape[0])
    _squash_slots_kernel[(triton.cdiv(B * J, launch["BLOCK_ROWS"]),)](
        # In place of a missing tensor, the kernel gets the slots.
        slots, slots if pose_bias is None else pose_bias, s, slots if V is None else V, v,
        B * J, J, D, slots.shape[0],
        UNIFORM=uniform,
        LEAKY=leaky,
        HAS_POSE_BIAS=pose_bias is not None,
        HAS_V=V is not None,
        SQUASHED=output == "v",
        **launch,
    )  # fmt: skip


@triton.jit
def _pull_back_kernel(
    # pointers
    slots_ptr, sums_ptr, dV_ptr, V_ptr, ds_ptr,
    # extents
    N, D, slots, iteration,
    # meta-parameters
    CARRY: tl.constexpr, SAVE: tl.constexpr, SQUASHED: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Open backward pass t = `iteration`: ds⁽ᵗ⁾ from the slots of dv⁽ᵗ⁾, and V⁽ᵗ⁻¹⁾.

    With CARRY, the slots lack dV⁽ᵗ⁺¹⁾, which is added. With SAVE, the sum replaces it.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (n < N) & (d < D)
    offsets = n * D + d
    slot_size = tl.cast(N, tl.int64) * D
    s = tl.load(sums_ptr + (iteration - 1) * slot_size + offsets, mask, other=0.0)
    dv = sum_many_slots(slots_ptr, offsets, mask, slot_size, slots, BLOCK_SLOTS).to(s.dtype)
    if CARRY:
        dv += tl.load(dV_ptr + offsets, mask, other=0.0)
    if SAVE:
        tl.store(dV_ptr + offsets, dv, mask)
    tl.store(ds_ptr + offsets, squash_rows_grad(s, dv) if SQUASHED else dv, mask)
    tl.store(V_ptr + offsets, running_sum(sums_ptr, offsets, mask, slot_size, iteration - 1), mask)


def write_pull_back(
    slots: Tensor,
    sums: Tensor,
    dV: Tensor,
    V: Tensor,
    ds: Tensor,
    *,
    iteration: int,
    squashed: bool,
) -> None:
    """Write V⁽ᵗ⁻¹⁾ and ds⁽ᵗ⁾ of backward pass t = `iteration`.

    Args:
        slots: contiguous, (slots, B, J, D): grad_v for the last iteration, and for the others the
            shares of the dpose of the pass after it.
        sums: every weighted sum, contiguous, (iterations, B, J, D).
        dV: contiguous, (B, J, D). It is the sum of the passes' dpose so far, and is updated.
        V, ds: contiguous outputs, (B, J, D).
        iteration: t, from 1.
        squashed: whether v⁽ᵗ⁾ is the squash of s⁽ᵗ⁾, and not s⁽ᵗ⁾ itself.
    """
    B, J, D = V.shape
    launch = _launch(D, slots.shape[0])
    _pull_back_kernel[(triton.cdiv(B * J, launch["BLOCK_ROWS"]),)](
        slots, sums, dV, V, ds,
        B * J, D, slots.shape[0], iteration,
        CARRY=iteration < len(sums) - 1,
        SAVE=1 < iteration < len(sums),
        SQUASHED=squashed,
        **launch,
    )  # fmt: skip
