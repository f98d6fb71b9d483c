"""A forward pass with two products for each pair of capsules: for any number of output capsules.

    c̃_ij = softmax_j(û_ij·pose_j + prior_ij),  c = c̃ + bias,  s_j = Σ_i c_ij û_ij,  û_ij = W_ij u_i

Neither product forms û. The logits are û_ij·pose_j = Σ_p u_ip (W_ij pose_j)_p: a product of the
poses with W_jᵀ, (batch rows × D) (D × P·capsules), then a sum over p against u. The weighted sum is
a product with inner dimension P·capsules, s_j = (c_j u) W_j. The logits lie between them in memory,
1/D of what û would take. Each product has a kernel of its own, because the best tiles differ:

- `_logits_kernel`: a warp holds u of some capsules and walks over a run of output capsules. It
  keeps the softmax's maximum and sum of the run. `_softmax_kernel` joins the runs.
- `_weighted_sum_kernel`: a warp has one output capsule and walks over the input capsules. The sum
  stays in its registers. The warps of a program share u.

In both, each warp has its own part of W, and all batch rows of the program. So a value of W is
read, rounded and split once for every 32 or 64 batch rows.

Capsules come in blocks of BLOCK_I. In a block, columns are ordered (p, i) with i fastest. A thread
has every fourth column of a factor, which is one capsule of a block of four: it forms the coupling
once for all p. `_prepare_kernel` writes u in this order once a call, and the logits are kept in it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritoncaps.kernels._launch import (
    Target,
    UnsupportedShape,
    accumulation_dtype,
    divide,
    dot_precision,
    measured,
    strides,
    target_of,
)
from tritoncaps.kernels._tiles import round_to_tf32, softmax_start, tf32_operand

# Launch rules -------------------------------------------------------------------------------------


def _blocks(P: int, D: int) -> tuple[int, int]:
    """BLOCK_P and BLOCK_D: a whole pose each."""
    block_p = triton.next_power_of_2(max(P, 1))
    block_d = max(triton.next_power_of_2(max(D, 1)), 16)
    if max(block_p, 16) * block_d > 4096:
        raise UnsupportedShape(f"a weight of P={P} × D={D} for one pair; a warp holds 4096 values")
    return block_p, block_d


def logits_launch(
    I: int, P: int, J: int, D: int, dtype: torch.dtype, target: Target
) -> dict[str, int]:
    """Launch keywords of the logits.

    BLOCK_I: 64 columns, of which a thread holds u and a projection for 32 batch rows, 128 values.
    A larger D leaves room for fewer, float64 for half. GROUPS: 4 warps with a group each.
    BLOCK_J: the output capsules of a run. The interpreter takes a millisecond for every program, so
    there one program has them all.
    """
    block_p, block_d = _blocks(P, D)
    is_wide = accumulation_dtype(dtype) == torch.float64
    is_interpreted = target.architecture == "interpreter"
    columns = max(min(64, 1024 // block_d) // (2 if is_wide else 1), 16, block_p)
    block_i = columns // block_p
    groups = triton.next_power_of_2(max(triton.cdiv(I, block_i), 1))
    launch = {
        "GROUPS": min(groups, 32 if is_interpreted else 4),
        "BLOCK_B": 32 if columns <= 64 and not is_wide else 16,
        "BLOCK_I": block_i,
        "BLOCK_J": triton.next_power_of_2(J) if is_interpreted else 16,
        "BLOCK_P": block_p,
        "BLOCK_D": block_d,
        "num_stages": 3,
    }
    launch["num_warps"] = min(launch["GROUPS"], 4)
    return measured("logits", launch, target, dtype, I=I, P=P, J=J, D=D)


def weighted_sum_launch(
    I: int, P: int, J: int, D: int, dtype: torch.dtype, target: Target
) -> tuple[dict[str, int], int, int]:
    """Launch keywords of the weighted sum, the splits of the blocks, the blocks in each split.

    BLOCK_I: blocks of four capsules. More if P is small, because a product has an inner dimension
    of at least 16. BLOCK_J: 8 output capsules, one for each warp. BLOCK_B: up to 64 batch rows. The
    factor c u and the sum then take 64 and 32 values of a thread.
    MAX_SPLITS: at B = 128, two programs for each of the 132 processors of an H200.
    """
    block_p, block_d = _blocks(P, D)
    is_wide = accumulation_dtype(dtype) == torch.float64
    is_interpreted = target.architecture == "interpreter"
    block_i = max(min(4, 64 // block_p), 16 // block_p, 1)
    if is_interpreted:
        block_i = max(block_i, min(triton.next_power_of_2(max(I, 1)), 256 // block_p))
    block_j = min(triton.next_power_of_2(J), 8)
    room = min(2048 // (block_i * block_p), 1024 // block_d) // (2 if is_wide else 1)
    block_b = min(max(room, 16), 64)
    programs = 128 // block_b * triton.cdiv(J, block_j)
    launch = {
        "BLOCK_B": block_b,
        "BLOCK_I": block_i,
        "BLOCK_J": block_j,
        "BLOCK_P": block_p,
        "BLOCK_D": block_d,
        "MAX_SPLITS": max(264 // programs, 1),
        "num_warps": block_j,
        "num_stages": 2,
    }
    launch = measured("weighted_sum", launch, target, dtype, I=I, P=P, J=J, D=D)
    return launch, *divide(I, launch["BLOCK_I"], launch.pop("MAX_SPLITS"))


# Kernels ------------------------------------------------------------------------------------------
#
# u is kept as (blocks, B, BLOCK_P, BLOCK_I), the logits as (J, blocks, B, BLOCK_I), and the
# softmax's maximum and sum of each run as (runs, 2, blocks, B, BLOCK_I).


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a @ b in the type of its operands, as `dot` of `_tiles.py` does it.

    That function's products share their factors. Triton then moves a factor of the last product
    through shared memory. Here each product has factors of its own, written differently, and Triton
    loads them where they are needed. LLVM finds that they are equal.
    """
    if PRECISION == "tf32x3":
        a_low = a - round_to_tf32(a)
        b_low = b - round_to_tf32(b)
        product = tl.dot(a_low, round_to_tf32(b), input_precision="tf32")
        product = tl.dot(a - a_low, b_low, acc=product, input_precision="tf32")
        product = tl.dot(a + (-a_low), b + (-b_low), acc=product, input_precision="tf32")
    elif PRECISION == "tf32":
        product = tl.dot(tf32_operand(a), tf32_operand(b), input_precision="tf32")
    else:
        product = tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)
    return product


@triton.jit
def _prepare_kernel(
    # pointers
    u_ptr, blocks_ptr,
    # extents
    B, I, P,
    # strides
    stride_u_b, stride_u_i, stride_u_p,
    # meta-parameters
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write a block of u, (BLOCK_B, BLOCK_P, BLOCK_I). What does not exist is zero."""
    block = tl.program_id(1).to(tl.int64)
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    k = tl.arange(0, BLOCK_P * BLOCK_I)[None, :]
    i = block * BLOCK_I + k % BLOCK_I
    p = (k // BLOCK_I).to(tl.int64)
    u_ptrs = u_ptr + b * stride_u_b + i * stride_u_i + p * stride_u_p
    u = tl.load(u_ptrs, (b < B) & (i < I) & (p < P), other=0.0)
    tl.store(blocks_ptr + (block * B + b) * (BLOCK_P * BLOCK_I) + k, u, b < B)


@triton.jit
def _logits_kernel(
    # pointers
    u_ptr, weight_ptr, pose_ptr, prior_ptr, logits_ptr, runs_ptr,
    # extents
    B, I, P, J, D, size,
    # strides
    stride_u_b, stride_u_i, stride_u_p,
    stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
    stride_prior_i, stride_prior_j,
    # meta-parameters
    HAS_POSE: tl.constexpr, HAS_PRIOR: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write û_ij·pose_j + prior_ij of a run of output capsules, and its maximum and sum."""
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    N: tl.constexpr = BLOCK_P * BLOCK_I
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    first_i = tl.program_id(1).to(tl.int64) * (GROUPS * BLOCK_I)
    first_i += tl.arange(0, GROUPS)[:, None] * BLOCK_I
    run = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    k = tl.arange(0, N)
    p = (k // BLOCK_I).to(tl.int64)
    ki = first_i + (k % BLOCK_I)[None, :]
    mask_k = (ki < I) & (p < P)[None, :]
    u_ptrs = u_ptr + (b * stride_u_b)[None, :, None]
    u_ptrs += (ki * stride_u_i + (p * stride_u_p)[None, :])[:, None, :]
    u = tl.load(u_ptrs, (b < B)[None, :, None] & mask_k[:, None, :], other=0.0).to(DTYPE)
    u = tl.reshape(u, (GROUPS, BLOCK_B, BLOCK_P, BLOCK_I))
    weight_ptrs = weight_ptr + (ki * stride_weight_i + (p * stride_weight_p)[None, :])[:, :, None]
    weight_ptrs += (d * stride_weight_d)[None, None, :]
    mask_w = mask_k[:, :, None] & (d < D)[None, None, :]
    pose_ptrs = pose_ptr + (b * J * D)[:, None] + d[None, :]
    mask_bd = (b < B)[:, None] & (d < D)[None, :]

    i = first_i + tl.arange(0, BLOCK_I)[None, :]
    prior_ptrs = prior_ptr + i * stride_prior_i
    # Whole blocks are written, because the weighted sum reads whole blocks.
    offs = (b * UNIT)[None, :, None] + (i // UNIT * (B * UNIT) + i % UNIT)[:, None, :]
    mask = (b < B)[None, :, None] & (i < tl.cdiv(I, UNIT) * UNIT)[:, None, :]
    top, mass = softmax_start((GROUPS, BLOCK_B, BLOCK_I), DTYPE, False)
    for j in range(run * BLOCK_J, tl.minimum((run + 1) * BLOCK_J, J)):
        logits = tl.zeros((GROUPS, BLOCK_B, BLOCK_I), DTYPE)
        if HAS_POSE:
            w = tl.load(weight_ptrs + j * stride_weight_j, mask_w, other=0.0).to(DTYPE)
            pose = tl.load(pose_ptrs + j * D, mask_bd, other=0.0).to(DTYPE)
            pose = tl.broadcast_to(pose[None, :, :], (GROUPS, BLOCK_B, BLOCK_D))
            projected = _dot(pose, tl.permute(w, (0, 2, 1)), PRECISION)
            logits += tl.sum(tl.reshape(projected, (GROUPS, BLOCK_B, BLOCK_P, BLOCK_I)) * u, axis=2)
        if HAS_PRIOR:
            prior = tl.load(prior_ptrs + j * stride_prior_j, i < I, other=0.0)
            logits += prior.to(DTYPE)[:, None, :]
        tl.store(logits_ptr + j * size + offs, logits, mask)
        new_top = tl.maximum(top, logits)
        mass = mass * tl.exp(top - new_top) + tl.exp(logits - new_top)
        top = new_top
    tl.store(runs_ptr + 2 * run * size + offs, top, mask)
    tl.store(runs_ptr + (2 * run + 1) * size + offs, mass, mask)


@triton.jit
def _softmax_kernel(
    # pointers
    runs_ptr,
    # extents
    size, runs,
    # meta-parameters
    LEAKY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the runs. The first gets the softmax's maximum, and the inverse of its sum."""
    DTYPE: tl.constexpr = runs_ptr.dtype.element_ty
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    top, mass = softmax_start((BLOCK,), DTYPE, LEAKY)
    for run in range(tl.cast(runs, tl.int64)):
        top_of_run = tl.load(runs_ptr + 2 * run * size + offs, mask, other=0.0)
        mass_of_run = tl.load(runs_ptr + (2 * run + 1) * size + offs, mask, other=1.0)
        new_top = tl.maximum(top, top_of_run)
        mass = mass * tl.exp(top - new_top) + mass_of_run * tl.exp(top_of_run - new_top)
        top = new_top
    tl.store(runs_ptr + offs, top, mask)
    tl.store(runs_ptr + size + offs, 1.0 / mass, mask)


@triton.jit
def _weighted_sum_kernel(
    # pointers
    blocks_ptr, weight_ptr, logits_ptr, softmax_ptr, bias_ptr, slots_ptr, coupling_ptr,
    # extents
    B, I, P, J, D, size, tiles,
    # strides
    stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
    stride_bias_i, stride_bias_j,
    # meta-parameters
    HAS_LOGITS: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_COUPLING: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Put one program's share of s in its slot. Without logits, its share of Σ_i û_ij."""
    DTYPE: tl.constexpr = slots_ptr.dtype.element_ty
    K: tl.constexpr = BLOCK_P * BLOCK_I
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    j = tl.program_id(1).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    split = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    k = tl.arange(0, K)
    p = (k // BLOCK_I).to(tl.int64)
    is_j = (j < J)[:, None, None]
    is_b = (b < B)[None, :, None]
    is_d = (d < D)[None, None, :]
    weight_ptrs = weight_ptr + (j * stride_weight_j)[:, None, None]
    weight_ptrs += (p * stride_weight_p)[None, :, None] + (d * stride_weight_d)[None, None, :]
    total = tl.zeros((BLOCK_J, BLOCK_B, BLOCK_D), DTYPE)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(I, BLOCK_I))):
        ki = tile * BLOCK_I + k % BLOCK_I
        mask_k = ((ki < I) & (p < P))[None, :, None]
        w_ptrs = weight_ptrs + (ki * stride_weight_i)[None, :, None]
        w = tl.load(w_ptrs, is_j & mask_k & is_d, other=0.0).to(DTYPE)
        row = (tile * B + b)[None, :, None]
        u = tl.load(blocks_ptr + row * K + k[None, None, :], is_b, other=0.0)
        if HAS_LOGITS:
            i = tl.arange(0, BLOCK_I)[None, None, :]
            offs = row * BLOCK_I + i
            top = tl.load(softmax_ptr + offs, is_b, other=0.0)
            inverse = tl.load(softmax_ptr + size + offs, is_b, other=0.0)
            logits_ptrs = logits_ptr + (j * size)[:, None, None] + offs
            logits = tl.load(logits_ptrs, is_j & is_b, other=0.0)
            c = tl.exp(logits - top) * inverse
            i += tile * BLOCK_I
            if HAS_BIAS:
                bias_ptrs = bias_ptr + i * stride_bias_i + (j * stride_bias_j)[:, None, None]
                c += tl.load(bias_ptrs, is_j & (i < I), other=0.0).to(DTYPE)
            if SAVE_COUPLING:
                coupling_ptrs = coupling_ptr + (b[None, :, None] * I + i) * J + j[:, None, None]
                tl.store(coupling_ptrs, c, is_j & is_b & (i < I))
            c = tl.broadcast_to(c[:, :, None, :], (BLOCK_J, BLOCK_B, BLOCK_P, BLOCK_I))
            cu = tl.reshape(c, (BLOCK_J, BLOCK_B, K)) * u
        else:
            cu = tl.broadcast_to(u, (BLOCK_J, BLOCK_B, K))
        total += _dot(cu, w, PRECISION)
    offs_slot = (b * J * D)[None, :, None] + (j * D)[:, None, None] + d[None, None, :]
    slot_ptr = slots_ptr + split * (tl.cast(B, tl.int64) * J * D)
    tl.store(slot_ptr + offs_slot, total, is_j & is_b & is_d)


# Launchers ----------------------------------------------------------------------------------------


class TwoProducts:
    """The passes of one call over u, (B, I, P), and the weight, (I, P, J, D), any strides."""

    def __init__(self, u: Tensor, weight: Tensor) -> None:
        B, I, P = u.shape
        _, _, J, D = weight.shape
        shape = I, P, J, D, u.dtype, target_of(u)
        self._u, self._weight = u, weight
        self._precision = dot_precision(u.dtype, target_of(u))
        self._logits_launch = logits_launch(*shape)
        self._sum_launch, splits, self._tiles = weighted_sum_launch(*shape)
        unit, block_p = self._sum_launch["BLOCK_I"], self._sum_launch["BLOCK_P"]
        blocks = triton.cdiv(I, unit)
        runs = triton.cdiv(J, self._logits_launch["BLOCK_J"])
        dtype = accumulation_dtype(u.dtype)
        self._blocks = u.new_empty((blocks, B, block_p * unit), dtype=dtype)
        self._logits = u.new_empty((J, blocks, B, unit), dtype=dtype)
        self._runs = u.new_empty((runs, 2, blocks, B, unit), dtype=dtype)
        self.slots = u.new_empty((splits, B, J, D), dtype=dtype)
        _prepare_kernel[(triton.cdiv(B, 32), blocks)](
            u, self._blocks,
            B, I, P,
            *u.stride(),
            BLOCK_B=32,
            BLOCK_I=unit,
            BLOCK_P=block_p,
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
        if has_logits:
            self._write_logits(pose, prior, leaky)
        u, weight, launch = self._u, self._weight, self._sum_launch
        B, I, P = u.shape
        _, _, J, D = weight.shape
        splits = len(self.slots)
        grid = triton.cdiv(B, launch["BLOCK_B"]), triton.cdiv(J, launch["BLOCK_J"]), splits
        _weighted_sum_kernel[grid](
            # In place of a missing tensor, a kernel gets u, which it does not touch.
            self._blocks, weight, self._logits, self._runs, u if bias is None else bias,
            self.slots, u if coupling is None else coupling,
            B, I, P, J, D, self._runs[0, 0].numel(), self._tiles,
            *weight.stride(), *strides(bias, 2),
            HAS_LOGITS=has_logits,
            HAS_BIAS=bias is not None,
            SAVE_COUPLING=coupling is not None,
            PRECISION=self._precision,
            **launch,
        )  # fmt: skip

    def _write_logits(self, pose: Tensor | None, prior: Tensor | None, leaky: bool) -> None:
        """Write the logits, and to the first run the softmax's maximum and its inverse sum."""
        u, weight, launch = self._u, self._weight, self._logits_launch
        B, I, P = u.shape
        _, _, J, D = weight.shape
        runs, size = len(self._runs), self._runs[0, 0].numel()
        tile = launch["GROUPS"] * launch["BLOCK_I"]
        _logits_kernel[(triton.cdiv(B, launch["BLOCK_B"]), triton.cdiv(I, tile), runs)](
            u, weight, *(u if tensor is None else tensor for tensor in (pose, prior)),
            self._logits, self._runs,
            B, I, P, J, D, size,
            *u.stride(), *weight.stride(), *strides(prior, 2),
            HAS_POSE=pose is not None,
            HAS_PRIOR=prior is not None,
            PRECISION=self._precision,
            UNIT=self._sum_launch["BLOCK_I"],
            **launch,
        )  # fmt: skip
        _softmax_kernel[(triton.cdiv(size, 1024),)](
            self._runs,
            size, runs,
            LEAKY=leaky,
            BLOCK=1024,
        )  # fmt: skip
