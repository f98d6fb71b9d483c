"""Squash: a vector's length to [0, 1), its direction kept."""

import torch
from torch import Tensor

from tritoncaps._torch_path._precision import accumulation_dtype


def _polar(s: Tensor) -> tuple[Tensor, Tensor]:
    """Length n, (N, 1), and direction s/n, (N, D), 0 where s is 0; no square overflows."""
    smallest = torch.finfo(s.dtype).tiny  # of the normal numbers, so that 0/0 is not met
    largest = s.abs().amax(dim=-1, keepdim=True).clamp(min=smallest)
    scaled = s / largest
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return largest * length, scaled.div_(length.clamp(min=smallest))


def squash_fwd(s: Tensor) -> Tensor:
    """v = n² / (1 + n²) · s/n of each row of s, (N, D) → (N, D).

    As n / (n + 1/n) the first factor squares nothing; at 0 it is 0/∞.
    """
    if s.numel() == 0:
        return torch.empty_like(s, memory_format=torch.contiguous_format)
    length, direction = _polar(s.to(accumulation_dtype(s.dtype)))
    length = length.clamp(max=torch.finfo(length.dtype).max)  # of a sum that overflows
    return direction.mul_(length / (length + 1 / length)).to(s.dtype).contiguous()


def squash_bwd(grad_v: Tensor, s: Tensor) -> Tensor:
    """Gradient of squash, (N, D).

    With f(n) = n/(1+n²) and ŝ = s/n, v = f·s. The part of dv across s is scaled by f, the part
    along it, ρ = ŝ·dv, by f + n·f' = 2f/(1+n²): ds = f·(dv − ρŝ) + 2f/(1+n²)·ρŝ. Kept apart, the
    two lose nothing to cancellation where n is large and the second is tiny.
    """
    if s.numel() == 0:
        return torch.empty_like(s, memory_format=torch.contiguous_format)
    dtype = accumulation_dtype(s.dtype)
    length, direction = _polar(s.to(dtype))
    grad_v = grad_v.to(dtype)
    f = 1 / (length + 1 / length)
    along = direction.mul_((direction * grad_v).sum(dim=-1, keepdim=True))
    across = grad_v - along
    return across.add_(along.mul_(2 / (1 + length.square()))).mul_(f).to(s.dtype).contiguous()
