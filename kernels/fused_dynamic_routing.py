"""Fused routing by agreement: r passes over (u, W). The prediction vectors û = W u are not stored.

Each pass is a `routing_pass` with the running sum V⁽ᵗ⁻¹⁾ as its pose. After a pass, a small kernel
finishes its sums and turns them into V.

The backward starts with dv⁽ʳ⁾ = grad_v and dV⁽ʳ⁾ = 0. ds⁽ᵗ⁾ is the gradient of squash at s⁽ᵗ⁾ for
dv⁽ᵗ⁾, and `routing_pass` derives db⁽ᵗ⁾ and c⁽ᵗ⁾ for the pose V⁽ᵗ⁻¹⁾. Then

    dV⁽ᵗ⁻¹⁾ = dV⁽ᵗ⁾ + Σ_i db⁽ᵗ⁾_ij û_ij,  dv⁽ᵗ⁻¹⁾ = dV⁽ᵗ⁻¹⁾   v⁽ᵗ⁻¹⁾ is in every later V
    dû_ij = Σ_t (c⁽ᵗ⁾_ij ds⁽ᵗ⁾_j + db⁽ᵗ⁾_ij V⁽ᵗ⁻¹⁾_j)
    dprior_ij = Σ_t Σ_b db⁽ᵗ⁾_ij

Passes run from the last iteration to the first. After them, dû is contracted at once.
"""

import torch
from torch import Tensor

from tritoncaps.kernels._launch import accumulation_dtype, device_of
from tritoncaps.kernels._one_product import OneProduct
from tritoncaps.kernels._patches import Patches
from tritoncaps.kernels._slots import write_pull_back, write_result
from tritoncaps.kernels._two_products import TwoProducts
from tritoncaps.kernels.routing_pass import backward_passes, forward_passes

# Launchers ----------------------------------------------------------------------------------------


def _route(
    passes: OneProduct | TwoProducts,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    v: Tensor,
    coupling: Tensor,
    sums: Tensor,
    leaky: bool,
    output: str,
) -> None:
    """Write the results of `fused_dynamic_routing_fwd`, pass after pass."""
    V = torch.empty_like(sums[0])
    last = len(sums) - 1
    for step, s in enumerate(sums):
        is_last = step == last
        saved = coupling if is_last and coupling.numel() else None
        passes.run(V if step > 0 else None, prior, None, saved, leaky=leaky)
        write_result(
            passes.slots, pose_bias, s, v if is_last else V,
            uniform=step == 0 and prior is None,
            leaky=leaky,
            output=output if is_last else "v",
            V=V if 0 < step < last else None,
        )  # fmt: skip


def fused_dynamic_routing_fwd(
    u: Tensor | Patches,
    weight: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    iterations: int,
    leaky: bool,
    output: str,
    return_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Route the prediction vectors W u without storing them.

    Args:
        u: input poses, shape (B, I, P), any strides, or the patches of a grid.
        weight: shape (I, P, J, D), any strides, dtype of `u`.
        prior: initial logits, shape (I, J), or None for zeros.
        pose_bias: added to every sum, shape (J, D), or None for zeros.
        iterations: the number of weighted sums, at least 1.
        leaky: whether an orphan class with logit 0 takes part in the softmax.
        output: "v", or "s" to return the last sum instead of its squash.
        return_coupling: whether to write the coupling of the last iteration.

    Returns:
        v or s (B, J, D); the coupling (B, I, J), or an empty tensor; and every weighted sum
        (iterations, B, J, D) in the accumulation type, for `fused_dynamic_routing_bwd`.
    """
    B, I, _ = u.shape
    _, _, J, D = weight.shape
    dtype = accumulation_dtype(u.dtype)
    v = u.new_empty(B, J, D)
    coupling = u.new_empty((B, I, J) if return_coupling else (0,))
    sums = u.new_empty((iterations, B, J, D), dtype=dtype)
    if B == 0 or J == 0:
        return v.zero_(), coupling, sums.zero_()

    pose_bias = None if pose_bias is None else pose_bias.contiguous()
    with device_of(u):
        if prior is None and iterations == 1:
            coupling.fill_(1 / (J + leaky))
        _route(forward_passes(u, weight), prior, pose_bias, v, coupling, sums, leaky, output)
    return v, coupling, sums


def fused_dynamic_routing_bwd(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor | Patches,
    weight: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    sums: Tensor,
    leaky: bool,
    gradient: str,
    output: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of u, the weight, the prior and the pose bias (None where there is none).

    Args:
        grad_v: shape (B, J, D), any strides.
        grad_coupling: shape (B, I, J), any strides, or None. Ignored unless `gradient` is "full".
        u, weight, prior, pose_bias, leaky, output: as given to `fused_dynamic_routing_fwd`.
        sums: as returned by `fused_dynamic_routing_fwd`, any strides: a `vmap` takes slices of it.
        gradient: "full" differentiates through every iteration. "last" treats the last coupling as
            a constant.
    """
    iterations, B, J, _ = sums.shape
    sums = sums.contiguous()
    full = gradient == "full"
    grad_u = u.new_empty(u.shape)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_prior, grad_pose_bias = (
        None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format)
        for x in (prior, pose_bias)
    )
    if B == 0 or J == 0:
        return grad_u.zero_(), grad_weight.zero_(), grad_prior, grad_pose_bias

    first = 1 if full else iterations
    V, ds = sums.new_empty((2, iterations + 1 - first, *sums.shape[1:]))
    dV = torch.empty_like(V[0])
    # Copied if it is not contiguous, because its strides would cost the last free registers.
    grad_coupling = grad_coupling.contiguous() if grad_coupling is not None and full else None
    with device_of(u):
        passes = backward_passes(
            "fused_dynamic_routing", u, weight, prior, None,
            (grad_u, grad_weight, grad_prior, None),
            steps=len(ds),
            full=full,
            leaky=leaky,
        )  # fmt: skip
        filled = grad_v.contiguous()[None]
        for iteration in range(iterations, first - 1, -1):
            step = iteration - first
            write_pull_back(
                filled, sums, dV, V[step], ds[step],
                iteration=iteration,
                squashed=output == "v" or iteration < iterations,
            )  # fmt: skip
            pose = V[step] if iteration > 1 else None
            passes.run(step, pose, ds[step], grad_coupling if iteration == iterations else None)
            filled = passes.slots
        # Without a prior the first iteration has no logits.
        uniform = first == 1 and prior is None
        passes.contract(V, ds, grad_coupling, uniform=uniform)
        if grad_pose_bias is not None:
            grad_pose_bias.copy_(ds.sum((0, 1)))
    return grad_u, grad_weight, grad_prior, grad_pose_bias
