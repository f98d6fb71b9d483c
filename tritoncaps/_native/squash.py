"""Binding of `tritoncaps_squash_*`. The algorithm is in squash.h."""

import torch
from torch import Tensor

from tritoncaps import _torch_path
from tritoncaps._native._call import check, function, sizes, workers


def squash_fwd(s: Tensor, form: str) -> Tensor:
    """v of each row of s, (N, D) → (N, D)."""
    if s.numel() == 0:
        return _torch_path.squash_fwd(s, form)
    s = s.contiguous()
    v = torch.empty_like(s)
    done = function("squash_fwd", s.dtype, "ppipi")(
        s.data_ptr(), sizes(*s.shape), form == "exponential", v.data_ptr(), _workers(s)
    )
    check(done, "squash")
    return v


def squash_bwd(grad_v: Tensor, s: Tensor, form: str) -> Tensor:
    """Gradient of squash, (N, D)."""
    if s.numel() == 0:
        return _torch_path.squash_bwd(grad_v, s, form)
    grad_v, s = grad_v.to(s.dtype).contiguous(), s.contiguous()
    grad_s = torch.empty_like(s)
    done = function("squash_bwd", s.dtype, "pppipi")(
        grad_v.data_ptr(),
        s.data_ptr(),
        sizes(*s.shape),
        form == "exponential",
        grad_s.data_ptr(),
        _workers(s),
    )
    check(done, "squash")
    return grad_s


def _workers(s: Tensor) -> int:
    """A row costs its products, and a root and divisions that take as long as about 40 more."""
    return workers(s.shape[0] * (s.shape[1] + 40))
