"""`tritoncaps::dynamic_routing`, for prediction vectors in memory."""

from typing import Any

from tritoncaps import _torch_path, reference
from tritoncaps._operators._dispatch import dispatched
from tritoncaps._operators._register import register

# These are the operations of the mathematics, with the prediction vectors computed once. What a
# backend recomputes to save memory is not counted.


def flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    """A weighted sum in each iteration, and an agreement between each two."""
    return _product(sizes) * (2 * given["iterations"] - 1)


def backward_flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    """Two products for each forward one, less one if the first iteration has no logits."""
    if given["gradient"] == "last":
        return _product(sizes)
    iterations = given["sums"][0]
    return _product(sizes) * (2 * (2 * iterations - 1) - (given["prior"] is None))


def _product(sizes: dict[str, int]) -> int:
    return 2 * sizes["B"] * sizes["I"] * sizes["J"] * sizes["D"]


dynamic_routing = register(
    "dynamic_routing",
    dispatched(_torch_path.dynamic_routing_fwd, gradient=str),
    dispatched(_torch_path.dynamic_routing_bwd),
    reference=reference.dynamic_routing,
    inputs={"u_hat": "B I J D", "prior?": "I J", "pose_bias?": "J D"},
    outputs={"v": "B J D", "coupling?": "B I J", "sums": "r B J D"},
    flops=flops,
    backward_flops=backward_flops,
)
