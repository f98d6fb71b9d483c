"""Routing of given prediction vectors û, (B, I, J, D): memory-bound, one read of û per pass.

A program owns one batch row and walks over tiles of input capsules. As in `routing_pass`, it sweeps
twice over the output capsules: first to find the softmax's normaliser, then to apply it. A tile is
small enough that the second sweep finds it in the first-level cache. In a kernel, `u_hat` is the û
of one tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritoncaps.kernels._launch import (
    Target,
    UnsupportedShape,
    accumulation_dtype,
    device_of,
    divide,
    measured,
    strides,
    target_of,
)
from tritoncaps.kernels._slots import advance_running_sum, pull_back, write_result
from tritoncaps.kernels._tiles import classes, load_grad_coupling, softmax_start


def dynamic_routing_launch(
    I: int, J: int, D: int, dtype: torch.dtype, target: Target
) -> tuple[dict[str, int], int, int]:
    """Launch keywords of a pass, the splits of the input capsules and the tiles in each split.

    BLOCK_I: the BLOCK_I·J·D values of a tile stay under 32 KiB. The tiles of all programs on a
    processor are then still in its first-level cache when the second sweep needs them.
    BLOCK_J: 2048 values in the registers of 8 warps (1024 of float64), at most a quarter of them
    beyond the last j.
    MAX_SPLITS: every program adds up the slots of all splits, which reads splits² · B·J·D values.
    16 keeps this far below û.
    """
    block_d = triton.next_power_of_2(max(D, 1))
    values = 2048 if accumulation_dtype(dtype) == torch.float32 else 1024
    if block_d > values:
        raise UnsupportedShape(f"poses of D={D}; a program holds at most {values}")
    fits = max(4 * values // max(J * D, 1), 1)
    rows = triton.next_power_of_2(max(I, 1))
    block_i = min(1 << (fits.bit_length() - 1), rows, values // block_d)
    block_j = min(values // (block_i * block_d), triton.next_power_of_2(J))
    while block_j > 1 and triton.cdiv(J, block_j) * block_j > 1.25 * J:
        block_j //= 2
    launch = {
        "BLOCK_I": block_i,
        "BLOCK_J": block_j,
        "BLOCK_D": block_d,
        "BLOCK_ROWS": min(max(1024 // block_d, 1), triton.next_power_of_2(J)),
        "MAX_SPLITS": 16,
        "num_warps": 8,
        "num_stages": 1,
    }
    launch = measured("dynamic_routing", launch, target, dtype, I=I, J=J, D=D)
    return launch, *divide(I, launch["BLOCK_I"], launch.pop("MAX_SPLITS"))


# Forward ------------------------------------------------------------------------------------------


@triton.jit
def _load_u_hat(
    row_ptrs, mask_id, first_j, J, D, stride_u_hat_j,
    DTYPE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """û of a block of output capsules, (BLOCK_I, BLOCK_J, BLOCK_D); j; and the mask over (j, d)."""
    j = first_j + tl.arange(0, BLOCK_J).to(tl.int64)
    mask = mask_id & (j < J)[None, :, None]
    u_hat = tl.load(row_ptrs + (j * stride_u_hat_j)[None, :, None], mask, other=0.0).to(DTYPE)
    return u_hat, j, (j < J)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]


@triton.jit
def _logits(
    u_hat, V_ptrs, mask_jd, prior_ptrs, mask_ij, mask_j,
    HAS_V: tl.constexpr, HAS_PRIOR: tl.constexpr,
):  # fmt: skip
    """V, (BLOCK_J, BLOCK_D), and logits û·V + prior, (BLOCK_I, BLOCK_J), -inf past the last j."""
    V = tl.zeros((u_hat.shape[1], u_hat.shape[2]), u_hat.dtype)
    logits = tl.zeros((u_hat.shape[0], u_hat.shape[1]), u_hat.dtype)
    if HAS_V:
        V = tl.load(V_ptrs, mask_jd, other=0.0)
        logits = tl.sum(u_hat * V[None, :, :], axis=2)
    if HAS_PRIOR:
        logits += tl.load(prior_ptrs, mask_ij, other=0.0).to(u_hat.dtype)
    return V, tl.where(mask_j[None, :], logits, float("-inf"))


@triton.jit
def _dynamic_fwd_kernel(
    # pointers
    u_hat_ptr, prior_ptr, pose_bias_ptr, slots_ptr, next_slots_ptr, V_ptr, sums_ptr, coupling_ptr,
    # extents
    B, I, J, D, iteration, tiles,
    # strides
    stride_u_hat_b, stride_u_hat_i, stride_u_hat_j, stride_u_hat_d, stride_prior_i, stride_prior_j,
    # meta-parameters
    HAS_V: tl.constexpr, HAS_PRIOR: tl.constexpr, HAS_POSE_BIAS: tl.constexpr, LEAKY: tl.constexpr,
    SAVE_COUPLING: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Put one program's share of s⁽ᵗ⁾ in its slot.

    s⁽ᵗ⁾ = Σ_i c_ij û_ij with c = softmax_j(û·V⁽ᵗ⁻¹⁾ + prior).
    """
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    slot_size = tl.cast(B, tl.int64) * J * D
    V_ptr += split * slot_size
    next_slots_ptr += split * slot_size
    if HAS_V:
        advance_running_sum(
            slots_ptr, pose_bias_ptr, sums_ptr, V_ptr,
            b * J, (b + 1) * J, slot_size, J, D, iteration, split == 0,
            SLOTS, False, LEAKY, HAS_POSE_BIAS, BLOCK_ROWS, BLOCK_D,
        )  # fmt: skip

    d = tl.arange(0, BLOCK_D).to(tl.int64)
    for tile in range(split * tiles, (split + 1) * tiles):
        i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
        row_ptrs = u_hat_ptr + b * stride_u_hat_b + (i * stride_u_hat_i)[:, None, None]
        row_ptrs += (d * stride_u_hat_d)[None, None, :]
        mask_id = (i < I)[:, None, None] & (d < D)[None, None, :]
        prior_ptrs = prior_ptr + (i * stride_prior_i)[:, None]
        started = tl.where(tile > split * tiles, J, 0)

        top, mass = softmax_start((BLOCK_I,), dtype, LEAKY)
        for first_j in range(0, J, BLOCK_J):
            u_hat, j, mask_jd = _load_u_hat(
                row_ptrs, mask_id, first_j, J, D, stride_u_hat_j, dtype, BLOCK_J, BLOCK_D
            )
            _, logits = _logits(
                u_hat, V_ptr + ((b * J + j) * D)[:, None] + d[None, :], mask_jd,
                prior_ptrs + (j * stride_prior_j)[None, :], (i < I)[:, None] & (j < J)[None, :],
                j < J, HAS_V, HAS_PRIOR,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            mass = mass * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top[:, None]), axis=1)
            top = new_top

        for first_j in range(0, J, BLOCK_J):
            u_hat, j, mask_jd = _load_u_hat(
                row_ptrs, mask_id, first_j, J, D, stride_u_hat_j, dtype, BLOCK_J, BLOCK_D
            )
            offs_jd = ((b * J + j) * D)[:, None] + d[None, :]
            mask_ij = (i < I)[:, None] & (j < J)[None, :]
            _, logits = _logits(
                u_hat, V_ptr + offs_jd, mask_jd,
                prior_ptrs + (j * stride_prior_j)[None, :], mask_ij, j < J,
                HAS_V, HAS_PRIOR,
            )  # fmt: skip
            c = tl.exp(logits - top[:, None]) / mass[:, None]
            if SAVE_COUPLING:
                tl.store(coupling_ptr + (b * I + i)[:, None] * J + j[None, :], c, mask_ij)
            s = tl.load(next_slots_ptr + offs_jd, mask_jd & (j < started)[:, None], other=0.0)
            s += tl.sum(c[:, :, None] * u_hat, axis=0)
            tl.store(next_slots_ptr + offs_jd, s, mask_jd)
        # The next tile adds to values that other threads of the program have written.
        tl.debug_barrier()


# Backward -----------------------------------------------------------------------------------------
#
# The formulas are those of `fused_dynamic_routing`:
#
#     dc = û·ds⁽ᵗ⁾ (+ grad_coupling in the last iteration),  δ = Σ_j c dc,  db = c (dc - δ)
#     dV⁽ᵗ⁻¹⁾ = dV⁽ᵗ⁾ + Σ_i db û,  dû = Σ_t (c ds⁽ᵗ⁾ + db V⁽ᵗ⁻¹⁾),  dprior = Σ_t Σ_b db
#
# Passes run from the last iteration to the first. Pass t finishes dv⁽ᵗ⁾ in its prologue, adds to
# dV⁽ᵗ⁻¹⁾, and saves log Σ_j exp and δ for every (b, i). A last kernel then evaluates all iterations
# at once for each û and writes dû. In total, û is read r + 1 times and dû is written once.


@triton.jit
def _coupling_gradient(
    u_hat, ds_ptrs, mask_jd, grad_coupling_ptrs, mask_ij, HAS_GRAD_COUPLING: tl.constexpr
):  # fmt: skip
    """ds, (BLOCK_J, BLOCK_D), and dc = û·ds + grad_coupling, (BLOCK_I, BLOCK_J)."""
    ds = tl.load(ds_ptrs, mask_jd, other=0.0)
    dc = tl.sum(u_hat * ds[None, :, :], axis=2)
    if HAS_GRAD_COUPLING:
        dc += tl.load(grad_coupling_ptrs, mask_ij, other=0.0).to(u_hat.dtype)
    return ds, dc


@triton.jit
def _dynamic_bwd_kernel(
    # pointers
    u_hat_ptr, prior_ptr, grad_coupling_ptr, slots_ptr, next_slots_ptr, V_ptr, ds_ptr,
    sums_ptr, saved_V_ptr, saved_ds_ptr, normaliser_ptr, delta_ptr,
    # extents
    B, I, J, D, iteration, tiles,
    # strides
    stride_u_hat_b, stride_u_hat_i, stride_u_hat_j, stride_u_hat_d, stride_prior_i, stride_prior_j,
    stride_grad_coupling_b, stride_grad_coupling_i, stride_grad_coupling_j,
    # meta-parameters
    IS_LAST: tl.constexpr, SQUASHED: tl.constexpr, FULL: tl.constexpr, HAS_V: tl.constexpr,
    HAS_PRIOR: tl.constexpr, LEAKY: tl.constexpr, HAS_GRAD_COUPLING: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Backward of one iteration: add to dV⁽ᵗ⁻¹⁾, save log Σ_j exp and δ for every (b, i).

    Unless FULL, the coupling is a constant: db = 0. Without V and prior it is uniform, and
    nothing is left to do after the prologue. Such a pass is launched with no tiles.
    """
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    slot_size = tl.cast(B, tl.int64) * J * D
    V_ptr += split * slot_size
    ds_ptr += split * slot_size
    next_slots_ptr += split * slot_size
    pull_back(
        slots_ptr, sums_ptr, V_ptr, ds_ptr, next_slots_ptr, saved_V_ptr, saved_ds_ptr,
        b * J, (b + 1) * J, slot_size, D, iteration, split == 0,
        not IS_LAST, SQUASHED, SLOTS, BLOCK_ROWS, BLOCK_D,
    )  # fmt: skip

    d = tl.arange(0, BLOCK_D).to(tl.int64)
    for tile in range(split * tiles, (split + 1) * tiles):
        i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
        row_ptrs = u_hat_ptr + b * stride_u_hat_b + (i * stride_u_hat_i)[:, None, None]
        row_ptrs += (d * stride_u_hat_d)[None, None, :]
        mask_id = (i < I)[:, None, None] & (d < D)[None, None, :]
        prior_ptrs = prior_ptr + (i * stride_prior_i)[:, None]
        grad_coupling_ptrs = grad_coupling_ptr + b * stride_grad_coupling_b
        grad_coupling_ptrs += (i * stride_grad_coupling_i)[:, None]

        top, mass = softmax_start((BLOCK_I,), dtype, LEAKY)
        moment = tl.zeros((BLOCK_I,), dtype)  # Σ_j exp(logit - top) dc
        for first_j in range(0, J, BLOCK_J):
            u_hat, j, mask_jd = _load_u_hat(
                row_ptrs, mask_id, first_j, J, D, stride_u_hat_j, dtype, BLOCK_J, BLOCK_D
            )
            offs_jd = ((b * J + j) * D)[:, None] + d[None, :]
            mask_ij = (i < I)[:, None] & (j < J)[None, :]
            _, logits = _logits(
                u_hat, V_ptr + offs_jd, mask_jd,
                prior_ptrs + (j * stride_prior_j)[None, :], mask_ij, j < J,
                HAS_V, HAS_PRIOR,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            shrink = tl.exp(top - new_top)
            share = tl.exp(logits - new_top[:, None])
            mass = mass * shrink + tl.sum(share, axis=1)
            if FULL:
                _, dc = _coupling_gradient(
                    u_hat, ds_ptr + offs_jd, mask_jd,
                    grad_coupling_ptrs + (j * stride_grad_coupling_j)[None, :], mask_ij,
                    HAS_GRAD_COUPLING,
                )  # fmt: skip
                moment = moment * shrink + tl.sum(share * dc, axis=1)
            top = new_top
        delta = moment / mass
        tl.store(normaliser_ptr + b * I + i, top + tl.log(mass), i < I)
        tl.store(delta_ptr + b * I + i, delta, i < I)

        if HAS_V and FULL:
            for first_j in range(0, J, BLOCK_J):
                u_hat, j, mask_jd = _load_u_hat(
                    row_ptrs, mask_id, first_j, J, D, stride_u_hat_j, dtype, BLOCK_J, BLOCK_D
                )
                offs_jd = ((b * J + j) * D)[:, None] + d[None, :]
                mask_ij = (i < I)[:, None] & (j < J)[None, :]
                _, logits = _logits(
                    u_hat, V_ptr + offs_jd, mask_jd,
                    prior_ptrs + (j * stride_prior_j)[None, :], mask_ij, j < J,
                    HAS_V, HAS_PRIOR,
                )  # fmt: skip
                _, dc = _coupling_gradient(
                    u_hat, ds_ptr + offs_jd, mask_jd,
                    grad_coupling_ptrs + (j * stride_grad_coupling_j)[None, :], mask_ij,
                    HAS_GRAD_COUPLING,
                )  # fmt: skip
                c = tl.exp(logits - top[:, None]) / mass[:, None]
                db = c * (dc - delta[:, None])
                dv = tl.load(next_slots_ptr + offs_jd, mask_jd, other=0.0)
                dv += tl.sum(db[:, :, None] * u_hat, axis=0)
                tl.store(next_slots_ptr + offs_jd, dv, mask_jd)
            # The next tile adds to values that other threads of the program have written.
            tl.debug_barrier()


@triton.jit
def _add_iteration(
    du_hat, dlogits, u_hat, V_ptrs, ds_ptrs, mask_jd, prior_ptrs, mask_ij, mask_j,
    normaliser_ptrs, delta_ptrs, mask_i, grad_coupling, J,
    FULL: tl.constexpr, HAS_V: tl.constexpr, HAS_PRIOR: tl.constexpr, LEAKY: tl.constexpr,
):  # fmt: skip
    """Add c ds + db V of an iteration to dû, (BLOCK_I, BLOCK_J, BLOCK_D), and db to dlogits."""
    ds, dc = _coupling_gradient(u_hat, ds_ptrs, mask_jd, V_ptrs, mask_ij, False)
    if HAS_V or HAS_PRIOR:
        V, logits = _logits(u_hat, V_ptrs, mask_jd, prior_ptrs, mask_ij, mask_j, HAS_V, HAS_PRIOR)
        c = tl.exp(logits - tl.load(normaliser_ptrs, mask_i, other=0.0)[:, None])
        du_hat += c[:, :, None] * ds[None, :, :]
        if FULL:
            delta = tl.load(delta_ptrs, mask_i, other=0.0)
            db = c * (dc + grad_coupling - delta[:, None])
            dlogits += db
            if HAS_V:
                du_hat += db[:, :, None] * V[None, :, :]
    else:
        du_hat += (ds / classes(J, LEAKY))[None, :, :]
    return du_hat, dlogits


@triton.jit
def _u_hat_gradient_kernel(
    # pointers
    u_hat_ptr, prior_ptr, grad_coupling_ptr, V_ptr, ds_ptr, normaliser_ptr, delta_ptr,
    grad_u_hat_ptr, grad_logits_ptr,
    # extents
    B, I, J, D, first_step, steps, tiles,
    # strides
    stride_u_hat_b, stride_u_hat_i, stride_u_hat_j, stride_u_hat_d, stride_prior_i, stride_prior_j,
    stride_grad_coupling_b, stride_grad_coupling_i, stride_grad_coupling_j,
    # meta-parameters
    FULL: tl.constexpr, WITH_FIRST: tl.constexpr, HAS_PRIOR: tl.constexpr, LEAKY: tl.constexpr,
    HAS_GRAD_COUPLING: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dû of one tile. With a prior also Σ_t db, whose sum over the batch is dprior.

    Step t - 1 is iteration t. Step 0 has no V. It runs only if WITH_FIRST.
    """
    dtype: tl.constexpr = V_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0).to(tl.int64) % tiles
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    row_ptrs = u_hat_ptr + b * stride_u_hat_b + (i * stride_u_hat_i)[:, None, None]
    row_ptrs += (d * stride_u_hat_d)[None, None, :]
    mask_id = (i < I)[:, None, None] & (d < D)[None, None, :]
    grad_coupling_rows = grad_coupling_ptr + b * stride_grad_coupling_b
    grad_coupling_rows += (i * stride_grad_coupling_i)[:, None]
    V_step = tl.cast(B, tl.int64) * J * D
    pair_step = tl.cast(B, tl.int64) * I
    offs_i = b * I + i
    for first_j in range(0, J, BLOCK_J):
        u_hat, j, mask_jd = _load_u_hat(
            row_ptrs, mask_id, first_j, J, D, stride_u_hat_j, dtype, BLOCK_J, BLOCK_D
        )
        offs_jd = ((b * J + j) * D)[:, None] + d[None, :]
        mask_ij = (i < I)[:, None] & (j < J)[None, :]
        prior_ptrs = prior_ptr + (i * stride_prior_i)[:, None] + (j * stride_prior_j)[None, :]
        grad_coupling_ptrs = grad_coupling_rows + (j * stride_grad_coupling_j)[None, :]
        du_hat = tl.zeros((BLOCK_I, BLOCK_J, BLOCK_D), dtype)
        dlogits = tl.zeros((BLOCK_I, BLOCK_J), dtype)
        for step in range(first_step, steps):
            grad_coupling = load_grad_coupling(
                grad_coupling_ptrs, mask_ij, steps - 1 - step, dtype, HAS_GRAD_COUPLING
            )
            offs_V = step * V_step + offs_jd
            pairs = step * pair_step + offs_i
            du_hat, dlogits = _add_iteration(
                du_hat, dlogits, u_hat, V_ptr + offs_V, ds_ptr + offs_V, mask_jd,
                prior_ptrs, mask_ij, j < J, normaliser_ptr + pairs, delta_ptr + pairs, i < I,
                grad_coupling, J, FULL, True, HAS_PRIOR, LEAKY,
            )  # fmt: skip
        if WITH_FIRST:
            grad_coupling = load_grad_coupling(
                grad_coupling_ptrs, mask_ij, steps - 1, dtype, HAS_GRAD_COUPLING
            )
            du_hat, dlogits = _add_iteration(
                du_hat, dlogits, u_hat, V_ptr + offs_jd, ds_ptr + offs_jd, mask_jd,
                prior_ptrs, mask_ij, j < J, normaliser_ptr + offs_i, delta_ptr + offs_i, i < I,
                grad_coupling, J, FULL, False, HAS_PRIOR, LEAKY,
            )  # fmt: skip
        offs_ij = offs_i[:, None] * J + j[None, :]
        offs_ijd = offs_ij[:, :, None] * D + d[None, None, :]
        tl.store(grad_u_hat_ptr + offs_ijd, du_hat, mask_ij[:, :, None] & (d < D)[None, None, :])
        if HAS_PRIOR and FULL:
            tl.store(grad_logits_ptr + offs_ij, dlogits, mask_ij)


# Launchers ----------------------------------------------------------------------------------------


def dynamic_routing_fwd(
    u_hat: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    iterations: int,
    leaky: bool,
    output: str,
    return_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Route given prediction vectors.

    Args:
        u_hat: shape (B, I, J, D), any strides.
        prior: initial logits, shape (I, J), or None for zeros.
        pose_bias: added to every sum, shape (J, D), or None for zeros.
        iterations: the number of weighted sums, at least 1.
        leaky: whether an orphan class with logit 0 takes part in the softmax.
        output: "v", or "s" to return the last sum instead of its squash.
        return_coupling: whether to write the coupling of the last iteration.

    Returns:
        v or s (B, J, D); the coupling (B, I, J), or an empty tensor; and every weighted sum
        (iterations, B, J, D) in the accumulation type, for `dynamic_routing_bwd`.
    """
    B, I, J, D = u_hat.shape
    dtype = accumulation_dtype(u_hat.dtype)
    v = u_hat.new_empty(B, J, D)
    coupling = u_hat.new_empty((B, I, J) if return_coupling else (0,))
    sums = u_hat.new_empty((iterations, B, J, D), dtype=dtype)
    if B == 0 or J == 0:
        return v.zero_(), coupling, sums.zero_()

    target = target_of(u_hat)
    launch, splits, tiles = dynamic_routing_launch(I, J, D, u_hat.dtype, target)
    pose_bias = None if pose_bias is None else pose_bias.contiguous()
    # Two buffers take turns, because a pass reads every slot of the previous iteration.
    slots = u_hat.new_empty((2, splits, B, J, D), dtype=dtype)
    V = u_hat.new_empty((splits, B, J, D), dtype=dtype)
    with device_of(u_hat):
        for iteration in range(1, iterations + 1):
            _dynamic_fwd_kernel[(B, splits)](
                # In place of a missing tensor, a kernel gets u_hat, which it does not touch.
                u_hat, *(u_hat if x is None else x for x in (prior, pose_bias)),
                slots[(iteration - 1) % 2], slots[iteration % 2], V, sums, coupling,
                B, I, J, D, iteration, tiles,
                *u_hat.stride(),
                *strides(prior, 2),
                HAS_V=iteration > 1,
                HAS_PRIOR=prior is not None,
                HAS_POSE_BIAS=pose_bias is not None,
                LEAKY=leaky,
                SAVE_COUPLING=return_coupling and iteration == iterations,
                SLOTS=splits,
                **launch,
            )  # fmt: skip
        write_result(
            slots[iterations % 2], pose_bias, sums[-1], v,
            uniform=False, leaky=leaky, output=output,
        )  # fmt: skip
    return v, coupling, sums


def dynamic_routing_bwd(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u_hat: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    sums: Tensor,
    leaky: bool,
    gradient: str,
    output: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the prediction vectors, the prior and the pose bias (None where there is none).

    Args:
        grad_v: shape (B, J, D), any strides.
        grad_coupling: shape (B, I, J), any strides, or None. Ignored unless `gradient` is "full".
        u_hat, prior, pose_bias, leaky, output: as given to `dynamic_routing_fwd`.
        sums: as returned by `dynamic_routing_fwd`, any strides: a `vmap` takes slices of it.
        gradient: "full" differentiates through every iteration. "last" treats the last coupling as
            a constant.
    """
    B, I, J, D = u_hat.shape
    iterations, sums = sums.shape[0], sums.contiguous()
    full = gradient == "full"
    grad_u_hat = torch.empty_like(u_hat, memory_format=torch.contiguous_format)
    grad_prior, grad_pose_bias = (
        None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format)
        for x in (prior, pose_bias)
    )
    if B == 0 or J == 0:
        return grad_u_hat.zero_(), grad_prior, grad_pose_bias

    target = target_of(u_hat)
    launch, splits, tiles = dynamic_routing_launch(I, J, D, u_hat.dtype, target)
    slots = sums.new_empty(2, splits, B, J, D)
    V = sums.new_empty(splits, B, J, D)
    ds = torch.empty_like(V)
    saved_V = torch.empty_like(sums)
    saved_ds = torch.empty_like(sums)
    normaliser = sums.new_empty(iterations, B, I)
    delta = torch.empty_like(normaliser)
    has_grad_coupling = grad_coupling is not None and full
    # In place of a missing tensor, a kernel gets u_hat, which it does not touch.
    inputs = (u_hat, *(u_hat if x is None else x for x in (prior, grad_coupling)))
    all_strides = (*u_hat.stride(), *strides(prior, 2), *strides(grad_coupling, 3))
    with device_of(u_hat):
        filled = grad_v.contiguous().view(1, B, J, D)
        first = 1 if full else iterations
        for iteration in range(iterations, first - 1, -1):
            step = iteration - 1
            uniform = iteration == 1 and prior is None
            next_slots = slots[iteration % 2]
            _dynamic_bwd_kernel[(B, 1 if uniform else splits)](
                *inputs, filled, next_slots, V, ds,
                sums, saved_V[step], saved_ds[step], normaliser[step], delta[step],
                B, I, J, D, iteration, 0 if uniform else tiles,
                *all_strides,
                IS_LAST=iteration == iterations,
                SQUASHED=output == "v" or iteration < iterations,
                FULL=full,
                HAS_V=iteration > 1,
                HAS_PRIOR=prior is not None,
                LEAKY=leaky,
                HAS_GRAD_COUPLING=has_grad_coupling and iteration == iterations,
                SLOTS=filled.shape[0],
                **launch,
            )  # fmt: skip
            filled = next_slots
        sum_logits = prior is not None and full
        grad_logits = sums.new_empty((B, I, J) if sum_logits else (0,))
        del launch["BLOCK_ROWS"]  # only a prologue uses it, and the last kernel has none
        all_tiles = triton.cdiv(I, launch["BLOCK_I"])
        _u_hat_gradient_kernel[(B * all_tiles,)](
            *inputs, saved_V, saved_ds, normaliser, delta, grad_u_hat, grad_logits,
            B, I, J, D, max(first - 1, 1), iterations, all_tiles,
            *all_strides,
            FULL=full,
            WITH_FIRST=first == 1,
            HAS_PRIOR=prior is not None,
            LEAKY=leaky,
            HAS_GRAD_COUPLING=has_grad_coupling,
            **launch,
        )  # fmt: skip
        if grad_prior is not None and sum_logits:
            grad_prior.copy_(grad_logits.sum(0))
        if grad_pose_bias is not None:
            grad_pose_bias.copy_(saved_ds[first - 1 :].sum((0, 1)))
    return grad_u_hat, grad_prior, grad_pose_bias
