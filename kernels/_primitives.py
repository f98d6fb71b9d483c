"""Tile arithmetic that several kernels use unchanged.

Both routing ops sum over the input capsules with many programs. Each program leaves its share of a
weighted sum in a slot of its own, in a buffer (slots, B, J, D), and every program of the next
launch first adds the slots up, in slot order. The order never depends on timing, so a result is the
same to the last bit on every run, and no float is ever added atomically.

A "row" is one vector over D of a contiguous (B, J, D) tensor; row n belongs to b = n // J.
"""

import torch
import triton
import triton.language as tl

# The least finite values: a running maximum that starts here is below any logit, yet meets one of
# minus infinity without forming inf - inf.
_LOWEST_FLOAT32 = tl.constexpr(torch.finfo(torch.float32).min)
_LOWEST_FLOAT64 = tl.constexpr(torch.finfo(torch.float64).min)


@triton.jit
def full_of_lowest(shape: tl.constexpr, dtype: tl.constexpr):
    """A tensor of the least finite value of its type, from which a maximum starts."""
    if dtype == tl.float64:
        filled = tl.full(shape, _LOWEST_FLOAT64, dtype)
    else:
        filled = tl.full(shape, _LOWEST_FLOAT32, dtype)
    return filled


@triton.jit
def _round_to_tf32(x):
    """Round float32 to the 11 significant bits that a TF32 multiplier reads."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _tf32_operand(x):
    """Round an operand of one TF32 product; every NaN becomes one that the multiplier sees.

    An NVIDIA GPU makes NaN of all ones, which the rounding would carry over the sign, to -0; and
    one whose ones are all in the 13 bits that a multiplier does not read is infinity to it.
    """
    return tl.where(x == x, _round_to_tf32(x), float("nan"))


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in the type of its operands.

    A TF32 multiplier drops the bits that it does not read. For "tf32" the operands are rounded
    first, since dropping bits makes every product too small.

    "tf32x3" is float32 by three TF32 products: with a = a₀ + a₁ and a₀ in TF32, a₁ fits too but for
    its last bit, and only a₁ b₁, at most 2⁻²² of a b, is left out. It is spelled out here because
    it takes three instructions a value, a third of what Triton's own splitting takes. Of NaN, a₁ is
    NaN whatever a₀ is.
    """
    if PRECISION == "tf32x3":
        a_high = _round_to_tf32(a)
        b_high = _round_to_tf32(b)
        product = tl.dot(a - a_high, b_high, input_precision="tf32")
        product = tl.dot(a_high, b - b_high, acc=product, input_precision="tf32")
        product = tl.dot(a_high, b_high, acc=product, input_precision="tf32")
    elif PRECISION == "tf32":
        product = tl.dot(_tf32_operand(a), _tf32_operand(b), input_precision="tf32")
    else:
        product = tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)
    return product


@triton.jit
def _length_and_direction(s):
    """Length (ROWS, 1) and unit vector (ROWS, BLOCK_D) of each row; a zero row has direction 0.

    Rows are divided by their largest component first, so that no square overflows or vanishes. The
    maximum passes over NaN, so it is the root that has to carry it to the other components.
    """
    peak = tl.max(tl.abs(s), axis=1)[:, None]
    scaled = s / tl.where(peak > 0, peak, 1.0)
    root = tl.sqrt(tl.sum(scaled * scaled, axis=1))[:, None]
    root = tl.where(root == 0, 1.0, root)
    return peak * root, scaled / root


@triton.jit
def squash_rows(s):
    """squash(s) = n² / (1 + n²) e of each row, n its length and e its direction.

    With m = max(n, 1) and k = min(n, 1) that is k² / (1/m² + k²) e: no square overflows, nor does
    it matter that n itself may.
    """
    length, direction = _length_and_direction(s)
    inverse = 1.0 / tl.maximum(length, 1.0)
    small = tl.minimum(length, 1.0)
    return small * small / (inverse * inverse + small * small) * direction


@triton.jit
def squash_rows_grad(s, dv):
    """Gradient of squash at each row s.

    With e = s / n, the part of dv across s is scaled by f = n / (1 + n²) and the part along it,
    ρ = e·dv, by f + n f' = 2f / (1 + n²): ds = f ((dv - ρe) + 2 / (1 + n²) ρe). The two are kept
    apart, as their sum would lose the second to cancellation where n is large. With m and k as in
    `squash_rows`, 1 / (1 + n²) = (1/m)² / ((1/m)² + k²) and f = (1/m) k / ((1/m)² + k²).
    """
    length, direction = _length_and_direction(s)
    along = tl.sum(direction * dv, axis=1)[:, None] * direction
    inverse = 1.0 / tl.maximum(length, 1.0)
    small = tl.minimum(length, 1.0)
    scale = inverse / (inverse * inverse + small * small)
    return small * scale * ((dv - along) + 2.0 * inverse * scale * along)


@triton.jit
def sum_slots(slots_ptr, offsets, mask, slot_size, SLOTS: tl.constexpr):
    """Add up the same tile of every slot, first to last."""
    total = tl.load(slots_ptr + offsets, mask=mask, other=0.0)
    for slot in tl.static_range(1, SLOTS):
        total += tl.load(slots_ptr + slot * slot_size + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def total_pose(sums_ptr, offsets, mask, slot_size, count):
    """V after `count` iterations: the squashed sums of iterations 1 to `count`, in that order."""
    total = tl.zeros(offsets.shape, dtype=sums_ptr.dtype.element_ty)
    for k in range(count):
        total += squash_rows(tl.load(sums_ptr + k * slot_size + offsets, mask=mask, other=0.0))
    return total


@triton.jit
def load_sum(slots_ptr, offsets, mask, slot_size, J, SLOTS: tl.constexpr, UNIFORM: tl.constexpr):
    """The weighted sum of an iteration from its slots; UNIFORM ones still lack the coupling 1/J."""
    s = sum_slots(slots_ptr, offsets, mask, slot_size, SLOTS)
    if UNIFORM:
        s = s / J
    return s


@triton.jit
def advance_poses(
    # pointers
    slots_ptr, sums_ptr, poses_ptr,
    # extents
    first_row, last_row, slot_size, J, D, iteration, is_writer,
    # meta-parameters
    SLOTS: tl.constexpr, UNIFORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Open a forward pass: finish s⁽ᵗ⁻¹⁾ of some rows and put V⁽ᵗ⁻¹⁾ where the pass can read it.

    `iteration` is t. `poses_ptr` is this program's own copy; one writer saves s⁽ᵗ⁻¹⁾ for good.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    for row in range(first_row, last_row, BLOCK_ROWS):
        n = row + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (n < last_row) & (d < D)
        offsets = n * D + d
        s = load_sum(slots_ptr, offsets, mask, slot_size, J, SLOTS, UNIFORM)
        pose = total_pose(sums_ptr, offsets, mask, slot_size, iteration - 2) + squash_rows(s)
        tl.store(poses_ptr + offsets, pose, mask=mask)
        if is_writer:
            tl.store(sums_ptr + (iteration - 2) * slot_size + offsets, s, mask=mask)
    # The pass reads poses that other threads of the program have written.
    tl.debug_barrier()


@triton.jit
def pull_back(
    # pointers
    slots_ptr, sums_ptr, poses_ptr, grads_ptr, next_slot_ptr, saved_poses_ptr, saved_grads_ptr,
    # extents
    first_row, last_row, slot_size, D, iteration, is_writer,
    # meta-parameters
    CARRY: tl.constexpr, SLOTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Open a backward pass: ds⁽ᵗ⁾ from the slots of dv⁽ᵗ⁾, and V⁽ᵗ⁻¹⁾, of some rows.

    `poses_ptr` and `grads_ptr` are this program's own copies; one writer saves both for the pass
    that contracts them. The slot that the pass adds to starts at zero, the writer's at dv⁽ᵗ⁾ where
    that is dV⁽ᵗ⁾ (CARRY), so that the next slots add up to dV⁽ᵗ⁻¹⁾.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    for row in range(first_row, last_row, BLOCK_ROWS):
        n = row + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (n < last_row) & (d < D)
        offsets = n * D + d
        s = tl.load(sums_ptr + (iteration - 1) * slot_size + offsets, mask=mask, other=0.0)
        dv = sum_slots(slots_ptr, offsets, mask, slot_size, SLOTS).to(s.dtype)
        ds = squash_rows_grad(s, dv)
        pose = total_pose(sums_ptr, offsets, mask, slot_size, iteration - 1)
        tl.store(grads_ptr + offsets, ds, mask=mask)
        tl.store(poses_ptr + offsets, pose, mask=mask)
        if CARRY:
            tl.store(next_slot_ptr + offsets, tl.where(is_writer, dv, 0.0), mask=mask)
        else:
            tl.store(next_slot_ptr + offsets, tl.zeros_like(dv), mask=mask)
        if is_writer:
            tl.store(saved_grads_ptr + offsets, ds, mask=mask)
            tl.store(saved_poses_ptr + offsets, pose, mask=mask)
    tl.debug_barrier()


@triton.jit
def load_grad_coupling(
    ptrs, mask, steps_after, DTYPE: tl.constexpr, HAS_GRAD_COUPLING: tl.constexpr
):
    """The coupling's own gradient; it belongs to the last step, and is zero in the others."""
    grad_coupling = tl.zeros(mask.shape, DTYPE)
    if HAS_GRAD_COUPLING:
        is_last = tl.zeros(mask.shape, tl.int32) == steps_after
        grad_coupling += tl.load(ptrs, mask & is_last, other=0.0).to(DTYPE)
    return grad_coupling
