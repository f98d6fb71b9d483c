"""Fused routing: the prediction vectors û = W u are recomputed in every pass and never stored.

A program holds a tile of u, (GROUPS, BLOCK_B, BLOCK_P, BLOCK_I), and walks over the output capsules
twice: the first sweep finds the softmax's normaliser of each pair (b, i), the second applies it.
Nothing in the program grows with J.

With x any vector of output capsule j, û_ij·x = Σ_p u_ip (W_ij x)_p: one small product, x W_jᵀ, for
all pairs of the tile, then a sum over p against u. Products are batched over groups of input
capsules, one group a warp, so that no warp repeats another's product; what they exchange is the sum
over groups at the end of a step. Columns of a product run over (p, i), i fastest: the sum over p
stays in a thread.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritoncaps.kernels._launch import (
    accumulation_dtype,
    cdiv,
    device_of,
    dot_precision,
    fused_dynamic_routing_config,
    target_of,
    weight_gradient_config,
)
from tritoncaps.kernels._primitives import (
    advance_poses,
    dot,
    full_of_lowest,
    load_grad_coupling,
    pull_back,
)
from tritoncaps.kernels.squash import squash_slots

# Forward ------------------------------------------------------------------------------------------


@triton.jit
def _tile_axes(tile, GROUPS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr):
    """i, (GROUPS, BLOCK_I); i along the columns, (GROUPS, BLOCK_P * BLOCK_I); and p along them."""
    k = tl.arange(0, BLOCK_P * BLOCK_I)
    group_i = tile * GROUPS * BLOCK_I + tl.arange(0, GROUPS)[:, None] * BLOCK_I
    i = group_i + tl.arange(0, BLOCK_I)[None, :]
    return i, group_i + (k % BLOCK_I)[None, :], (k // BLOCK_I).to(tl.int64)


@triton.jit
def _load_tile(
    u_ptr, weight_ptr, b, ki, p, d, B, I, P, D, stride_u_b, stride_u_i, stride_u_p,
    stride_weight_i, stride_weight_p, stride_weight_d,
    DTYPE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """u, (GROUPS, BLOCK_B, BLOCK_P, BLOCK_I), and where the weight of j = 0 lies, with the masks.

    The masks are over (GROUPS, BLOCK_B, columns) and (GROUPS, columns, BLOCK_D).
    """
    mask_k = (ki < I) & (p < P)[None, :]
    mask_u = (b < B)[None, :, None] & mask_k[:, None, :]
    offs_ku = ki * stride_u_i + (p * stride_u_p)[None, :]
    u_ptrs = u_ptr + (b * stride_u_b)[None, :, None] + offs_ku[:, None, :]
    u = tl.load(u_ptrs, mask_u, other=0.0).to(DTYPE)
    u = tl.reshape(u, (ki.shape[0], b.shape[0], BLOCK_P, BLOCK_I))
    mask_w = mask_k[:, :, None] & (d < D)[None, None, :]
    offs_kw = ki * stride_weight_i + (p * stride_weight_p)[None, :]
    weight_ptrs = weight_ptr + offs_kw[:, :, None] + (d * stride_weight_d)[None, None, :]
    return u, weight_ptrs, mask_u, mask_w


@triton.jit
def _project(x, w, u, PRECISION: tl.constexpr):
    """W_j x, (GROUPS, BLOCK_B, BLOCK_P, BLOCK_I), and û_j·x, its sum over p against u."""
    x = tl.broadcast_to(x[None, :, :], (w.shape[0], x.shape[0], x.shape[1]))
    y = dot(x, tl.permute(w, (0, 2, 1)), PRECISION)
    y = tl.reshape(y, u.shape)
    return y, tl.sum(y * u, axis=2)


@triton.jit
def _logits(
    w, u, pose_ptrs, mask_bd, prior_ptrs, mask_i,
    HAS_POSES: tl.constexpr, HAS_PRIOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W_j V and the logits û_j·V + prior of one j, (GROUPS, BLOCK_B, BLOCK_I)."""
    if HAS_POSES:
        pose = tl.load(pose_ptrs, mask_bd, other=0.0)
        projected, logits = _project(pose, w, u, PRECISION)
    else:
        projected = tl.zeros_like(u)
        logits = tl.zeros((u.shape[0], u.shape[1], u.shape[3]), u.dtype)
    if HAS_PRIOR:
        logits += tl.load(prior_ptrs, mask_i, other=0.0).to(u.dtype)[:, None, :]
    return projected, logits


@triton.jit
def _weighted_sum(c, u, w, PRECISION: tl.constexpr):
    """Σ_i c_i û_ij over the tile, (BLOCK_B, BLOCK_D)."""
    cu = tl.reshape(c[:, :, None, :] * u, (w.shape[0], u.shape[1], w.shape[1]))
    return tl.sum(dot(cu, w, PRECISION), axis=0)


@triton.jit
def _routing_fwd_kernel(
    # pointers
    u_ptr, weight_ptr, prior_ptr,
    slots_ptr, next_slots_ptr, poses_ptr, sums_ptr, coupling_ptr,
    # extents
    B, I, P, J, D, iteration, tiles,
    # strides
    stride_u_b, stride_u_i, stride_u_p,
    stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
    stride_prior_i, stride_prior_j,
    # meta-parameters
    HAS_POSES: tl.constexpr, HAS_PRIOR: tl.constexpr, SAVE_COUPLING: tl.constexpr,
    SLOTS: tl.constexpr, UNIFORM: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Put one program's share of s⁽ᵗ⁾ in its slot.

    s⁽ᵗ⁾ = Σ_i c_ij û_ij with c = softmax_j(û·V⁽ᵗ⁻¹⁾ + prior).
    """
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    first_b = tl.program_id(0).to(tl.int64) * BLOCK_B
    split = tl.program_id(1).to(tl.int64)
    slot_size = tl.cast(B, tl.int64) * J * D
    poses_ptr += split * slot_size
    next_slots_ptr += split * slot_size
    if HAS_POSES:
        advance_poses(
            slots_ptr, sums_ptr, poses_ptr,
            first_b * J, tl.minimum(first_b + BLOCK_B, B) * J, slot_size, J, D, iteration,
            split == 0, SLOTS, UNIFORM, BLOCK_ROWS, BLOCK_D,
        )  # fmt: skip

    b = first_b + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_bd = (b < B)[:, None] & (d < D)[None, :]
    offs_bd = (b * J * D)[:, None] + d[None, :]
    for tile in range(split * tiles, (split + 1) * tiles):
        i, ki, p = _tile_axes(tile, GROUPS, BLOCK_I, BLOCK_P)
        u, weight_ptrs, _mask_u, mask_w = _load_tile(
            u_ptr, weight_ptr, b, ki, p, d, B, I, P, D, stride_u_b, stride_u_i, stride_u_p,
            stride_weight_i, stride_weight_p, stride_weight_d, dtype, BLOCK_P, BLOCK_I,
        )  # fmt: skip
        prior_ptrs = prior_ptr + i * stride_prior_i
        mask_started = (b < tl.where(tile > split * tiles, B, 0))[:, None] & (d < D)[None, :]

        top = full_of_lowest((GROUPS, BLOCK_B, BLOCK_I), dtype)
        mass = tl.zeros((GROUPS, BLOCK_B, BLOCK_I), dtype)
        for j in range(tl.cast(J, tl.int64)):
            w = tl.load(weight_ptrs + j * stride_weight_j, mask_w, other=0.0).to(dtype)
            _, logits = _logits(
                w, u, poses_ptr + offs_bd + j * D, mask_bd, prior_ptrs + j * stride_prior_j, i < I,
                HAS_POSES, HAS_PRIOR, PRECISION,
            )  # fmt: skip
            new_top = tl.maximum(top, logits)
            mass = mass * tl.exp(top - new_top) + tl.exp(logits - new_top)
            top = new_top

        for j in range(tl.cast(J, tl.int64)):
            w = tl.load(weight_ptrs + j * stride_weight_j, mask_w, other=0.0).to(dtype)
            _, logits = _logits(
                w, u, poses_ptr + offs_bd + j * D, mask_bd, prior_ptrs + j * stride_prior_j, i < I,
                HAS_POSES, HAS_PRIOR, PRECISION,
            )  # fmt: skip
            c = tl.exp(logits - top) / mass
            if SAVE_COUPLING:
                offs_c = ((b * I)[None, :, None] + i[:, None, :]) * J + j
                tl.store(coupling_ptr + offs_c, c, (b < B)[None, :, None] & (i < I)[:, None, :])
            slot_ptrs = next_slots_ptr + offs_bd + j * D
            s = tl.load(slot_ptrs, mask_started, other=0.0)
            tl.store(slot_ptrs, s + _weighted_sum(c, u, w, PRECISION), mask_bd)
        # The next tile adds to what other threads of the program have written.
        tl.debug_barrier()


# Backward -----------------------------------------------------------------------------------------
#
# Write T = W V⁽ᵗ⁻¹⁾ and T' = W ds⁽ᵗ⁾ for the two projections of a pair (i, j): its logit is u·T +
# prior, and the gradient of its coupling is dc = u·T' (+ grad_coupling in the last iteration). With
# dv⁽ʳ⁾ = grad_v, dV⁽ʳ⁾ = 0 and ds⁽ᵗ⁾ the gradient of squash at s⁽ᵗ⁾ for dv⁽ᵗ⁾,
#
#     δ_i = Σ_j c_ij dc_ij,  db_ij = c_ij (dc_ij - δ_i)     the softmax's backward
#     dV⁽ᵗ⁻¹⁾ = dV⁽ᵗ⁾ + Σ_i db_ij û_ij,  dv⁽ᵗ⁻¹⁾ = dV⁽ᵗ⁻¹⁾   v⁽ᵗ⁻¹⁾ is in every later V
#     dû_ij = Σ_t (c_ij ds⁽ᵗ⁾_j + db_ij V⁽ᵗ⁻¹⁾_j)            û is in the sums and in the logits
#     du_i = Σ_j W_ij dû_ij = Σ_t Σ_j (c_ij T' + db_ij T)
#     dW_ij = Σ_b u_i ⊗ dû_ij = Σ_t Σ_b ((c_ij u_i) ⊗ ds⁽ᵗ⁾_j + (db_ij u_i) ⊗ V⁽ᵗ⁻¹⁾_j)
#     dprior_ij = Σ_t Σ_b db_ij
#
# Pass t, from the last iteration to the first, finishes dv⁽ᵗ⁾ in its prologue, adds to dV⁽ᵗ⁻¹⁾ and
# to du, which costs no product beyond the projections, and leaves log Σ_j exp and δ of every
# (b, i). Given these two, a pair can be evaluated for one j alone, so that the last kernel may hand
# each (input tile, j) to a program of its own, which sums dW over the batch in registers and writes
# it once.


@triton.jit
def _coupling_gradient(
    w, u, grad_ptrs, mask_bd, grad_coupling_ptrs, mask_bi,
    HAS_GRAD_COUPLING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W_j ds and dc = û_j·ds + grad_coupling of one j, (GROUPS, BLOCK_B, BLOCK_I)."""
    grad = tl.load(grad_ptrs, mask_bd, other=0.0)
    projected, dc = _project(grad, w, u, PRECISION)
    if HAS_GRAD_COUPLING:
        dc += tl.load(grad_coupling_ptrs, mask_bi, other=0.0).to(u.dtype)
    return projected, dc


@triton.jit
def _routing_bwd_kernel(
    # pointers
    u_ptr, weight_ptr, prior_ptr, grad_coupling_ptr,
    slots_ptr, next_slots_ptr, poses_ptr, grads_ptr,
    sums_ptr, saved_poses_ptr, saved_grads_ptr, normaliser_ptr, delta_ptr, du_ptr, grad_u_ptr,
    # extents
    B, I, P, J, D, iteration, tiles,
    # strides
    stride_u_b, stride_u_i, stride_u_p,
    stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
    stride_prior_i, stride_prior_j,
    # meta-parameters
    IS_LAST: tl.constexpr, DETACH: tl.constexpr, HAS_POSES: tl.constexpr, HAS_PRIOR: tl.constexpr,
    HAS_GRAD_COUPLING: tl.constexpr,
    SLOTS: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Backward of one iteration: add to dV⁽ᵗ⁻¹⁾ and du, leave log Σ_j exp and δ of every (b, i).

    DETACH treats the coupling as a constant: db = 0. Without poses and prior the coupling is 1/J,
    and nothing is left.
    """
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    first_b = tl.program_id(0).to(tl.int64) * BLOCK_B
    split = tl.program_id(1).to(tl.int64)
    slot_size = tl.cast(B, tl.int64) * J * D
    poses_ptr += split * slot_size
    grads_ptr += split * slot_size
    next_slots_ptr += split * slot_size
    pull_back(
        slots_ptr, sums_ptr, poses_ptr, grads_ptr, next_slots_ptr, saved_poses_ptr, saved_grads_ptr,
        first_b * J, tl.minimum(first_b + BLOCK_B, B) * J, slot_size, D, iteration, split == 0,
        not IS_LAST, SLOTS, BLOCK_ROWS, BLOCK_D,
    )  # fmt: skip

    b = first_b + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_bd = (b < B)[:, None] & (d < D)[None, :]
    offs_bd = (b * J * D)[:, None] + d[None, :]
    for tile in range(split * tiles, (split + 1) * tiles):
        i, ki, p = _tile_axes(tile, GROUPS, BLOCK_I, BLOCK_P)
        u, weight_ptrs, mask_u, mask_w = _load_tile(
            u_ptr, weight_ptr, b, ki, p, d, B, I, P, D, stride_u_b, stride_u_i, stride_u_p,
            stride_weight_i, stride_weight_p, stride_weight_d, dtype, BLOCK_P, BLOCK_I,
        )  # fmt: skip
        prior_ptrs = prior_ptr + i * stride_prior_i
        mask_bi = (b < B)[None, :, None] & (i < I)[:, None, :]  # (GROUPS, BLOCK_B, BLOCK_I)
        offs_bi = (b * I)[None, :, None] + i[:, None, :]
        grad_coupling_ptrs = grad_coupling_ptr + offs_bi * J

        top = tl.zeros((GROUPS, BLOCK_B, BLOCK_I), dtype)
        mass = tl.zeros((GROUPS, BLOCK_B, BLOCK_I), dtype) + J
        moment = tl.zeros((GROUPS, BLOCK_B, BLOCK_I), dtype)  # Σ_j exp(logit - top) dc
        if HAS_POSES or HAS_PRIOR:
            top = full_of_lowest((GROUPS, BLOCK_B, BLOCK_I), dtype)
            mass = tl.zeros_like(mass)
            for j in range(tl.cast(J, tl.int64)):
                w = tl.load(weight_ptrs + j * stride_weight_j, mask_w, other=0.0).to(dtype)
                _, logits = _logits(
                    w, u, poses_ptr + offs_bd + j * D, mask_bd,
                    prior_ptrs + j * stride_prior_j, i < I, HAS_POSES, HAS_PRIOR, PRECISION,
                )  # fmt: skip
                new_top = tl.maximum(top, logits)
                shrink = tl.exp(top - new_top)
                share = tl.exp(logits - new_top)
                mass = mass * shrink + share
                if not DETACH:
                    _, dc = _coupling_gradient(
                        w, u, grads_ptr + offs_bd + j * D, mask_bd,
                        grad_coupling_ptrs + j, mask_bi, HAS_GRAD_COUPLING, PRECISION,
                    )  # fmt: skip
                    moment = moment * shrink + share * dc
                top = new_top
        delta = moment / mass
        if HAS_POSES or HAS_PRIOR:
            tl.store(normaliser_ptr + offs_bi, top + tl.log(mass), mask_bi)
            tl.store(delta_ptr + offs_bi, delta, mask_bi)

        du = tl.zeros((GROUPS, BLOCK_B, BLOCK_P, BLOCK_I), dtype)
        for j in range(tl.cast(J, tl.int64)):
            w = tl.load(weight_ptrs + j * stride_weight_j, mask_w, other=0.0).to(dtype)
            pose_projected, logits = _logits(
                w, u, poses_ptr + offs_bd + j * D, mask_bd, prior_ptrs + j * stride_prior_j, i < I,
                HAS_POSES, HAS_PRIOR, PRECISION,
            )  # fmt: skip
            grad_projected, dc = _coupling_gradient(
                w, u, grads_ptr + offs_bd + j * D, mask_bd,
                grad_coupling_ptrs + j, mask_bi, HAS_GRAD_COUPLING, PRECISION,
            )  # fmt: skip
            c = tl.exp(logits - top) / mass
            du += c[:, :, None, :] * grad_projected
            if HAS_POSES and not DETACH:
                db = c * (dc - delta)
                du += db[:, :, None, :] * pose_projected
                slot_ptrs = next_slots_ptr + offs_bd + j * D
                dv = tl.load(slot_ptrs, mask_bd, other=0.0)
                tl.store(slot_ptrs, dv + _weighted_sum(db, u, w, PRECISION), mask_bd)

        du = tl.reshape(du, (GROUPS, BLOCK_B, BLOCK_P * BLOCK_I))
        offs_u = ((b * I)[None, :, None] + ki[:, None, :]) * P + p[None, None, :]
        if not IS_LAST:
            du += tl.load(du_ptr + offs_u, mask_u, other=0.0)
        tl.store(grad_u_ptr + offs_u, du, mask_u)
        tl.debug_barrier()


@triton.jit
def _add_pairs(
    dw, dprior, u, w, prior, pose_ptrs, grad_ptrs, mask_bd,
    normaliser_ptrs, delta_ptrs, grad_coupling, mask_ib, J,
    DETACH: tl.constexpr, HAS_POSES: tl.constexpr, HAS_PRIOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add an iteration of one batch tile to dW_j, (K, BLOCK_D), and dprior_j, (BLOCK_I, BLOCK_B).

    Here u is (BLOCK_P, BLOCK_I, BLOCK_B), K = BLOCK_P * BLOCK_I, and w is (K, BLOCK_D). dW sums
    over the batch, so a row past its end must have coupling 0, whatever its logit.
    """
    K: tl.constexpr = w.shape[0]
    grad = tl.load(grad_ptrs, mask_bd, other=0.0)
    logits = prior
    if HAS_POSES:
        pose = tl.load(pose_ptrs, mask_bd, other=0.0)
        projected = dot(w, tl.trans(pose), PRECISION)
        logits += tl.sum(tl.reshape(projected, u.shape) * u, axis=0)
    if HAS_POSES or HAS_PRIOR:
        c = tl.exp(logits - tl.load(normaliser_ptrs, mask_ib, other=float("inf")))
    else:
        c = tl.where(mask_ib, tl.full(mask_ib.shape, 1.0, u.dtype) / J, 0.0)
    cu = tl.reshape(c[None, :, :] * u, (K, u.shape[2]))
    dw += dot(cu, grad, PRECISION)
    if (HAS_POSES or HAS_PRIOR) and not DETACH:
        projected = dot(w, tl.trans(grad), PRECISION)
        dc = grad_coupling + tl.sum(tl.reshape(projected, u.shape) * u, axis=0)
        db = c * (dc - tl.load(delta_ptrs, mask_ib, other=0.0))
        if HAS_PRIOR:
            dprior += tl.where(mask_ib, db, 0.0)
        if HAS_POSES:
            dbu = tl.reshape(db[None, :, :] * u, (K, u.shape[2]))
            dw += dot(dbu, pose, PRECISION)
    return dw, dprior


@triton.jit
def _weight_gradient_kernel(
    # pointers
    u_ptr, weight_ptr, prior_ptr, grad_coupling_ptr,
    poses_ptr, grads_ptr, normaliser_ptr, delta_ptr, grad_weight_ptr, grad_prior_ptr,
    # extents
    B, I, P, J, D, first_step, steps,
    # strides
    stride_u_b, stride_u_i, stride_u_p,
    stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
    stride_prior_i, stride_prior_j,
    # meta-parameters
    DETACH: tl.constexpr, WITH_FIRST: tl.constexpr, HAS_PRIOR: tl.constexpr,
    HAS_GRAD_COUPLING: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dW, (BLOCK_I, P, D), and dprior, (BLOCK_I,), of one tile of input capsules and one j.

    Step t - 1 is iteration t. Step 0 has no poses; it is WITH_FIRST or left out.
    """
    dtype: tl.constexpr = poses_ptr.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64) // J
    j = tl.program_id(0).to(tl.int64) % J
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    k = tl.arange(0, BLOCK_P * BLOCK_I)
    p = (k // BLOCK_I).to(tl.int64)
    i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    ki = tile * BLOCK_I + k % BLOCK_I
    mask_k = (ki < I) & (p < P)
    mask_w = mask_k[:, None] & (d < D)[None, :]
    offs_w = (ki * stride_weight_i + p * stride_weight_p)[:, None] + (d * stride_weight_d)[None, :]
    w = tl.load(weight_ptr + j * stride_weight_j + offs_w, mask_w, other=0.0).to(dtype)
    prior = tl.zeros((BLOCK_I, BLOCK_B), dtype)
    if HAS_PRIOR:
        prior_ptrs = prior_ptr + i * stride_prior_i + j * stride_prior_j
        prior += tl.load(prior_ptrs, i < I, other=0.0).to(dtype)[:, None]

    dw = tl.zeros((BLOCK_P * BLOCK_I, BLOCK_D), dtype)
    dprior = tl.zeros((BLOCK_I, BLOCK_B), dtype)
    pose_step = tl.cast(B, tl.int64) * J * D
    pair_step = tl.cast(B, tl.int64) * I
    for first_b in range(0, B, BLOCK_B):
        b = first_b + tl.arange(0, BLOCK_B).to(tl.int64)
        mask_bd = (b < B)[:, None] & (d < D)[None, :]
        mask_ib = (i < I)[:, None] & (b < B)[None, :]
        # Loaded along the capsules, which are next to each other in memory; batch rows are not.
        offs_u = (b * stride_u_b)[:, None] + (ki * stride_u_i + p * stride_u_p)[None, :]
        u = tl.load(u_ptr + offs_u, (b < B)[:, None] & mask_k[None, :], other=0.0).to(dtype)
        u = tl.reshape(tl.trans(u), (BLOCK_P, BLOCK_I, BLOCK_B))
        offs_bd = ((b * J + j) * D)[:, None] + d[None, :]
        offs_ib = (b * I)[None, :] + i[:, None]
        grad_coupling_ptrs = grad_coupling_ptr + offs_ib * J + j
        for step in range(first_step, steps):
            grad_coupling = load_grad_coupling(
                grad_coupling_ptrs, mask_ib, steps - 1 - step, dtype, HAS_GRAD_COUPLING
            )
            poses = step * pose_step + offs_bd
            # Without a prior, step 0 has no pairs.
            pairs = (step if HAS_PRIOR else step - 1) * pair_step + offs_ib
            dw, dprior = _add_pairs(
                dw, dprior, u, w, prior, poses_ptr + poses, grads_ptr + poses, mask_bd,
                normaliser_ptr + pairs, delta_ptr + pairs, grad_coupling, mask_ib, J,
                DETACH, True, HAS_PRIOR, PRECISION,
            )  # fmt: skip
        if WITH_FIRST:
            grad_coupling = load_grad_coupling(
                grad_coupling_ptrs, mask_ib, steps - 1, dtype, HAS_GRAD_COUPLING
            )
            dw, dprior = _add_pairs(
                dw, dprior, u, w, prior, poses_ptr + offs_bd, grads_ptr + offs_bd, mask_bd,
                normaliser_ptr + offs_ib, delta_ptr + offs_ib, grad_coupling, mask_ib, J,
                DETACH, False, HAS_PRIOR, PRECISION,
            )  # fmt: skip
    offs_dw = ((ki * P + p) * J + j)[:, None] * D + d[None, :]
    tl.store(grad_weight_ptr + offs_dw, dw, mask_w)
    if HAS_PRIOR and not DETACH:
        tl.store(grad_prior_ptr + i * J + j, tl.sum(dprior, axis=1), i < I)


# Launchers ----------------------------------------------------------------------------------------


def _uniform_sums(u: Tensor, weight: Tensor) -> Tensor:
    """Σ_i û_ij, not yet divided by J: one (B, I·P) × (I·P, J·D) product of the vendor's library."""
    B, I, P = u.shape
    _, _, J, D = weight.shape
    dtype = accumulation_dtype(u.dtype)
    rows, columns = u.reshape(B, I * P), weight.reshape(I * P, J * D)
    if u.dtype == dtype:
        product = torch.mm(rows, columns)
    elif u.is_cuda and torch.version.hip is None:
        product = torch.mm(rows, columns, out_dtype=dtype)
    else:
        product = torch.mm(rows.to(dtype), columns.to(dtype))
    return product.view(1, B, J, D)


def fused_dynamic_routing_fwd(
    u: Tensor, weight: Tensor, prior: Tensor | None, iterations: int, return_coupling: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Route the prediction vectors W u without storing them.

    Args:
        u: input poses, shape (B, I, P), any strides.
        weight: shape (I, P, J, D), any strides, dtype of `u`.
        prior: initial logits, shape (I, J), or None for zeros.
        iterations: the number of weighted sums, at least 1.
        return_coupling: whether to write the coupling of the last iteration.

    Returns:
        v (B, J, D); the coupling (B, I, J), or an empty tensor; every weighted sum (iterations, B,
        J, D) in the accumulation type. `fused_dynamic_routing_bwd` needs the last.
    """
    B, I, P = u.shape
    _, _, J, D = weight.shape
    dtype = accumulation_dtype(u.dtype)
    v = u.new_empty(B, J, D)
    coupling = u.new_empty((B, I, J) if return_coupling else (0,))
    sums = u.new_empty((iterations, B, J, D), dtype=dtype)
    if B == 0 or I == 0 or J == 0:
        return v.zero_(), coupling, sums.zero_()

    target = target_of(u)
    config = fused_dynamic_routing_config(I, P, J, D, u.dtype, target, backward=False)
    splits, tiles = config.divide(I)
    # Read and written alternately: a pass reads every slot of the iteration before it.
    slots = u.new_empty((2, splits, B, J, D), dtype=dtype)
    poses = u.new_empty((splits, B, J, D), dtype=dtype)
    with device_of(u):
        first = 1
        filled, uniform = slots[:1, 0], False
        if prior is None:
            filled, uniform, first = _uniform_sums(u, weight), True, 2
            if iterations == 1:
                coupling.fill_(1 / J)
        for iteration in range(first, iterations + 1):
            next_slots = slots[iteration % 2]
            _routing_fwd_kernel[(cdiv(B, config.block_b), splits)](
                u, weight, u if prior is None else prior, filled, next_slots, poses, sums, coupling,
                B, I, P, J, D, iteration, tiles,
                *u.stride(),
                *weight.stride(),
                *((0, 0) if prior is None else prior.stride()),
                HAS_POSES=iteration > 1,
                HAS_PRIOR=prior is not None,
                SAVE_COUPLING=return_coupling and iteration == iterations,
                SLOTS=filled.shape[0],
                UNIFORM=uniform,
                PRECISION=dot_precision(u.dtype, target),
                GROUPS=config.groups,
                BLOCK_B=config.block_b,
                BLOCK_I=config.block_i,
                BLOCK_P=config.block_p,
                BLOCK_D=config.block_d,
                BLOCK_ROWS=config.block_rows,
                **config.options(target),
            )  # fmt: skip
            filled, uniform = next_slots, False
        squash_slots(filled, uniform, sums[-1], v)
    return v, coupling, sums


def fused_dynamic_routing_bwd(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    sums: Tensor,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of u, the weight and the prior (None where there is none).

    Args:
        grad_v: shape (B, J, D), any strides.
        grad_coupling: shape (B, I, J), any strides (read as it is where it is contiguous, else
            copied: its own strides would cost the registers that are left), or None. Ignored
            unless `full`.
        u, weight, prior: as given to `fused_dynamic_routing_fwd`.
        sums: as returned by `fused_dynamic_routing_fwd`.
        full: differentiate through every iteration; otherwise the last coupling is a constant.
    """
    B, I, P = u.shape
    _, _, J, D = weight.shape
    iterations = sums.shape[0]
    grad_u = torch.empty_like(u, memory_format=torch.contiguous_format)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_prior = None
    if prior is not None:
        grad_prior = torch.zeros_like(prior, memory_format=torch.contiguous_format)
    if B == 0 or I == 0 or J == 0:
        return grad_u.zero_(), grad_weight.zero_(), grad_prior

    target = target_of(u)
    config = fused_dynamic_routing_config(I, P, J, D, u.dtype, target, backward=True)
    splits, tiles = config.divide(I)
    slots = sums.new_empty(2, splits, B, J, D)
    poses = sums.new_empty(splits, B, J, D)
    grads = torch.empty_like(poses)
    saved_poses = torch.empty_like(sums)
    saved_grads = torch.empty_like(sums)
    # Of the iterations that have logits: without a prior the first has none.
    unlogged = 1 if prior is None else 0
    normaliser = sums.new_empty(iterations - unlogged, B, I)
    delta = torch.empty_like(normaliser)
    # du is summed over the passes in the accumulation type; the last pass writes it in u's.
    du = grad_u if u.dtype == sums.dtype else torch.empty_like(grad_u, dtype=sums.dtype)
    has_grad_coupling = grad_coupling is not None and full
    # Where there is no prior or grad_coupling a kernel gets u for it, and does not touch it.
    inputs = (
        u,
        weight,
        u if prior is None else prior,
        u if grad_coupling is None else grad_coupling.contiguous(),
    )
    strides = (
        *u.stride(),
        *weight.stride(),
        *((0, 0) if prior is None else prior.stride()),
    )
    precision = dot_precision(u.dtype, target)
    with device_of(u):
        filled = grad_v.contiguous().view(1, B, J, D)
        first = 1 if full else iterations
        for iteration in range(iterations, first - 1, -1):
            step = iteration - 1
            pairs = max(step - unlogged, 0)
            next_slots = slots[iteration % 2]
            _routing_bwd_kernel[(cdiv(B, config.block_b), splits)](
                *inputs, filled, next_slots, poses, grads,
                sums, saved_poses[step], saved_grads[step], normaliser[pairs:], delta[pairs:],
                du, grad_u if iteration == first else du,
                B, I, P, J, D, iteration, tiles,
                *strides,
                IS_LAST=iteration == iterations,
                DETACH=not full,
                HAS_POSES=iteration > 1,
                HAS_PRIOR=prior is not None,
                HAS_GRAD_COUPLING=has_grad_coupling and iteration == iterations,
                SLOTS=filled.shape[0],
                PRECISION=precision,
                GROUPS=config.groups,
                BLOCK_B=config.block_b,
                BLOCK_I=config.block_i,
                BLOCK_P=config.block_p,
                BLOCK_D=config.block_d,
                BLOCK_ROWS=config.block_rows,
                **config.options(target),
            )  # fmt: skip
            filled = next_slots
        config = weight_gradient_config(I, P, J, D, u.dtype, target)
        _weight_gradient_kernel[(cdiv(I, config.block_i) * J,)](
            *inputs, saved_poses, saved_grads, normaliser, delta,
            grad_weight, grad_weight if grad_prior is None else grad_prior,
            B, I, P, J, D, max(first - 1, 1), iterations,
            *strides,
            DETACH=not full,
            WITH_FIRST=first == 1,
            HAS_PRIOR=prior is not None,
            HAS_GRAD_COUPLING=has_grad_coupling,
            PRECISION=precision,
            BLOCK_B=config.block_b,
            BLOCK_I=config.block_i,
            BLOCK_P=config.block_p,
            BLOCK_D=config.block_d,
            **config.options(target),
        )  # fmt: skip
    return grad_u, grad_weight, grad_prior
