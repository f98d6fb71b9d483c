"""`tritoncaps::routing_pass`: one pass with a given pose."""

from typing import Any

from torch import Tensor

from tritoncaps import _torch_path, reference
from tritoncaps._operators import prediction_vectors
from tritoncaps._operators._dispatch import run
from tritoncaps._operators._register import register


def _forward(
    u: Tensor,
    weight: Tensor,
    pose: Tensor,
    prior: Tensor | None,
    bias: Tensor | None,
    leaky: bool,
    return_coupling: bool,
) -> tuple[Tensor, Tensor]:
    return run(_torch_path.routing_pass_fwd, u, weight, pose, prior, bias, leaky, return_coupling)


def _backward(
    grad_s: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
    weight: Tensor,
    pose: Tensor,
    prior: Tensor | None,
    bias: Tensor | None,
    leaky: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    return run(
        _torch_path.routing_pass_bwd, grad_s, grad_coupling, u, weight, pose, prior, bias, leaky
    )


def _flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    """û, an agreement and a weighted sum."""
    product = 2 * sizes["B"] * sizes["I"] * sizes["J"] * sizes["D"]
    return prediction_vectors.flops(sizes, given) + 2 * product


def _backward_flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    return 2 * _flops(sizes, given)


routing_pass = register(
    "routing_pass",
    _forward,
    _backward,
    reference=reference.routing_pass,
    inputs={
        "u": "B I P",
        "weight": "I P J D",
        "pose": "B J D",
        "prior?": "I J",
        "bias?": "I J",
    },
    outputs={"s": "B J D", "coupling?": "B I J"},
    flops=_flops,
    backward_flops=_backward_flops,
)
