"""Squash: a vector's length to [0, 1), its direction kept."""

import torch
from torch import Tensor

from tritoncaps._torch_path._precision import accumulation_dtype

# Rows are scaled by this, exactly, lest the length of finite values overflow. Only below 10⁻³⁵, or
# 10⁻³⁰⁵ in float64, something is lost: there v is 0, and ds, at most n·|dv|, not exact.
_SCALE = 2.0**-8

_SUM_IN_FLOAT64 = {"cpu"}  # devices that have float64, and lose no time by it here


def _scaled(s: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of s, scaled, (..., D), and their length, (..., 1); no square overflows or vanishes.

    The length is NaN if a component is infinite, lest the others pass for known.
    """
    x = s.to(accumulation_dtype(s.dtype)) * _SCALE
    if x.dtype == torch.float32 and x.device.type in _SUM_IN_FLOAT64:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
        return x, (length - length).add_(length).to(x.dtype)  # ∞ − ∞ is NaN
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return x, largest * torch.linalg.vector_norm(x / largest, dim=-1, keepdim=True)


def squash_fwd(s: Tensor) -> Tensor:
    """v = n² / (1 + n²) · s/n of each row of s, (..., D) → (..., D).

    As s / (n + 1/n) it squares nothing; at 0 it is 0/∞.
    """
    if s.numel() == 0:
        return torch.empty_like(s, memory_format=torch.contiguous_format)
    x, length = _scaled(s)
    divisor = torch.add(length, length.reciprocal(), alpha=_SCALE**2)  # n + 1/n, scaled as well
    return x.div_(divisor).to(s.dtype).contiguous()


def squash_bwd(grad_v: Tensor, s: Tensor) -> Tensor:
    """Gradient of squash, (..., D).

    With f(n) = n/(1+n²) and ŝ = s/n, v = f·s. The part of dv across s is scaled by f, the part
    along it, ρ = ŝ·dv, by f + n·f' = 2f/(1+n²): ds = f·(dv − ρŝ) + 2f/(1+n²)·ρŝ. Kept apart, the
    two lose nothing to cancellation where n is large and the second is tiny.
    """
    if s.numel() == 0:
        return torch.empty_like(s, memory_format=torch.contiguous_format)
    x, length = _scaled(s)
    grad_v = grad_v.to(x.dtype)
    direction = x.div_(length.clamp(min=torch.finfo(x.dtype).tiny))
    n = length / _SCALE
    f = 1 / (n + 1 / n)
    along = direction.mul_((direction * grad_v).sum(dim=-1, keepdim=True))
    across = grad_v - along
    return across.add_(along.mul_(2 / (1 + n.square()))).mul_(f).to(s.dtype).contiguous()
