"""The backward of EM routing, beside the passes that it shares with the forward.

    pull_back_em_kernel      an iteration's gradients, as the packs that its passes read
    pose_gradient_kernel     an input, all its outputs and iterations: du and da
    matrix_gradient_kernel   some inputs and an output, all rows and iterations: dW

`em_routing.py` has the formulas. Iteration t reads two packs: (μ, w, c) of iteration t − 1, which
gives y = V − μ and ℓ as in a forward pass, and (μ, k₁, k₂, k₀) of iteration t, which with x = V − μ
gives

    gR′_ij = k₀ + Σ_rq (k₁ x + k₂ x²),  dV_ij = R_ij a_i (k₁ + 2 k₂ x) − 2 gℓ_ij w y

Iteration 1 has no logits, and its first pack is not used.
"""

import triton
import triton.language as tl

from tritoncaps.kernels._em_passes import gaussian, inverse_mass, number, sum_packs
from tritoncaps.kernels._em_tiles import (
    add_products,
    load_normaliser,
    load_pack,
    load_poses,
    load_weight,
    log_sigmoid,
    no_sums,
    over_matrix,
    store_pack,
    tile_axes,
    votes,
)


@triton.jit
def pull_back_em_kernel(
    # pointers
    slots_ptr, grad_v_ptr, grad_logits_ptr, beta_u_ptr, beta_a_ptr, mass_ptr, mean_ptr,
    variance_ptr, state_ptr, grads_ptr, grad_z_ptr,
    # extents
    B, J, tiles, slots, step, temperature, temperature_low, before, before_low,
    min_variance, min_variance_low,
    # meta-parameters
    IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr, HAS_GRAD_LOGITS: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write both packs of iteration t = step + 1 and λ gz, for BLOCK_N outputs.

    The gradients of mean, variance and z come from the slots of iteration t + 1, Σ_i gℓ y,
    Σ_i gℓ y² and Σ_i gℓ, or from the user if IS_LAST.
    """
    DTYPE: tl.constexpr = state_ptr.dtype.element_ty
    _, r, q, n, lane = tile_axes(1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES)
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(J, BLOCK_N)
    tile = pid // groups
    j = pid % groups * BLOCK_N + n
    b = tile * LANES + lane
    exists = (b < B) & (j < J)
    matrix = (j < J) & (r < R) & (q < Q)
    inside = exists & matrix
    pair = b * J + j
    of_pair = pair * (R * Q) + r * Q + q
    beta_u = tl.load(beta_u_ptr + j, j < J, other=0.0).to(DTYPE)
    beta_a = tl.load(beta_a_ptr + j, j < J, other=0.0).to(DTYPE)
    floor = number(min_variance, min_variance_low, DTYPE)
    rate = number(temperature, temperature_low, DTYPE)
    rows = tl.cast(B, tl.int64) * J
    now = tl.cast(step, tl.int64) * rows

    mass = tl.load(mass_ptr + now + pair, exists, other=0.0)
    mean = tl.load(mean_ptr + now * (R * Q) + of_pair, inside, other=0.0)
    variance = tl.load(variance_ptr + now * (R * Q) + of_pair, inside, other=1.0)
    z, w, cost, _ = gaussian(mass, variance, beta_u, beta_a, rate, floor, matrix, R, Q)
    if IS_LAST:
        grad_mean = tl.load(grad_v_ptr + of_pair, inside, other=0.0).to(DTYPE)
        grad_variance = tl.zeros((1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), DTYPE)
        grad_z = tl.zeros((1, 1, 1, BLOCK_N, LANES), DTYPE)
        if HAS_GRAD_LOGITS:
            grad_z += tl.load(grad_logits_ptr + pair, exists, other=0.0).to(DTYPE)
    else:
        first, second, total = sum_packs(
            slots_ptr, tile * J + j, tl.cast(tiles, tl.int64) * J, slots, j < J, r, q, lane,
            (1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), (1, 1, 1, BLOCK_N, LANES), R, Q, LANES,
        )  # fmt: skip
        grad_mean = 2.0 * w * first
        grad_variance = w * (2.0 * w * second - total)
        grad_z = total * tl.exp(log_sigmoid(-z))
    grad_z *= rate
    tl.store(grad_z_ptr + now + pair, grad_z, exists)
    grad_variance -= grad_z * mass * w
    constant = -grad_z * cost

    inverse = inverse_mass(mass)
    linear = grad_mean * inverse
    square = grad_variance * inverse
    constant -= over_matrix(square * tl.where(inside, variance, 0.0))
    row = tile * J + j
    store_pack(
        grads_ptr, row, j < J, r, q, lane, (mean, linear, square), constant, 3, R, Q, LANES
    )  # fmt: skip
    if not IS_FIRST:
        then = now - rows
        mass = tl.load(mass_ptr + then + pair, exists, other=0.0)
        mean = tl.load(mean_ptr + then * (R * Q) + of_pair, inside, other=0.0)
        variance = tl.load(variance_ptr + then * (R * Q) + of_pair, inside, other=1.0)
        _, w, _, c = gaussian(
            mass, variance, beta_u, beta_a, number(before, before_low, DTYPE), floor, matrix, R, Q
        )
        store_pack(state_ptr, row, j < J, r, q, lane, (mean, w), c, 2, R, Q, LANES)


@triton.jit
def _vote_gradient(
    V, a, state_ptr, grads_ptr, of_j, top, scale, delta, grad_assignment, iteration, r, q, lane,
    FULL: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dV of an iteration, and the pair's part of da_i: R_ij gR′_ij."""
    mean, linear, square, constant = load_pack(
        grads_ptr, of_j, lane >= 0, r, q, lane, 0.0, 3, R, Q, LANES
    )
    x = V - mean
    slope = linear + square * x
    grad = constant + over_matrix(slope * x)  # of R a
    mean, w, c = load_pack(state_ptr, of_j, iteration > 0, r, q, lane, 0.0, 2, R, Q, LANES)
    y = V - mean
    assignment = tl.exp(c - over_matrix(w * y * y) - top) * scale
    dV = (assignment * a) * (slope + square * x)
    if FULL:
        grad_logits = assignment * (a * grad + grad_assignment - delta)
        dV -= 2.0 * grad_logits * (w * y)
    return dV, assignment * grad


@triton.jit
def _all_steps(
    V, a, state_ptr, grads_ptr, normaliser_ptr, delta_ptr, grad_assignment_ptr, of_j, row, of_pair,
    exists, rows_j, rows_i, steps, first_step, r, q, lane,
    FULL: tl.constexpr, HAS_GRAD_ASSIGNMENT: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dV summed over the iterations, and the pair's part of da.

    `rows_j` and `rows_i` are the strides between iterations.
    """
    dV = tl.zeros(V.shape, V.dtype)
    da = tl.zeros(a.shape, V.dtype)
    for step in range(steps):
        iteration = step + first_step + 0 * lane  # a tensor, also in the interpreter
        of_i = step * rows_i + row
        top, scale = load_normaliser(normaliser_ptr, of_i, exists, lane, LANES)
        delta = tl.zeros(a.shape, V.dtype)
        grad_assignment = tl.zeros(a.shape, V.dtype)
        if FULL:
            delta = tl.load(delta_ptr + of_i * LANES + lane, exists & (iteration > 0), other=0.0)
            if HAS_GRAD_ASSIGNMENT:
                is_last = exists & (iteration == first_step + steps - 1)
                ptrs = grad_assignment_ptr + of_pair * LANES + lane
                grad_assignment += tl.load(ptrs, is_last, other=0.0).to(V.dtype)
        more, share = _vote_gradient(
            V, a, state_ptr, grads_ptr, step * rows_j + of_j, top, scale, delta, grad_assignment,
            iteration, r, q, lane, FULL, R, Q, LANES,
        )  # fmt: skip
        dV += more
        da += share
    return dV, da


@triton.jit
def pose_gradient_kernel(
    # pointers
    poses_ptr, weight_ptr, activations_ptr, state_ptr, grads_ptr, grad_assignment_ptr,
    normaliser_ptr, delta_ptr, du_ptr, da_ptr,
    # extents
    tiles, I, J, steps, first_step,
    # meta-parameters
    FULL: tl.constexpr, HAS_GRAD_ASSIGNMENT: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """du_i = Σ_j dV_ij W_ijᵀ and da_i of BLOCK_G · BLOCK_N inputs."""
    DTYPE: tl.constexpr = state_ptr.dtype.element_ty
    g, r, q, n, lane = tile_axes(BLOCK_G, BLOCK_R, BLOCK_Q, BLOCK_N, LANES)
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(I, BLOCK_G * BLOCK_N)
    tile = pid // groups
    i = pid % groups * (BLOCK_G * BLOCK_N) + g * BLOCK_N + n
    exists = i < I
    row = tile * I + i
    u = load_poses(poses_ptr, row, exists, r, lane, DTYPE, P, R, LANES)
    a = tl.load(activations_ptr + row * LANES + lane, exists, other=0.0).to(DTYPE)
    da = tl.zeros((BLOCK_G, 1, 1, BLOCK_N, LANES), DTYPE)
    du = no_sums((BLOCK_G, BLOCK_R, 1, BLOCK_N, LANES), DTYPE, P)
    rows = tl.cast(tiles, tl.int64)
    for j in range(tl.cast(J, tl.int64)):
        w = load_weight(weight_ptr, i * J + j, exists, q, lane, DTYPE, P, Q)
        V = votes(u, w, (BLOCK_G, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), DTYPE, P)
        dV, share = _all_steps(
            V, a, state_ptr, grads_ptr, normaliser_ptr, delta_ptr, grad_assignment_ptr,
            tile * J + j + 0 * n, row, row * J + j, exists, rows * J, rows * I, steps, first_step,
            r, q, lane, FULL, HAS_GRAD_ASSIGNMENT, R, Q, LANES,
        )  # fmt: skip
        da += share
        du = add_products(du, dV, w, 2, P)
    tl.store(da_ptr + row * LANES + lane, da, exists)
    ptrs = du_ptr + row * (P * R * LANES) + lane * R + r
    for p in tl.static_range(P):
        tl.store(ptrs + p * R * LANES, du[p], exists & (r < R))


@triton.jit
def matrix_gradient_kernel(
    # pointers
    poses_ptr, weight_ptr, activations_ptr, state_ptr, grads_ptr, grad_assignment_ptr,
    normaliser_ptr, delta_ptr, slots_ptr,
    # extents
    tiles, I, J, steps, first_step, splits, each,
    # meta-parameters
    FULL: tl.constexpr, HAS_GRAD_ASSIGNMENT: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dW_ij = Σ_b u_iᵀ dV_ij of BLOCK_G · BLOCK_N inputs and an output, over `each` tiles."""
    DTYPE: tl.constexpr = state_ptr.dtype.element_ty
    g, r, q, n, lane = tile_axes(BLOCK_G, BLOCK_R, BLOCK_Q, BLOCK_N, LANES)
    pid = tl.program_id(0).to(tl.int64)
    split = pid % splits
    j = pid // splits % J
    i = pid // splits // J * (BLOCK_G * BLOCK_N) + g * BLOCK_N + n
    exists = i < I
    pair = i * J + j
    w = load_weight(weight_ptr, pair, exists, q, lane, DTYPE, P, Q)
    dw = no_sums((BLOCK_G, 1, BLOCK_Q, BLOCK_N, LANES), DTYPE, P)
    rows = tl.cast(tiles, tl.int64)
    for tile in range(split * each, tl.minimum((split + 1) * each, rows)):
        row = tile * I + i
        u = load_poses(poses_ptr, row, exists, r, lane, DTYPE, P, R, LANES)
        a = tl.load(activations_ptr + row * LANES + lane, exists, other=0.0).to(DTYPE)
        V = votes(u, w, (BLOCK_G, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), DTYPE, P)
        dV, _ = _all_steps(
            V, a, state_ptr, grads_ptr, normaliser_ptr, delta_ptr, grad_assignment_ptr,
            tile * J + j + 0 * n, row, row * J + j, exists, rows * J, rows * I, steps, first_step,
            r, q, lane, FULL, HAS_GRAD_ASSIGNMENT, R, Q, LANES,
        )  # fmt: skip
        dw = add_products(dw, dV, u, 1, P)
    ptrs = slots_ptr + (split * I * J + pair) * (P * Q) + q
    for p in tl.static_range(P):
        total = tl.sum(dw[p], axis=4, keep_dims=True)
        tl.store(ptrs + p * Q, total, exists & (q < Q))
