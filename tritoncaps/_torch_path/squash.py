"""Squash: scale a vector's length to at most 1 and keep its direction."""

import torch
from torch import Tensor

from tritoncaps._torch_path._precision import accumulation_dtype

# Scaling rows by this is exact, and keeps the length of finite values from overflowing. Digits are
# lost only below 10⁻³⁵, or 10⁻³⁰⁵ in float64.
_SCALE = 2.0**-8

_SUM_IN_FLOAT64 = {"cpu"}  # devices that have float64, at no cost in time here


def _scaled(s: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of s, scaled, (..., D), and their length, (..., 1). No square overflows or vanishes.

    A row with an infinite component has length NaN, which spoils all its components.
    """
    x = s.to(accumulation_dtype(s.dtype)) * _SCALE
    if x.dtype == torch.float32 and x.device.type in _SUM_IN_FLOAT64:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
        return x, (length - length).add_(length).to(x.dtype)  # ∞ − ∞ is NaN
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return x, largest * torch.linalg.vector_norm(x / largest, dim=-1, keepdim=True)


def squash_fwd(s: Tensor, form: str) -> Tensor:
    """v of each row of s, (..., D) → (..., D).

    "quadratic", n² / (1 + n²) · s/n, is written as s / (n + 1/n). This needs no square, and at 0 it
    is 0/∞ = 0. "exponential" is (1 − e⁻ⁿ) · s/n.
    """
    if s.numel() == 0:
        return torch.empty_like(s, memory_format=torch.contiguous_format)
    x, length = _scaled(s)
    longest = 1 - 4 * torch.finfo(x.dtype).eps  # so that rounding makes no row longer than 1
    if form == "quadratic":
        # n + 1/n, scaled as x is
        divisor = torch.add(length, length.reciprocal(), alpha=_SCALE**2)
        x.div_(torch.maximum(divisor, length / longest))
    else:
        x.mul_(torch.minimum(_exponential_factor(length), longest / length))
    return x.to(s.dtype).contiguous()


def squash_bwd(grad_v: Tensor, s: Tensor, form: str) -> Tensor:
    """Gradient of squash, (..., D).

    With ŝ = s/n, v = g(n)·ŝ. The part of dv perpendicular to s is scaled by f = g/n. The part along
    s, ρ = ŝ·dv, is scaled by g': ds = f·((dv − ρŝ) + g'/f·ρŝ).

    "quadratic": f = n/(1+n²) and g' = 2f/(1+n²). "exponential": f = (1−e⁻ⁿ)/n and g' = e⁻ⁿ. The two
    parts are kept separate: where n is large, their sum would lose the second to cancellation.
    """
    if s.numel() == 0:
        return torch.empty_like(s, memory_format=torch.contiguous_format)
    x, length = _scaled(s)
    grad_v = grad_v.to(x.dtype)
    n = length / _SCALE
    if form == "quadratic":
        f = 1 / (n + 1 / n)
        ratio = 2 / (1 + n.square())
    else:
        f = _exponential_factor(length) * _SCALE
        ratio = torch.exp(-n) / f
    direction = x.div_(length.clamp(min=torch.finfo(x.dtype).tiny))
    along = direction.mul_((direction * grad_v).sum(dim=-1, keepdim=True))
    across = grad_v - along
    return across.add_(along.mul_(ratio)).mul_(f).to(s.dtype).contiguous()


def _exponential_factor(length: Tensor) -> Tensor:
    """(1 − e⁻ⁿ) / length, where n = length / _SCALE. At 0 it is the limit, 1 / _SCALE."""
    limit = torch.full_like(length, 1 / _SCALE)
    return torch.where(length == 0, limit, -torch.expm1(-length / _SCALE) / length)
