"""The passes of EM routing over the inputs or the outputs of some rows.

    expectation_kernel   an input, all its outputs: log Σ_j exp ℓ_ij, and δ in a backward
    competition_kernel   joins these where an input of a convolution feeds several positions
    sums_kernel          an output, a share of its inputs: the sums over i, in slots
    statistics_kernel    finishes the sums of a forward pass: mass, mean, variance, logit

`em_routing.py` has the formulas. A pass reads the Gaussians of the iteration before as a pack
(m, s, c). With s = 1 / √(2 S̃) and m = μ s, the distance of a vote in its unit is t = s V − m, and

    ℓ_ij = c_j − Σ_rq t²,  c = log σ(z) − ½ Σ_rq log 2π S̃

but for a constant that a softmax does not see. The sums are over weights ω_ij, which are R_ij a_i
in a forward pass and the gradient of ℓ_ij in a backward pass: Σ_i ω t, Σ_i ω t² and Σ_i ω.
"""

import triton
import triton.language as tl

from tritoncaps.kernels._em_tiles import (
    load_pack,
    load_poses,
    load_weight,
    log_sigmoid,
    over_matrix,
    store_pack,
    tile_axes,
    votes,
)
from tritoncaps.kernels._tiles import softmax_start

# Below this an output has no mean and no variance: both are 0.
NO_MASS = tl.constexpr(1e-20)


@triton.jit
def share_gradient(t, linear, square, constant):
    """gR′_ij, the gradient of R_ij a_i, from the pack of gradients: k₀ + Σ_rq (k₁ t + k₂ t²)."""
    return constant + over_matrix(t * (linear + square * t))


@triton.jit
def expectation_kernel(
    # pointers
    poses_ptr, weight_ptr, activations_ptr, state_ptr, grads_ptr, grad_assignment_ptr,
    normaliser_ptr, delta_ptr,
    # extents
    I, J,
    # meta-parameters
    GRADIENT: tl.constexpr, HAS_GRAD_ASSIGNMENT: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Log Σ_j exp ℓ_ij of BLOCK_G · BLOCK_N inputs. With GRADIENT, also δ_i = Σ_j R_ij gR_ij."""
    DTYPE: tl.constexpr = state_ptr.dtype.element_ty
    g, r, q, n, lane = tile_axes(BLOCK_G, BLOCK_R, BLOCK_Q, BLOCK_N, LANES)
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(I, BLOCK_G * BLOCK_N)
    tile = pid // groups
    i = pid % groups * (BLOCK_G * BLOCK_N) + g * BLOCK_N + n
    exists = i < I
    row = tile * I + i
    u = load_poses(poses_ptr, row, exists, r, lane, DTYPE, P, R, LANES)
    top, mass = softmax_start((BLOCK_G, 1, 1, BLOCK_N, LANES), DTYPE, False)
    moment = tl.zeros((BLOCK_G, 1, 1, BLOCK_N, LANES), DTYPE)  # Σ_j exp(ℓ - top) gR
    if GRADIENT:
        a = tl.load(activations_ptr + row * LANES + lane, exists, other=0.0).to(DTYPE)
    for j in range(tl.cast(J, tl.int64)):
        w = load_weight(weight_ptr, i * J + j, exists, q, lane, DTYPE, P, Q)
        V = votes(u, w, (BLOCK_G, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), DTYPE, P)
        of_j = tile * J + j + 0 * n
        m, s, c = load_pack(state_ptr, of_j, lane >= 0, r, q, lane, 0.0, R, Q, LANES)
        t = s * V - m
        logits = c - over_matrix(t * t)
        new_top = tl.maximum(top, logits)
        shrink = tl.exp(top - new_top)
        share = tl.exp(logits - new_top)
        mass = mass * shrink + share
        top = new_top
        if GRADIENT:
            linear, square, constant = load_pack(
                grads_ptr, of_j, lane >= 0, r, q, lane, 0.0, R, Q, LANES
            )
            grad = a * share_gradient(t, linear, square, constant)
            if HAS_GRAD_ASSIGNMENT:
                ptrs = grad_assignment_ptr + (row * J + j) * LANES + lane
                grad += tl.load(ptrs, exists, other=0.0).to(DTYPE)
            moment = moment * shrink + share * grad
    tl.store(normaliser_ptr + row * LANES + lane, top + tl.log(mass), exists)
    if GRADIENT:
        tl.store(delta_ptr + row * LANES + lane, moment / mass, exists)


@triton.jit
def competition_kernel(
    # pointers
    normaliser_ptr, delta_ptr, joined_ptr, joined_delta_ptr,
    # extents
    B, I, types,
    # meta-parameters
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK_I: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Join the positions that an input capsule feeds, in the order of the grid.

    The normaliser becomes that of all their output capsules, and δ the sum over these. `types` is
    the number C of input capsules at a position: input (ky, kx, c) of position (y, x) is capsule c
    at (y·STRIDE + ky, x·STRIDE + kx).
    """
    DTYPE: tl.constexpr = normaliser_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(I, BLOCK_I)
    tile = pid // blocks
    i = (pid % blocks * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    b = tile * LANES + tl.arange(0, LANES)[None, :]
    exists = (i < I) & (b < B)
    first_b = b // (ROWS * COLUMNS) * (ROWS * COLUMNS)
    y = b // COLUMNS % ROWS * STRIDE + i // (KERNEL * types)
    x = b % COLUMNS * STRIDE + i // types % KERNEL
    top, mass = softmax_start((BLOCK_I, LANES), DTYPE, False)
    mass = tl.where(exists, mass, 1.0)  # so that a row that does not exist has a logarithm
    moment = tl.zeros((BLOCK_I, LANES), DTYPE)
    MOST: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    for n in range(MOST * MOST):
        row = y // STRIDE - (MOST - 1 - n // MOST)
        column = x // STRIDE - (MOST - 1 - n % MOST)
        ky = y - row * STRIDE
        kx = x - column * STRIDE
        feeds = exists & (row >= 0) & (row < ROWS) & (ky < KERNEL)
        feeds = feeds & (column >= 0) & (column < COLUMNS) & (kx < KERNEL)
        other = first_b + row * COLUMNS + column
        place = (ky * KERNEL + kx) * types + i % types
        offsets = (other // LANES * I + place) * LANES + other % LANES
        term = tl.load(normaliser_ptr + offsets, feeds, other=float("-inf"))
        new_top = tl.maximum(top, term)
        shrink = tl.exp(top - new_top)
        share = tl.exp(term - new_top)
        mass = mass * shrink + share
        top = new_top
        if GRADIENT:
            delta = tl.load(delta_ptr + offsets, feeds, other=0.0)
            moment = moment * shrink + share * delta
    offsets = (tile * I + i) * LANES + tl.arange(0, LANES)[None, :]
    joined = tl.where(exists, top + tl.log(mass), 0.0)
    tl.store(joined_ptr + offsets, joined, i < I)
    if GRADIENT:
        tl.store(joined_delta_ptr + offsets, moment / mass, i < I)


@triton.jit
def sums_kernel(
    # pointers
    poses_ptr, weight_ptr, activations_ptr, state_ptr, grads_ptr, grad_assignment_ptr,
    normaliser_ptr, delta_ptr, assignment_ptr, slots_ptr,
    # extents
    tiles, I, J, splits, each,
    # meta-parameters
    HAS_STATE: tl.constexpr, HAS_LOGITS: tl.constexpr, GRADIENT: tl.constexpr,
    HAS_GRAD_ASSIGNMENT: tl.constexpr, SAVE_ASSIGNMENT: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Put Σ_i ω t, Σ_i ω t² and Σ_i ω of BLOCK_N outputs, over `each` inputs, in a slot.

    Without a state, t is the vote itself, and Σ ω t² is left out. Without logits, ℓ is 0.
    """
    DTYPE: tl.constexpr = slots_ptr.dtype.element_ty
    g, r, q, n, lane = tile_axes(BLOCK_G, BLOCK_R, BLOCK_Q, BLOCK_N, LANES)
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(J, BLOCK_N)
    split = pid // groups % splits
    tile = pid // groups // splits
    j = pid % groups * BLOCK_N + n
    of_j = tile * J + j
    if HAS_STATE:
        m, s, c = load_pack(state_ptr, of_j, j < J, r, q, lane, float("-inf"), R, Q, LANES)
    if GRADIENT:
        linear, square, constant = load_pack(grads_ptr, of_j, j < J, r, q, lane, 0.0, R, Q, LANES)
    first = tl.zeros((1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), DTYPE)
    second = tl.zeros((1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), DTYPE)
    total = tl.zeros((1, 1, 1, BLOCK_N, LANES), DTYPE)
    last_i = tl.minimum((split + 1) * each, I)
    for first_i in range(split * each, last_i, BLOCK_G):
        i = first_i + g + 0 * n
        exists = (i < last_i) & (j < J)
        row = tile * I + i
        u = load_poses(poses_ptr, row, exists, r, lane, DTYPE, P, R, LANES)
        w = load_weight(weight_ptr, i * J + j, exists, q, lane, DTYPE, P, Q)
        t = votes(u, w, (BLOCK_G, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), DTYPE, P)
        if HAS_STATE:
            t = s * t - m
        logits = tl.zeros((BLOCK_G, 1, 1, BLOCK_N, LANES), DTYPE)
        if HAS_LOGITS:
            logits = c - over_matrix(t * t)
        offsets = row * LANES + lane
        normaliser = tl.load(normaliser_ptr + offsets, exists, other=float("inf"))
        assignment = tl.exp(logits - normaliser)
        a = tl.load(activations_ptr + offsets, exists, other=0.0).to(DTYPE)
        if SAVE_ASSIGNMENT:
            tl.store(assignment_ptr + (row * J + j) * LANES + lane, assignment, exists)
        if GRADIENT:
            grad = a * share_gradient(t, linear, square, constant)
            if HAS_GRAD_ASSIGNMENT:
                ptrs = grad_assignment_ptr + (row * J + j) * LANES + lane
                grad += tl.load(ptrs, exists, other=0.0).to(DTYPE)
            omega = assignment * (grad - tl.load(delta_ptr + offsets, exists, other=0.0))
        else:
            omega = assignment * a
        weighted = omega * t
        first += tl.sum(weighted, axis=0, keep_dims=True)
        if HAS_STATE:
            second += tl.sum(weighted * t, axis=0, keep_dims=True)
        total += tl.sum(omega, axis=0, keep_dims=True)
    slot_row = (split * tiles + tile) * J + j
    store_pack(slots_ptr, slot_row, j < J, r, q, lane, first, second, total, R, Q, LANES)


@triton.jit
def number(high, low, DTYPE: tl.constexpr):
    """A number of the host, which passes float32 alone: in two parts, for float64."""
    return tl.cast(high, DTYPE) + tl.cast(low, DTYPE)


@triton.jit
def gaussian(
    mass, variance, beta_u, beta_a, temperature, min_variance, inside,
    R: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """z, s = 1 / √(2 S̃), which is 0 outside the matrix, cost and log-weight c of some outputs.

    The cost of a unit of mass is D β_u + ½ Σ log S̃. With 2π a usual log S̃ is small, so that c keeps
    its digits.
    """
    floored = tl.where(inside, variance + min_variance, 1.0)
    log_width = 0.5 * over_matrix(tl.where(inside, tl.log(6.283185307179586 * floored), 0.0))
    cost = R * Q * (beta_u - 0.9189385332046727) + log_width  # ½ log 2π
    z = temperature * (beta_a - mass * cost)
    s = tl.where(inside, 1.0 / tl.sqrt(2.0 * floored), 0.0)
    return z, s, cost, log_sigmoid(z) - log_width


@triton.jit
def inverse_mass(mass):
    """1 / mass, or 0 without mass: such an output has neither a mean nor a gradient of it.

    A mass of NaN is not too small. It stays NaN.
    """
    is_nothing = mass <= NO_MASS
    return tl.where(is_nothing, 0.0, 1.0 / tl.where(is_nothing, 1.0, mass))


@triton.jit
def sum_packs(
    slots_ptr, row, slot_rows, slots, exists, r, q, lane,
    SHAPE: tl.constexpr, SCALARS: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add up the packs of a row in all slots, first to last."""
    DTYPE: tl.constexpr = slots_ptr.dtype.element_ty
    first = tl.zeros(SHAPE, DTYPE)
    second = tl.zeros(SHAPE, DTYPE)
    total = tl.zeros(SCALARS, DTYPE)
    for slot in range(slots):
        of_first, of_second, of_total = load_pack(
            slots_ptr, row + slot * slot_rows, exists, r, q, lane, 0.0, R, Q, LANES
        )
        first += of_first
        second += of_second
        total += of_total
    return first, second, total


@triton.jit
def statistics_kernel(
    # pointers
    slots_ptr, beta_u_ptr, beta_a_ptr, state_ptr, mass_ptr, mean_ptr, variance_ptr, logits_ptr,
    # extents
    B, J, tiles, slots, temperature, temperature_low, min_variance, min_variance_low,
    # meta-parameters
    HAS_STATE: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Mass, mean and variance of BLOCK_N outputs from their slots, and the pack of the next pass.

    The sums are those of distances in the pack's unit s from its mean m / s. So the variance is
    the mean square less the square of a mean that is small. Without a state, the slots hold the
    sums of the votes, and the pack gets their mean with s = 1.
    """
    DTYPE: tl.constexpr = slots_ptr.dtype.element_ty
    _, r, q, n, lane = tile_axes(1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES)
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(J, BLOCK_N)
    tile = pid // groups
    j = pid % groups * BLOCK_N + n
    row = tile * J + j
    first, second, mass = sum_packs(
        slots_ptr, row, tl.cast(tiles, tl.int64) * J, slots, j < J, r, q, lane,
        (1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), (1, 1, 1, BLOCK_N, LANES), R, Q, LANES,
    )  # fmt: skip
    inverse = inverse_mass(mass)
    if HAS_STATE:
        m, s, _ = load_pack(state_ptr, row, j < J, r, q, lane, 0.0, R, Q, LANES)
        unit = 1.0 / tl.where(s > 0.0, s, 1.0)
        step = first * inverse
        mean = tl.where(inverse == 0.0, 0.0, (m + step) * unit)
        variance = (second * inverse - step * step) * (unit * unit)
        variance = tl.where(variance < 0.0, 0.0, variance)  # a maximum would drop NaN
        b = tile * LANES + lane
        exists = (b < B) & (j < J)
        # A row that does not exist has no spread, and there may be no floor.
        variance = tl.where(b < B, variance, 1.0)
        inside = (j < J) & (r < R) & (q < Q)
        z, s, _, c = gaussian(
            mass, variance,
            tl.load(beta_u_ptr + j, j < J, other=0.0).to(DTYPE),
            tl.load(beta_a_ptr + j, j < J, other=0.0).to(DTYPE),
            number(temperature, temperature_low, DTYPE),
            number(min_variance, min_variance_low, DTYPE), inside, R, Q,
        )  # fmt: skip
        offsets = b * J + j
        tl.store(mass_ptr + offsets, mass, exists)
        tl.store(logits_ptr + offsets, z, exists)
        offsets = offsets * (R * Q) + r * Q + q
        tl.store(mean_ptr + offsets, mean, exists & inside)
        tl.store(variance_ptr + offsets, variance, exists & inside)
    else:
        mean = first * inverse
        s = tl.full((1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), 1.0, DTYPE)
        c = tl.zeros((1, 1, 1, BLOCK_N, LANES), DTYPE)
    store_pack(state_ptr, row, j < J, r, q, lane, mean * s, s, c, R, Q, LANES)
