"""Squash of rows, v = |s|² / (1 + |s|²) · s / |s|: one read of s, one write of v.

A program holds BLOCK_ROWS whole rows, so a row's length never leaves the program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritoncaps.kernels._launch import cdiv, device_of, row_config
from tritoncaps.kernels._primitives import (
    load_sum,
    squash_rows,
    squash_rows_grad,
)


@triton.jit
def _squash_fwd_kernel(
    # pointers
    s_ptr, v_ptr,
    # extents
    N, D,
    # strides
    stride_s_n, stride_s_d,
    # meta-parameters
    WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Squash of BLOCK_ROWS rows; WIDE computes in float64."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    mask = (n < N) & (d < D)
    s = tl.load(s_ptr + n * stride_s_n + d * stride_s_d, mask, other=0.0).to(dtype)
    tl.store(v_ptr + n * D + d, squash_rows(s), mask)


@triton.jit
def _squash_bwd_kernel(
    # pointers
    grad_v_ptr, s_ptr, grad_s_ptr,
    # extents
    N, D,
    # strides
    stride_grad_v_n, stride_grad_v_d, stride_s_n, stride_s_d,
    # meta-parameters
    WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of squash of BLOCK_ROWS rows; the formula is derived in `squash_rows_grad`."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    mask = (n < N) & (d < D)
    s = tl.load(s_ptr + n * stride_s_n + d * stride_s_d, mask, other=0.0).to(dtype)
    dv_ptrs = grad_v_ptr + n * stride_grad_v_n + d * stride_grad_v_d
    dv = tl.load(dv_ptrs, mask, other=0.0).to(dtype)
    tl.store(grad_s_ptr + n * D + d, squash_rows_grad(s, dv), mask)


@triton.jit
def _squash_slots_kernel(
    # pointers
    slots_ptr, s_ptr, v_ptr,
    # extents
    N, J, D,
    # meta-parameters
    SLOTS: tl.constexpr, UNIFORM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Close a routing: the last weighted sum s from its slots, and the output v = squash(s)."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (n < N) & (d < D)
    offsets = n * D + d
    s = load_sum(slots_ptr, offsets, mask, tl.cast(N, tl.int64) * D, J, SLOTS, UNIFORM)
    tl.store(s_ptr + offsets, s, mask)
    tl.store(v_ptr + offsets, squash_rows(s), mask)


def squash_fwd(s: Tensor) -> Tensor:
    """Squash each row of s, shape (N, D), any strides; a new contiguous tensor of s's dtype."""
    N, D = s.shape
    v = torch.empty_like(s, memory_format=torch.contiguous_format)
    if s.numel() == 0:
        return v
    config = row_config(D)
    with device_of(s):
        _squash_fwd_kernel[(cdiv(N, config.block_rows),)](
            s, v,
            N, D,
            *s.stride(),
            WIDE=s.dtype == torch.float64,
            BLOCK_ROWS=config.block_rows,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip
    return v


def squash_bwd(grad_v: Tensor, s: Tensor) -> Tensor:
    """Gradient of squash at each row of s; both of shape (N, D), any strides."""
    N, D = s.shape
    grad_s = torch.empty_like(s, memory_format=torch.contiguous_format)
    if s.numel() == 0:
        return grad_s
    config = row_config(D)
    with device_of(s):
        _squash_bwd_kernel[(cdiv(N, config.block_rows),)](
            grad_v, s, grad_s,
            N, D,
            *grad_v.stride(),
            *s.stride(),
            WIDE=s.dtype == torch.float64,
            BLOCK_ROWS=config.block_rows,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip
    return grad_s


def squash_slots(slots: Tensor, uniform: bool, s: Tensor, v: Tensor) -> None:
    """Write s = Σ slots (divided by J if uniform) and v = squash(s).

    Args:
        slots: contiguous, shape (slots, B, J, D).
        uniform: whether the slots hold Σ_i û_ij, still without the uniform coupling 1/J.
        s, v: contiguous outputs, shape (B, J, D).
    """
    B, J, D = s.shape
    config = row_config(D)
    _squash_slots_kernel[(cdiv(B * J, config.block_rows),)](
        slots, s, v,
        B * J, J, D,
        SLOTS=slots.shape[0],
        UNIFORM=uniform,
        BLOCK_ROWS=config.block_rows,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )  # fmt: skip
