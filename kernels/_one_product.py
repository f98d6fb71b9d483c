# ruff: noqa: RUF005 - Triton does not unpack tuples
"""A forward pass that forms every prediction vector once: for few output capsules, on tensor cores.

    c̃_ij = softmax_j(û_ij·pose_j + prior_ij),  c = c̃ + bias,  s_j = Σ_i c_ij û_ij,  û_ij = W_ij u_i

A warp owns 8 batch rows and walks over input capsules. One product, of all rows (j, d) of W_i with
8 columns u_i, gives it û_i for every j. The agreement, the softmax and the weighted sum then need
nothing but registers: û_i, the poses and the sums take J·D / 4 values a thread each. The warps of
a program share W_i. They meet only where it is copied.

A matrix unit spreads 8 neighbouring rows of its result over lanes. So the rows of W are ordered
(pair of j, d / 4, j % 2, d % 4): for every pair, the lanes are (j % 2, d % 4). A sum over d takes
two shuffles then, and one over j a single one. An axis of a tile is a power of two, so the pairs
come in parts, the binary digits of their number: 10 output capsules are 1 + 4 pairs, without
padding.

A product has an inner dimension K of at least 16. A float32 column is stored as u₀ + u₁, where TF32
holds u₀ exactly and u₁ but for its last bit, and K = 2P: W meets both. If W is split likewise
(SPLIT), these are float32 products from TF32 ones. A 16-bit column is multiplied as it is, and
zeros fill K where P is below 16.

`prepare` writes u and W in this order once a call. A pass then reads contiguous memory without
masks, whatever the strides of the inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritoncaps.kernels._launch import Target, divide, dot_precision, measured, strides, target_of
from tritoncaps.kernels._patches import Patches
from tritoncaps.kernels._prepared import prepare
from tritoncaps.kernels._tiles import round_to_tf32

LOG2_E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


# Launch rule --------------------------------------------------------------------------------------


def one_product_launch(
    I: int, P: int, J: int, D: int, dtype: torch.dtype, target: Target
) -> tuple[dict[str, int], int, int] | None:
    """Launch keywords of a pass, the splits of the input capsules, the capsules in each; or None.

    None where this form does not serve. It needs matrix units that multiply by 8 columns, which
    NVIDIA has, though not for float64. A thread must hold û_i, poses and sums of all J·D rows, and
    the coupling of J. With D rounded up, there is room for 192 rows of 20 output capsules if P is
    at most 8, and for 160 of 12 if it is at most 16. The interpreter takes milliseconds for every
    device function that is called, so it gets the other form, except in the tests of this one.
    GROUPS: 4 warps. Two such programs fill the registers of a processor. Few input capsules make
    few programs, so these are smaller.
    MAX_SPLITS: at B = 128, 64 splits are 256 programs, two for almost every processor of an H200.
    num_stages: the next capsules are fetched while the warps work on one: two ahead, or one where P
    is above 8, or none on Blackwell then, because the addresses take registers too.
    """
    block_p = max(triton.next_power_of_2(max(P, 1)), 8)
    block_d = max(triton.next_power_of_2(max(D, 1)), 8)
    max_rows, max_j = {8: (192, 20), 16: (160, 12)}.get(block_p, (0, 0))
    fits = 2 * triton.cdiv(J, 2) * block_d <= max_rows and max_j >= J
    if not target.architecture.startswith("sm") or dtype == torch.float64 or not fits:
        return None
    groups = 4 if I > 64 else 2 if I > 32 else 1
    launch = {
        "GROUPS": groups,
        "BLOCK_P": block_p,
        "BLOCK_D": block_d,
        "MAX_SPLITS": 64,
        "num_warps": groups,
        "num_stages": 3 if block_p == 8 else 1 if target.architecture.startswith("sm1") else 2,
    }
    launch = measured("one_product", launch, target, dtype, I=I, P=P, J=J, D=D)
    return launch, *divide(I, 1, launch.pop("MAX_SPLITS"))


def parts_of(J: int) -> tuple[int, ...]:
    """The pairs of output capsules in each part: powers of two, the smallest first."""
    pairs = triton.cdiv(J, 2)
    return tuple(1 << k for k in range(pairs.bit_length()) if pairs >> k & 1)


# A pass -------------------------------------------------------------------------------------------
#
# The parts of a tensor are a tuple of tiles, (GROUPS, pairs, D / 4, 2, 4, 8), with axes
# (group, pair of j, d / 4, j % 2, d % 4, batch row). PARTS holds their numbers of pairs.


@triton.jit
def _repeat(w, GROUPS: tl.constexpr, K: tl.constexpr):
    """W_i, (rows, P), for every group and repeated along K: (GROUPS, rows, K)."""
    ROWS: tl.constexpr = w.shape[0]
    P: tl.constexpr = w.shape[1]
    w = tl.reshape(tl.broadcast_to(w[:, None, :], (ROWS, K // P, P)), (ROWS, K))
    return tl.broadcast_to(w[None, :, :], (GROUPS, ROWS, K))


@triton.jit
def add_product(total, w, columns, SPLIT: tl.constexpr):
    """total + W_i u_i, (GROUPS, rows, 8), from W_i, (rows, P), and columns, (GROUPS, K, 8)."""
    GROUPS: tl.constexpr = columns.shape[0]
    K: tl.constexpr = columns.shape[1]
    high = w
    if SPLIT:
        high = round_to_tf32(w)
        low = _repeat(w - high, GROUPS, K)
        total = tl.dot(low, columns, acc=total, input_precision="tf32")
    return tl.dot(_repeat(high, GROUPS, K), columns, acc=total, input_precision="tf32")


@triton.jit
def by_pair(rows, BLOCK_D: tl.constexpr):
    """(GROUPS, rows, 8) as a part."""
    GROUPS: tl.constexpr = rows.shape[0]
    PAIRS: tl.constexpr = rows.shape[1] // (2 * BLOCK_D)
    return tl.reshape(rows, (GROUPS, PAIRS, BLOCK_D // 4, 2, 4, rows.shape[2]))


@triton.jit
def over_d(part):
    """The sum over d, (GROUPS, pairs, 2, 8)."""
    return tl.sum(tl.sum(part, axis=2), axis=3)


@triton.jit
def max_over_j(logits):
    return tl.max(tl.max(logits, axis=1), axis=1)[:, None, None, :]


@triton.jit
def sum_over_j(shares):
    return tl.sum(tl.sum(shares, axis=1), axis=1)[:, None, None, :]


@triton.jit
def output_capsules(PARTS: tl.constexpr, k: tl.constexpr, PAIRS: tl.constexpr):
    """j of part k, (pairs, 2). The pairs before it are the smaller digits of PAIRS."""
    pair = (PAIRS & (PARTS[k] - 1)) + tl.arange(0, PARTS[k])
    return 2 * pair[:, None] + tl.arange(0, 2)[None, :]


@triton.jit
def part_offsets(j, row, rows, J, D, BLOCK_D: tl.constexpr):
    """Where the vectors of a part lie in a contiguous (rows, J, D), and which of them exist."""
    j = j[:, None, :, None]
    d = 4 * tl.arange(0, BLOCK_D // 4)[:, None, None] + tl.arange(0, 4)[None, None, :]
    exists = ((j < J) & (d < D))[None, :, :, :, :, None]
    row = row[:, None, None, None, None, :]
    return row * J * D + (j * D + d)[None, :, :, :, :, None], (row < rows) & exists


@triton.jit
def load_weight(
    weight_ptr, PARTS: tl.constexpr, k: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows of part k of a prepared W_i, (rows, P)."""
    first_row: tl.constexpr = (PAIRS & (PARTS[k] - 1)) * 2 * BLOCK_D
    row = first_row + tl.arange(0, 2 * PARTS[k] * BLOCK_D)
    return tl.load(weight_ptr + row[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :])


@triton.jit
def add_prior(logits, prior_ptrs, exists, HAS_PRIOR: tl.constexpr, IS_ODD: tl.constexpr):
    """Logits in base 2, (GROUPS, pairs, 2, 8), plus the prior. Where no j exists they become -∞.

    A finite prior stays finite, so the lowest is a logit like any other.
    """
    if HAS_PRIOR:
        prior = tl.load(prior_ptrs, exists, other=float("-inf")).to(tl.float32)
        finite = tl.minimum(tl.maximum(prior, -_LARGEST / LOG2_E), _LARGEST / LOG2_E)
        prior = tl.where(tl.abs(prior) <= _LARGEST, finite * LOG2_E, prior)
        logits += prior[None, :, :, None]
    elif IS_ODD:
        logits = tl.where(exists[None, :, :, None], logits, float("-inf"))
    return logits


@triton.jit
def _softmax(logits, N: tl.constexpr, LEAKY: tl.constexpr):
    """The softmax over j of logits in base 2, N parts, (GROUPS, pairs, 2, 8) each."""
    top = max_over_j(logits[0])
    for k in tl.static_range(1, N):
        top = tl.maximum(top, max_over_j(logits[k]))
    if LEAKY:
        top = tl.maximum(top, 0.0)
        mass = tl.exp2(-top)
    else:
        mass = tl.zeros_like(top)
    shares = ()
    for k in tl.static_range(N):
        shares = shares + (tl.exp2(logits[k] - top),)
        mass += sum_over_j(shares[k])
    inverse = 1.0 / mass
    softmax = ()
    for k in tl.static_range(N):
        softmax = softmax + (shares[k] * inverse,)
    return softmax


@triton.jit
def _one_product_kernel(
    # pointers
    columns_ptr, weight_ptr, pose_ptr, prior_ptr, bias_ptr, slots_ptr, coupling_ptr,
    # extents
    B, I, J, D, padded_b, capsules,
    # strides
    stride_prior_i, stride_prior_j, stride_bias_i, stride_bias_j,
    # meta-parameters
    HAS_POSE: tl.constexpr, HAS_PRIOR: tl.constexpr, HAS_BIAS: tl.constexpr, LEAKY: tl.constexpr,
    SAVE_COUPLING: tl.constexpr, SPLIT: tl.constexpr, IS_ODD: tl.constexpr,
    PARTS: tl.constexpr, PAIRS: tl.constexpr, K: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Put one program's share of s in its slot. Without pose and prior, its share of Σ_i û_ij."""
    ROWS: tl.constexpr = 2 * PAIRS * BLOCK_D
    N: tl.constexpr = len(PARTS)
    HAS_LOGITS: tl.constexpr = HAS_POSE or HAS_PRIOR
    first_b = tl.program_id(0).to(tl.int64) * (GROUPS * 8)
    split = tl.program_id(1)
    row = tl.arange(0, GROUPS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    rows = tl.minimum(B - first_b, GROUPS * 8).to(tl.int32)
    pose_ptr += first_b * J * D
    sums = ()
    poses = ()
    for k in tl.static_range(N):
        total = tl.zeros((GROUPS, 2 * PARTS[k] * BLOCK_D, 8), tl.float32)
        sums = sums + (by_pair(total, BLOCK_D) if HAS_LOGITS else total,)
        if HAS_POSE:
            j = output_capsules(PARTS, k, PAIRS)
            offs, exists = part_offsets(j, row, rows, J, D, BLOCK_D)
            pose = tl.load(pose_ptr + offs, exists, other=0.0).to(tl.float32)
            poses = poses + (pose * LOG2_E,)

    columns_ptr += first_b * K
    offs_columns = (row * K)[:, None, :] + tl.arange(0, K)[None, :, None]
    row_ptrs = coupling_ptr + (first_b + row) * I * J
    for step in range(split * capsules, tl.minimum((split + 1) * capsules, I)):
        i = tl.cast(step, tl.int64)
        columns = tl.load(columns_ptr + i * padded_b * K + offs_columns)
        votes = ()
        logits = ()
        new_sums = ()
        for k in tl.static_range(N):
            w = load_weight(weight_ptr + i * (ROWS * BLOCK_P), PARTS, k, PAIRS, BLOCK_P, BLOCK_D)
            if HAS_LOGITS:
                zeros = tl.zeros((GROUPS, 2 * PARTS[k] * BLOCK_D, 8), tl.float32)
                vote = by_pair(add_product(zeros, w, columns, SPLIT), BLOCK_D)
                if HAS_POSE:
                    logit = over_d(vote * poses[k])
                else:
                    logit = tl.zeros((GROUPS, vote.shape[1], 2, 8), tl.float32)
                j = output_capsules(PARTS, k, PAIRS)
                prior_ptrs = prior_ptr + i * stride_prior_i + j * stride_prior_j
                votes = votes + (vote,)
                logits = logits + (add_prior(logit, prior_ptrs, j < J, HAS_PRIOR, IS_ODD),)
            else:
                new_sums = new_sums + (add_product(sums[k], w, columns, SPLIT),)
        if HAS_LOGITS:
            softmax = _softmax(logits, N, LEAKY)
            for k in tl.static_range(N):
                c = softmax[k]
                j = output_capsules(PARTS, k, PAIRS)
                if HAS_BIAS:
                    bias_ptrs = bias_ptr + i * stride_bias_i + j * stride_bias_j
                    c += tl.load(bias_ptrs, j < J, other=0.0).to(tl.float32)[None, :, :, None]
                if SAVE_COUPLING:
                    coupling_ptrs = (row_ptrs + i * J)[:, None, None, :] + j[None, :, :, None]
                    is_pair = (row < rows)[:, None, None, :] & (j < J)[None, :, :, None]
                    tl.store(coupling_ptrs, c, is_pair)
                new_sums = new_sums + (sums[k] + c[:, :, None, :, None, :] * votes[k],)
        sums = new_sums

    slots_ptr += (split.to(tl.int64) * B + first_b) * J * D
    for k in tl.static_range(N):
        j = output_capsules(PARTS, k, PAIRS)
        offs, exists = part_offsets(j, row, rows, J, D, BLOCK_D)
        total = sums[k] if HAS_LOGITS else by_pair(sums[k], BLOCK_D)
        tl.store(slots_ptr + offs, total, exists)


# Launchers ----------------------------------------------------------------------------------------


class OneProduct:
    """The passes of one call over (u, W), which it first brings into the order of the products."""

    def __init__(
        self,
        u: Tensor | Patches,
        weight: Tensor,
        launch: dict[str, int],
        splits: int,
        capsules: int,
    ) -> None:
        _, _, J, D = weight.shape
        self.shape = (u.shape[0], u.shape[1], J, D)
        self.launch, self.capsules = launch, capsules
        self.prepared = prepare(
            u, weight, dot_precision(u.dtype, target_of(u)),
            block_b=max(8 * launch["GROUPS"], 16),
            block_p=launch["BLOCK_P"],
            block_d=launch["BLOCK_D"],
        )  # fmt: skip
        self.slots = u.new_empty((splits, u.shape[0], J, D), dtype=torch.float32)

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

        Args:
            pose: contiguous, (B, J, D), or None. Without pose and prior, the slots get the shares
                of Σ_i û_ij, which lack the uniform coupling.
            prior, bias: (I, J), any strides, or None.
            coupling: contiguous output, (B, I, J), or None.
            leaky: whether an orphan class with logit 0 takes part in the softmax.
        """
        B, I, J, D = self.shape
        columns, weight, split = self.prepared
        _one_product_kernel[(columns.shape[1] // (8 * self.launch["GROUPS"]), len(self.slots))](
            columns, weight,
            # In place of a missing tensor, a kernel gets the columns, which it only reads.
            *(columns if tensor is None else tensor for tensor in (pose, prior, bias)),
            self.slots, columns if coupling is None else coupling,
            B, I, J, D, columns.shape[1], self.capsules,
            *strides(prior, 2), *strides(bias, 2),
            HAS_POSE=pose is not None,
            HAS_PRIOR=prior is not None,
            HAS_BIAS=bias is not None,
            LEAKY=leaky,
            SAVE_COUPLING=coupling is not None,
            SPLIT=split,
            IS_ODD=J % 2 == 1,
            PARTS=parts_of(J),
            PAIRS=triton.cdiv(J, 2),
            K=columns.shape[2],
            **self.launch,
        )  # fmt: skip


def one_product(u: Tensor | Patches, weight: Tensor) -> OneProduct | None:
    """Prepare passes over u, (B, I, P), and the weight, (I, P, J, D), any strides.

    None where `one_product_launch` has no launch. B and J are at least 1.
    """
    I, P, J, D = weight.shape
    launch = one_product_launch(I, P, J, D, u.dtype, target_of(u))
    return None if launch is None else OneProduct(u, weight, *launch)
