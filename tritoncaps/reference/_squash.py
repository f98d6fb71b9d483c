"""The squash."""

import torch
from torch import Tensor


def squash(s: Tensor, dim: int = -1, *, form: str = "quadratic") -> Tensor:
    """Scale vectors of length n = |s| to a length in [0, 1], keeping their direction.

    "quadratic": v = n² / (1 + n²) · s / n (Sabour 2017, 1).
    "exponential": v = (1 − e⁻ⁿ) · s / n (Mazzia, Salvetti, Chiaberge 2021, 4).
    """
    if s.shape[dim] == 0:
        return s.clone()
    finfo = torch.finfo(s.dtype)
    # n = |s| without a square that overflows. The scale cancels, so it needs no gradient.
    largest = s.detach().abs().amax(dim=dim, keepdim=True)
    # Nor may n itself. At such a length v is the direction alone, so s may be shorter.
    too_long = largest > finfo.max / 256
    s, largest = (torch.where(too_long, x / 256, x) for x in (s, largest))
    scale = largest.clamp(min=finfo.tiny)
    # At 0, n has no derivative. A constant stands in there, so derivatives of v are finite.
    not_zero = torch.where(largest != 0, s / scale, 1)
    length = scale * not_zero.square().sum(dim=dim, keepdim=True).sqrt()
    n = torch.where(largest != 0, length, 0)
    # v = f(n) · s. Either branch of `where` is finite where the other one is taken.
    if form == "quadratic":
        k = torch.where(n < 1, n, 1 / n.clamp(min=1))  # f is the same for n and 1/n
        f = k / (1 + k**2)
    else:
        # Near 0, the derivatives of the quotient cancel. Its series does not.
        small = n < finfo.eps**0.25
        near, far = torch.where(small, n, 0), torch.where(small, 1, n)
        series = 1 - near / 2 * (1 - near / 3 * (1 - near / 4))
        f = torch.where(small, series, -torch.expm1(-far) / far)
    # Rounding must not make v longer than 1.
    longest = 1 - 4 * min(finfo.eps, 2**-23)
    return torch.minimum(f, longest / n.clamp(min=0.5)) * s
