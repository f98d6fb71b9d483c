"""Prediction vectors and routing fused: some images at a time, or some input capsules."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tritoncaps._torch_path._chunks import chunk_gradients, route_chunks
from tritoncaps._torch_path._images import image_gradients, route_images
from tritoncaps._torch_path._slices import accumulation_dtype, chunk_bytes, group_bytes
from tritoncaps._torch_path.prediction_vectors import predict


def capsule_routing_fwd(
    u: Tensor, weight: Tensor, prior: Tensor | None, iterations: int, return_coupling: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """v (B, J, D), the last coupling (B, I, J) or an empty tensor, and all s⁽ᵗ⁾ (r, B, J, D)."""
    dtype = accumulation_dtype(u.dtype)
    size = group_size(u, weight.shape, backward=False)
    if size == 0:
        v, coupling, sums = route_chunks(u, weight, prior, iterations, return_coupling)
    else:
        exact = u.to(dtype), weight.to(dtype)
        v, coupling, sums = route_images(
            partial(_votes_of, *exact),
            (*u.shape[:2], *weight.shape[2:]),
            size,
            prior,
            iterations,
            return_coupling,
            exact[0],
        )
    return v.to(u.dtype), coupling.to(u.dtype), sums


def _votes_of(u: Tensor, weight: Tensor, images: slice, out: Tensor) -> Tensor:
    return predict(u[images], weight, out)


def group_size(u: Tensor, weight_shape: Sequence[int], backward: bool) -> int:
    """How many images to route at once; 0 where it is better to walk over the input capsules.

    The temporaries of a group of images are D wide; those of a chunk of capsules are P wide, but
    made anew in each iteration. A group reads the weight, and for that wants about P images, whose
    prediction vectors are as large as the weight; a chunk wants many images, its columns.
    """
    B, (I, P, J, D) = len(u), weight_shape
    image_bytes = I * J * D * accumulation_dtype(u.dtype).itemsize
    in_level_2, in_level_3 = (most(u.device) // image_bytes for most in (chunk_bytes, group_bytes))
    many = max(P, 8)
    enough = math.ceil(many / 2)
    room = max(in_level_2, min(in_level_3, many))
    is_narrow = D <= (P if backward else 2 * P)  # noqa: SIM300
    if in_level_2 >= B or (room >= enough and (is_narrow or 2 * many >= B)):
        size = room
    elif many >= B:
        size = enough
    else:
        return 0
    return max(1, min(B, size))


def capsule_routing_bwd(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    sums: Tensor,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of u, (B, I, P), of the weight, (I, P, J, D), and of the prior, (I, J)."""
    inputs = (grad_v, grad_coupling, u, weight, prior, sums, full)
    if size := group_size(u, weight.shape, backward=True):
        grad_u, grad_weight, grad_prior = _gradients_by_images(*inputs, size)
    else:
        grad_u, grad_weight, grad_prior = chunk_gradients(*inputs)
    return (
        grad_u.to(u.dtype),
        grad_weight.to(weight.dtype),
        None if grad_prior is None else grad_prior.to(u.dtype),
    )


def _gradients_by_images(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    sums: Tensor,
    full: bool,
    size: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """du_i = Σ_j W_ij dû_ij and dW_ij = Σ_b u_i ⊗ dû_ij, `size` images at a time."""
    exact = u.to(sums.dtype), weight.to(sums.dtype)
    grad_u = torch.empty_like(exact[0], memory_format=torch.contiguous_format)
    grad_weight = exact[1].new_zeros(weight.shape)
    grad_prior = None if prior is None else torch.zeros_like(prior, dtype=sums.dtype)
    rows = exact[1].flatten(2)  # (I, P, J·D)
    for images, capsules, grad_votes in image_gradients(
        partial(_votes_of, *exact),
        (*u.shape[:2], *weight.shape[2:]),
        size,
        grad_v,
        grad_coupling,
        prior,
        sums,
        full,
        grad_prior,
    ):
        grad = grad_votes.flatten(2)  # (C, n, J·D)
        grad_u[images, capsules] = torch.bmm(grad, rows[capsules].transpose(1, 2)).transpose(0, 1)
        poses = exact[0][images, capsules].permute(1, 2, 0)  # (C, P, n)
        grad_weight[capsules].flatten(2).baddbmm_(poses, grad)
    return grad_u, grad_weight, grad_prior
