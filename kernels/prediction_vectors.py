"""Prediction vectors û_ij = W_ij u_i, (B, I, J, D): one product (B, P) × (P, J·D) for each i.

A product sums only P terms, so most time is spent writing û and reading its gradient twice. The
columns n of a product run over (j, d).
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
    dot_precision,
    target_of,
    with_all_registers,
)
from tritoncaps.kernels._tiles import dot

# Few programs would walk through the sum over so long a P. The vendor's library splits it.
LONG_SUM = 512


def prediction_vectors_launch(
    P: int, J: int, D: int, dtype: torch.dtype, target: Target
) -> dict[str, int]:
    """Tiles of 64 × 64 values of û. Each of 128 threads holds 32 of them (16 for float64)."""
    block = 64 if accumulation_dtype(dtype) == torch.float32 else 32
    if 65535 * block < J * D:
        raise UnsupportedShape(f"J·D = {J * D} columns; a grid covers at most {65535 * block}")
    launch = {
        "BLOCK_B": block,
        "BLOCK_P": min(max(triton.next_power_of_2(P), 16), 32),
        "BLOCK_N": min(max(triton.next_power_of_2(J * D), 16), block),
        "num_warps": 4,
        "num_stages": 1,
    }
    return with_all_registers(launch, target)


@triton.jit
def _prediction_vectors_kernel(
    # pointers
    u_ptr, weight_ptr, u_hat_ptr,
    # extents
    B, I, P, J, D,
    # strides
    stride_u_b, stride_u_i, stride_u_p,
    stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
    # meta-parameters
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """û of one i, BLOCK_B batch rows and BLOCK_N columns."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    N = tl.cast(J, tl.int64) * D
    tiles_b = tl.cdiv(B, BLOCK_B)
    pid = tl.program_id(0).to(tl.int64)
    i = pid // tiles_b
    b = (pid % tiles_b) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    u_ptrs = u_ptr + i * stride_u_i + (b * stride_u_b)[:, None]
    weight_ptrs = weight_ptr + i * stride_weight_i
    weight_ptrs += (n // D * stride_weight_j + n % D * stride_weight_d)[None, :]
    u_hat = tl.zeros((BLOCK_B, BLOCK_N), dtype)
    for first_p in range(0, P, BLOCK_P):
        p = first_p + tl.arange(0, BLOCK_P).to(tl.int64)
        mask_u = (b < B)[:, None] & (p < P)[None, :]
        u = tl.load(u_ptrs + (p * stride_u_p)[None, :], mask_u, other=0.0).to(dtype)
        mask_w = (p < P)[:, None] & (n < N)[None, :]
        w = tl.load(weight_ptrs + (p * stride_weight_p)[:, None], mask_w, other=0.0).to(dtype)
        u_hat += dot(u, w, PRECISION)
    offsets = ((b * I + i) * N)[:, None] + n[None, :]
    tl.store(u_hat_ptr + offsets, u_hat, (b < B)[:, None] & (n < N)[None, :])


# Backward -----------------------------------------------------------------------------------------
#
# With g = dû: du_i = Σ_n g_in W_in is a reduction over the columns, and dW_in = Σ_b u_bi ⊗ g_bin is
# one over the batch. Each has its own kernel, which owns its output and runs the whole reduction.


@triton.jit
def _grad_u_kernel(
    # pointers
    grad_u_hat_ptr, weight_ptr, grad_u_ptr,
    # extents
    B, I, P, J, D,
    # strides
    stride_grad_b, stride_grad_i, stride_grad_j, stride_grad_d,
    stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
    # meta-parameters
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """du of one i, BLOCK_B batch rows and BLOCK_P components."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    N = tl.cast(J, tl.int64) * D
    tiles_b = tl.cdiv(B, BLOCK_B)
    pid = tl.program_id(0).to(tl.int64)
    i = pid // tiles_b
    b = (pid % tiles_b) * BLOCK_B + tl.arange(0, BLOCK_B)
    p = tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    grad_ptrs = grad_u_hat_ptr + i * stride_grad_i + (b * stride_grad_b)[:, None]
    weight_ptrs = weight_ptr + i * stride_weight_i + (p * stride_weight_p)[None, :]
    du = tl.zeros((BLOCK_B, BLOCK_P), dtype)
    for first_n in range(0, N, BLOCK_N):
        n = first_n + tl.arange(0, BLOCK_N)
        offs_grad = n // D * stride_grad_j + n % D * stride_grad_d
        mask_grad = (b < B)[:, None] & (n < N)[None, :]
        grad = tl.load(grad_ptrs + offs_grad[None, :], mask_grad, other=0.0).to(dtype)
        offs_w = n // D * stride_weight_j + n % D * stride_weight_d
        mask_w = (n < N)[:, None] & (p < P)[None, :]
        w = tl.load(weight_ptrs + offs_w[:, None], mask_w, other=0.0).to(dtype)
        du += dot(grad, w, PRECISION)
    offsets = ((b * I + i) * P)[:, None] + p[None, :]
    tl.store(grad_u_ptr + offsets, du, (b < B)[:, None] & (p < P)[None, :])


@triton.jit
def _grad_weight_kernel(
    # pointers
    grad_u_hat_ptr, u_ptr, grad_weight_ptr,
    # extents
    B, I, P, J, D,
    # strides
    stride_grad_b, stride_grad_i, stride_grad_j, stride_grad_d,
    stride_u_b, stride_u_i, stride_u_p,
    # meta-parameters
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dW of one i, BLOCK_P components and BLOCK_N columns."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    N = tl.cast(J, tl.int64) * D
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    i = pid // tiles_n
    n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    grad_ptrs = grad_u_hat_ptr + i * stride_grad_i
    grad_ptrs += (n // D * stride_grad_j + n % D * stride_grad_d)[None, :]
    u_ptrs = u_ptr + i * stride_u_i + (p * stride_u_p)[:, None]
    dw = tl.zeros((BLOCK_P, BLOCK_N), dtype)
    for first_b in range(0, B, BLOCK_B):
        b = first_b + tl.arange(0, BLOCK_B).to(tl.int64)
        mask_u = (p < P)[:, None] & (b < B)[None, :]
        u = tl.load(u_ptrs + (b * stride_u_b)[None, :], mask_u, other=0.0).to(dtype)
        mask_grad = (b < B)[:, None] & (n < N)[None, :]
        grad = tl.load(grad_ptrs + (b * stride_grad_b)[:, None], mask_grad, other=0.0).to(dtype)
        dw += dot(u, grad, PRECISION)
    offsets = ((i * P + p) * N)[:, None] + n[None, :]
    tl.store(grad_weight_ptr + offsets, dw, (p < P)[:, None] & (n < N)[None, :])


def _of_one_capsule(u: Tensor, weight: Tensor) -> Tensor:
    """û of a single input capsule: one product of the vendor's library, (B, P) × (P, J·D)."""
    B, _, P = u.shape
    _, _, J, D = weight.shape
    rows, columns = u.reshape(B, P), weight.reshape(P, J * D)
    dtype = accumulation_dtype(u.dtype)
    if u.dtype == dtype:
        product = torch.mm(rows, columns)
    elif u.is_cuda and torch.version.hip is None:
        product = torch.mm(rows, columns, out_dtype=dtype)
    else:
        product = torch.mm(rows.to(dtype), columns.to(dtype))
    return product.view(B, 1, J, D).to(u.dtype)


def prediction_vectors_fwd(u: Tensor, weight: Tensor) -> Tensor:
    """û, shape (B, I, J, D), from u (B, I, P) and weight (I, P, J, D), both with any strides."""
    B, I, P = u.shape
    _, _, J, D = weight.shape
    if I == 1 and P >= LONG_SUM:
        return _of_one_capsule(u, weight)
    u_hat = u.new_empty(B, I, J, D)
    if u_hat.numel() == 0:
        return u_hat
    target = target_of(u)
    launch = prediction_vectors_launch(P, J, D, u.dtype, target)
    grid = (I * triton.cdiv(B, launch["BLOCK_B"]), triton.cdiv(J * D, launch["BLOCK_N"]))
    with device_of(u):
        _prediction_vectors_kernel[grid](
            u, weight, u_hat,
            B, I, P, J, D,
            *u.stride(),
            *weight.stride(),
            WIDE=u.dtype == torch.float64,
            PRECISION=dot_precision(u.dtype, target),
            **launch,
        )  # fmt: skip
    return u_hat


def prediction_vectors_bwd(grad_u_hat: Tensor, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u and of the weight. grad_u_hat is (B, I, J, D) with any strides."""
    B, I, P = u.shape
    _, _, J, D = weight.shape
    grad_u = torch.empty_like(u, memory_format=torch.contiguous_format)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    target = target_of(u)
    launch = prediction_vectors_launch(P, J, D, u.dtype, target)
    tiles_b = triton.cdiv(B, launch["BLOCK_B"])
    tiles_p = triton.cdiv(P, launch["BLOCK_P"])
    tiles_n = triton.cdiv(J * D, launch["BLOCK_N"])
    meta = {
        "WIDE": u.dtype == torch.float64,
        "PRECISION": dot_precision(u.dtype, target),
        **launch,
    }
    with device_of(u):
        if grad_u.numel() > 0:
            _grad_u_kernel[(I * tiles_b, tiles_p)](
                grad_u_hat, weight, grad_u,
                B, I, P, J, D,
                *grad_u_hat.stride(),
                *weight.stride(),
                **meta,
            )  # fmt: skip
        if grad_weight.numel() > 0:
            _grad_weight_kernel[(I * tiles_n, tiles_p)](
                grad_u_hat, u, grad_weight,
                B, I, P, J, D,
                *grad_u_hat.stride(),
                *u.stride(),
                **meta,
            )  # fmt: skip
    return grad_u, grad_weight
