"""The routing loop, forward and backward, over any prediction vectors.

The logits of iteration t are û·V⁽ᵗ⁻¹⁾ with V⁽ᵗ⁾ = Σ_{k≤t} v⁽ᵏ⁾, so it is a pass with these poses.
"""

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
    sums = passes.like.new_zeros(iterations, B, J, D)
    coupling = passes.like.new_empty((B, I, J) if return_coupling else (0,), dtype=dtype)
    V: Tensor | None = None
    for t, s in enumerate(sums):
        is_last = t == iterations - 1
        passes.add_weighted_sum(s, V, coupling=coupling if is_last and return_coupling else None)
        if pose_bias is not None:
            s += pose_bias
        if not is_last:
            V = squash_fwd(s, "quadratic") if V is None else V.add_(squash_fwd(s, "quadratic"))
    result = s.clone() if output == "s" else squash_fwd(s, "quadratic")
    return result.to(dtype), coupling, sums


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
    r, B, J, D = sums.shape
    vectors = sums.new_empty(B, J, 2 * r - 1, D)  # V⁽¹⁾, ..., V⁽ʳ⁻¹⁾, ds⁽¹⁾, ..., ds⁽ʳ⁾
    for t in range(r - 1):
        vectors[:, :, t] = squash_fwd(sums[t], "quadratic")
        if t > 0:
            vectors[:, :, t] += vectors[:, :, t - 1]
    is_full = gradient == "full"
    first = 0 if is_full else r - 1
    grad_out = grad_v.to(sums.dtype)
    for t in reversed(range(first, r)):
        is_last = t == r - 1
        squashed = output == "v" or not is_last
        vectors[:, :, r - 1 + t] = (
            squash_bwd(grad_out, sums[t], "quadratic") if squashed else grad_out
        )
        if is_last:  # from here on, dV⁽ᵗ⁾ of all later iterations
            grad_out = torch.zeros_like(sums[t])
        if t > first:
            of_pass = vectors[:, :, t - 1 :: r]  # V⁽ᵗ⁻¹⁾ and ds⁽ᵗ⁾
            passes.backward(of_pass, 1, grad_coupling if is_last else None, grad_pose=grad_out)
    if not is_full:
        vectors = vectors[:, :, max(r - 2, 0) :: r]
    grad_prior = None if prior is None else zeros_like(prior)
    passes.backward(
        vectors, r - first, grad_coupling, use, through_coupling=is_full, grad_prior=grad_prior
    )
    if pose_bias is None:
        return grad_prior, None
    return grad_prior, vectors[:, :, first - r :].sum(dim=(0, 2)).to(pose_bias.dtype)


def zeros_like(x: Tensor) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format)
