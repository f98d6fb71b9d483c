"""`tritoncaps::em_routing`: the votes never exist in memory."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tritoncaps import _torch_path
from tritoncaps._operators._dispatch import run
from tritoncaps._operators._register import register
from tritoncaps.reference import _em_routing as reference


def _forward(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    iterations: int,
    temperature: Sequence[float],
    min_variance: float,
    gradient: str,
    return_assignment: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return run(
        _torch_path.em_routing_fwd,
        poses,
        activations,
        weight,
        beta_u,
        beta_a,
        iterations,
        temperature,
        min_variance,
        [],
        gradient,
        return_assignment,
    )


def _backward(
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
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return run(
        _torch_path.em_routing_bwd,
        grad_v,
        grad_logits,
        grad_assignment,
        poses,
        activations,
        weight,
        beta_u,
        beta_a,
        mass,
        mean,
        variance,
        iterations,
        temperature,
        min_variance,
        [],
        gradient,
    )


def _formula(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    iterations: int,
    temperature: Sequence[float],
    min_variance: float,
    gradient: str,
    return_assignment: bool,
) -> tuple[Tensor, ...]:
    votes = reference.matrix_votes(poses, weight)
    v, logits, assignment = reference.route(
        votes, activations, beta_u, beta_a, temperature, min_variance, (), gradient
    )
    return (v, logits, assignment) if return_assignment else (v, logits)


def flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    """The votes, a mean and a variance in each iteration, and a distance between each two."""
    return _votes(sizes) + _sum(sizes) * (3 * given["iterations"] - 1)


def backward_flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    """Two products for each forward one."""
    sums = 2 if given["gradient"] == "last" else 3 * given["iterations"] - 1
    return 2 * (_votes(sizes) + _sum(sizes) * sums)


def _votes(sizes: dict[str, int]) -> int:
    return _sum(sizes) * sizes["P"]


def _sum(sizes: dict[str, int]) -> int:
    return 2 * sizes["B"] * sizes["I"] * sizes["J"] * sizes["R"] * sizes["Q"]


em_routing = register(
    "em_routing",
    _forward,
    _backward,
    reference=_formula,
    inputs={
        "poses": "B I R P",
        "activations": "B I",
        "weight": "I P J Q",
        "beta_u": "J",
        "beta_a": "J",
    },
    outputs={
        "v": "B J R Q",
        "logits": "B J",
        "assignment?": "B I J",
        "mass": "r B J",
        "mean": "r B J R Q",
        "variance": "r B J R Q",
    },
    flops=flops,
    backward_flops=backward_flops,
)
