# ruff: noqa: RUF005 - Triton does not unpack tuples
"""The backward of the passes of `_one_product.py`: dpose, and what else needs a sum over all j.

    dc_ij = û_ij·ds_j (+ grad_coupling_ij),  δ_i = Σ_j c̃_ij dc_ij,  db_ij = c̃_ij (dc_ij - δ_i)
    dpose_j = Σ_i db_ij û_ij

A warp owns 8 batch rows and walks over input capsules, as in the forward. It holds ds next to the
poses. log Σ_j exp and δ are saved for every (i, b). With them, a pair (i, j) can be evaluated for a
single j, so `_vote_gradient.py` leaves the order of the passes and contracts all at once.
"""

import triton
import triton.language as tl
from torch import Tensor

from tritoncaps.kernels._launch import strides
from tritoncaps.kernels._one_product import (
    LOG2_E,
    OneProduct,
    add_prior,
    add_product,
    by_pair,
    load_weight,
    max_over_j,
    output_capsules,
    over_d,
    part_offsets,
    parts_of,
    sum_over_j,
)
from tritoncaps.kernels._vote_gradient import Contraction

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _one_product_bwd_kernel(
    # pointers
    columns_ptr, weight_ptr, pose_ptr, ds_ptr, prior_ptr, grad_coupling_ptr,
    slots_ptr, normaliser_ptr, delta_ptr,
    # extents
    B, I, J, D, padded_b, capsules,
    # strides
    stride_prior_i, stride_prior_j,
    # meta-parameters
    FULL: tl.constexpr, HAS_POSE: tl.constexpr, HAS_PRIOR: tl.constexpr, LEAKY: tl.constexpr,
    HAS_GRAD_COUPLING: tl.constexpr, SPLIT: tl.constexpr, IS_ODD: tl.constexpr,
    PARTS: tl.constexpr, PAIRS: tl.constexpr, K: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Put one program's share of dpose in its slot, and save log Σ_j exp and δ, (I, padded_b).

    Unless FULL, the coupling is a constant, and only log Σ_j exp is saved.
    """
    ROWS: tl.constexpr = 2 * PAIRS * BLOCK_D
    N: tl.constexpr = len(PARTS)
    first_b = tl.program_id(0).to(tl.int64) * (GROUPS * 8)
    split = tl.program_id(1)
    row = tl.arange(0, GROUPS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    rows = tl.minimum(B - first_b, GROUPS * 8).to(tl.int32)
    pose_ptr += first_b * J * D
    ds_ptr += first_b * J * D
    poses = ()
    grads = ()
    sums = ()
    for k in tl.static_range(N):
        j = output_capsules(PARTS, k, PAIRS)
        offs, exists = part_offsets(j, row, rows, J, D, BLOCK_D)
        if HAS_POSE:
            pose = tl.load(pose_ptr + offs, exists, other=0.0).to(tl.float32)
            poses = poses + (pose * LOG2_E,)
        if FULL:
            grads = grads + (tl.load(ds_ptr + offs, exists, other=0.0).to(tl.float32),)
            zeros = tl.zeros((GROUPS, 2 * PARTS[k] * BLOCK_D, 8), tl.float32)
            sums = sums + (by_pair(zeros, BLOCK_D),)

    columns_ptr += first_b * K
    offs_columns = (row * K)[:, None, :] + tl.arange(0, K)[None, :, None]
    row_ptrs = grad_coupling_ptr + (first_b + row) * I * J
    for step in range(split * capsules, tl.minimum((split + 1) * capsules, I)):
        i = tl.cast(step, tl.int64)
        columns = tl.load(columns_ptr + i * padded_b * K + offs_columns)
        votes = ()
        logits = ()
        dcs = ()
        for k in tl.static_range(N):
            w = load_weight(weight_ptr + i * (ROWS * BLOCK_P), PARTS, k, PAIRS, BLOCK_P, BLOCK_D)
            zeros = tl.zeros((GROUPS, 2 * PARTS[k] * BLOCK_D, 8), tl.float32)
            vote = by_pair(add_product(zeros, w, columns, SPLIT), BLOCK_D)
            j = output_capsules(PARTS, k, PAIRS)
            prior_ptrs = prior_ptr + i * stride_prior_i + j * stride_prior_j
            if HAS_POSE:
                logit = over_d(vote * poses[k])
            else:
                logit = tl.zeros((GROUPS, vote.shape[1], 2, 8), tl.float32)
            logits = logits + (add_prior(logit, prior_ptrs, j < J, HAS_PRIOR, IS_ODD),)
            if FULL:
                dc = over_d(vote * grads[k])
                if HAS_GRAD_COUPLING:
                    ptrs = (row_ptrs + i * J)[:, None, None, :] + j[None, :, :, None]
                    is_pair = (row < rows)[:, None, None, :] & (j < J)[None, :, :, None]
                    dc += tl.load(ptrs, is_pair, other=0.0).to(tl.float32)
                votes = votes + (vote,)
                dcs = dcs + (dc,)

        top = max_over_j(logits[0])
        for k in tl.static_range(1, N):
            top = tl.maximum(top, max_over_j(logits[k]))
        if LEAKY:
            top = tl.maximum(top, 0.0)
            mass = tl.exp2(-top)
        else:
            mass = tl.zeros_like(top)
        moment = tl.zeros_like(top)
        shares = ()
        for k in tl.static_range(N):
            share = tl.exp2(logits[k] - top)
            shares = shares + (share,)
            mass += sum_over_j(share)
            if FULL:
                moment += sum_over_j(share * dcs[k])
        offs_pair = i * padded_b + first_b + row
        normaliser = (top + tl.log2(mass)) * _LN_2
        tl.store(normaliser_ptr + offs_pair, tl.reshape(normaliser, (GROUPS, 8)))
        if FULL:
            inverse = 1.0 / mass
            delta = moment * inverse
            tl.store(delta_ptr + offs_pair, tl.reshape(delta, (GROUPS, 8)))
            new_sums = ()
            for k in tl.static_range(N):
                db = shares[k] * inverse * (dcs[k] - delta)
                new_sums = new_sums + (sums[k] + db[:, :, None, :, None, :] * votes[k],)
            sums = new_sums

    if FULL:
        slots_ptr += (split.to(tl.int64) * B + first_b) * J * D
        for k in tl.static_range(N):
            j = output_capsules(PARTS, k, PAIRS)
            offs, exists = part_offsets(j, row, rows, J, D, BLOCK_D)
            tl.store(slots_ptr + offs, sums[k], exists)


class OneProductBackward:
    """The backward passes of one call, and the contraction after them."""

    def __init__(self, passes: OneProduct, contraction: Contraction, *, steps: int) -> None:
        self._passes, self._contraction = passes, contraction
        self.slots = passes.slots
        I, padded_b, _ = passes.prepared.columns.shape
        self._saved = self.slots.new_empty(2, steps, I, padded_b)

    def run(self, step: int, pose: Tensor | None, ds: Tensor, grad_coupling: Tensor | None) -> None:
        """Write the shares of dpose of a step to the slots. See `TwoSweeps.run`."""
        prior = self._contraction.prior
        if pose is None and prior is None:
            return
        B, I, J, D = self._passes.shape
        columns, weight, split = self._passes.prepared
        launch = self._passes.launch
        if prior is not None or grad_coupling is not None:
            # Addresses of capsules that are fetched ahead would not fit into registers.
            launch = {**launch, "num_stages": 1}
        _one_product_bwd_kernel[(columns.shape[1] // (8 * launch["GROUPS"]), len(self.slots))](
            columns, weight,
            # In place of a missing tensor, a kernel gets the columns, which it does not touch.
            *(columns if x is None else x for x in (pose, ds, prior, grad_coupling)),
            self.slots, self._saved[0, step], self._saved[1, step],
            B, I, J, D, columns.shape[1], self._passes.capsules,
            *strides(prior, 2),
            FULL=self._contraction.full,
            HAS_POSE=pose is not None,
            HAS_PRIOR=prior is not None,
            LEAKY=self._contraction.leaky,
            HAS_GRAD_COUPLING=grad_coupling is not None,
            SPLIT=split,
            IS_ODD=J % 2 == 1,
            PARTS=parts_of(J),
            PAIRS=triton.cdiv(J, 2),
            K=columns.shape[2],
            **launch,
        )  # fmt: skip

    def contract(
        self,
        poses: Tensor,
        ds: Tensor,
        grad_coupling: Tensor | None,
        *,
        uniform: bool,
    ) -> None:
        """Write the gradients of all steps. See `TwoSweeps.contract`."""
        self._contraction.write(
            self._passes.prepared, poses, ds, grad_coupling, self._saved, uniform=uniform
        )
