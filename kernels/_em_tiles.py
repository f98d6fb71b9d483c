# ruff: noqa: RUF005 - Triton does not unpack tuples
"""What the kernels of EM routing hold: rows of the batch in the lanes of a warp.

A tile has five axes, (BLOCK_G, BLOCK_R, BLOCK_Q, BLOCK_N, LANES):

    g, n    inputs or outputs, g within a thread and n across the warps
    r, q    the rows and the columns of a matrix, within a thread
    lane    rows of the batch, across the lanes of a warp

So no sum but that over the batch leaves its thread. BLOCK_N is the number of warps, and no tensor
lacks n, even if its values are the same for every n: Triton would spread its r or q over the warps,
and bring them together through shared memory. The tensors that the kernels read are ordered for
this, in tiles of LANES batch rows. Rows that do not exist are zero.

    poses        (tiles, I, P, LANES, R)
    weight       (I, J, P, Q)
    activations  (tiles, I, LANES), likewise δ
    normaliser   (tiles, I, 2, LANES): the largest ℓ_ij of an input, and 1 / Σ_j exp(ℓ_ij − largest)
    assignment   (tiles, I, J, LANES)
    a pack       (tiles, J, (N·R·Q + 1)·LANES): N tensors (R, LANES, Q) and one (LANES) of each j

A lane's q, or r, lie side by side, so that one instruction loads four of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Orders of axes -----------------------------------------------------------------------------------


def in_lanes(x: Tensor, lanes: int, *order: int) -> Tensor:
    """Divide the rows of x, (B, …), into (tiles, lanes, …), and permute to `order`."""
    tiles = triton.cdiv(len(x), lanes)
    if missing := tiles * lanes - len(x):
        x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, missing))
    return x.unflatten(0, (tiles, lanes)).permute(order).contiguous()


def from_lanes(x: Tensor, B: int, dtype: torch.dtype, *order: int) -> Tensor:
    """Permute x to (tiles, lanes, …), and join its first B rows to (B, …)."""
    return x.permute(order).flatten(0, 1)[:B].to(dtype).contiguous()


def pack_size(count: int, R: int, Q: int, lanes: int) -> int:
    """The values of one j in a tile of a pack with `count` matrices."""
    return (count * R * Q + 1) * lanes


# Tiles --------------------------------------------------------------------------------------------


@triton.jit
def tile_axes(
    BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """g, r, q, n and lane, each along its own axis."""
    g = tl.arange(0, BLOCK_G)[:, None, None, None, None]
    r = tl.arange(0, BLOCK_R)[None, :, None, None, None]
    q = tl.arange(0, BLOCK_Q)[None, None, :, None, None]
    n = tl.arange(0, BLOCK_N)[None, None, None, :, None]
    # With one row or column, lanes would be loaded in fours, and change their places.
    lane = tl.max_contiguous(tl.arange(0, LANES), 1)[None, None, None, None, :]
    return g, r, q, n, lane


@triton.jit
def load_poses(
    poses_ptr, row, exists, r, lane,
    DTYPE: tl.constexpr, P: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """u[p], (BLOCK_G, BLOCK_R, 1, BLOCK_N, LANES), for every p. `row` is tile·I + i."""
    ptrs = poses_ptr + row * (P * R * LANES) + lane * R + r
    u = ()
    for p in tl.static_range(P):
        loaded = tl.load(ptrs + p * R * LANES, exists & (r < R), other=0.0)
        u = u + (loaded.to(DTYPE),)
    return u


@triton.jit
def load_weight(
    weight_ptr, pair, exists, q, lane,
    DTYPE: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """W[p], (BLOCK_G, 1, BLOCK_Q, BLOCK_N, LANES), for every p. `pair` is i·J + j."""
    # Every lane loads it. A tensor without lanes would be spread over them.
    ptrs = weight_ptr + pair * (P * Q) + q + 0 * lane
    w = ()
    for p in tl.static_range(P):
        w = w + (tl.load(ptrs + p * Q, exists & (q < Q), other=0.0).to(DTYPE),)
    return w


@triton.jit
def votes(u, w, shape: tl.constexpr, DTYPE: tl.constexpr, P: tl.constexpr):
    """V_rq = Σ_p u_rp W_pq, (BLOCK_G, BLOCK_R, BLOCK_Q, BLOCK_N, LANES)."""
    V = tl.zeros(shape, DTYPE)
    for p in tl.static_range(P):
        V += u[p] * w[p]
    return V


@triton.jit
def no_sums(shape: tl.constexpr, DTYPE: tl.constexpr, P: tl.constexpr):
    """A zero tensor for every p."""
    sums = ()
    for _ in tl.static_range(P):
        sums = sums + (tl.zeros(shape, DTYPE),)
    return sums


@triton.jit
def add_products(sums, x, factors, AXIS: tl.constexpr, P: tl.constexpr):
    """sums[p] + Σ x · factors[p] over r or q, for every p."""
    more = ()
    for p in tl.static_range(P):
        more = more + (sums[p] + tl.sum(x * factors[p], axis=AXIS, keep_dims=True),)
    return more


@triton.jit
def load_pack(
    pack_ptr, row, exists, r, q, lane, other,
    COUNT: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The COUNT matrices and the number of each pair (b, j). `row` is tile·J + j."""
    base = pack_ptr + row * ((COUNT * R * Q + 1) * LANES)
    ptrs = base + (r * LANES + lane) * Q + q
    mask = exists & (r < R) & (q < Q)
    pack = ()
    for n in tl.static_range(COUNT):
        pack = pack + (tl.load(ptrs + n * (R * Q * LANES), mask, other=0.0),)
    return pack + (tl.load(base + COUNT * R * Q * LANES + lane, exists, other=other),)


@triton.jit
def store_pack(
    pack_ptr, row, exists, r, q, lane, pack, number,
    COUNT: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write what `load_pack` reads."""
    base = pack_ptr + row * ((COUNT * R * Q + 1) * LANES)
    ptrs = base + (r * LANES + lane) * Q + q
    mask = exists & (r < R) & (q < Q)
    for n in tl.static_range(COUNT):
        tl.store(ptrs + n * (R * Q * LANES), pack[n], mask)
    tl.store(base + COUNT * R * Q * LANES + lane, number, exists)


@triton.jit
def load_normaliser(normaliser_ptr, row, exists, lane, LANES: tl.constexpr):
    """The largest ℓ of inputs, and their scale: R_ij = exp(ℓ_ij − top) · scale.

    One logarithm of the sum would be rounded like the largest ℓ, which may be in the tens.
    """
    ptrs = normaliser_ptr + row * (2 * LANES) + lane
    top = tl.load(ptrs, exists, other=float("inf"))
    return top, tl.load(ptrs + LANES, exists, other=0.0)


@triton.jit
def store_normaliser(normaliser_ptr, row, exists, lane, top, scale, LANES: tl.constexpr):
    """Write what `load_normaliser` reads."""
    ptrs = normaliser_ptr + row * (2 * LANES) + lane
    tl.store(ptrs, top, exists)
    tl.store(ptrs + LANES, scale, exists)


@triton.jit
def over_matrix(x):
    """Σ_rq x_rq, (BLOCK_G, 1, 1, BLOCK_N, LANES)."""
    return tl.sum(tl.sum(x, axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def log_sigmoid(z):
    """log σ(z), for any z."""
    return tl.minimum(z, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(z)))
