"""Binding of `tritoncaps_em_routing_*`. The algorithms are in em_forward.h and em_backward.h."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritoncaps import _torch_path
from tritoncaps._native._call import check, function, numbers, pointer, sizes, workers


def em_routing_fwd(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    iterations: int,
    temperature: Sequence[float],
    min_variance: float,
    grid: Sequence[int],
    gradient: str,
    return_assignment: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """v (B, J, R, Q), logits (B, J), the last assignment (B, I, J) or an empty tensor, states.

    The states are the mass, (T, B, J), mean and variance, (T, B, J, R, Q), of all iterations.
    """
    (B, I, R, P), (_, _, J, Q) = poses.shape, weight.shape
    if 0 in (B, I, R, P, J, Q):
        return _torch_path.em_routing_fwd(
            *(poses, activations, weight, beta_u, beta_a, iterations, temperature),
            *(min_variance, grid, gradient, return_assignment),
        )
    inputs = _inputs(poses, activations, weight, beta_u, beta_a)
    v, logits = poses.new_empty((B, J, R, Q)), poses.new_empty((B, J))
    assignment = poses.new_empty((B, I, J) if return_assignment else (0,))
    mass = poses.new_empty((iterations, B, J), dtype=torch.float32)
    mean = mass.new_empty((iterations, B, J, R, Q))
    variance = torch.empty_like(mean)
    done = function("em_routing_fwd", poses.dtype, "pppppppfpppppppi")(
        *map(pointer, inputs),
        sizes(B, I, R, P, J, Q, iterations),
        numbers(*temperature),
        min_variance,
        sizes(*grid) if grid else None,
        v.data_ptr(),
        logits.data_ptr(),
        assignment.data_ptr() if return_assignment else None,
        mass.data_ptr(),
        mean.data_ptr(),
        variance.data_ptr(),
        workers(iterations * B * I * J * R * Q * (P + 4)),
    )
    check(done, "em_routing")
    return v, logits, assignment, mass, mean, variance


def em_routing_bwd(
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
    grid: Sequence[int],
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of poses, activations, weight, beta_u and beta_a."""
    (B, I, R, P), (_, _, J, Q) = poses.shape, weight.shape
    if 0 in (B, I, R, P, J, Q):
        return _torch_path.em_routing_bwd(
            *(grad_v, grad_logits, grad_assignment, poses, activations, weight, beta_u, beta_a),
            *(mass, mean, variance, iterations, temperature, min_variance, grid, gradient),
        )
    cotangents = [
        None if grad is None else grad.to(poses.dtype).contiguous()
        for grad in (grad_v, grad_logits, grad_assignment)
    ]
    inputs = _inputs(poses, activations, weight, beta_u, beta_a)
    states = [x.contiguous() for x in (mass, mean, variance)]
    grads = [torch.empty_like(x) for x in inputs]
    done = function("em_routing_bwd", poses.dtype, "pppppppppppppfpipppppi")(
        *map(pointer, cotangents),
        *map(pointer, inputs),
        *map(pointer, states),
        sizes(B, I, R, P, J, Q, iterations),
        numbers(*temperature),
        min_variance,
        sizes(*grid) if grid else None,
        gradient == "full",
        *map(pointer, grads),
        workers(3 * iterations * B * I * J * R * Q * (P + 4)),
    )
    check(done, "em_routing")
    d_poses, d_activations, d_weight, d_beta_u, d_beta_a = grads
    return d_poses, d_activations, d_weight, d_beta_u.to(beta_u.dtype), d_beta_a.to(beta_a.dtype)


def _inputs(
    poses: Tensor, activations: Tensor, weight: Tensor, beta_u: Tensor, beta_a: Tensor
) -> list[Tensor]:
    """Make all contiguous, and the betas float32."""
    betas = [beta_u.float(), beta_a.float()]
    return [x.contiguous() for x in (poses, activations, weight, *betas)]
