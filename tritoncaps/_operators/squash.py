"""`tritoncaps::squash`, along the last axis."""

import math

from torch import Tensor

from tritoncaps import _torch_path, reference
from tritoncaps._operators._dispatch import run
from tritoncaps._operators._register import register


def _forward(s: Tensor, form: str) -> Tensor:
    return run(_torch_path.squash_fwd, _as_rows(s), form).view(s.shape)


def _backward(grad_v: Tensor, s: Tensor, form: str) -> Tensor:
    return run(_torch_path.squash_bwd, _as_rows(grad_v), _as_rows(s), form).view(s.shape)


def _as_rows(s: Tensor) -> Tensor:
    """(..., D) → (N, D). reshape(-1, D) would fail for D = 0."""
    return s.reshape(math.prod(s.shape[:-1]), s.shape[-1])


squash = register(
    "squash",
    _forward,
    _backward,
    reference=reference.squash,
    inputs={"s": "... D"},
    outputs={"v": "... D"},
)
