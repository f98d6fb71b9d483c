"""The operators in plain torch, for CPUs and any device without Triton kernels.

Every function here has a twin of the same name and signature in `tritoncaps.kernels`. Routing goes
over a few input capsules of the whole batch at a time, whose prediction vectors fit the cache, and
computes them again in each iteration (`_passes.py`). The derivation of the backward is in
`kernels/README.md`. In short, the logits are û·V⁽ᵗ⁻¹⁾ with V⁽ᵗ⁾ = Σ_{k≤t} v⁽ᵏ⁾, so only s⁽ᵗ⁾ has to
be kept between forward and backward.
"""

from tritoncaps._torch_path._precision import accumulation_dtype
from tritoncaps._torch_path.conv_dynamic_routing import (
    conv_dynamic_routing_bwd,
    conv_dynamic_routing_fwd,
)
from tritoncaps._torch_path.conv_em_routing import conv_em_routing_bwd, conv_em_routing_fwd
from tritoncaps._torch_path.dynamic_routing import dynamic_routing_bwd, dynamic_routing_fwd
from tritoncaps._torch_path.em_routing import em_routing_bwd, em_routing_fwd
from tritoncaps._torch_path.fused_dynamic_routing import (
    fused_dynamic_routing_bwd,
    fused_dynamic_routing_fwd,
)
from tritoncaps._torch_path.prediction_vectors import prediction_vectors_bwd, prediction_vectors_fwd
from tritoncaps._torch_path.routing_pass import routing_pass_bwd, routing_pass_fwd
from tritoncaps._torch_path.squash import squash_bwd, squash_fwd

__all__ = [
    "accumulation_dtype",
    "conv_dynamic_routing_bwd",
    "conv_dynamic_routing_fwd",
    "conv_em_routing_bwd",
    "conv_em_routing_fwd",
    "dynamic_routing_bwd",
    "dynamic_routing_fwd",
    "em_routing_bwd",
    "em_routing_fwd",
    "fused_dynamic_routing_bwd",
    "fused_dynamic_routing_fwd",
    "prediction_vectors_bwd",
    "prediction_vectors_fwd",
    "routing_pass_bwd",
    "routing_pass_fwd",
    "squash_bwd",
    "squash_fwd",
]
