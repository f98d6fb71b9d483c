"""`tritoncaps::prediction_vectors`."""

from typing import Any

from tritoncaps import _torch_path, reference
from tritoncaps._operators._dispatch import dispatched
from tritoncaps._operators._register import register


def flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    """The operations of û = W u."""
    return 2 * sizes["B"] * sizes["I"] * sizes["P"] * sizes["J"] * sizes["D"]


def backward_flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    """The operations of du and dW."""
    return 2 * flops(sizes, given)


prediction_vectors = register(
    "prediction_vectors",
    dispatched(_torch_path.prediction_vectors_fwd),
    dispatched(_torch_path.prediction_vectors_bwd),
    reference=reference.prediction_vectors,
    inputs={"u": "B I P", "weight": "I P J D"},
    outputs={"u_hat": "B I J D"},
    flops=flops,
    backward_flops=backward_flops,
)
