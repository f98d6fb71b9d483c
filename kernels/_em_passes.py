"""The passes of EM routing over the inputs or the outputs of some rows.

    expectation_kernel   an input, all its outputs: the normaliser of ℓ_ij, and δ in a backward
    competition_kernel   joins these where an input of a convolution feeds several positions
    sums_kernel          an output, a share of its inputs: the sums over i, in slots
    statistics_kernel    finishes the sums of a forward pass: mass, mean, variance, logit

`em_routing.py` has the formulas. A pass reads the Gaussians of the iteration before as a pack
(μ, w, c). With w = 1 / (2 S̃) and x = V − μ,

    ℓ_ij = c_j − Σ_rq w x²,  c = log σ(z) − ½ Σ_rq log 2π S̃

A forward pass sums over i with the weights ω = R_ij a_i, one input after another (Welford 1962):

    N′ = N + ω,  r = ω / N′,  d = V − μ,  μ′ = μ + r d,  M′ = M + N r d²

M is Σ_i ω (V − μ)². Nothing cancels, wherever the mean is, and a vote that has all the mass is the
mean to the last bit. Gradients divide x by S̃, which would make the least rest of it large. A
backward pass adds up Σ_i gℓ x, Σ_i gℓ x² and Σ_i gℓ.
"""

import triton
import triton.language as tl

from tritoncaps.kernels._em_tiles import (
    load_normaliser,
    load_pack,
    load_poses,
    load_weight,
    log_sigmoid,
    over_matrix,
    store_normaliser,
    store_pack,
    tile_axes,
    votes,
)
from tritoncaps.kernels._tiles import softmax_start

# Below this an output has no mean and no variance: both are 0.
NO_MASS = tl.constexpr(1e-20)


@triton.jit
def share_gradient(x, linear, square, constant):
    """gR′_ij, the gradient of R_ij a_i, by the pack of gradients: k₀ + Σ_rq (k₁ x + k₂ x²)."""
    return constant + over_matrix(x * (linear + square * x))


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
    """The normaliser of BLOCK_G · BLOCK_N inputs. With GRADIENT, also δ_i = Σ_j R_ij gR_ij."""
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
        W = load_weight(weight_ptr, i * J + j, exists, q, lane, DTYPE, P, Q)
        V = votes(u, W, (BLOCK_G, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), DTYPE, P)
        of_j = tile * J + j + 0 * n
        mean, w, c = load_pack(state_ptr, of_j, lane >= 0, r, q, lane, 0.0, 2, R, Q, LANES)
        x = V - mean
        logits = c - over_matrix(w * x * x)
        new_top = tl.maximum(top, logits)
        shrink = tl.exp(top - new_top)
        share = tl.exp(logits - new_top)
        mass = mass * shrink + share
        top = new_top
        if GRADIENT:
            own_mean, linear, square, constant = load_pack(
                grads_ptr, of_j, lane >= 0, r, q, lane, 0.0, 3, R, Q, LANES
            )
            grad = a * share_gradient(V - own_mean, linear, square, constant)
            if HAS_GRAD_ASSIGNMENT:
                ptrs = grad_assignment_ptr + (row * J + j) * LANES + lane
                grad += tl.load(ptrs, exists, other=0.0).to(DTYPE)
            moment = moment * shrink + share * grad
    store_normaliser(normaliser_ptr, row, exists, lane, top, 1.0 / mass, LANES)
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
    lane = tl.arange(0, LANES)[None, :]
    b = tile * LANES + lane
    exists = (i < I) & (b < B)
    first_b = b // (ROWS * COLUMNS) * (ROWS * COLUMNS)
    y = b // COLUMNS % ROWS * STRIDE + i // (KERNEL * types)
    x = b % COLUMNS * STRIDE + i // types % KERNEL
    top, mass = softmax_start((BLOCK_I, LANES), DTYPE, False)
    mass = tl.where(exists, mass, 1.0)  # so that a row that does not exist has a scale
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
        other_row = other // LANES * I + place
        term, scale = load_normaliser(normaliser_ptr, other_row, feeds, other % LANES, LANES)
        term = tl.where(feeds, term, float("-inf"))
        new_top = tl.maximum(top, term)
        shrink = tl.exp(top - new_top)
        share = tl.exp(term - new_top) / tl.where(feeds, scale, 1.0)
        mass = mass * shrink + share
        top = new_top
        if GRADIENT:
            delta = tl.load(delta_ptr + other_row * LANES + other % LANES, feeds, other=0.0)
            moment = moment * shrink + share * delta
    row = tile * I + i
    top = tl.where(exists, top, 0.0)
    store_normaliser(joined_ptr, row, i < I, lane, top, 1.0 / mass, LANES)
    if GRADIENT:
        tl.store(joined_delta_ptr + row * LANES + lane, moment / mass, i < I)


@triton.jit
def sums_kernel(
    # pointers
    poses_ptr, weight_ptr, activations_ptr, state_ptr, grads_ptr, grad_assignment_ptr,
    normaliser_ptr, delta_ptr, assignment_ptr, slots_ptr,
    # extents
    tiles, I, J, splits, each,
    # meta-parameters
    HAS_LOGITS: tl.constexpr, GRADIENT: tl.constexpr,
    HAS_GRAD_ASSIGNMENT: tl.constexpr, SAVE_ASSIGNMENT: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Put what a pass finds of `each` inputs in a slot, for BLOCK_N outputs.

    It is μ, M and N, or with GRADIENT Σ_i gℓ x, Σ_i gℓ x² and Σ_i gℓ. Without logits, ℓ is 0.
    """
    DTYPE: tl.constexpr = slots_ptr.dtype.element_ty
    _, r, q, n, lane = tile_axes(1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES)
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(J, BLOCK_N)
    split = pid // groups % splits
    tile = pid // groups // splits
    j = pid % groups * BLOCK_N + n
    of_j = tile * J + j
    if HAS_LOGITS:
        mean, w, c = load_pack(state_ptr, of_j, j < J, r, q, lane, float("-inf"), 2, R, Q, LANES)
    if GRADIENT:
        own_mean, linear, square, constant = load_pack(
            grads_ptr, of_j, j < J, r, q, lane, 0.0, 3, R, Q, LANES
        )
    first = tl.zeros((1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), DTYPE)
    second = tl.zeros((1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), DTYPE)
    total = tl.zeros((1, 1, 1, BLOCK_N, LANES), DTYPE)
    last_i = tl.minimum((split + 1) * each, I)
    for first_i in range(split * each, last_i):
        i = first_i + 0 * n
        exists = j < J
        row = tile * I + i
        u = load_poses(poses_ptr, row, exists, r, lane, DTYPE, P, R, LANES)
        W = load_weight(weight_ptr, i * J + j, exists, q, lane, DTYPE, P, Q)
        V = votes(u, W, (1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), DTYPE, P)
        logits = tl.zeros((1, 1, 1, BLOCK_N, LANES), DTYPE)
        if HAS_LOGITS:
            x = V - mean
            logits = c - over_matrix(w * x * x)
        offsets = row * LANES + lane
        top, scale = load_normaliser(normaliser_ptr, row, exists, lane, LANES)
        assignment = tl.exp(logits - top) * scale
        a = tl.load(activations_ptr + offsets, exists, other=0.0).to(DTYPE)
        if SAVE_ASSIGNMENT:
            tl.store(assignment_ptr + (row * J + j) * LANES + lane, assignment, exists)
        if GRADIENT:
            grad = a * share_gradient(V - own_mean, linear, square, constant)
            if HAS_GRAD_ASSIGNMENT:
                ptrs = grad_assignment_ptr + (row * J + j) * LANES + lane
                grad += tl.load(ptrs, exists, other=0.0).to(DTYPE)
            omega = assignment * (grad - tl.load(delta_ptr + offsets, exists, other=0.0))
            first += omega * x
            second += omega * x * x
            total += omega
        else:
            first, second, total = merged(first, second, total, V, 0.0, assignment * a)
    slot_row = (split * tiles + tile) * J + j
    store_pack(slots_ptr, slot_row, j < J, r, q, lane, (first, second), total, 2, R, Q, LANES)


@triton.jit
def merged(mean, second, mass, more_mean, more_second, more):
    """μ, M and N of some inputs and of more of them."""
    before = mass
    mass = before + more
    # An approximate quotient of equal numbers need not be 1. Without mass nothing moves.
    is_all = (mass == more) & (more != 0.0)
    part = tl.where(is_all, 1.0, more / tl.where(mass == 0.0, 1.0, mass))
    step = more_mean - mean
    return mean + part * step, second + more_second + (before * part) * step * step, mass


@triton.jit
def number(high, low, DTYPE: tl.constexpr):
    """Join the two float32 parts of a float64 number: a launch passes scalars as float32."""
    return tl.cast(high, DTYPE) + tl.cast(low, DTYPE)


@triton.jit
def gaussian(
    mass, variance, beta_u, beta_a, temperature, min_variance, inside,
    R: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """z, w = 1 / (2 S̃), which is 0 outside the matrix, cost and log-weight c of some outputs.

    The cost of a unit of mass is D β_u + ½ Σ log S̃. The logarithm in c has the factor 2π, and that
    in the cost has none: to add D/2 log 2π afterwards, or to subtract it, would lose digits.
    """
    floored = tl.where(inside, variance + min_variance, 1.0)
    log_width = 0.5 * over_matrix(tl.where(inside, tl.log(6.283185307179586 * floored), 0.0))
    cost = R * Q * beta_u + 0.5 * over_matrix(tl.where(inside, tl.log(floored), 0.0))
    z = temperature * (beta_a - mass * cost)
    w = tl.where(inside, 0.5 / floored, 0.0)
    return z, w, cost, log_sigmoid(z) - log_width


@triton.jit
def inverse_mass(mass):
    """1 / mass, or 0 without mass: such an output has neither a mean nor a gradient of it.

    A mass of NaN is not too small. It stays NaN.
    """
    # A number in the code would be one of float32.
    is_nothing = mass <= tl.full(mass.shape, NO_MASS, mass.dtype)
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
            slots_ptr, row + slot * slot_rows, exists, r, q, lane, 0.0, 2, R, Q, LANES
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
    R: tl.constexpr, Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Mass, mean, variance of BLOCK_N outputs from their slots, and the pack of the next pass."""
    DTYPE: tl.constexpr = slots_ptr.dtype.element_ty
    _, r, q, n, lane = tile_axes(1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES)
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(J, BLOCK_N)
    tile = pid // groups
    j = pid % groups * BLOCK_N + n
    row = tile * J + j
    mean = tl.zeros((1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), DTYPE)
    second = tl.zeros((1, BLOCK_R, BLOCK_Q, BLOCK_N, LANES), DTYPE)
    mass = tl.zeros((1, 1, 1, BLOCK_N, LANES), DTYPE)
    for slot in range(slots):
        slot_row = slot * (tl.cast(tiles, tl.int64) * J) + row
        mean, second, mass = merged(
            mean, second, mass,
            *load_pack(slots_ptr, slot_row, j < J, r, q, lane, 0.0, 2, R, Q, LANES),
        )  # fmt: skip
    inverse = inverse_mass(mass)
    mean = tl.where(inverse == 0.0, 0.0, mean)
    b = tile * LANES + lane
    exists = (b < B) & (j < J)
    # A row that does not exist has no spread, and there may be no floor.
    variance = tl.where(b < B, second * inverse, 1.0)
    inside = (j < J) & (r < R) & (q < Q)
    z, w, _, c = gaussian(
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
    store_pack(state_ptr, row, j < J, r, q, lane, (mean, w), c, 2, R, Q, LANES)
