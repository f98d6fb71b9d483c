"""EM routing in the patches of a grid, which are read where they lie.

The kernels are those of `em_routing`. `_patches.py` says where they read.
"""

from torch import Tensor

from tritoncaps.kernels._launch import device_of
from tritoncaps.kernels._patches import Patches
from tritoncaps.kernels.em_routing import em_routing_bwd, em_routing_fwd


def conv_em_routing_fwd(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    iterations: int,
    temperature: list[float],
    min_variance: float,
    stride: int,
    competition: str,
    gradient: str,
    return_assignment: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Route each patch of a grid.

    Args:
        poses: shape (N, H, W, C, R, P), any strides.
        activations: shape (N, H, W, C), any strides, dtype of `poses`, as all others.
        weight: shape (K, K, C, P, J, Q), any strides.
        stride: the step between patches.
        competition: "children", all output capsules that an input capsule feeds, or "position",
            those of one position.
        beta_u, beta_a, iterations, temperature, min_variance, gradient, return_assignment: as for
            `em_routing_fwd`.

    Returns:
        What `em_routing_fwd` does, with (N, H', W') in place of B, and (K, K, C) in place of I.
    """
    given, grid, positions = _patches(poses, activations, weight, stride, competition)
    v, logits, assignment, *moments = em_routing_fwd(
        *given, weight.flatten(0, 2), beta_u, beta_a, iterations, temperature, min_variance, grid,
        gradient, return_assignment,
    )  # fmt: skip
    if return_assignment:
        assignment = assignment.view(*positions, *weight.shape[:3], weight.shape[4])
    mass, mean, variance = (x.unflatten(1, positions) for x in moments)
    return *(x.unflatten(0, positions) for x in (v, logits)), assignment, mass, mean, variance


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
    temperature: list[float],
    min_variance: float,
    stride: int,
    competition: str,
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the poses, the activations, the weight, beta_u and beta_a.

    Args:
        grad_v, grad_logits: of the results, any strides. `grad_logits` may be None.
        grad_assignment: shape (N, H', W', K, K, C, J), any strides, or None.
        mass, mean, variance: as returned by `conv_em_routing_fwd`, any strides.
        Everything else as given to it.
    """
    given, grid, _ = _patches(poses, activations, weight, stride, competition)
    of_poses, of_activations = given
    grad_poses, grad_activations, grad_weight, grad_beta_u, grad_beta_a = em_routing_bwd(
        grad_v.flatten(0, 2),
        None if grad_logits is None else grad_logits.flatten(0, 2),
        None if grad_assignment is None else grad_assignment.flatten(3, 5).flatten(0, 2),
        of_poses, of_activations, weight.flatten(0, 2), beta_u, beta_a,
        mass.flatten(1, 3), mean.flatten(1, 3), variance.flatten(1, 3),
        iterations, temperature, min_variance, grid, gradient,
    )  # fmt: skip
    with device_of(poses):
        grad_poses = of_poses.add(grad_poses)
        grad_activations = of_activations.add(grad_activations)
    return grad_poses, grad_activations, grad_weight.view(weight.shape), grad_beta_u, grad_beta_a


def _patches(
    poses: Tensor, activations: Tensor, weight: Tensor, stride: int, competition: str
) -> tuple[tuple[Patches, Patches], list[int], tuple[int, int, int]]:
    """The patches of both, the grid of the competition, and (N, H', W')."""
    of_poses, of_activations = (Patches(x, len(weight), stride) for x in (poses, activations))
    size = of_poses.size
    grid = [*size, len(weight), stride] if competition == "children" else []
    return (of_poses, of_activations), grid, (len(poses), *size)
