"""The routing loop, forward and backward, however the prediction vectors are sliced."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from tritoncaps._torch_path.squash import squash_bwd, squash_fwd


def route(
    weighted_sum: Callable[[int, Tensor | None], Tensor],
    sums: Tensor,
    pose_bias: Tensor | None,
    output: str,
) -> Tensor:
    """Run the iterations, write every s⁽ᵗ⁾ to `sums`, (r, ..., D), and return v⁽ʳ⁾, (..., D).

    `weighted_sum(t, V)` returns Σ_i c_ij û_ij given V⁽ᵗ⁻¹⁾. t counts from 0, and V⁽⁰⁾ is None.
    `pose_bias` broadcasts to s. With `output="s"`, s⁽ʳ⁾ is returned.
    """
    V: Tensor | None = None
    for t in range(len(sums)):
        sums[t] = weighted_sum(t, V)
        if pose_bias is not None:
            sums[t] += pose_bias
        if output == "s" and t == len(sums) - 1:
            return sums[t].clone()
        v = squash_fwd(sums[t], "quadratic")
        V = v if V is None else V + v
    return v


def route_backward(
    grad_v: Tensor,
    sums: Tensor,
    gradient: str,
    output: str,
    step: Callable[[int, Tensor | None, Tensor], Tensor | None],
    grad_pose_bias: Tensor | None,
) -> None:
    """Walk the iterations backwards, or only the last one with `gradient="last"`.

    `step(t, V, grad_s)` is given V⁽ᵗ⁻¹⁾ and ds⁽ᵗ⁾. It adds the share of iteration t to the
    gradients of the inputs. It returns Σ_i db_ij û_ij, its share of dV⁽ᵗ⁻¹⁾, or None for the first
    iteration. The gradient of the pose bias, Σ_t Σ_b ds⁽ᵗ⁾, is added to `grad_pose_bias`, (J, D).
    """
    totals = [None, *accumulate(squash_fwd(s, "quadratic") for s in sums[:-1])]
    grad_out = grad_v.to(sums.dtype)
    for t in reversed(range(len(sums))):
        is_last = t == len(sums) - 1
        squashed = output == "v" or not is_last
        grad_s = squash_bwd(grad_out, sums[t], "quadratic") if squashed else grad_out
        if grad_pose_bias is not None:
            grad_pose_bias += grad_s.reshape(-1, *grad_pose_bias.shape).sum(dim=0)
        share = step(t, totals[t], grad_s)
        if share is None or gradient == "last":
            return
        grad_out = share if is_last else grad_out + share


def leaky_softmax(b: Tensor, leaky: bool, dim: int, out: Tensor | None = None) -> Tensor:
    """Softmax over the output capsules, and over an orphan class with logit 0 if leaky."""
    if not leaky:
        return torch.softmax(b, dim=dim, out=out)
    top = b.amax(dim=dim, keepdim=True).clamp_(min=0)
    shares = torch.sub(b, top, out=out).exp_()
    return shares.div_(shares.sum(dim=dim, keepdim=True).add_(top.neg_().exp_()))


def coupling_gradient(c: Tensor, grad_c: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
    """db = c∘(dc − Σ_j c∘dc), the gradient of the softmax over the output capsules."""
    weighted = torch.mul(c, grad_c, out=out)
    return torch.sub(grad_c, weighted.sum(dim=dim, keepdim=True), out=out).mul_(c)
