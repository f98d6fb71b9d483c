"""Routing by agreement in the patches of a grid."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tritoncaps._torch_path._images import Gradients, Images
from tritoncaps._torch_path.fused_dynamic_routing import (
    fused_dynamic_routing_bwd,
    fused_dynamic_routing_fwd,
)


def in_patches(forward: Callable[..., Any], backward: Callable[..., Any]) -> tuple[Any, Any]:
    """The convolution by `fused_dynamic_routing` of a backend: forward and backward."""

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
        """v or s (B, H', W', J, D), the last coupling (B, H', W', K, K, C, J), all s⁽ᵗ⁾."""
        images = Images(u, len(weight), stride)
        matrices, logits = weight.flatten(0, 2), _flat(prior)
        options = pose_bias, iterations, leaky, output, return_coupling

        def route(part: slice) -> Any:
            return forward(images.patches(u, part), matrices, logits, *options)

        v, coupling, sums = images.routed(route, axes=(0, 0, 1))
        if return_coupling:
            coupling = coupling.unflatten(3, weight.shape[:3])
        return v, coupling, sums

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
        """Gradients of u, the weight, the prior and the pose bias."""
        images = Images(u, len(weight), stride)
        matrices, logits = weight.flatten(0, 2), _flat(prior)
        grads = Gradients(u, weight, prior, pose_bias)
        if grad_coupling is not None:
            grad_coupling = grad_coupling.flatten(3, 5)
        for part in images.slices:
            of_patches, *of_rest = backward(
                grad_v[part].flatten(0, 2),
                None if grad_coupling is None else grad_coupling[part].flatten(0, 2),
                images.patches(u, part),
                matrices,
                logits,
                pose_bias,
                sums[:, part].flatten(1, 3),
                leaky,
                gradient,
                output,
            )
            images.add(of_patches, grads[0], part)
            grads.add(1, of_rest)
        return grads.lowered()

    return conv_dynamic_routing_fwd, conv_dynamic_routing_bwd


def _flat(prior: Tensor | None) -> Tensor | None:
    return None if prior is None else prior.flatten(0, 2)


conv_dynamic_routing_fwd, conv_dynamic_routing_bwd = in_patches(
    fused_dynamic_routing_fwd, fused_dynamic_routing_bwd
)
