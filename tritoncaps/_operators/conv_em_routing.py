"""`tritoncaps::conv_em_routing`: neither votes nor patches are kept in memory."""

from typing import Any

from torch import Tensor

from tritoncaps import _torch_path
from tritoncaps._operators import em_routing as dense
from tritoncaps._operators._dispatch import dispatched
from tritoncaps._operators._register import register
from tritoncaps._operators.conv_dynamic_routing import folded, sizes_of_grid
from tritoncaps.reference import conv_em_routing as reference


def _formula(**arguments: Any) -> tuple[Tensor, ...]:
    v, _, *rest = reference(**arguments, return_logits=True)
    return v, *rest


def _flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    return dense.flops(folded(sizes, given), given)


def _backward_flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    return dense.backward_flops(folded(sizes, given), given)


conv_em_routing = register(
    "conv_em_routing",
    dispatched(_torch_path.conv_em_routing_fwd),
    dispatched(_torch_path.conv_em_routing_bwd),
    reference=_formula,
    inputs={
        "poses": "B H W C R P",
        "activations": "B H W C",
        "weight": "K K C P J Q",
        "beta_u": "J",
        "beta_a": "J",
    },
    outputs={
        "v": "B H' W' J R Q",
        "logits": "B H' W' J",
        "assignment?": "B H' W' K K C J",
        "mass": "r B H' W' J",
        "mean": "r B H' W' J R Q",
        "variance": "r B H' W' J R Q",
    },
    sizes=sizes_of_grid,
    flops=_flops,
    backward_flops=_backward_flops,
)
