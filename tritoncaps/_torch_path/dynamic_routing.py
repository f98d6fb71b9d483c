"""Routing by agreement of prediction vectors in memory, a few images at a time."""

import torch
from torch import Tensor

from tritoncaps._torch_path._images import (
    PredictionVectors,
    group_width,
    image_gradients,
    route_images,
)
from tritoncaps._torch_path._precision import accumulation_dtype
from tritoncaps._torch_path._slices import even_size, group_bytes, length, view


def dynamic_routing_fwd(
    u_hat: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    iterations: int,
    leaky: bool,
    output: str,
    return_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """v or s (B, J, D), the last coupling (B, I, J) or an empty tensor, all s⁽ᵗ⁾ (r, B, J, D)."""
    size = group_size(u_hat, iterations, backward=False)
    u_hat_of = _laid_out(u_hat, size)
    options = (iterations, leaky, output, return_coupling)
    return route_images(u_hat_of, u_hat.shape, size, prior, pose_bias, *options, like=u_hat)


def dynamic_routing_bwd(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u_hat: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    sums: Tensor,
    leaky: bool,
    gradient: str,
    output: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of u_hat, (B, I, J, D), of the prior, (I, J), and of the pose bias, (J, D)."""
    size = group_size(u_hat, len(sums), backward=True)
    u_hat_of = _laid_out(u_hat, size)
    grad_u_hat = torch.empty_like(u_hat, memory_format=torch.contiguous_format)
    grad_prior, grad_pose_bias = (
        None if x is None else sums.new_zeros(x.shape) for x in (prior, pose_bias)
    )
    given = (grad_v, grad_coupling, prior, sums, leaky, gradient, output)
    for images, capsules, part in image_gradients(
        u_hat_of, u_hat.shape, size, *given, grad_prior, grad_pose_bias
    ):
        grad_u_hat[images, capsules] = part.transpose(0, 1)
    return (
        grad_u_hat,
        None if grad_prior is None else grad_prior.to(u_hat.dtype),
        None if grad_pose_bias is None else grad_pose_bias.to(u_hat.dtype),
    )


def group_size(u_hat: Tensor, iterations: int, backward: bool) -> int:
    """How many images to route at once: as many as fit the cache, and at least one."""
    B, I, J, D = u_hat.shape
    width = group_width(D, iterations, backward)
    image_bytes = I * J * width * accumulation_dtype(u_hat.dtype).itemsize
    return even_size(B, group_bytes(u_hat.device) // max(1, image_bytes))


def _laid_out(u_hat: Tensor, size: int) -> PredictionVectors:
    """Prediction vectors in the layout of a group, (I, n, J, D): a copy, except of one image."""
    _, I, J, D = u_hat.shape
    dtype = accumulation_dtype(u_hat.dtype)
    if size == 1 and dtype == u_hat.dtype and u_hat[:1].is_contiguous():
        return lambda images: u_hat[images].transpose(0, 1)
    buffer = u_hat.new_empty(I * size * J * D, dtype=dtype)

    def u_hat_of(images: slice) -> Tensor:
        return view(buffer, (I, length(images), J, D)).copy_(u_hat[images].transpose(0, 1))

    return u_hat_of
