"""EM routing in the patches of a grid."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tritoncaps._torch_path._images import Gradients, Images
from tritoncaps._torch_path.em_routing import em_routing_bwd, em_routing_fwd


def in_patches(forward: Callable[..., Any], backward: Callable[..., Any]) -> tuple[Any, Any]:
    """The convolution by `em_routing` of a backend: forward and backward."""

    def conv_em_routing_fwd(
        poses: Tensor,
        activations: Tensor,
        weight: Tensor,
        beta_u: Tensor,
        beta_a: Tensor,
        iterations: int,
        temperature: Sequence[float],
        min_variance: float,
        stride: int,
        competition: str,
        gradient: str,
        return_assignment: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """v (B, H', W', J, R, Q), logits (B, H', W', J), the last assignment, the moments.

        The assignment is (B, H', W', K, K, C, J) or an empty tensor.
        """
        images = Images(poses, len(weight), stride)
        matrices = weight.flatten(0, 2)
        grid = [*images.size, len(weight), stride] if competition == "children" else []
        options = iterations, temperature, min_variance, grid, gradient, return_assignment

        def route(part: slice) -> Any:
            inputs = (images.patches(x, part) for x in (poses, activations))
            return forward(*inputs, matrices, beta_u, beta_a, *options)

        v, logits, assignment, *moments = images.routed(route, axes=(0, 0, 0, 1, 1, 1))
        if return_assignment:
            assignment = assignment.unflatten(3, weight.shape[:3])
        return v, logits, assignment, *moments  # type: ignore[return-value]

    def conv_em_routing_bwd(
        grad_v: Tensor,
        grad_logits: Tensor | None,
        grad_assignment: Tensor | None,
        poses: Tensor,
        activations: Tensor,
        weight: Tensor,
        beta_u: Tensor,
        beta_a: Tensor,
        mass: Tensor,
        mean: Tensor,
        variance: Tensor,
        iterations: int,
        temperature: Sequence[float],
        min_variance: float,
        stride: int,
        competition: str,
        gradient: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of poses, activations, weight, beta_u and beta_a."""
        images = Images(poses, len(weight), stride)
        matrices = weight.flatten(0, 2)
        grid = [*images.size, len(weight), stride] if competition == "children" else []
        grads = Gradients(poses, activations, weight, beta_u, beta_a)
        if grad_assignment is not None:
            grad_assignment = grad_assignment.flatten(3, 5)
        for part in images.slices:
            given = (grad_v, grad_logits, grad_assignment)
            of_poses, of_activations, *of_rest = backward(
                *(None if x is None else x[part].flatten(0, 2) for x in given),
                *(images.patches(x, part) for x in (poses, activations)),
                *(matrices, beta_u, beta_a),
                *(x[:, part].flatten(1, 3) for x in (mass, mean, variance)),
                *(iterations, temperature, min_variance, grid, gradient),
            )
            images.add(of_poses, grads[0], part)
            images.add(of_activations, grads[1], part)
            grads.add(2, of_rest)
        return grads.lowered()

    return conv_em_routing_fwd, conv_em_routing_bwd


conv_em_routing_fwd, conv_em_routing_bwd = in_patches(em_routing_fwd, em_routing_bwd)
