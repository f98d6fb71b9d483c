"""Fused routing by agreement: r passes over (u, W). The prediction vectors û = W u are not stored.

Each pass is a `routing_pass` with the running sum V⁽ᵗ⁻¹⁾ as its pose. The forward runs the passes
of `_one_product.py` where these serve. Otherwise, and in the backward, this file adds a prologue to
each launch, which finishes the sums of the previous pass and turns them into V.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritoncaps.kernels._launch import (
    accumulation_dtype,
    device_of,
    dot_precision,
    strides,
    target_of,
)
from tritoncaps.kernels._one_product import OneProduct, one_product
from tritoncaps.kernels._slots import advance_running_sum, pull_back, write_result
from tritoncaps.kernels.prediction_vectors import uniform_sums
from tritoncaps.kernels.routing_pass import (
    pass_backward,
    pass_forward,
    pass_launch,
    write_weight_gradient,
)


@triton.jit
def _routing_fwd_kernel(
    # pointers
    u_ptr, weight_ptr, prior_ptr, pose_bias_ptr,
    slots_ptr, next_slots_ptr, V_ptr, sums_ptr, coupling_ptr,
    # extents
    B, I, P, J, D, iteration, tiles,
    # strides
    stride_u_b, stride_u_i, stride_u_p,
    stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
    stride_prior_i, stride_prior_j,
    # meta-parameters
    HAS_V: tl.constexpr, HAS_PRIOR: tl.constexpr, HAS_POSE_BIAS: tl.constexpr, LEAKY: tl.constexpr,
    SAVE_COUPLING: tl.constexpr,
    SLOTS: tl.constexpr, UNIFORM: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Put one program's share of s⁽ᵗ⁾ in its slot.

    s⁽ᵗ⁾ = Σ_i c_ij û_ij with c = softmax_j(û·V⁽ᵗ⁻¹⁾ + prior).
    """
    first_b = tl.program_id(0).to(tl.int64) * BLOCK_B
    split = tl.program_id(1).to(tl.int64)
    slot_size = tl.cast(B, tl.int64) * J * D
    V_ptr += split * slot_size
    if HAS_V:
        advance_running_sum(
            slots_ptr, pose_bias_ptr, sums_ptr, V_ptr,
            first_b * J, tl.minimum(first_b + BLOCK_B, B) * J, slot_size, J, D, iteration,
            split == 0, SLOTS, UNIFORM, LEAKY, HAS_POSE_BIAS, BLOCK_ROWS, BLOCK_D,
        )  # fmt: skip
    pass_forward(
        u_ptr, weight_ptr, V_ptr, prior_ptr, u_ptr, next_slots_ptr + split * slot_size,
        coupling_ptr,
        first_b, split * tiles, tiles, B, I, P, J, D,
        stride_u_b, stride_u_i, stride_u_p,
        stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
        stride_prior_i, stride_prior_j, 0, 0,
        sums_ptr.dtype.element_ty, HAS_V, HAS_PRIOR, False, LEAKY, SAVE_COUPLING, PRECISION, GROUPS,
        BLOCK_B, BLOCK_I, BLOCK_P, BLOCK_D,
    )  # fmt: skip


# Backward -----------------------------------------------------------------------------------------
#
# Start with dv⁽ʳ⁾ = grad_v and dV⁽ʳ⁾ = 0. ds⁽ᵗ⁾ is the gradient of squash at s⁽ᵗ⁾ for dv⁽ᵗ⁾, and
# `routing_pass` derives db⁽ᵗ⁾ and c⁽ᵗ⁾ for the pose V⁽ᵗ⁻¹⁾. Then
#
#     dV⁽ᵗ⁻¹⁾ = dV⁽ᵗ⁾ + Σ_i db⁽ᵗ⁾_ij û_ij,  dv⁽ᵗ⁻¹⁾ = dV⁽ᵗ⁻¹⁾   v⁽ᵗ⁻¹⁾ is in every later V
#     dû_ij = Σ_t (c⁽ᵗ⁾_ij ds⁽ᵗ⁾_j + db⁽ᵗ⁾_ij V⁽ᵗ⁻¹⁾_j)
#     dprior_ij = Σ_t Σ_b db⁽ᵗ⁾_ij
#
# Passes run from the last iteration to the first. Pass t finishes dv⁽ᵗ⁾ in its prologue and adds to
# dV⁽ᵗ⁻¹⁾ and to du. One kernel then sums dW and dprior over all passes.


@triton.jit
def _routing_bwd_kernel(
    # pointers
    u_ptr, weight_ptr, prior_ptr, grad_coupling_ptr,
    slots_ptr, next_slots_ptr, V_ptr, ds_ptr,
    sums_ptr, saved_V_ptr, saved_ds_ptr, normaliser_ptr, delta_ptr, du_ptr, grad_u_ptr,
    # extents
    B, I, P, J, D, iteration, tiles,
    # strides
    stride_u_b, stride_u_i, stride_u_p,
    stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
    stride_prior_i, stride_prior_j,
    # meta-parameters
    IS_LAST: tl.constexpr, SQUASHED: tl.constexpr, FULL: tl.constexpr, HAS_V: tl.constexpr,
    HAS_PRIOR: tl.constexpr, LEAKY: tl.constexpr, HAS_GRAD_COUPLING: tl.constexpr,
    SLOTS: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Backward of one iteration: add to dV⁽ᵗ⁻¹⁾ and du, save log Σ_j exp and δ for every (b, i)."""
    first_b = tl.program_id(0).to(tl.int64) * BLOCK_B
    split = tl.program_id(1).to(tl.int64)
    slot_size = tl.cast(B, tl.int64) * J * D
    V_ptr += split * slot_size
    ds_ptr += split * slot_size
    next_slot_ptr = next_slots_ptr + split * slot_size
    pull_back(
        slots_ptr, sums_ptr, V_ptr, ds_ptr, next_slot_ptr, saved_V_ptr, saved_ds_ptr,
        first_b * J, tl.minimum(first_b + BLOCK_B, B) * J, slot_size, D, iteration, split == 0,
        not IS_LAST, SQUASHED, SLOTS, BLOCK_ROWS, BLOCK_D,
    )  # fmt: skip
    pass_backward(
        u_ptr, weight_ptr, V_ptr, ds_ptr, prior_ptr, u_ptr, grad_coupling_ptr, next_slot_ptr,
        normaliser_ptr, delta_ptr, du_ptr, grad_u_ptr,
        first_b, split * tiles, tiles, B, I, P, J, D,
        stride_u_b, stride_u_i, stride_u_p,
        stride_weight_i, stride_weight_p, stride_weight_j, stride_weight_d,
        stride_prior_i, stride_prior_j, 0, 0,
        sums_ptr.dtype.element_ty, not IS_LAST, FULL, HAS_V, HAS_PRIOR, False, LEAKY,
        HAS_GRAD_COUPLING, PRECISION, GROUPS, BLOCK_B, BLOCK_I, BLOCK_P, BLOCK_D,
    )  # fmt: skip


# Launchers ----------------------------------------------------------------------------------------


def _route(
    passes: OneProduct,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    v: Tensor,
    coupling: Tensor,
    sums: Tensor,
    leaky: bool,
    output: str,
) -> None:
    """Write the results of `fused_dynamic_routing_fwd` by passes that form every û_ij once."""
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


def _route_in_two_sweeps(
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    v: Tensor,
    coupling: Tensor,
    sums: Tensor,
    leaky: bool,
    output: str,
) -> None:
    """Write the results of `fused_dynamic_routing_fwd` by passes of two sweeps over j."""
    B, I, P = u.shape
    _, _, J, D = weight.shape
    target = target_of(u)
    launch, splits, tiles = pass_launch(
        "fused_dynamic_routing", I, P, J, D, u.dtype, target, backward=False, prologue=True
    )
    # Two buffers take turns, because a pass reads every slot of the previous iteration.
    slots = sums.new_empty(2, splits, B, J, D)
    V = sums.new_empty(splits, B, J, D)
    filled, uniform, first = slots[:1, 0], False, 1
    if prior is None:
        filled, uniform, first = uniform_sums(u, weight).unsqueeze(0), True, 2
    for iteration in range(first, len(sums) + 1):
        next_slots = slots[iteration % 2]
        _routing_fwd_kernel[(triton.cdiv(B, launch["BLOCK_B"]), splits)](
            # In place of a missing tensor, a kernel gets u, which it does not touch.
            u, weight, *(u if tensor is None else tensor for tensor in (prior, pose_bias)),
            filled, next_slots, V, sums, coupling,
            B, I, P, J, D, iteration, tiles,
            *u.stride(), *weight.stride(), *strides(prior, 2),
            HAS_V=iteration > 1,
            HAS_PRIOR=prior is not None,
            HAS_POSE_BIAS=pose_bias is not None,
            LEAKY=leaky,
            SAVE_COUPLING=coupling.numel() > 0 and iteration == len(sums),
            SLOTS=filled.shape[0],
            UNIFORM=uniform,
            PRECISION=dot_precision(u.dtype, target),
            **launch,
        )  # fmt: skip
        filled, uniform = next_slots, False
    write_result(filled, pose_bias, sums[-1], v, uniform=uniform, leaky=leaky, output=output)


def fused_dynamic_routing_fwd(
    u: Tensor,
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
        u: input poses, shape (B, I, P), any strides.
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
        given = prior, pose_bias, v, coupling, sums, leaky, output
        passes = one_product(u, weight)
        if passes is None:
            _route_in_two_sweeps(u, weight, *given)
        else:
            _route(passes, *given)
    return v, coupling, sums


def fused_dynamic_routing_bwd(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
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
    B, I, P = u.shape
    _, _, J, D = weight.shape
    iterations, sums = sums.shape[0], sums.contiguous()
    full = gradient == "full"
    grad_u = torch.empty_like(u, memory_format=torch.contiguous_format)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_prior, grad_pose_bias = (
        None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format)
        for x in (prior, pose_bias)
    )
    if B == 0 or J == 0:
        return grad_u.zero_(), grad_weight.zero_(), grad_prior, grad_pose_bias

    target = target_of(u)
    launch, splits, tiles = pass_launch(
        "fused_dynamic_routing", I, P, J, D, u.dtype, target, backward=True, prologue=True
    )
    slots = sums.new_empty(2, splits, B, J, D)
    V = sums.new_empty(splits, B, J, D)
    ds = torch.empty_like(V)
    saved_V = torch.empty_like(sums)
    saved_ds = torch.empty_like(sums)
    # Without a prior the first iteration has no logits.
    unlogged = 1 if prior is None else 0
    normaliser = sums.new_empty(iterations - unlogged, B, I)
    delta = torch.empty_like(normaliser)
    # du is summed over the passes in the accumulation type. The last pass writes it in u's dtype.
    du = grad_u if u.dtype == sums.dtype else torch.empty_like(grad_u, dtype=sums.dtype)
    # Copied if it is not contiguous, because its strides would cost the last free registers.
    grad_coupling = grad_coupling.contiguous() if grad_coupling is not None and full else None
    with device_of(u):
        filled = grad_v.contiguous().view(1, B, J, D)
        first = 1 if full else iterations
        for iteration in range(iterations, first - 1, -1):
            step = iteration - 1
            pairs = max(step - unlogged, 0)
            next_slots = slots[iteration % 2]
            _routing_bwd_kernel[(triton.cdiv(B, launch["BLOCK_B"]), splits)](
                u, weight,
                # In place of a missing tensor, a kernel gets u, which it does not touch.
                *(u if tensor is None else tensor for tensor in (prior, grad_coupling)),
                filled, next_slots, V, ds,
                sums, saved_V[step], saved_ds[step], normaliser[pairs:], delta[pairs:],
                du, grad_u if iteration == first else du,
                B, I, P, J, D, iteration, tiles,
                *u.stride(), *weight.stride(), *strides(prior, 2),
                IS_LAST=iteration == iterations,
                SQUASHED=output == "v" or iteration < iterations,
                FULL=full,
                HAS_V=iteration > 1,
                HAS_PRIOR=prior is not None,
                LEAKY=leaky,
                HAS_GRAD_COUPLING=grad_coupling is not None and iteration == iterations,
                SLOTS=filled.shape[0],
                PRECISION=dot_precision(u.dtype, target),
                **launch,
            )  # fmt: skip
            filled = next_slots
        write_weight_gradient(
            u, weight, prior, None, grad_coupling,
            (saved_V, saved_ds, normaliser, delta), (grad_weight, grad_prior, None),
            first_step=max(first - 1, 1),
            steps=iterations,
            full=full,
            leaky=leaky,
            without_pose=first == 1,
            unlogged=unlogged,
        )  # fmt: skip
        if grad_pose_bias is not None:
            grad_pose_bias.copy_(saved_ds[first - 1 :].sum((0, 1)))
    return grad_u, grad_weight, grad_prior, grad_pose_bias
