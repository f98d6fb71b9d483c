"""Routing by agreement in the patches of a grid, which are read where they lie.

The kernels are those of `fused_dynamic_routing`. `_patches.py` says where they read.
"""

from torch import Tensor

from tritoncaps.kernels._launch import device_of
from tritoncaps.kernels._patches import Patches
from tritoncaps.kernels.fused_dynamic_routing import (
    fused_dynamic_routing_bwd,
    fused_dynamic_routing_fwd,
)


def conv_dynamic_routing_fwd(
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    iterations: int,
    stride: int,
    leaky: bool,
    output: str,
    return_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Route each patch of a grid.

    Args:
        u: the grid, shape (N, H, W, C, P), any strides.
        weight: shape (K, K, C, P, J, D), any strides, dtype of `u`.
        prior: initial logits, shape (K, K, C, J), or None for zeros.
        stride: the step between patches.
        pose_bias, iterations, leaky, output, return_coupling: as for `fused_dynamic_routing_fwd`.

    Returns:
        v or s (N, H', W', J, D); the coupling (N, H', W', K, K, C, J), or an empty tensor; and
        every weighted sum (iterations, N, H', W', J, D) in the accumulation type.
    """
    patches = Patches(u, len(weight), stride)
    positions = len(u), *patches.size
    v, coupling, sums = fused_dynamic_routing_fwd(
        patches, weight.flatten(0, 2), None if prior is None else prior.flatten(0, 2), pose_bias,
        iterations, leaky, output, return_coupling,
    )  # fmt: skip
    if return_coupling:
        coupling = coupling.view(*positions, *weight.shape[:3], weight.shape[4])
    return v.unflatten(0, positions), coupling, sums.unflatten(1, positions)


def conv_dynamic_routing_bwd(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    sums: Tensor,
    stride: int,
    leaky: bool,
    gradient: str,
    output: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of u, the weight, the prior and the pose bias (None where there is none).

    Args:
        grad_v: shape (N, H', W', J, D), any strides.
        grad_coupling: shape (N, H', W', K, K, C, J), any strides, or None.
        u, weight, prior, pose_bias, stride, leaky, output: as given to `conv_dynamic_routing_fwd`.
        sums: as returned by it, any strides.
        gradient: as for `fused_dynamic_routing_bwd`.
    """
    patches = Patches(u, len(weight), stride)
    grad_patches, grad_weight, grad_prior, grad_pose_bias = fused_dynamic_routing_bwd(
        grad_v.flatten(0, 2),
        None if grad_coupling is None else grad_coupling.flatten(3, 5).flatten(0, 2),
        patches, weight.flatten(0, 2), None if prior is None else prior.flatten(0, 2), pose_bias,
        sums.flatten(1, 3), leaky, gradient, output,
    )  # fmt: skip
    with device_of(u):
        grad_u = patches.add(grad_patches)
    if prior is not None and grad_prior is not None:
        grad_prior = grad_prior.view(prior.shape)
    return grad_u, grad_weight.view(weight.shape), grad_prior, grad_pose_bias
