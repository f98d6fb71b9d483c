"""Routing of given prediction vectors û, (B, I, J, D): memory-bound, one read of û a pass.

A program owns one batch row and walks over tiles of input capsules. As in the fused routing it sweeps
twice over the output capsules, first for the softmax's normaliser, then to apply it; a tile is sized so
that the second sweep finds it in the first-level cache. "Votes" are the û of one tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritoncaps.kernels._launch import (
    accumulation_dtype,
    cdiv,
    device_of,
    routing_pass_config,
)
from tritoncaps.kernels._primitives import LOWEST, advance_poses, pull_back
from tritoncaps.kernels.squash import squash_slots

# Forward ------------------------------------------------------------------------------------------


@triton.jit
def _load_votes(
    row_ptrs, mask_id, first_j, J, D, stride_votes_j,
    DTYPE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """û of one block of output capsules, (BLOCK_I, BLOCK_J, BLOCK_D), with j and the mask over (j, d)."""
    j = first_j + tl.arange(0, BLOCK_J).to(tl.int64)
    mask = mask_id & (j < J)[None, :, None]
    votes = tl.load(row_ptrs + (j * stride_votes_j)[None, :, None], mask, other=0.0).to(DTYPE)
    return votes, j, (j < J)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]


@triton.jit
def _logits(
    votes, pose_ptrs, mask_jd, prior_ptrs, mask_ij, mask_j,
    HAS_POSES: tl.constexpr, HAS_PRIOR: tl.constexpr,
):  # fmt: skip
    """V, (BLOCK_J, BLOCK_D), and the logits û·V + prior, (BLOCK_I, BLOCK_J), -inf past the last j."""
    pose = tl.zeros((votes.shape[1], votes.shape[2]), votes.dtype)
    logits = tl.zeros((votes.shape[0], votes.shape[1]), votes.dtype)
    if HAS_POSES:
        pose = tl.load(pose_ptrs, mask_jd, other=0.0)
        logits = tl.sum(votes * pose[None, :, :], axis=2)
    if HAS_PRIOR:
        logits += tl.load(prior_ptrs, mask_ij, other=0.0).to(votes.dtype)
    return pose, tl.where(mask_j[None, :], logits, float("-inf"))


@triton.jit
def _dynamic_fwd_kernel(
    # pointers
    votes_ptr, prior_ptr, slots_ptr, next_slots_ptr, poses_ptr, sums_ptr, coupling_ptr,
    # extents
    B, I, J, D, iteration, tiles,
    # strides
    stride_votes_b, stride_votes_i, stride_votes_j, stride_votes_d, stride_prior_i, stride_prior_j,
    # meta-parameters
    HAS_POSES: tl.constexpr, HAS_PRIOR: tl.constexpr, SAVE_COUPLING: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Put one program's share of s⁽ᵗ⁾ = Σ_i c_ij û_ij in its slot, c = softmax_j(û·V⁽ᵗ⁻¹⁾ + prior)."""
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    slot_size = tl.cast(B, tl.int64) * J * D
    poses_ptr += split * slot_size
    next_slots_ptr += split * slot_size
    if HAS_POSES:
        advance_poses(
            slots_ptr, sums_ptr, poses_ptr,
            b * J, (b + 1) * J, slot_size, J, D, iteration, split == 0,
            SLOTS, False, BLOCK_ROWS, BLOCK_D,
        )  # fmt: skip

    d = tl.arange(0, BLOCK_D).to(tl.int64)
    for tile in range(split * tiles, (split + 1) * tiles):
        i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
        row_ptrs = votes_ptr + b * stride_votes_b + (i * stride_votes_i)[:, None, None]
        row_ptrs += (d * stride_votes_d)[None, None, :]
        mask_id = (i < I)[:, None, None] & (d < D)[None, None, :]
        prior_ptrs = prior_ptr + (i * stride_prior_i)[:, None]
        started = tl.where(tile > split * tiles, J, 0)

        top = tl.full((BLOCK_I,), LOWEST, dtype)
        mass = tl.zeros((BLOCK_I,), dtype)
        for first_j in range(0, J, BLOCK_J):
            votes, j, mask_jd = _load_votes(
                row_ptrs, mask_id, first_j, J, D, stride_votes_j, dtype, BLOCK_J, BLOCK_D
            )
            _, logits = _logits(
                votes, poses_ptr + ((b * J + j) * D)[:, None] + d[None, :], mask_jd,
                prior_ptrs + (j * stride_prior_j)[None, :], (i < I)[:, None] & (j < J)[None, :], j < J,
                HAS_POSES, HAS_PRIOR,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            mass = mass * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top[:, None]), axis=1)
            top = new_top

        for first_j in range(0, J, BLOCK_J):
            votes, j, mask_jd = _load_votes(
                row_ptrs, mask_id, first_j, J, D, stride_votes_j, dtype, BLOCK_J, BLOCK_D
            )
            offs_jd = ((b * J + j) * D)[:, None] + d[None, :]
            mask_ij = (i < I)[:, None] & (j < J)[None, :]
            _, logits = _logits(
                votes, poses_ptr + offs_jd, mask_jd,
                prior_ptrs + (j * stride_prior_j)[None, :], mask_ij, j < J,
                HAS_POSES, HAS_PRIOR,
            )  # fmt: skip
            c = tl.exp(logits - top[:, None]) / mass[:, None]
            if SAVE_COUPLING:
                tl.store(coupling_ptr + (b * I + i)[:, None] * J + j[None, :], c, mask_ij)
            s = tl.load(next_slots_ptr + offs_jd, mask_jd & (j < started)[:, None], other=0.0)
            s += tl.sum(c[:, :, None] * votes, axis=0)
            tl.store(next_slots_ptr + offs_jd, s, mask_jd)
        # The next tile adds to what other threads of the program have written.
        tl.debug_barrier()


# Backward -----------------------------------------------------------------------------------------
#
# The formulas are those of the fused routing:
#
#     dc = û·ds⁽ᵗ⁾ (+ grad_coupling in the last iteration),  δ = Σ_j c dc,  db = c (dc - δ)
#     dV⁽ᵗ⁻¹⁾ = dV⁽ᵗ⁾ + Σ_i db û,  dû = Σ_t (c ds⁽ᵗ⁾ + db V⁽ᵗ⁻¹⁾),  dprior = Σ_t Σ_b db
#
# Pass t, from the last iteration to the first, finishes dv⁽ᵗ⁾ in its prologue, adds to dV⁽ᵗ⁻¹⁾ and leaves
# log Σ_j exp and δ of every (b, i). One more pass then evaluates all iterations at once for each û and
# writes dû, so that û is read r times and dû written once.


@triton.jit
def _coupling_gradient(
    votes, grad_ptrs, mask_jd, grad_coupling_ptrs, mask_ij, HAS_GRAD_COUPLING: tl.constexpr
):  # fmt: skip
    """ds, (BLOCK_J, BLOCK_D), and dc = û·ds + grad_coupling, (BLOCK_I, BLOCK_J)."""
    grad = tl.load(grad_ptrs, mask_jd, other=0.0)
    dc = tl.sum(votes * grad[None, :, :], axis=2)
    if HAS_GRAD_COUPLING:
        dc += tl.load(grad_coupling_ptrs, mask_ij, other=0.0).to(votes.dtype)
    return grad, dc


@triton.jit
def _dynamic_bwd_kernel(
    # pointers
    votes_ptr, prior_ptr, grad_coupling_ptr, slots_ptr, next_slots_ptr, poses_ptr, grads_ptr,
    sums_ptr, saved_poses_ptr, saved_grads_ptr, normaliser_ptr, delta_ptr,
    # extents
    B, I, J, D, iteration, tiles,
    # strides
    stride_votes_b, stride_votes_i, stride_votes_j, stride_votes_d, stride_prior_i, stride_prior_j,
    stride_grad_coupling_b, stride_grad_coupling_i, stride_grad_coupling_j,
    # meta-parameters
    IS_LAST: tl.constexpr, DETACH: tl.constexpr, HAS_POSES: tl.constexpr, HAS_PRIOR: tl.constexpr,
    HAS_GRAD_COUPLING: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Backward of one iteration: add to dV⁽ᵗ⁻¹⁾, leave log Σ_j exp and δ of every (b, i).

    DETACH treats the coupling as a constant: db = 0. Without poses and prior the coupling is 1/J and
    there is nothing to do beyond the prologue: such a pass is launched with no tiles.
    """
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    slot_size = tl.cast(B, tl.int64) * J * D
    poses_ptr += split * slot_size
    grads_ptr += split * slot_size
    next_slots_ptr += split * slot_size
    pull_back(
        slots_ptr, sums_ptr, poses_ptr, grads_ptr, next_slots_ptr, saved_poses_ptr, saved_grads_ptr,
        b * J, (b + 1) * J, slot_size, D, iteration, split == 0,
        not IS_LAST, SLOTS, BLOCK_ROWS, BLOCK_D,
    )  # fmt: skip

    d = tl.arange(0, BLOCK_D).to(tl.int64)
    for tile in range(split * tiles, (split + 1) * tiles):
        i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
        row_ptrs = votes_ptr + b * stride_votes_b + (i * stride_votes_i)[:, None, None]
        row_ptrs += (d * stride_votes_d)[None, None, :]
        mask_id = (i < I)[:, None, None] & (d < D)[None, None, :]
        prior_ptrs = prior_ptr + (i * stride_prior_i)[:, None]
        grad_coupling_ptrs = grad_coupling_ptr + b * stride_grad_coupling_b
        grad_coupling_ptrs += (i * stride_grad_coupling_i)[:, None]

        top = tl.full((BLOCK_I,), LOWEST, dtype)
        mass = tl.zeros((BLOCK_I,), dtype)
        moment = tl.zeros((BLOCK_I,), dtype)  # Σ_j exp(logit - top) dc
        for first_j in range(0, J, BLOCK_J):
            votes, j, mask_jd = _load_votes(
                row_ptrs, mask_id, first_j, J, D, stride_votes_j, dtype, BLOCK_J, BLOCK_D
            )
            offs_jd = ((b * J + j) * D)[:, None] + d[None, :]
            mask_ij = (i < I)[:, None] & (j < J)[None, :]
            _, logits = _logits(
                votes, poses_ptr + offs_jd, mask_jd,
                prior_ptrs + (j * stride_prior_j)[None, :], mask_ij, j < J,
                HAS_POSES, HAS_PRIOR,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            shrink = tl.exp(top - new_top)
            share = tl.exp(logits - new_top[:, None])
            mass = mass * shrink + tl.sum(share, axis=1)
            if not DETACH:
                _, dc = _coupling_gradient(
                    votes, grads_ptr + offs_jd, mask_jd,
                    grad_coupling_ptrs + (j * stride_grad_coupling_j)[None, :], mask_ij,
                    HAS_GRAD_COUPLING,
                )  # fmt: skip
                moment = moment * shrink + tl.sum(share * dc, axis=1)
            top = new_top
        delta = moment / mass
        tl.store(normaliser_ptr + b * I + i, top + tl.log(mass), i < I)
        tl.store(delta_ptr + b * I + i, delta, i < I)

        if HAS_POSES and not DETACH:
            for first_j in range(0, J, BLOCK_J):
                votes, j, mask_jd = _load_votes(
                    row_ptrs, mask_id, first_j, J, D, stride_votes_j, dtype, BLOCK_J, BLOCK_D
                )
                offs_jd = ((b * J + j) * D)[:, None] + d[None, :]
                mask_ij = (i < I)[:, None] & (j < J)[None, :]
                _, logits = _logits(
                    votes, poses_ptr + offs_jd, mask_jd,
                    prior_ptrs + (j * stride_prior_j)[None, :], mask_ij, j < J,
                    HAS_POSES, HAS_PRIOR,
                )  # fmt: skip
                _, dc = _coupling_gradient(
                    votes, grads_ptr + offs_jd, mask_jd,
                    grad_coupling_ptrs + (j * stride_grad_coupling_j)[None, :], mask_ij,
                    HAS_GRAD_COUPLING,
                )  # fmt: skip
                c = tl.exp(logits - top[:, None]) / mass[:, None]
                db = c * (dc - delta[:, None])
                dv = tl.load(next_slots_ptr + offs_jd, mask_jd, other=0.0)
                dv += tl.sum(db[:, :, None] * votes, axis=0)
                tl.store(next_slots_ptr + offs_jd, dv, mask_jd)
            # The next tile adds to what other threads of the program have written.
            tl.debug_barrier()


@triton.jit
def _votes_gradient_kernel(
    # pointers
    votes_ptr, prior_ptr, grad_coupling_ptr, poses_ptr, grads_ptr, normaliser_ptr, delta_ptr,
    grad_votes_ptr, grad_logits_ptr,
    # extents
    B, I, J, D, first_step, steps, tiles,
    # strides
    stride_votes_b, stride_votes_i, stride_votes_j, stride_votes_d, stride_prior_i, stride_prior_j,
    stride_grad_coupling_b, stride_grad_coupling_i, stride_grad_coupling_j,
    # meta-parameters
    DETACH: tl.constexpr, WITH_FIRST: tl.constexpr, HAS_PRIOR: tl.constexpr,
    HAS_GRAD_COUPLING: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dû of one tile, and Σ_t db, whose sum over the batch is dprior.

    Step t - 1 is iteration t. Step 0 has no poses; it is WITH_FIRST or left out.
    """
    dtype: tl.constexpr = poses_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0).to(tl.int64) % tiles
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    row_ptrs = votes_ptr + b * stride_votes_b + (i * stride_votes_i)[:, None, None]
    row_ptrs += (d * stride_votes_d)[None, None, :]
    mask_id = (i < I)[:, None, None] & (d < D)[None, None, :]
    prior_ptrs = prior_ptr + (i * stride_prior_i)[:, None]
    grad_coupling_ptrs = grad_coupling_ptr + b * stride_grad_coupling_b
    grad_coupling_ptrs += (i * stride_grad_coupling_i)[:, None]
    pose_step = tl.cast(B, tl.int64) * J * D
    pair_step = tl.cast(B, tl.int64) * I
    for first_j in range(0, J, BLOCK_J):
        votes, j, mask_jd = _load_votes(
            row_ptrs, mask_id, first_j, J, D, stride_votes_j, dtype, BLOCK_J, BLOCK_D
        )
        offs_jd = ((b * J + j) * D)[:, None] + d[None, :]
        offs_ij = (b * I + i)[:, None] * J + j[None, :]
        mask_ij = (i < I)[:, None] & (j < J)[None, :]
        dvotes = tl.zeros((BLOCK_I, BLOCK_J, BLOCK_D), dtype)
        dlogits = tl.zeros((BLOCK_I, BLOCK_J), dtype)
        for step in range(first_step, steps):
            pose, logits = _logits(
                votes, poses_ptr + step * pose_step + offs_jd, mask_jd,
                prior_ptrs + (j * stride_prior_j)[None, :], mask_ij, j < J, True, HAS_PRIOR,
            )  # fmt: skip
            pairs = step * pair_step + b * I + i
            normaliser = tl.load(normaliser_ptr + pairs, i < I, other=0.0)
            c = tl.exp(logits - normaliser[:, None])
            grad, dc = _coupling_gradient(
                votes, grads_ptr + step * pose_step + offs_jd, mask_jd, grad_coupling_ptrs, mask_ij, False
            )
            dvotes += c[:, :, None] * grad[None, :, :]
            if not DETACH:
                if HAS_GRAD_COUPLING:
                    if step == steps - 1:
                        gc_ptrs = grad_coupling_ptrs + (j * stride_grad_coupling_j)[None, :]
                        dc += tl.load(gc_ptrs, mask_ij, other=0.0).to(dtype)
                delta = tl.load(delta_ptr + pairs, i < I, other=0.0)
                db = c * (dc - delta[:, None])
                dvotes += db[:, :, None] * pose[None, :, :]
                dlogits += db
        if WITH_FIRST:
            grad = tl.load(grads_ptr + offs_jd, mask_jd, other=0.0)
