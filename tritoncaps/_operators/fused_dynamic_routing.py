"""`tritoncaps::fused_dynamic_routing`: the prediction vectors never exist in memory."""

from typing import Any

from torch import Tensor

from tritoncaps import _torch_path, reference
from tritoncaps._operators import dynamic_routing, prediction_vectors
from tritoncaps._operators._dispatch import run
from tritoncaps._operators._register import register


def _forward(
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    iterations: int,
    leaky: bool,
    gradient: str,
    output: str,
    return_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return run(
        _torch_path.fused_dynamic_routing_fwd,
        u,
        weight,
        prior,
        pose_bias,
        iterations,
        leaky,
        output,
        return_coupling,
    )


def _backward(
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
    return run(
        _torch_path.fused_dynamic_routing_bwd,
        grad_v,
        grad_coupling,
        u,
        weight,
        prior,
        pose_bias,
        sums,
        leaky,
        gradient,
        output,
    )


def flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    return prediction_vectors.flops(sizes, given) + dynamic_routing.flops(sizes, given)


def backward_flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    loop = dynamic_routing.backward_flops(sizes, given)
    return prediction_vectors.backward_flops(sizes, given) + loop


fused_dynamic_routing = register(
    "fused_dynamic_routing",
    _forward,
    _backward,
    reference=reference.fused_dynamic_routing,
    inputs={"u": "B I P", "weight": "I P J D", "prior?": "I J", "pose_bias?": "J D"},
    outputs={"v": "B J D", "coupling?": "B I J", "sums": "r B J D"},
    flops=flops,
    backward_flops=backward_flops,
)
