"""u and W in the order in which the products of `_one_product.py` read them.

    columns (I, B', K)         u_i of each batch row, B' rows: whole programs
    weight (I, rows, BLOCK_P)  W_i with rows (pair of j, d / 4, j % 2, d % 4)

Rows, columns and components that do not exist are zero, so a pass reads both without masks. A
float32 column is u₀ followed by u - u₀, with u₀ in TF32 and K = 2 BLOCK_P. A 16-bit column is u,
followed by zeros up to K = 16.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritoncaps.kernels._patches import Patches, input_offsets, located, row_offsets
from tritoncaps.kernels._tiles import round_to_tf32, tf32_operand


@triton.jit
def _prepare_weight(
    weight_ptr, rows_ptr, first_row, rows, P, J, D, stride_p, stride_j, stride_d,
    ROUND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write some rows of W_i of one capsule, (P, J, D), as (rows, BLOCK_P)."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    j = row // (2 * BLOCK_D) * 2 + row // 4 % 2
    d = row // 8 % (BLOCK_D // 4) * 4 + row % 4
    p = tl.arange(0, BLOCK_P)
    offs_row = j.to(tl.int64) * stride_j + d.to(tl.int64) * stride_d
    offs_w = (p.to(tl.int64) * stride_p)[:, None] + offs_row[None, :]
    mask = (p < P)[:, None] & ((j < J) & (d < D))[None, :]
    w = tl.load(weight_ptr + offs_w, mask, other=0.0)
    if ROUND:
        w = tf32_operand(w)
    row_ptrs = rows_ptr + row[:, None] * BLOCK_P + p[None, :]
    tl.store(row_ptrs, tl.trans(w), (row < rows)[:, None])


@triton.jit
def _prepare_columns(
    u_ptr, columns_ptr, b, i, B, I, P, padded_b, stride_b, stride_i, stride_p, stride_h, stride_w,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, KERNEL: tl.constexpr,
    TYPES: tl.constexpr, SPLIT: tl.constexpr, K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write u of some batch rows and capsules, (b, i, P), as columns, (i, b, K)."""
    p = tl.arange(0, BLOCK_P).to(tl.int64)[None, None, :]
    b = b[:, None, None]
    i = i[None, :, None]
    u_ptrs = u_ptr + row_offsets(b, stride_b, stride_h, stride_w, ROWS, COLUMNS, STEP)
    u_ptrs += input_offsets(i, stride_i, stride_h, stride_w, KERNEL, TYPES) + p * stride_p
    u = tl.load(u_ptrs, (b < B) & (i < I) & (p < P), other=0.0)
    ptrs = columns_ptr + (i * padded_b + b) * K + p
    exists = (b < padded_b) & (i < I) & (p < BLOCK_P)
    if SPLIT:
        high = round_to_tf32(u)
        tl.store(ptrs, high, exists)
        tl.store(ptrs + BLOCK_P, u - high, exists)
    else:
        tl.store(ptrs, u, exists)
        if K > BLOCK_P:
            tl.store(ptrs + BLOCK_P, tl.zeros_like(u), exists)


@triton.jit
def _prepare_kernel(
    # pointers
    u_ptr, weight_ptr, columns_ptr, rows_ptr,
    # extents
    B, I, P, J, D, padded_b, rows,
    # strides
    stride_u_b, stride_u_i, stride_u_p, stride_u_h, stride_u_w,
    stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
    # meta-parameters
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, KERNEL: tl.constexpr,
    TYPES: tl.constexpr, SPLIT_COLUMNS: tl.constexpr, ROUND_WEIGHT: tl.constexpr, K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The first programs prepare a tile of a capsule's weight each, the others a tile of u each."""
    tiles_w = tl.cdiv(rows, BLOCK_ROWS)
    pid = tl.program_id(0).to(tl.int64)
    tile = pid - tl.cast(I, tl.int64) * tiles_w
    if tile < 0:
        capsule = pid // tiles_w
        _prepare_weight(
            weight_ptr + capsule * stride_weight_i, rows_ptr + capsule * rows * BLOCK_P,
            pid % tiles_w * BLOCK_ROWS, rows, P, J, D,
            stride_weight_p, stride_weight_j, stride_weight_d,
            ROUND_WEIGHT, BLOCK_ROWS, BLOCK_P, BLOCK_D,
        )  # fmt: skip
    else:
        tiles_b = tl.cdiv(padded_b, BLOCK_B)
        b = tile % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)
        i = tile // tiles_b * BLOCK_I + tl.arange(0, BLOCK_I)
        _prepare_columns(
            u_ptr, columns_ptr, b, i, B, I, P, padded_b,
            stride_u_b, stride_u_i, stride_u_p, stride_u_h, stride_u_w,
            ROWS, COLUMNS, STEP, KERNEL, TYPES, SPLIT_COLUMNS, K, BLOCK_P,
        )  # fmt: skip


class Prepared(NamedTuple):
    """Columns (I, B', K), the weight (I, rows, BLOCK_P), and whether W is still to be split."""

    columns: Tensor
    weight: Tensor
    split: bool


def prepare(
    u: Tensor | Patches, weight: Tensor, precision: str, *, block_b: int, block_p: int, block_d: int
) -> Prepared:
    """Bring u, (B, I, P), and the weight, (I, P, J, D), of any strides, into this order.

    u may be the patches of a grid.

    `block_b` batch rows share a program of a pass. Float32 columns are always split. The weight is
    rounded if `precision` is "tf32", and left for the pass to split otherwise.
    """
    B, I, P = u.shape
    _, _, J, D = weight.shape
    is_float32 = u.dtype == torch.float32
    K = 2 * block_p if is_float32 else max(block_p, 16)
    rows = 2 * triton.cdiv(J, 2) * block_d
    padded_b = triton.cdiv(B, block_b) * block_b
    split = is_float32 and precision != "tf32"
    columns = u.new_empty(I, padded_b, K)
    prepared = weight.new_empty(I, rows, block_p)
    # A tile has 1024 values: 8 batch rows, of which a warp has as many.
    block_i = 128 // block_p
    tiles = padded_b // 8 * triton.cdiv(I, block_i)
    # Few output capsules fill one tile of W. More of them take tiles of 512 rows.
    block_rows = min(triton.next_power_of_2(rows), 512)
    values, of_u, modes = located(u)
    _prepare_kernel[(I * triton.cdiv(rows, block_rows) + tiles,)](
        values, weight, columns, prepared,
        B, I, P, J, D, padded_b, rows,
        *of_u, *weight.stride(),
        SPLIT_COLUMNS=is_float32,
        ROUND_WEIGHT=is_float32 and not split,
        K=K,
        BLOCK_ROWS=block_rows,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
        BLOCK_B=8,
        BLOCK_I=block_i,
        num_warps=4,
        **modes,
    )  # fmt: skip
    return Prepared(columns, prepared, split)
