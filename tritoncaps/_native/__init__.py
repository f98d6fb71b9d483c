"""What a CPU runs where it was built: routing in C++, the twin of `_torch_path`."""

from tritoncaps._native.fused_dynamic_routing import (
    fused_dynamic_routing_bwd,
    fused_dynamic_routing_fwd,
)
from tritoncaps._native.routing_pass import routing_pass_bwd, routing_pass_fwd

__all__ = [
    "fused_dynamic_routing_bwd",
    "fused_dynamic_routing_fwd",
    "routing_pass_bwd",
    "routing_pass_fwd",
]
