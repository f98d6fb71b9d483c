"""`tritoncaps::fused_dynamic_routing`: the prediction vectors never exist in memory."""

from typing import Any

from tritoncaps import _torch_path, reference
from tritoncaps._operators import dynamic_routing, prediction_vectors
from tritoncaps._operators._dispatch import dispatched
from tritoncaps._operators._register import register


def flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    return prediction_vectors.flops(sizes, given) + dynamic_routing.flops(sizes, given)


def backward_flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    loop = dynamic_routing.backward_flops(sizes, given)
    return prediction_vectors.backward_flops(sizes, given) + loop


fused_dynamic_routing = register(
    "fused_dynamic_routing",
    dispatched(_torch_path.fused_dynamic_routing_fwd, gradient=str),
    dispatched(_torch_path.fused_dynamic_routing_bwd),
    reference=reference.fused_dynamic_routing,
    inputs={"u": "B I P", "weight": "I P J D", "prior?": "I J", "pose_bias?": "J D"},
    outputs={"v": "B J D", "coupling?": "B I J", "sums": "r B J D"},
    flops=flops,
    backward_flops=backward_flops,
)
