"""The routing loop, forward and backward, however the prediction vectors are sliced."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from tritoncaps._torch_path.squash import squash_bwd, squash_fwd


def route(weighted_sum: Callable[[int, Tensor | None], Tensor], sums: Tensor) -> Tensor:
    """Run the iterations, write every s⁽ᵗ⁾ to `sums`, (r, ..., D), and return v⁽ʳ⁾, (..., D).

    `weighted_sum(t, V)` returns s⁽ᵗ⁾ given V⁽ᵗ⁻¹⁾. t counts from 0, and V⁽⁰⁾ is None.
    """
    V: Tensor | None = None
    for t in range(len(sums)):
        sums[t] = weighted_sum(t, V)
        v = squash_fwd(sums[t], "quadratic")
        V = v if V is None else V + v
    return v


def route_backward(
    grad_v: Tensor,
    sums: Tensor,
    gradient: str,
    step: Callable[[int, Tensor | None, Tensor], Tensor | None],
) -> None:
    """Walk the iterations backwards, or only the last one with `gradient="last"`.

    `step(t, V, grad_s)` is given V⁽ᵗ⁻¹⁾ and ds⁽ᵗ⁾. It adds the share of iteration t to the
    gradients of the inputs. It returns Σ_i db_ij û_ij, its share of dV⁽ᵗ⁻¹⁾, or None for the first
    iteration.
    """
    totals = [None, *accumulate(squash_fwd(s, "quadratic") for s in sums[:-1])]
    grad_out = grad_v.to(sums.dtype)
    for t in reversed(range(len(sums))):
        grad_s = squash_bwd(grad_out, sums[t], "quadratic")
        share = step(t, totals[t], grad_s)
        if share is None or gradient == "last":
            return
        grad_out = share if t == len(sums) - 1 else grad_out + share


def coupling_gradient(c: Tensor, grad_c: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
    """db = c∘(dc − Σ_j c∘dc), the gradient of the softmax over the output capsules."""
    weighted = torch.mul(c, grad_c, out=out)
    return torch.sub(grad_c, weighted.sum(dim=dim, keepdim=True), out=out).mul_(c)
