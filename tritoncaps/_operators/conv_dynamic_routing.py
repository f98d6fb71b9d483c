"""`tritoncaps::conv_dynamic_routing`: neither prediction vectors nor patches are kept in memory."""

from typing import Any

from torch import Tensor

from tritoncaps import _torch_path, reference
from tritoncaps._operators import fused_dynamic_routing as dense
from tritoncaps._operators._dispatch import run
from tritoncaps._operators._register import register


def _forward(
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    iterations: int,
    stride: int,
    leaky: bool,
    gradient: str,
    output: str,
    return_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return run(
        _torch_path.conv_dynamic_routing_fwd,
        u,
        weight,
        prior,
        pose_bias,
        iterations,
        stride,
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
    stride: int,
    leaky: bool,
    gradient: str,
    output: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return run(
        _torch_path.conv_dynamic_routing_bwd,
        grad_v,
        grad_coupling,
        u,
        weight,
        prior,
        pose_bias,
        sums,
        stride,
        leaky,
        gradient,
        output,
    )


def positions(sizes: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """H' and W', the positions of the kernel on a grid without padding."""
    return {f"{axis}'": (sizes[axis] - sizes["K"]) // given["stride"] + 1 for axis in ("H", "W")}


def folded(sizes: dict[str, int], given: dict[str, Any]) -> dict[str, int]:
    """The sizes with the positions in the batch B, and the capsules of a patch as I."""
    of_kernel = positions(sizes, given)
    rows = sizes["B"] * of_kernel["H'"] * of_kernel["W'"]
    return {**sizes, "B": rows, "I": sizes["K"] ** 2 * sizes["C"]}


def _flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    return dense.flops(folded(sizes, given), given)


def _backward_flops(sizes: dict[str, int], given: dict[str, Any]) -> int:
    return dense.backward_flops(folded(sizes, given), given)


conv_dynamic_routing = register(
    "conv_dynamic_routing",
    _forward,
    _backward,
    reference=reference.conv_dynamic_routing,
    inputs={
        "u": "B H W C P",
        "weight": "K K C P J D",
        "prior?": "K K C J",
        "pose_bias?": "J D",
    },
    outputs={"v": "B H' W' J D", "coupling?": "B H' W' K K C J", "sums": "r B H' W' J D"},
    sizes=positions,
    flops=_flops,
    backward_flops=_backward_flops,
)
