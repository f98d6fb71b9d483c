"""`tritoncaps::prediction_vectors`."""

from typing import Any

from torch import Tensor

from tritoncaps import _torch_path, reference
from tritoncaps._operators._dispatch import run
from tritoncaps._operators._register import register


def _forward(u: Tensor, weight: Tensor) -> Tensor:
    return run(_torch_path.prediction_vectors_fwd, u, weight)


def _backward(grad_u_hat: Tensor, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return run(_torch_path.prediction_vectors_bwd, grad_u_hat, u, weight)


def flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    """The operations of û = W u."""
    return 2 * sizes["B"] * sizes["I"] * sizes["P"] * sizes["J"] * sizes["D"]


def backward_flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    """The operations of du and dW."""
    return 2 * flops(sizes, given)


prediction_vectors = register(
    "prediction_vectors",
    _forward,
    _backward,
    reference=reference.prediction_vectors,
    inputs={"u": "B I P", "weight": "I P J D"},
    outputs={"u_hat": "B I J D"},
    flops=flops,
    backward_flops=backward_flops,
)
