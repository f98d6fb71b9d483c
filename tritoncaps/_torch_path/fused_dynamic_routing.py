"""Prediction vectors and routing in one: a few images or a few input capsules at a time."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tritoncaps._torch_path._chunks import chunk_gradients, route_chunks
from tritoncaps._torch_path._images import (
    PredictionVectors,
    group_width,
    image_gradients,
    route_images,
)
from tritoncaps._torch_path._precision import accumulation_dtype
from tritoncaps._torch_path._slices import (
    chunk_bytes,
    even_size,
    group_bytes,
    length,
    view,
)
from tritoncaps._torch_path.prediction_vectors import predict


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
    """v or s (B, J, D), the last coupling (B, I, J) or an empty tensor, all s⁽ᵗ⁾ (r, B, J, D)."""
    size = group_size(u, weight.shape, iterations, backward=False)
    options = (prior, pose_bias, iterations, leaky, output, return_coupling)
    if size == 0:
        return route_chunks(u, weight, *options)
    (B, I, _), (_, _, J, D) = u.shape, weight.shape
    dtype = accumulation_dtype(u.dtype)
    u_hat_of = predicted(u.to(dtype), weight.to(dtype).flatten(2), J, size)
    return route_images(u_hat_of, (B, I, J, D), size, *options, like=u)


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
    """Gradients of u, (B, I, P), the weight, (I, P, J, D), the prior, (I, J), and the pose bias.

    By images: du_i = Σ_j W_ij dû_ij and dW_ij = Σ_b u_i ⊗ dû_ij.
    """
    size = group_size(u, weight.shape, len(sums) if gradient == "full" else 1, backward=True)
    if size == 0:
        options = (sums, leaky, gradient, output)
        return chunk_gradients(grad_v, grad_coupling, u, weight, prior, pose_bias, *options)
    (B, I, P), (_, _, J, D) = u.shape, weight.shape
    raised, rows = u.to(sums.dtype), weight.to(sums.dtype).flatten(2)  # (I, P, J·D)
    grad_u, grad_rows = u.new_empty(B, I, P), rows.new_zeros(I, P, J * D)
    grad_prior, grad_pose_bias = (
        None if x is None else sums.new_zeros(x.shape) for x in (prior, pose_bias)
    )
    given = (grad_v, grad_coupling, prior, sums, leaky, gradient, output)
    u_hat_of = predicted(raised, rows, J, size)
    for images, capsules, grad_u_hat in image_gradients(
        u_hat_of, (B, I, J, D), size, *given, grad_prior, grad_pose_bias
    ):
        grad = grad_u_hat.flatten(2)  # (C, n, J·D)
        grad_u[images, capsules] = torch.bmm(grad, rows[capsules].transpose(1, 2)).transpose(0, 1)
        grad_rows[capsules].baddbmm_(raised[images, capsules].permute(1, 2, 0), grad)
    return (
        grad_u,
        grad_rows.view(weight.shape).to(u.dtype),
        None if grad_prior is None else grad_prior.to(u.dtype),
        None if grad_pose_bias is None else grad_pose_bias.to(u.dtype),
    )


def predicted(u: Tensor, rows: Tensor, J: int, size: int) -> PredictionVectors:
    """Compute the prediction vectors of up to `size` images at a time. `rows` is (I, P, J·D)."""
    I, _, JD = rows.shape
    buffer = u.new_empty(I * size * JD)

    def u_hat_of(images: slice) -> Tensor:
        return predict(u[images], rows, view(buffer, (I, length(images), J, JD // J)))

    return u_hat_of


def group_size(u: Tensor, weight_shape: Sequence[int], iterations: int, backward: bool) -> int:
    """How many images to route at once, or 0 to walk over the input capsules instead.

    A group of images has temporaries that are D wide, and computes its prediction vectors once. A
    chunk of capsules has temporaries that are P wide, and recomputes them in each iteration. A
    group reads the whole weight, which pays off from about P images on. A chunk has the images as
    its columns and is fast with many of them. So the rule is, in this order:

    - 0 for a single iteration, or the gradient of the last one only, with at least P and 8 images.
    - All images, if the level-2 caches hold the batch.
    - Up to 3P/2 or 12 images, if the level-3 cache holds n of them with n·r ≥ 18, because products
      of few rows are slow, even if computed once. This also needs D ≤ r·P (in the backward
      D < (r − 1)·P), or at most 2P images.
    - 16 for three iterations or more, if P is at least 16 and at least D.
    - Half of P, if there are at most P images.
    - Otherwise 0.
    """
    B, (I, P, J, D) = len(u), weight_shape
    wanted = max(P, 8)
    if iterations == 1 and wanted <= B:
        return 0
    width = group_width(D, iterations, backward)
    image_bytes = I * J * width * accumulation_dtype(u.dtype).itemsize
    near, shared = (most(u.device) // image_bytes for most in (chunk_bytes, group_bytes))
    fitting = max(near, min(shared, 3 * wanted // 2))
    is_narrow = (iterations - 1) * P > D if backward else iterations * P >= D
    if near >= B or (fitting * iterations >= 18 and (is_narrow or 2 * wanted >= B)):
        size = fitting
    elif max(D, 16) <= P and iterations >= 3:
        size = 16
    elif P >= B:
        size = math.ceil(P / 2)
    else:
        return 0
    return even_size(B, size)
