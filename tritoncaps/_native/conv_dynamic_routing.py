"""Routing by agreement in the patches of a grid, each by `fused_dynamic_routing`."""

from tritoncaps._native.fused_dynamic_routing import (
    fused_dynamic_routing_bwd,
    fused_dynamic_routing_fwd,
)
from tritoncaps._torch_path.conv_dynamic_routing import in_patches

conv_dynamic_routing_fwd, conv_dynamic_routing_bwd = in_patches(
    fused_dynamic_routing_fwd, fused_dynamic_routing_bwd
)
