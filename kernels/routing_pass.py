"""One routing pass: softmax over the output capsules, weighted sum over the input capsules.

    c̃_ij = softmax_j(û_ij·pose_j + prior_ij),  c = c̃ + bias,  s_j = Σ_i c_ij û_ij

The prediction vectors û = W u are computed where they are needed and never stored.

The forward is that of `_one_product.py` or `_two_products.py`. So is the backward where
`_vote_gradient.py` serves. This file has the other backward. A program holds a tile of u,
(GROUPS, BLOCK_B, BLOCK_P, BLOCK_I), and walks over the output capsules twice. The first sweep finds
the softmax's normaliser for each pair (b, i), and the second applies it. Nothing in the program
grows with J.

For any vector x of output capsule j, û_ij·x = Σ_p u_ip (W_ij x)_p. This takes one small product,
x W_jᵀ, for all pairs of the tile, then a sum over p against u. Products are batched over groups of
input capsules, one group per warp, so no warp repeats another's product. The warps meet only in the
sum over groups at the end of a step. Columns of a product run over (p, i) with i fastest, which
keeps the sum over p in a thread.

`fused_dynamic_routing` runs several such passes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritoncaps.kernels._launch import (
    Target,
    accumulation_dtype,
    device_of,
    divide,
    dot_precision,
    holds_operands,
    measured,
    pose_blocks,
    strides,
    target_of,
)
from tritoncaps.kernels._one_product import OneProduct, one_product
from tritoncaps.kernels._one_product_backward import OneProductBackward
from tritoncaps.kernels._patches import Patches
from tritoncaps.kernels._slots import write_sum
from tritoncaps.kernels._tiles import classes, dot, load_grad_coupling, softmax_start
from tritoncaps.kernels._two_products import TwoProducts
from tritoncaps.kernels._two_products_backward import TwoProductsBackward
from tritoncaps.kernels._vote_gradient import Contraction, Grads, launch_for

# Launch rules -------------------------------------------------------------------------------------


def _weight_tile(P: int, D: int, values: int) -> tuple[int, int, int]:
    """BLOCK_I, BLOCK_P and BLOCK_D of a weight tile (P·I, D) of about `values` values."""
    block_p, block_d = pose_blocks(P, D)
    return max(values // block_d, 16, block_p) // block_p, block_p, block_d


def pass_launch(
    rule: str,
    I: int,
    P: int,
    J: int,
    D: int,
    dtype: torch.dtype,
    target: Target,
) -> tuple[dict[str, int], int, int]:
    """Launch keywords of a backward pass, the splits of the input capsules, the tiles in each.

    BLOCK_B: 16, the rows of one matrix instruction. More would leave a batch of 128 too few
    programs.
    BLOCK_I: a warp's slice of the weight has 512 values (256 of float64). With more, du and two
    projections no longer keep to the registers. A `routing_pass`, which may also hold a bias, takes
    half of that on NVIDIA, and so does every pass if D is above 16. A pair P × D with more values
    spills. The larger it is, the more it spills, until it is refused.
    GROUPS: 8 warps with one group each. Few input capsules are spread over the splits first, then
    over the warps. The interpreter takes a millisecond for every program, so there they are spread
    over the warps alone.
    num_stages: nothing is fetched ahead, because the addresses would not fit into registers.
    MAX_SPLITS: every program adds up the slots of all splits, which reads splits² · B·J·D values.
    16 keeps this far below û. The MNIST shape gets 12 splits of 3 tiles, 96 programs at B = 128.
    Whether more and smaller ones would be faster has not been measured on any device.
    """
    is_wide = accumulation_dtype(dtype) == torch.float64
    is_tight = (rule == "routing_pass" or D > 16) and target.architecture.startswith("sm")
    block_i, block_p, block_d = _weight_tile(P, D, 256 if is_wide or is_tight else 512)
    is_interpreted = target.architecture == "interpreter"
    spread = triton.cdiv(I, 8 if is_interpreted else 16)
    block_i = min(block_i, max(16 // block_p, triton.next_power_of_2(spread), 1))
    tiles = max(triton.cdiv(I, block_i), 1)
    groups = tiles if is_interpreted else max(triton.cdiv(tiles, 16), min(tiles, 2))
    groups = min(triton.next_power_of_2(groups), 8)
    buffer = groups * block_i * block_p * block_d * (8 if is_wide else 4)
    while groups > 1 and 2 * buffer > target.shared_memory:
        groups, buffer = groups // 2, buffer // 2
    launch = {
        "GROUPS": groups,
        "BLOCK_B": 16,
        "BLOCK_I": block_i,
        "BLOCK_P": block_p,
        "BLOCK_D": block_d,
        "MAX_SPLITS": 16,
        "num_warps": groups,
        "num_stages": 1,
    }
    launch = measured(f"{rule}_bwd", launch, target, dtype, I=I, P=P, J=J, D=D)
    return launch, *divide(I, launch["GROUPS"] * launch["BLOCK_I"], launch.pop("MAX_SPLITS"))


def weight_gradient_launch(
    I: int, P: int, J: int, D: int, dtype: torch.dtype, target: Target
) -> dict[str, int]:
    """Launch keywords of dW: one tile and one j per program, 1024 values (512 of float64).

    I·P·J·D/1024 programs are enough work for every processor. BLOCK_B: with dW and two projections
    in 4 warps, there is room for 32 batch rows at a time. It is 16 where operands take registers
    too, and for a tile of fewer rows, whose warps hold parts of the projections twice.
    """
    is_wide = accumulation_dtype(dtype) == torch.float64
    block_i, block_p, block_d = _weight_tile(P, D, 512 if is_wide else 1024)
    block_i = min(block_i, max(16 // block_p, triton.next_power_of_2(I), 1))
    launch = {
        "BLOCK_B": 32 if block_i * block_p >= 64 and not holds_operands(target) else 16,
        "BLOCK_I": block_i,
        "BLOCK_P": block_p,
        "BLOCK_D": block_d,
        "num_warps": 4,
        "num_stages": 1,
    }
    return measured("weight_gradient", launch, target, dtype, I=I, P=P, J=J, D=D)


# Tiles --------------------------------------------------------------------------------------------


@triton.jit
def _tile_axes(tile, GROUPS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr):
    """i, (GROUPS, BLOCK_I), and along the columns i and p, each (GROUPS, BLOCK_P * BLOCK_I)."""
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
    """u, (GROUPS, BLOCK_B, BLOCK_P, BLOCK_I), pointers to the weight of j = 0, and the masks.

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
    HAS_POSE: tl.constexpr, HAS_PRIOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W_j pose and the logits û_j·pose + prior of one j, (GROUPS, BLOCK_B, BLOCK_I)."""
    if HAS_POSE:
        pose = tl.load(pose_ptrs, mask_bd, other=0.0).to(u.dtype)
        projected, logits = _project(pose, w, u, PRECISION)
    else:
        projected = tl.zeros_like(u)
        logits = tl.zeros((u.shape[0], u.shape[1], u.shape[3]), u.dtype)
    if HAS_PRIOR:
        logits += tl.load(prior_ptrs, mask_i, other=0.0).to(u.dtype)[:, None, :]
    return projected, logits


@triton.jit
def _add_bias(c, bias_ptrs, mask_i, HAS_BIAS: tl.constexpr):
    """c̃ + bias, (GROUPS, BLOCK_B, BLOCK_I)."""
    if HAS_BIAS:
        c += tl.load(bias_ptrs, mask_i, other=0.0).to(c.dtype)[:, None, :]
    return c


@triton.jit
def _weighted_sum(c, u, w, PRECISION: tl.constexpr):
    """Σ_i c_i û_ij over the tile, (BLOCK_B, BLOCK_D).

    A thread has columns 2n and 2n + 1 of the result of a product, and takes columns n and n + 4 of
    a factor. With K in that order, c u goes from one to the other within its thread.
    """
    GROUPS: tl.constexpr = w.shape[0]
    K: tl.constexpr = w.shape[1]
    cu = tl.reshape(c[:, :, None, :] * u, (GROUPS, u.shape[1], K // 8, 4, 2))
    cu = tl.reshape(tl.permute(cu, (0, 1, 2, 4, 3)), (GROUPS, u.shape[1], K))
    w = tl.permute(tl.reshape(w, (GROUPS, K // 8, 4, 2, w.shape[2])), (0, 1, 3, 2, 4))
    w = tl.reshape(w, (GROUPS, K, w.shape[4]))
    return tl.sum(dot(cu, w, PRECISION), axis=0)


# Backward -----------------------------------------------------------------------------------------
#
# Write T = W pose and T' = W ds for the two projections of a pair (i, j). Its logit is u·T + prior,
# and the gradient of its coupling is dc = u·T' (+ grad_coupling). Then
#
#     δ_i = Σ_j c̃_ij dc_ij,  db_ij = c̃_ij (dc_ij - δ_i)     the softmax's backward
#     dpose_j = Σ_i db_ij û_ij                               the pose is in the logits
#     dû_ij = c_ij ds_j + db_ij pose_j                       û is in the sum and in the logits
#     du_i = Σ_j W_ij dû_ij = Σ_j (c_ij T' + db_ij T)
#     dW_ij = Σ_b u_i ⊗ dû_ij = Σ_b ((c_ij u_i) ⊗ ds_j + (db_ij u_i) ⊗ pose_j)
#     dprior_ij = Σ_b db_ij,  dbias_ij = Σ_b dc_ij
#
# The first kernel adds to dpose and to du, which costs no product beyond the projections. It saves
# log Σ_j exp and δ for every (b, i). With these two, a pair can be evaluated for a single j. So the
# second kernel gives each (input tile, j) to its own program, which sums dW over the batch in
# registers and writes it once.


@triton.jit
def _coupling_gradient(
    w, u, ds_ptrs, mask_bd, grad_coupling_ptrs, mask_bi,
    HAS_GRAD_COUPLING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W_j ds and dc = û_j·ds + grad_coupling of one j, (GROUPS, BLOCK_B, BLOCK_I)."""
    ds = tl.load(ds_ptrs, mask_bd, other=0.0).to(u.dtype)
    projected, dc = _project(ds, w, u, PRECISION)
    if HAS_GRAD_COUPLING:
        dc += tl.load(grad_coupling_ptrs, mask_bi, other=0.0).to(u.dtype)
    return projected, dc


@triton.jit
def _pass_bwd_kernel(
    # pointers
    u_ptr, weight_ptr, pose_ptr, ds_ptr, prior_ptr, bias_ptr, grad_coupling_ptr, slots_ptr,
    normaliser_ptr, delta_ptr, du_ptr, grad_u_ptr,
    # extents
    B, I, P, J, D, tiles,
    # strides
    stride_u_b, stride_u_i, stride_u_p,
    stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
    stride_prior_i, stride_prior_j, stride_bias_i, stride_bias_j,
    # meta-parameters
    ADD_DU: tl.constexpr, FULL: tl.constexpr, HAS_POSE: tl.constexpr,
    HAS_PRIOR: tl.constexpr, HAS_BIAS: tl.constexpr, LEAKY: tl.constexpr,
    HAS_GRAD_COUPLING: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add one program's share of dpose to its slot, and save log Σ_j exp and δ for every (b, i).

    With ADD_DU, du continues that of later passes. Unless FULL, the coupling is a constant: db = 0.
    Without pose and prior it is uniform, and log Σ_j exp and δ are not saved.
    """
    DTYPE: tl.constexpr = slots_ptr.dtype.element_ty
    first_b = tl.program_id(0).to(tl.int64) * BLOCK_B
    split = tl.program_id(1).to(tl.int64)
    first_tile = split * tiles
    slot_ptr = slots_ptr + split * (tl.cast(B, tl.int64) * J * D)
    b = first_b + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_bd = (b < B)[:, None] & (d < D)[None, :]
    offs_bd = (b * J * D)[:, None] + d[None, :]
    for tile in range(first_tile, first_tile + tiles):
        i, ki, p = _tile_axes(tile, GROUPS, BLOCK_I, BLOCK_P)
        u, weight_ptrs, mask_u, mask_w = _load_tile(
            u_ptr, weight_ptr, b, ki, p, d, B, I, P, D, stride_u_b, stride_u_i, stride_u_p,
            stride_weight_i, stride_weight_p, stride_weight_d, DTYPE, BLOCK_P, BLOCK_I,
        )  # fmt: skip
        prior_ptrs = prior_ptr + i * stride_prior_i
        mask_bi = (b < B)[None, :, None] & (i < I)[:, None, :]  # (GROUPS, BLOCK_B, BLOCK_I)
        offs_bi = (b * I)[None, :, None] + i[:, None, :]

        top = tl.zeros((GROUPS, BLOCK_B, BLOCK_I), DTYPE)
        mass = tl.zeros((GROUPS, BLOCK_B, BLOCK_I), DTYPE) + classes(J, LEAKY)
        moment = tl.zeros((GROUPS, BLOCK_B, BLOCK_I), DTYPE)  # Σ_j exp(logit - top) dc
        if HAS_POSE or HAS_PRIOR:
            top, mass = softmax_start((GROUPS, BLOCK_B, BLOCK_I), DTYPE, LEAKY)
            for j in range(tl.cast(J, tl.int64)):
                w = tl.load(weight_ptrs + j * stride_weight_j, mask_w, other=0.0).to(DTYPE)
                _, logits = _logits(
                    w, u, pose_ptr + j * D + offs_bd, mask_bd,
                    prior_ptrs + j * stride_prior_j, i < I, HAS_POSE, HAS_PRIOR, PRECISION,
                )  # fmt: skip
                new_top = tl.maximum(top, logits)
                shrink = tl.exp(top - new_top)
                share = tl.exp(logits - new_top)
                mass = mass * shrink + share
                if FULL:
                    _, dc = _coupling_gradient(
                        w, u, ds_ptr + j * D + offs_bd, mask_bd,
                        grad_coupling_ptr + j + offs_bi * J, mask_bi, HAS_GRAD_COUPLING, PRECISION,
                    )  # fmt: skip
                    moment = moment * shrink + share * dc
                top = new_top
        delta = moment / mass
        if HAS_POSE or HAS_PRIOR:
            tl.store(normaliser_ptr + offs_bi, top + tl.log(mass), mask_bi)
            tl.store(delta_ptr + offs_bi, delta, mask_bi)

        du = tl.zeros((GROUPS, BLOCK_B, BLOCK_P, BLOCK_I), DTYPE)
        for j in range(tl.cast(J, tl.int64)):
            w = tl.load(weight_ptrs + j * stride_weight_j, mask_w, other=0.0).to(DTYPE)
            # The gradient comes before the logits: in this order everything fits into registers.
            ds_projected, dc = _coupling_gradient(
                w, u, ds_ptr + j * D + offs_bd, mask_bd,
                grad_coupling_ptr + j + offs_bi * J, mask_bi, HAS_GRAD_COUPLING, PRECISION,
            )  # fmt: skip
            pose_projected, logits = _logits(
                w, u, pose_ptr + j * D + offs_bd, mask_bd, prior_ptrs + j * stride_prior_j, i < I,
                HAS_POSE, HAS_PRIOR, PRECISION,
            )  # fmt: skip
            softmax = tl.exp(logits - top) / mass
            bias_ptrs = bias_ptr + i * stride_bias_i + j * stride_bias_j
            c = _add_bias(softmax, bias_ptrs, i < I, HAS_BIAS)
            du += c[:, :, None, :] * ds_projected
            if HAS_POSE and FULL:
                db = softmax * (dc - delta)
                du += db[:, :, None, :] * pose_projected
                slot_ptrs = slot_ptr + j * D + offs_bd
                dpose = tl.load(slot_ptrs, mask_bd, other=0.0)
                tl.store(slot_ptrs, dpose + _weighted_sum(db, u, w, PRECISION), mask_bd)

        du = tl.reshape(du, (GROUPS, BLOCK_B, BLOCK_P * BLOCK_I))
        offs_u = ((b * I)[None, :, None] + ki[:, None, :]) * P + p[None, None, :]
        if ADD_DU:
            du += tl.load(du_ptr + offs_u, mask_u, other=0.0)
        tl.store(grad_u_ptr + offs_u, du, mask_u)
        tl.debug_barrier()


@triton.jit
def _add_pairs(
    dw, dprior, dbias, u, w, prior, bias, pose_ptrs, ds_ptrs, mask_bd,
    normaliser_ptrs, delta_ptrs, grad_coupling, mask_ib, J,
    FULL: tl.constexpr, HAS_POSE: tl.constexpr, HAS_PRIOR: tl.constexpr, HAS_BIAS: tl.constexpr,
    LEAKY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a pass over one batch tile to dW_j, (K, BLOCK_D), dprior_j and dbias_j.

    u is (BLOCK_P, BLOCK_I, BLOCK_B), w is (K, BLOCK_D) with K = BLOCK_P * BLOCK_I, and dprior_j
    and dbias_j are (BLOCK_I, BLOCK_B). dW sums over the batch, so a row past the end of the batch
    must have coupling 0, whatever its logit.
    """
    K: tl.constexpr = w.shape[0]
    ds = tl.load(ds_ptrs, mask_bd, other=0.0).to(u.dtype)
    # The gradient comes before the logits, as in `_pass_bwd_kernel`: this takes fewer registers.
    if (HAS_POSE or HAS_PRIOR) and FULL:
        projected = dot(w, tl.trans(ds), PRECISION)
        dc = grad_coupling + tl.sum(tl.reshape(projected, u.shape) * u, axis=0)
    logits = prior
    if HAS_POSE:
        pose = tl.load(pose_ptrs, mask_bd, other=0.0).to(u.dtype)
        projected = dot(w, tl.trans(pose), PRECISION)
        logits += tl.sum(tl.reshape(projected, u.shape) * u, axis=0)
    if HAS_POSE or HAS_PRIOR:
        softmax = tl.exp(logits - tl.load(normaliser_ptrs, mask_ib, other=float("inf")))
    else:
        ones = tl.full(mask_ib.shape, 1.0, u.dtype)
        softmax = tl.where(mask_ib, ones / classes(J, LEAKY), 0.0)
    c = softmax
    if HAS_BIAS:
        c += tl.where(mask_ib, bias, 0.0)
    cu = tl.reshape(c[None, :, :] * u, (K, u.shape[2]))
    dw += dot(cu, ds, PRECISION)
    if (HAS_POSE or HAS_PRIOR) and FULL:
        db = softmax * (dc - tl.load(delta_ptrs, mask_ib, other=0.0))
        if HAS_BIAS:
            dbias += tl.where(mask_ib, dc, 0.0)
        if HAS_PRIOR:
            dprior += tl.where(mask_ib, db, 0.0)
        if HAS_POSE:
            dbu = tl.reshape(db[None, :, :] * u, (K, u.shape[2]))
            dw += dot(dbu, pose, PRECISION)
    return dw, dprior, dbias


@triton.jit
def _weight_gradient_kernel(
    # pointers
    u_ptr, weight_ptr, prior_ptr, bias_ptr, grad_coupling_ptr,
    pose_ptr, ds_ptr, normaliser_ptr, delta_ptr, grad_weight_ptr, grad_prior_ptr, grad_bias_ptr,
    # extents
    B, I, P, J, D, steps,
    # strides
    stride_u_b, stride_u_i, stride_u_p,
    stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
    stride_prior_i, stride_prior_j, stride_bias_i, stride_bias_j,
    # meta-parameters
    FULL: tl.constexpr, WITHOUT_POSE: tl.constexpr, HAS_PRIOR: tl.constexpr,
    HAS_BIAS: tl.constexpr, LEAKY: tl.constexpr, HAS_GRAD_COUPLING: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dW, (BLOCK_I, P, D), dprior and dbias, (BLOCK_I,), of one tile of input capsules and one j.

    A step is a pass. WITHOUT_POSE says that step 0 has neither a pose nor, without a prior, logits.
    """
    DTYPE: tl.constexpr = normaliser_ptr.dtype.element_ty
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
    w = tl.load(weight_ptr + j * stride_weight_j + offs_w, mask_w, other=0.0).to(DTYPE)
    prior = tl.zeros((BLOCK_I, BLOCK_B), DTYPE)
    if HAS_PRIOR:
        prior_ptrs = prior_ptr + i * stride_prior_i + j * stride_prior_j
        prior += tl.load(prior_ptrs, i < I, other=0.0).to(DTYPE)[:, None]
    bias = tl.zeros((BLOCK_I, BLOCK_B), DTYPE)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + i * stride_bias_i + j * stride_bias_j
        bias += tl.load(bias_ptrs, i < I, other=0.0).to(DTYPE)[:, None]

    dw = tl.zeros((BLOCK_P * BLOCK_I, BLOCK_D), DTYPE)
    dprior = tl.zeros((BLOCK_I, BLOCK_B), DTYPE)
    dbias = tl.zeros((BLOCK_I, BLOCK_B), DTYPE)
    pose_step = tl.cast(B, tl.int64) * J * D
    pair_step = tl.cast(B, tl.int64) * I
    for first_b in range(0, B, BLOCK_B):
        b = first_b + tl.arange(0, BLOCK_B).to(tl.int64)
        mask_bd = (b < B)[:, None] & (d < D)[None, :]
        mask_ib = (i < I)[:, None] & (b < B)[None, :]
        # Loaded along the capsules, which are adjacent in memory. Batch rows are not.
        offs_u = (b * stride_u_b)[:, None] + (ki * stride_u_i + p * stride_u_p)[None, :]
        u = tl.load(u_ptr + offs_u, (b < B)[:, None] & mask_k[None, :], other=0.0).to(DTYPE)
        u = tl.reshape(tl.trans(u), (BLOCK_P, BLOCK_I, BLOCK_B))
        offs_bd = ((b * J + j) * D)[:, None] + d[None, :]
        offs_ib = (b * I)[None, :] + i[:, None]
        grad_coupling_ptrs = grad_coupling_ptr + offs_ib * J + j
        for step in range(1 if WITHOUT_POSE else 0, steps):
            grad_coupling = load_grad_coupling(
                grad_coupling_ptrs, mask_ib, steps - 1 - step, DTYPE, HAS_GRAD_COUPLING
            )
            offs_pose = step * pose_step + offs_bd
            pairs = step * pair_step + offs_ib
            dw, dprior, dbias = _add_pairs(
                dw, dprior, dbias, u, w, prior, bias, pose_ptr + offs_pose, ds_ptr + offs_pose,
                mask_bd, normaliser_ptr + pairs, delta_ptr + pairs, grad_coupling, mask_ib, J,
                FULL, True, HAS_PRIOR, HAS_BIAS, LEAKY, PRECISION,
            )  # fmt: skip
        if WITHOUT_POSE:
            grad_coupling = load_grad_coupling(
                grad_coupling_ptrs, mask_ib, steps - 1, DTYPE, HAS_GRAD_COUPLING
            )
            dw, dprior, dbias = _add_pairs(
                dw, dprior, dbias, u, w, prior, bias, pose_ptr + offs_bd, ds_ptr + offs_bd,
                mask_bd, normaliser_ptr + offs_ib, delta_ptr + offs_ib, grad_coupling, mask_ib, J,
                FULL, False, HAS_PRIOR, HAS_BIAS, LEAKY, PRECISION,
            )  # fmt: skip
    offs_dw = ((ki * P + p) * J + j)[:, None] * D + d[None, :]
    tl.store(grad_weight_ptr + offs_dw, dw, mask_w)
    if HAS_PRIOR and FULL:
        tl.store(grad_prior_ptr + i * J + j, tl.sum(dprior, axis=1), i < I)
    if HAS_BIAS and FULL:
        tl.store(grad_bias_ptr + i * J + j, tl.sum(dbias, axis=1), i < I)


# Launchers ----------------------------------------------------------------------------------------


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def forward_passes(u: Tensor | Patches, weight: Tensor) -> OneProduct | TwoProducts:
    """Forward passes over u, (B, I, P), and the weight, (I, P, J, D): one product where it serves.

    u may be the patches of a grid.
    No extent but I and P may be 0.
    """
    return one_product(u, weight) or TwoProducts(u, weight)


class TwoSweeps:
    """The backward passes of one call by two sweeps over j, and the contraction after them.

    The passes sum du too. The contraction is dW, dprior and dbias.
    """

    def __init__(
        self,
        rule: str,
        u: Tensor,
        weight: Tensor,
        prior: Tensor | None,
        bias: Tensor | None,
        grads: Grads,
        *,
        steps: int,
        full: bool,
        leaky: bool,
    ) -> None:
        B, I, P = u.shape
        _, _, J, D = weight.shape
        self._given, self._grads = (u, weight, prior, bias), grads
        self._full, self._leaky = full, leaky
        self._launch, splits, self._tiles = pass_launch(rule, I, P, J, D, u.dtype, target_of(u))
        dtype = accumulation_dtype(u.dtype)
        self.slots = u.new_empty((splits, B, J, D), dtype=dtype)
        self._saved = u.new_empty((2, steps, B, I), dtype=dtype)
        # The sum over the passes. The last one writes it in u's dtype.
        self._du = grads[0] if u.dtype == dtype else u.new_empty((B, I, P), dtype=dtype)

    def run(self, step: int, pose: Tensor | None, ds: Tensor, grad_coupling: Tensor | None) -> None:
        """Write the shares of dpose of a step to the slots, from the last step to the first.

        Args:
            step: from 0.
            pose: contiguous, (B, J, D), or None for zeros, in the first step.
            ds: contiguous, (B, J, D).
            grad_coupling: contiguous, (B, I, J), or None, in the last step.
        """
        u, weight, prior, bias = self._given
        B, I, P = u.shape
        _, _, J, D = weight.shape
        self.slots.zero_()
        _pass_bwd_kernel[(triton.cdiv(B, self._launch["BLOCK_B"]), len(self.slots))](
            u, weight,
            # In place of a missing tensor, a kernel gets u, which it does not touch.
            *(u if x is None else x for x in (pose, ds, prior, bias, grad_coupling)),
            self.slots, *self._saved[:, step], self._du, self._du if step else self._grads[0],
            B, I, P, J, D, self._tiles,
            *u.stride(), *weight.stride(), *strides(prior, 2), *strides(bias, 2),
            ADD_DU=step < self._saved.shape[1] - 1,
            FULL=self._full,
            HAS_POSE=pose is not None,
            HAS_PRIOR=prior is not None,
            HAS_BIAS=bias is not None,
            LEAKY=self._leaky,
            HAS_GRAD_COUPLING=grad_coupling is not None,
            PRECISION=dot_precision(u.dtype, target_of(u)),
            **self._launch,
        )  # fmt: skip

    def contract(
        self,
        poses: Tensor,
        ds: Tensor,
        grad_coupling: Tensor | None,
        *,
        uniform: bool,
    ) -> None:
        """Write the gradients of all steps, of which du is there already.

        Args:
            poses, ds: contiguous, (steps, B, J, D).
            grad_coupling: of the last step, contiguous, (B, I, J), or None.
            uniform: whether the first step has no logits.
        """
        u, weight, prior, bias = self._given
        B, I, P = u.shape
        _, _, J, D = weight.shape
        launch = weight_gradient_launch(I, P, J, D, u.dtype, target_of(u))
        _weight_gradient_kernel[(triton.cdiv(I, launch["BLOCK_I"]) * J,)](
            u, weight, *(u if x is None else x for x in (prior, bias, grad_coupling)),
            poses, ds, self._saved[0], self._saved[1],
            *(self._grads[1] if x is None else x for x in self._grads[1:]),
            B, I, P, J, D, len(ds),
            *u.stride(), *weight.stride(), *strides(prior, 2), *strides(bias, 2),
            FULL=self._full,
            WITHOUT_POSE=uniform,
            HAS_PRIOR=prior is not None,
            HAS_BIAS=bias is not None,
            LEAKY=self._leaky,
            HAS_GRAD_COUPLING=grad_coupling is not None,
            PRECISION=dot_precision(u.dtype, target_of(u)),
            **launch,
        )  # fmt: skip


def backward_passes(
    rule: str,
    u: Tensor | Patches,
    weight: Tensor,
    prior: Tensor | None,
    bias: Tensor | None,
    grads: Grads,
    *,
    steps: int = 1,
    full: bool = True,
    leaky: bool,
) -> OneProductBackward | TwoProductsBackward | TwoSweeps:
    """Backward passes over u, (B, I, P), and the weight, (I, P, J, D).

    Where `_vote_gradient.py` serves they have one product, or two. Elsewhere they take two sweeps,
    which need a copy of the patches of a grid.

    Args:
        rule: the operator, whose entry a table of launches may replace.
        u, weight, prior, bias, leaky: as given to the forward.
        grads: of u, the weight, the prior and the bias: contiguous outputs.
        steps: how many passes there are.
        full: whether the couplings depend on û. If not, the gradients of prior and bias are zero,
            and are not written.
    """
    launch = launch_for(u, weight)
    if launch is None:
        u = u.copy() if isinstance(u, Patches) else u
        return TwoSweeps(rule, u, weight, prior, bias, grads, steps=steps, full=full, leaky=leaky)
    contraction = Contraction(launch, prior, bias, grads, full, leaky)
    passes = one_product(u, weight)
    if passes is None:
        return TwoProductsBackward(u, weight, contraction, steps=steps)
    return OneProductBackward(passes, contraction, steps=steps)


def routing_pass_fwd(
    u: Tensor,
    weight: Tensor,
    pose: Tensor,
    prior: Tensor | None,
    bias: Tensor | None,
    leaky: bool,
    return_coupling: bool,
) -> tuple[Tensor, Tensor]:
    """Run one pass: s_j = Σ_i c_ij û_ij with c = softmax_j(û·pose + prior) + bias.

    Args:
        u: input poses, shape (B, I, P), any strides.
        weight: shape (I, P, J, D), any strides, dtype of `u`.
        pose: vectors that û is compared with, shape (B, J, D), any strides, dtype of `u`.
        prior: added to the logits, shape (I, J), or None for zeros.
        bias: added to the softmax, shape (I, J), or None for zeros.
        leaky: whether an orphan class with logit 0 takes part in the softmax.
        return_coupling: whether to write the coupling c.

    Returns:
        s (B, J, D), and c (B, I, J) or an empty tensor.
    """
    B, I, _ = u.shape
    _, _, J, D = weight.shape
    s = u.new_empty(B, J, D)
    coupling = u.new_empty((B, I, J) if return_coupling else (0,))
    if B == 0 or I == 0 or J == 0:
        return s.zero_(), coupling

    with device_of(u):
        passes = forward_passes(u, weight)
        saved = coupling if return_coupling else None
        passes.run(pose.contiguous(), prior, bias, saved, leaky=leaky)
        write_sum(passes.slots, s)
    return s, coupling


def routing_pass_bwd(
    grad_s: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
    weight: Tensor,
    pose: Tensor,
    prior: Tensor | None,
    bias: Tensor | None,
    leaky: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of u, weight, pose, prior and bias (None where there is no prior or no bias).

    Args:
        grad_s: shape (B, J, D), any strides.
        grad_coupling: shape (B, I, J), any strides, or None.
        u, weight, pose, prior, bias, leaky: as given to `routing_pass_fwd`.
    """
    B, I, _ = u.shape
    _, _, J, _ = weight.shape
    grad_u, grad_weight, grad_pose = (_contiguous_like(x) for x in (u, weight, pose))
    grad_prior, grad_bias = (None if x is None else _contiguous_like(x) for x in (prior, bias))
    if B == 0 or I == 0 or J == 0:
        for grad in (grad_u, grad_weight, grad_pose, grad_prior, grad_bias):
            if grad is not None:
                grad.zero_()
        return grad_u, grad_weight, grad_pose, grad_prior, grad_bias

    pose, grad_s = pose.contiguous(), grad_s.contiguous()
    # Copied if it is not contiguous, because its strides would cost the last free registers.
    grad_coupling = None if grad_coupling is None else grad_coupling.contiguous()
    with device_of(u):
        grads = grad_u, grad_weight, grad_prior, grad_bias
        passes = backward_passes("routing_pass", u, weight, prior, bias, grads, leaky=leaky)
        passes.run(0, pose, grad_s, grad_coupling)
        write_sum(passes.slots, grad_pose)
        passes.contract(pose[None], grad_s[None], grad_coupling, uniform=False)
    return grad_u, grad_weight, grad_pose, grad_prior, grad_bias
