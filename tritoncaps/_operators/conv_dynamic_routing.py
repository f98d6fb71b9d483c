"""`tritoncaps::conv_dynamic_routing`: neither prediction vectors nor patches are kept in memory."""

from typing import Any

from tritoncaps import _torch_path, reference
from tritoncaps._operators import fused_dynamic_routing as dense
from tritoncaps._operators._dispatch import dispatched
from tritoncaps._operators._register import register
from tritoncaps._patches import positions


def sizes_of_grid(sizes: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """H' and W', the positions of the kernel."""
    return {f"{axis}'": positions(sizes[axis], sizes["K"], given["stride"]) for axis in "HW"}


def folded(sizes: dict[str, int], given: dict[str, Any]) -> dict[str, int]:
    """The sizes with the positions in the batch B, and the capsules of a patch as I."""
    rows, columns = sizes_of_grid(sizes, given).values()
    return {**sizes, "B": sizes["B"] * rows * columns, "I": sizes["K"] ** 2 * sizes["C"]}


def _flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    return dense.flops(folded(sizes, given), given)


def _backward_flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    return dense.backward_flops(folded(sizes, given), given)


conv_dynamic_routing = register(
    "conv_dynamic_routing",
    dispatched(_torch_path.conv_dynamic_routing_fwd, gradient=str),
    dispatched(_torch_path.conv_dynamic_routing_bwd),
    reference=reference.conv_dynamic_routing,
    inputs={
        "u": "B H W C P",
        "weight": "K K C P J D",
        "prior?": "K K C J",
        "pose_bias?": "J D",
    },
    outputs={"v": "B H' W' J D", "coupling?": "B H' W' K K C J", "sums": "r B H' W' J D"},
    sizes=sizes_of_grid,
    flops=_flops,
    backward_flops=_backward_flops,
)
