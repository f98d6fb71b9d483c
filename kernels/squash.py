"""Squash of rows: one read of s, one write of v.

"quadratic":   v = n² / (1 + n²) e     (Sabour 2017, equation 1)
"exponential": v = (1 − e⁻ⁿ) e         (Mazzia 2021, equation 4)

Here n is a row's length and e its direction. A program holds BLOCK_ROWS whole rows, so it needs
nothing from other programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritoncaps.kernels._launch import UnsupportedShape, device_of
from tritoncaps.kernels._tiles import (
    squash_rows,
    squash_rows_exponential,
    squash_rows_exponential_grad,
    squash_rows_grad,
)


def row_launch(D: int) -> dict[str, int]:
    """Whole rows, about 1024 values per program: 8 per thread, for every slot that is added up."""
    block_d = triton.next_power_of_2(max(D, 1))
    if block_d > 16384:
        raise UnsupportedShape(f"a row of D={D} values; a program holds at most 16384")
    return {
        "BLOCK_ROWS": max(1024 // block_d, 1),
        "BLOCK_D": block_d,
        "num_warps": 4 if block_d <= 2048 else 8,
    }


@triton.jit
def _squash_fwd_kernel(
    # pointers
    s_ptr, v_ptr,
    # extents
    N, D,
    # strides
    stride_s_n, stride_s_d,
    # meta-parameters
    FORM: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Squash BLOCK_ROWS rows. WIDE computes in float64."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    mask = (n < N) & (d < D)
    s = tl.load(s_ptr + n * stride_s_n + d * stride_s_d, mask, other=0.0).to(dtype)
    if FORM == "exponential":
        v = squash_rows_exponential(s)
    else:
        v = squash_rows(s)
    tl.store(v_ptr + n * D + d, v, mask)


@triton.jit
def _squash_bwd_kernel(
    # pointers
    grad_v_ptr, s_ptr, grad_s_ptr,
    # extents
    N, D,
    # strides
    stride_grad_v_n, stride_grad_v_d, stride_s_n, stride_s_d,
    # meta-parameters
    FORM: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of squash at BLOCK_ROWS rows. `squash_rows_grad` derives the formula."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    mask = (n < N) & (d < D)
    s = tl.load(s_ptr + n * stride_s_n + d * stride_s_d, mask, other=0.0).to(dtype)
    dv_ptrs = grad_v_ptr + n * stride_grad_v_n + d * stride_grad_v_d
    dv = tl.load(dv_ptrs, mask, other=0.0).to(dtype)
    if FORM == "exponential":
        ds = squash_rows_exponential_grad(s, dv)
    else:
        ds = squash_rows_grad(s, dv)
    tl.store(grad_s_ptr + n * D + d, ds, mask)


def squash_fwd(s: Tensor, form: str) -> Tensor:
    """Squash each row of s.

    Args:
        s: rows, shape (N, D), any strides.
        form: "quadratic" or "exponential".

    Returns:
        A new contiguous tensor with the shape and dtype of `s`.
    """
    N, D = s.shape
    v = torch.empty_like(s, memory_format=torch.contiguous_format)
    if s.numel() == 0:
        return v
    launch = row_launch(D)
    with device_of(s):
        _squash_fwd_kernel[(triton.cdiv(N, launch["BLOCK_ROWS"]),)](
            s, v,
            N, D,
            *s.stride(),
            FORM=form,
            WIDE=s.dtype == torch.float64,
            **launch,
        )  # fmt: skip
    return v


def squash_bwd(grad_v: Tensor, s: Tensor, form: str) -> Tensor:
    """Gradient of squash at each row of s.

    Args:
        grad_v, s: shape (N, D), any strides.
        form: as given to `squash_fwd`.
    """
    N, D = s.shape
    grad_s = torch.empty_like(s, memory_format=torch.contiguous_format)
    if s.numel() == 0:
        return grad_s
    launch = row_launch(D)
    with device_of(s):
        _squash_bwd_kernel[(triton.cdiv(N, launch["BLOCK_ROWS"]),)](
            grad_v, s, grad_s,
            N, D,
            *grad_v.stride(),
            *s.stride(),
            FORM=form,
            WIDE=s.dtype == torch.float64,
            **launch,
        )  # fmt: skip
    return grad_s
