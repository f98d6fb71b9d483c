"""Routing by agreement of prediction vectors in memory."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tritoncaps._torch_path._images import image_gradients, route_images
from tritoncaps._torch_path._slices import accumulation_dtype, group_bytes


def dynamic_routing_fwd(
    u_hat: Tensor, prior: Tensor | None, iterations: int, return_coupling: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """v (B, J, D), the last coupling (B, I, J) or an empty tensor, and all s⁽ᵗ⁾ (r, B, J, D)."""
    like = u_hat.new_empty(0, dtype=accumulation_dtype(u_hat.dtype))
    v, coupling, sums = route_images(
        partial(_laid_out, u_hat),
        u_hat.shape,
        images_at_once(u_hat.shape, like),
        prior,
        iterations,
        return_coupling,
        like,
    )
    return v.to(u_hat.dtype), coupling.to(u_hat.dtype), sums


def _laid_out(u_hat: Tensor, images: slice, out: Tensor) -> Tensor:
    """Prediction vectors as a group has them, (I, n, J, D): a copy, but of one image."""
    votes = u_hat[images].transpose(0, 1)
    if votes.dtype == out.dtype and votes.is_contiguous():
        return votes
    return out.copy_(votes)


def images_at_once(shape: Sequence[int], like: Tensor) -> int:
    """How many images' prediction vectors, (B, I, J, D), fit the cache together; at least one."""
    B, *each = shape
    image_bytes = max(1, math.prod(each)) * like.element_size()
    return max(1, min(B, group_bytes(like.device) // image_bytes))


def dynamic_routing_bwd(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u_hat: Tensor,
    prior: Tensor | None,
    sums: Tensor,
    full: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of u_hat, (B, I, J, D), and of the prior, (I, J)."""
    grad_u_hat = torch.empty_like(u_hat, memory_format=torch.contiguous_format)
    grad_prior = None if prior is None else torch.zeros_like(prior, dtype=sums.dtype)
    for images, capsules, grad_votes in image_gradients(
        partial(_laid_out, u_hat),
        u_hat.shape,
        images_at_once(u_hat.shape, sums),
        grad_v,
        grad_coupling,
        prior,
        sums,
        full,
        grad_prior,
    ):
        grad_u_hat[images, capsules] = grad_votes.transpose(0, 1)
    return grad_u_hat, None if grad_prior is None else grad_prior.to(u_hat.dtype)
