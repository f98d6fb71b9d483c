"""A forward pass with two products for each pair of capsules: for any number of output capsules.

    c̃_ij = softmax_j(û_ij·pose_j + prior_ij),  c = c̃ + bias,  s_j = Σ_i c_ij û_ij,  û_ij = W_ij u_i

Neither product forms û. The logits are û_ij·pose_j = Σ_p u_ip (W_ij pose_j)_p: a product of the
poses with W_jᵀ, (batch rows × D) (D × P·capsules), then a sum over p against u. The weighted sum is
a product with inner dimension P·capsules, s_j = (c_j u) W_j. The logits lie between them in memory,
1/D of what û would take. Each product has a kernel of its own, because the best tiles differ:

- `_logits_kernel`: a warp holds u of a block of capsules and walks over a run of output capsules.
  It keeps the softmax's maximum and sum of the run. `_softmax_kernel` joins the runs.
- `_weighted_sum_kernel`: a warp has one output capsule and walks over the blocks. The sum stays in
  its registers. The warps of a program share u.

In both, each warp has its own part of W, and all batch rows of the program. So a value of W is
read, rounded and split once for every 32 or 64 batch rows.

Columns of a block run over (p, i) with i fastest. Where a block has four capsules, this gives every
thread the columns of one of them: in the first product, so it can sum over p, and in the second, so
it forms the coupling once for all p. `_blocks_kernel` writes u in this order once a call. The
logits of a block lie side by side too.

`_two_products_backward.py` has the backward. There the first kernel also forms dc_ij = û_ij·ds_j.
The second takes db_ij = c̃_ij (dc_ij - δ_i) in place of c_ij.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritoncaps.kernels._launch import (
    Target,
    accumulation_dtype,
    divide,
    dot_precision,
    holds_operands,
    measured,
    pose_blocks,
    strides,
    target_of,
    with_all_registers,
)
from tritoncaps.kernels._patches import Patches, input_offsets, located, row_offsets
from tritoncaps.kernels._tiles import round_to_tf32, softmax_start

# Launch rule --------------------------------------------------------------------------------------


def two_products_launch(
    I: int, P: int, J: int, D: int, dtype: torch.dtype, target: Target
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """The block, and the launch keywords of the logits and of the weighted sum.

    BLOCK_I: 32 columns, 16 if D is above 32. A block is at least one capsule, and a product needs
    at least 16 columns.
    BLOCK_B: 32 batch rows, of which a thread of the logits holds u and a projection, 32 values
    each. In the weighted sum, a thread holds c u, at most 64 values, and the sum and a product, at
    most 32 each: 64 rows. Three products split c u in two. So they have 32 rows, because Triton 3.6
    spills a few values with 64. Half of all that for float64, and fewer the larger a pose is.
    GROUPS: 4 blocks, one for each warp. BLOCK_J: 8 output capsules, one for each warp. Fewer if
    their W does not fit into shared memory.
    maxnreg: three programs of the logits share a processor. The values of float64, or of a larger
    pose, would not fit then, and neither would those of products that keep their operands. With a
    prior, or in the backward, two programs share it.
    MAX_RUN: the output capsules that a program walks over. Shorter runs make more programs, and
    read u more often.
    MAX_SPLITS: at B = 128, two programs for each of the 132 processors of an H200.
    num_stages: the next W is fetched while the warps work on one. In the weighted sum, the
    addresses of a second one ahead would take too many registers. A W that does not fit twice is
    not fetched ahead.
    The interpreter takes a millisecond for every program, so there one has everything, if it can.
    """
    block_p, block_d = pose_blocks(P, D)
    is_interpreted = target.architecture == "interpreter"
    scale = 2 if accumulation_dtype(dtype) == torch.float64 else 1
    columns = max(min(32, 1024 // block_d) // scale, 16)
    if is_interpreted:
        columns = min(block_p * triton.next_power_of_2(max(I, 1)), 128)
    block_i = max(columns, 16, block_p) // block_p
    block = {"BLOCK_I": block_i, "BLOCK_P": block_p, "BLOCK_D": block_d}
    columns = block_i * block_p

    # Four times what the warps read of W leaves room for the next of it, and for the rest.
    warps, room = 8, target.shared_memory // (4 * columns * block_d * 4 * scale)
    while warps > 1 and warps > room and not is_interpreted:
        warps //= 2

    groups = min(triton.next_power_of_2(max(triton.cdiv(I, block_i), 1)), 4, warps)
    rows = 1024 // max(columns, block_d) // scale
    logits = {
        "GROUPS": groups,
        "BLOCK_B": min(max(rows, 16), 32),
        "MAX_RUN": J if is_interpreted else 32,
        "num_warps": groups,
        "num_stages": 3 if room > 0 else 1,
    }
    is_nvidia = target.architecture.startswith("sm")
    if is_nvidia and not holds_operands(target) and max(columns, block_d) <= 32 // scale:
        logits["maxnreg"] = 168
    block_j = min(triton.next_power_of_2(J), warps)
    factors = 1024 if dot_precision(dtype, target) == "tf32x3" else 2048
    block_b = min(max(min(factors // columns, 1024 // block_d) // scale, 16), 64)
    programs = 128 // block_b * triton.cdiv(J, block_j)
    weighted_sum = {
        "BLOCK_B": block_b,
        "BLOCK_J": block_j,
        "MAX_SPLITS": 1 if is_interpreted else max(264 // programs, 1),
        "num_warps": block_j,
        "num_stages": 2 if room > 0 else 1,
    }
    extents = {"I": I, "P": P, "J": J, "D": D}
    return (
        block,
        measured("logits", logits, target, dtype, **extents),
        measured("weighted_sum", weighted_sum, target, dtype, **extents),
    )


# Kernels ------------------------------------------------------------------------------------------
#
# u is kept as (blocks, B, BLOCK_P, BLOCK_I), the logits and dc as (J, blocks, rows, BLOCK_I). Each
# run leaves (2 or 3, blocks, rows, BLOCK_I): the softmax's maximum, its sum, and with dc the sum of
# exp(logit - maximum) dc. `rows` are a chunk of the batch, from `first_b` on, and `size` is
# blocks · rows · BLOCK_I.


@triton.jit
def _tf32_operand(x):
    """`tf32_operand` of `_tiles.py` in three instructions instead of five.

    The multiplier drops the bits that rounding would clear. The differences are exact, and NaN in
    them stays NaN. As with three products, an infinite operand becomes NaN.
    """
    rounded = (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    return x - (x - rounded)


@triton.jit
def _dot(a, w, PRECISION: tl.constexpr):
    """a @ w in the type of a, as `dot` of `_tiles.py` does it. TF32 holds a w of 16 bits exactly.

    That function's three products share their factors, and Triton moves one of them through shared
    memory again. Here every product has factors of its own, written differently. So Triton loads
    each where it is needed, and the assembler gets one of each, because LLVM sees that they are
    equal.
    """
    IS_EXACT: tl.constexpr = w.dtype.primitive_bitwidth == 16
    w = w.to(a.dtype)
    if PRECISION == "tf32x3":
        a_low = a - round_to_tf32(a)
        w_low = w - round_to_tf32(w)
        product = tl.dot(a_low, round_to_tf32(w), input_precision="tf32")
        product = tl.dot(a - a_low, w_low, acc=product, input_precision="tf32")
        product = tl.dot(a + (-a_low), w + (-w_low), acc=product, input_precision="tf32")
    elif PRECISION == "tf32":
        w = w if IS_EXACT else _tf32_operand(w)
        product = tl.dot(_tf32_operand(a), w, input_precision="tf32")
    else:
        product = tl.dot(a, w, input_precision=PRECISION, out_dtype=a.dtype)
    return product


@triton.jit
def _blocks_kernel(
    # pointers
    u_ptr, blocks_ptr,
    # extents
    B, I, P,
    # strides
    stride_u_b, stride_u_i, stride_u_p, stride_u_h, stride_u_w,
    # meta-parameters
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, KERNEL: tl.constexpr,
    TYPES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write a block of u, (BLOCK_B, BLOCK_P, BLOCK_I). What does not exist is zero."""
    block = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    k = tl.arange(0, BLOCK_P * BLOCK_I)[None, :]
    i = block * BLOCK_I + k % BLOCK_I
    p = (k // BLOCK_I).to(tl.int64)
    u_ptrs = u_ptr + row_offsets(b, stride_u_b, stride_u_h, stride_u_w, ROWS, COLUMNS, STEP)
    u_ptrs += input_offsets(i, stride_u_i, stride_u_h, stride_u_w, KERNEL, TYPES) + p * stride_u_p
    u = tl.load(u_ptrs, (b < B) & (i < I) & (p < P), other=0.0)
    tl.store(blocks_ptr + (block * B + b) * (BLOCK_P * BLOCK_I) + k, u, b < B)


@triton.jit
def _again(w):
    """w, written as another value. So Triton loads and splits it for a second product as for one.

    It would move factors that two products share through shared memory. As in `_dot`, the assembler
    gets one of each.
    """
    INT: tl.constexpr = tl.int16 if w.dtype.primitive_bitwidth == 16 else tl.int32
    bits = w.to(INT, bitcast=True)
    return ((bits & 0xFF) | (bits & -0x100)).to(w.dtype, bitcast=True)


@triton.jit
def _agreement(x, w, u, PRECISION: tl.constexpr):
    """û·x of the capsules of a block, (GROUPS, BLOCK_B, BLOCK_I), from the product W x."""
    x = tl.broadcast_to(x[None, :, :], (u.shape[0], x.shape[0], x.shape[1]))
    projected = _dot(x, tl.permute(w, (0, 2, 1)), PRECISION)
    return tl.sum(tl.reshape(projected, u.shape) * u, axis=2)


@triton.jit
def _logits_kernel(
    # pointers
    blocks_ptr, weight_ptr, pose_ptr, prior_ptr, ds_ptr, grad_coupling_ptr,
    logits_ptr, dc_ptr, runs_ptr,
    # extents
    B, I, P, J, D, first_b, rows, blocks, size, run_length,
    # strides
    stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
    stride_prior_i, stride_prior_j,
    # meta-parameters
    HAS_POSE: tl.constexpr, HAS_PRIOR: tl.constexpr, WITH_DC: tl.constexpr,
    HAS_GRAD_COUPLING: tl.constexpr, SAVE_PAIRS: tl.constexpr, PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write û_ij·pose_j + prior_ij of a run of output capsules, and its maximum and sum.

    With dc, also û_ij·ds_j + grad_coupling_ij, and Σ_j exp(logit - maximum) dc of the run. Unless
    SAVE_PAIRS, what belongs to a pair (i, j) is not written.
    """
    VALUES: tl.constexpr = 3 if WITH_DC else 2
    DTYPE: tl.constexpr = runs_ptr.dtype.element_ty
    K: tl.constexpr = BLOCK_P * BLOCK_I
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b = first_b + row
    block = tl.program_id(1).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    run = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    k = tl.arange(0, K)
    p = (k // BLOCK_I).to(tl.int64)
    mask_rows = (row < rows)[None, :, None] & (block < blocks)[:, None, None]
    u_ptrs = blocks_ptr + ((block[:, None] * B + b[None, :]) * K)[:, :, None] + k[None, None, :]
    u = tl.load(u_ptrs, mask_rows, other=0.0)
    u = tl.reshape(u, (GROUPS, BLOCK_B, BLOCK_P, BLOCK_I))
    offs_bd = (b * J * D)[:, None] + d[None, :]
    mask_bd = (row < rows)[:, None] & (d < D)[None, :]
    ki = block[:, None] * BLOCK_I + (k % BLOCK_I)[None, :]
    weight_ptrs = weight_ptr + (ki * stride_weight_i + (p * stride_weight_p)[None, :])[:, :, None]
    weight_ptrs += (d * stride_weight_d)[None, None, :]
    mask_w = ((ki < I) & (p < P)[None, :])[:, :, None] & (d < D)[None, None, :]
    i = block[:, None] * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    prior_ptrs = prior_ptr + i * stride_prior_i
    coupling_ptrs = grad_coupling_ptr + (b[None, :, None] * I + i[:, None, :]) * J
    offs = ((block[:, None] * rows + row[None, :]) * BLOCK_I)[:, :, None]
    offs += tl.arange(0, BLOCK_I)[None, None, :]

    top, mass = softmax_start((GROUPS, BLOCK_B, BLOCK_I), DTYPE, False)
    moment = tl.zeros((GROUPS, BLOCK_B, BLOCK_I), DTYPE)
    for j in range(run * run_length, tl.minimum((run + 1) * run_length, J)):
        if HAS_POSE or WITH_DC:
            w = tl.load(weight_ptrs + j * stride_weight_j, mask_w, other=0.0)
        logits = tl.zeros((GROUPS, BLOCK_B, BLOCK_I), DTYPE)
        if HAS_POSE:
            pose = tl.load(pose_ptr + j * D + offs_bd, mask_bd, other=0.0).to(DTYPE)
            logits += _agreement(pose, w, u, PRECISION)
        if HAS_PRIOR:
            prior = tl.load(prior_ptrs + j * stride_prior_j, i < I, other=0.0)
            logits += prior.to(DTYPE)[:, None, :]
        # Where no capsule is left in a block, the logits are 0: the weighted sum reads them.
        if SAVE_PAIRS:
            tl.store(logits_ptr + j * size + offs, logits, mask_rows)
        # Of the exponentials of both differences from the new maximum, one is 1.
        share = tl.exp(-tl.abs(logits - top))
        is_new = logits > top
        mass = tl.where(is_new, mass * share + 1.0, mass + share)
        if WITH_DC:
            ds = tl.load(ds_ptr + j * D + offs_bd, mask_bd, other=0.0).to(DTYPE)
            dc = _agreement(ds, _again(w), u, PRECISION)
            if HAS_GRAD_COUPLING:
                mask_pairs = mask_rows & (i < I)[:, None, :]
                dc += tl.load(coupling_ptrs + j, mask_pairs, other=0.0).to(DTYPE)
            if SAVE_PAIRS:
                tl.store(dc_ptr + j * size + offs, dc, mask_rows)
            moment = tl.where(is_new, moment * share + dc, moment + share * dc)
        top = tl.maximum(top, logits)
    runs_ptr += VALUES * run * size
    tl.store(runs_ptr + offs, top, mask_rows)
    tl.store(runs_ptr + size + offs, mass, mask_rows)
    if WITH_DC:
        tl.store(runs_ptr + 2 * size + offs, moment, mask_rows)


@triton.jit
def _softmax_kernel(
    # pointers
    runs_ptr, normaliser_ptr, delta_ptr,
    # extents
    I, first_b, rows, size, runs, padded_b,
    # meta-parameters
    LEAKY: tl.constexpr, WITH_DC: tl.constexpr, SAVE_NORMALISER: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Join the runs. The first gets the softmax's maximum, the inverse of its sum, and δ with dc.

    log Σ_j exp and δ may be saved too, (I, padded_b).
    """
    DTYPE: tl.constexpr = runs_ptr.dtype.element_ty
    VALUES: tl.constexpr = 3 if WITH_DC else 2
    block = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    of_block = tl.arange(0, BLOCK_I)[None, :]
    mask = tl.broadcast_to(row < rows, (BLOCK_B, BLOCK_I))
    first_ptrs = runs_ptr + (block * rows + row) * BLOCK_I + of_block
    top, mass = softmax_start((BLOCK_B, BLOCK_I), DTYPE, LEAKY)
    moment = tl.zeros((BLOCK_B, BLOCK_I), DTYPE)
    for run in range(tl.cast(runs, tl.int64)):
        ptrs = first_ptrs + VALUES * run * size
        top_of_run = tl.load(ptrs, mask, other=0.0)
        new_top = tl.maximum(top, top_of_run)
        shrink = tl.exp(top - new_top)
        share = tl.exp(top_of_run - new_top)
        mass = mass * shrink + tl.load(ptrs + size, mask, other=1.0) * share
        if WITH_DC:
            moment = moment * shrink + tl.load(ptrs + 2 * size, mask, other=0.0) * share
        top = new_top
    inverse = 1.0 / mass
    delta = moment * inverse
    tl.store(first_ptrs, top, mask)
    tl.store(first_ptrs + size, inverse, mask)
    if WITH_DC:
        tl.store(first_ptrs + 2 * size, delta, mask)
    if SAVE_NORMALISER:
        i = block * BLOCK_I + of_block
        offs = i * padded_b + first_b + row
        tl.store(normaliser_ptr + offs, top + tl.log(mass), mask & (i < I))
        if WITH_DC:
            tl.store(delta_ptr + offs, delta, mask & (i < I))


@triton.jit
def _weighted_sum_kernel(
    # pointers
    blocks_ptr, weight_ptr, logits_ptr, dc_ptr, softmax_ptr, bias_ptr, slots_ptr, coupling_ptr,
    # extents
    B, I, P, J, D, first_b, rows, blocks, size, blocks_each,
    # strides
    stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
    stride_bias_i, stride_bias_j,
    # meta-parameters
    HAS_LOGITS: tl.constexpr, WITH_DC: tl.constexpr, HAS_BIAS: tl.constexpr,
    SAVE_COUPLING: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Put one program's share of s in its slot. Without logits, its share of Σ_i û_ij.

    With dc, that of dpose: db takes the place of c.
    """
    DTYPE: tl.constexpr = slots_ptr.dtype.element_ty
    K: tl.constexpr = BLOCK_P * BLOCK_I
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b = first_b + row
    j = tl.program_id(1).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    split = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    k = tl.arange(0, K)
    p = (k // BLOCK_I).to(tl.int64)
    is_j = (j < J)[:, None, None]
    is_row = (row < rows)[None, :, None]
    is_d = (d < D)[None, None, :]
    weight_ptrs = weight_ptr + (j * stride_weight_j)[:, None, None]
    weight_ptrs += (p * stride_weight_p)[None, :, None] + (d * stride_weight_d)[None, None, :]
    total = tl.zeros((BLOCK_J, BLOCK_B, BLOCK_D), DTYPE)
    for block in range(split * blocks_each, tl.minimum((split + 1) * blocks_each, blocks)):
        ki = block * BLOCK_I + k % BLOCK_I
        mask_w = is_j & ((ki < I) & (p < P))[None, :, None] & is_d
        w = tl.load(weight_ptrs + (ki * stride_weight_i)[None, :, None], mask_w, other=0.0)
        u_ptrs = blocks_ptr + ((block * B + b) * K)[None, :, None] + k[None, None, :]
        u = tl.load(u_ptrs, is_row, other=0.0)
        if HAS_LOGITS:
            of_block = tl.arange(0, BLOCK_I)[None, None, :]
            offs = ((block * rows + row) * BLOCK_I)[None, :, None] + of_block
            top = tl.load(softmax_ptr + offs, is_row, other=0.0)
            inverse = tl.load(softmax_ptr + size + offs, is_row, other=0.0)
            offs_pairs = (j * size)[:, None, None] + offs
            # The exponential of a logit that does not exist must not overflow.
            logits = tl.load(logits_ptr + offs_pairs, is_j & is_row, other=float("-inf"))
            c = tl.exp(logits - top) * inverse
            if WITH_DC:
                delta = tl.load(softmax_ptr + 2 * size + offs, is_row, other=0.0)
                c *= tl.load(dc_ptr + offs_pairs, is_j & is_row, other=0.0) - delta
            i = block * BLOCK_I + of_block
            if HAS_BIAS:
                bias_ptrs = bias_ptr + i * stride_bias_i + (j * stride_bias_j)[:, None, None]
                c += tl.load(bias_ptrs, is_j & (i < I), other=0.0).to(DTYPE)
            if SAVE_COUPLING:
                coupling_ptrs = coupling_ptr + (b[None, :, None] * I + i) * J + j[:, None, None]
                tl.store(coupling_ptrs, c, is_j & is_row & (i < I))
            c = tl.broadcast_to(c[:, :, None, :], (BLOCK_J, BLOCK_B, BLOCK_P, BLOCK_I))
            cu = tl.reshape(c, (BLOCK_J, BLOCK_B, K)) * u
        else:
            cu = tl.broadcast_to(u, (BLOCK_J, BLOCK_B, K))
        total += _dot(cu, w, PRECISION)
    slot_ptr = slots_ptr + split * (tl.cast(B, tl.int64) * J * D)
    offs_slot = (b * J * D)[None, :, None] + (j * D)[:, None, None] + d[None, None, :]
    tl.store(slot_ptr + offs_slot, total, is_j & is_row & is_d)


# Launchers ----------------------------------------------------------------------------------------


class TwoProducts:
    """The passes of one call over u, (B, I, P), and the weight, (I, P, J, D), any strides.

    `pairs` is the tensors over (b, i, j) that a pass leaves in memory: 2 if it has dc.
    """

    def __init__(self, u: Tensor | Patches, weight: Tensor, *, pairs: int = 1) -> None:
        B, I, P = u.shape
        _, _, J, D = weight.shape
        target, dtype = target_of(u), accumulation_dtype(u.dtype)
        block, logits, weighted_sum = two_products_launch(I, P, J, D, u.dtype, target)
        block_i, block_p = block["BLOCK_I"], block["BLOCK_P"]
        blocks = triton.cdiv(I, block_i)
        splits, self._blocks_each = divide(blocks, 1, weighted_sum.pop("MAX_SPLITS"))
        runs, self._run_length = divide(J, 1, triton.cdiv(J, logits.pop("MAX_RUN")))
        # What a pass leaves of the pairs takes an eighth of what û would, or is that of 64 rows. If
        # the whole batch would take more, it goes in chunks, which are whole programs.
        fitting = B * D // (8 * pairs)
        self._chunk = B if fitting >= B else min(B, max(fitting // 64, 1) * 64)
        self._weight, self._extents = weight, (B, I, P, J, D)
        self._logits_launch, self._sum_launch = block | logits, block | weighted_sum
        self._join_launch = with_all_registers({"num_warps": 4}, target)
        self._precision = dot_precision(u.dtype, target)
        self._blocks = u.new_empty((blocks, B, block_p * block_i), dtype=dtype)
        size = blocks * self._chunk * block_i
        self._pairs = u.new_empty((pairs, J, size), dtype=dtype)
        self._runs = u.new_empty((runs, 1 + pairs, size), dtype=dtype)
        self.slots = u.new_empty((splits, B, J, D), dtype=dtype)
        values, of_u, modes = located(u)
        _blocks_kernel[(blocks, triton.cdiv(B, 32))](
            values, self._blocks,
            B, I, P,
            *of_u,
            BLOCK_B=32,
            BLOCK_I=block_i,
            BLOCK_P=block_p,
            **modes,
        )  # fmt: skip

    def run(
        self,
        pose: Tensor | None,
        prior: Tensor | None,
        bias: Tensor | None,
        coupling: Tensor | None,
        *,
        leaky: bool,
    ) -> None:
        """Write the shares of s to the slots, and c to `coupling` unless it is None.

        The arguments are those of `OneProduct.run`.
        """
        has_logits = pose is not None or prior is not None
        # Without logits, nothing limits the rows.
        for chunk in self.chunks() if has_logits else [(0, self._extents[0])]:
            if has_logits:
                self.write_softmax(chunk, pose, prior, leaky=leaky)
            self.write_weighted_sum(chunk, bias, coupling, has_logits=has_logits)

    def chunks(self) -> list[tuple[int, int]]:
        """The first row and the number of rows of every chunk of the batch."""
        B = self._extents[0]
        return [(first, min(self._chunk, B - first)) for first in range(0, B, self._chunk)]

    def write_softmax(
        self,
        chunk: tuple[int, int],
        pose: Tensor | None,
        prior: Tensor | None,
        ds: Tensor | None = None,
        grad_coupling: Tensor | None = None,
        saved: Tensor | None = None,
        *,
        save_pairs: bool = True,
        leaky: bool,
    ) -> None:
        """Write the logits of a chunk, and to the first run their maximum and inverse sum.

        With `ds`, (B, J, D), write dc too, and to the first run δ. `saved`, (2, I, B'), gets
        log Σ_j exp and δ. Without `save_pairs`, logits and dc are not written.
        """
        B, I, P, J, D = self._extents
        first_b, rows = chunk
        launch, blocks, runs = self._logits_launch, len(self._blocks), len(self._runs)
        size = blocks * rows * launch["BLOCK_I"]
        if ds is not None and launch["BLOCK_I"] > 4:
            launch = launch | {"BLOCK_B": 16}  # of many small capsules, a thread has many pairs
        if (prior is not None or ds is not None) and "maxnreg" in launch:
            launch = launch | {"maxnreg": 255}  # for its addresses, and for a second product
        grid = triton.cdiv(rows, launch["BLOCK_B"]), triton.cdiv(blocks, launch["GROUPS"]), runs
        _logits_kernel[grid](
            self._blocks, self._weight,
            # In place of a missing tensor, a kernel gets the blocks, which it only reads.
            *(self._blocks if x is None else x for x in (pose, prior, ds, grad_coupling)),
            self._pairs[0], self._pairs[-1], self._runs,
            B, I, P, J, D, first_b, rows, blocks, size, self._run_length,
            *self._weight.stride(), *strides(prior, 2),
            HAS_POSE=pose is not None,
            HAS_PRIOR=prior is not None,
            WITH_DC=ds is not None,
            HAS_GRAD_COUPLING=grad_coupling is not None,
            SAVE_PAIRS=save_pairs,
            PRECISION=self._precision,
            **launch,
        )  # fmt: skip
        block_b = 512 // launch["BLOCK_I"]
        _softmax_kernel[(blocks, triton.cdiv(rows, block_b))](
            self._runs, *((self._runs, self._runs) if saved is None else saved),
            I, first_b, rows, size, runs, 0 if saved is None else saved.shape[2],
            LEAKY=leaky,
            WITH_DC=ds is not None,
            SAVE_NORMALISER=saved is not None,
            BLOCK_B=block_b,
            BLOCK_I=launch["BLOCK_I"],
            **self._join_launch,
        )  # fmt: skip

    def write_weighted_sum(
        self,
        chunk: tuple[int, int],
        bias: Tensor | None = None,
        coupling: Tensor | None = None,
        *,
        has_logits: bool = True,
        with_dc: bool = False,
    ) -> None:
        """Write the shares of s of a chunk to the slots, or with dc those of dpose."""
        B, I, P, J, D = self._extents
        first_b, rows = chunk
        launch, blocks = self._sum_launch, len(self._blocks)
        tiles_b, tiles_j = triton.cdiv(rows, launch["BLOCK_B"]), triton.cdiv(J, launch["BLOCK_J"])
        _weighted_sum_kernel[(tiles_b, tiles_j, len(self.slots))](
            self._blocks, self._weight, self._pairs[0], self._pairs[-1], self._runs,
            self._blocks if bias is None else bias,
            self.slots, self._blocks if coupling is None else coupling,
            B, I, P, J, D, first_b, rows, blocks, blocks * rows * launch["BLOCK_I"],
            self._blocks_each,
            *self._weight.stride(), *strides(bias, 2),
            HAS_LOGITS=has_logits,
            WITH_DC=with_dc,
            HAS_BIAS=bias is not None,
            SAVE_COUPLING=coupling is not None,
            PRECISION=self._precision,
            **launch,
        )  # fmt: skip
