"""The routing loop, forward and backward, over any prediction vectors.

The logits of iteration t are û·V⁽ᵗ⁻¹⁾ with V⁽ᵗ⁾ = Σ_{k≤t} v⁽ᵏ⁾, so it is a pass with these poses.
"""

from itertools import accumulate

import torch
from torch import Tensor

from tritoncaps._torch_path._passes import OfCapsules, Passes
from tritoncaps._torch_path.squash import squash_bwd, squash_fwd


def route(
    passes: Passes,
    pose_bias: Tensor | None,
    iterations: int,
    output: str,
    return_coupling: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """v or s (B, J, D), the last coupling (B, I, J) or an empty tensor, all s⁽ᵗ⁾ (r, B, J, D)."""
    B, I, J, D = passes.shape
    sums = passes.like.new_empty(iterations, B, J, D)
    coupling = passes.like.new_empty((B, I, J) if return_coupling else (0,), dtype=dtype)
    V: Tensor | None = None
    for t, s in enumerate(sums):
        is_last = t == iterations - 1
        s.copy_(passes.weighted_sum(V, coupling=coupling if is_last and return_coupling else None))
        if pose_bias is not None:
            s += pose_bias
        v = s.clone() if is_last and output == "s" else squash_fwd(s, "quadratic")
        V = v if V is None else V + v
    return v.to(dtype), coupling, sums


def route_backward(
    passes: Passes,
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    sums: Tensor,
    gradient: str,
    output: str,
    use: OfCapsules,
    prior: Tensor | None,
    pose_bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Hand dû to `use`, and return the gradients of the prior, (I, J), and the pose bias, (J, D).

    First the loop is walked back, one pass for each iteration but the first, until every ds⁽ᵗ⁾ is
    known. Then one pass gives dû_ij = Σ_t (c⁽ᵗ⁾_ij ds⁽ᵗ⁾_j + db⁽ᵗ⁾_ij V⁽ᵗ⁻¹⁾_j). With
    `gradient="last"` it has the terms of the last iteration alone, without db.
    """
    poses = [None, *accumulate(squash_fwd(s, "quadratic") for s in sums[:-1])]
    first = len(sums) - 1 if gradient == "last" else 0
    grad_s: list[Tensor] = []
    grad_out = grad_v.to(sums.dtype)
    for t in reversed(range(first, len(sums))):
        is_last = t == len(sums) - 1
        squashed = output == "v" or not is_last
        ds = squash_bwd(grad_out, sums[t], "quadratic") if squashed else grad_out
        grad_s.insert(0, ds)
        if t > first:
            share = torch.zeros_like(ds)  # of dV⁽ᵗ⁻¹⁾
            passes.backward([poses[t]], [ds], grad_coupling if is_last else None, grad_pose=share)
            grad_out = share if is_last else grad_out + share
    is_full = gradient == "full"
    grad_prior = (
        None if prior is None else torch.zeros_like(prior, memory_format=torch.contiguous_format)
    )
    passes.backward(
        poses[first:], grad_s, grad_coupling, use, through_coupling=is_full, grad_prior=grad_prior
    )
    if pose_bias is None:
        return grad_prior, None
    return grad_prior, torch.stack(grad_s).sum(dim=(0, 1)).to(pose_bias.dtype)
