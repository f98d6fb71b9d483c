"""`tritoncaps::routing_pass`: one pass with a given pose."""

from typing import Any

from tritoncaps import _torch_path, reference
from tritoncaps._operators import prediction_vectors
from tritoncaps._operators._dispatch import dispatched
from tritoncaps._operators._register import register


def _flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    """û, an agreement and a weighted sum."""
    product = 2 * sizes["B"] * sizes["I"] * sizes["J"] * sizes["D"]
    return prediction_vectors.flops(sizes, given) + 2 * product


def _backward_flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    return 2 * _flops(sizes, given)


routing_pass = register(
    "routing_pass",
    dispatched(_torch_path.routing_pass_fwd),
    dispatched(_torch_path.routing_pass_bwd),
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
