"""The Triton kernels of the capsule operators and their launchers.

A launcher takes validated tensors of any strides, on one device and of one dtype, and returns new
contiguous ones. It knows nothing of autograd or dispatch. Importing this package imports Triton.
"""

from triton.runtime.errors import OutOfResources

from tritoncaps.kernels._launch import UnsupportedShape
from tritoncaps.kernels.conv_dynamic_routing import (
    conv_dynamic_routing_bwd,
    conv_dynamic_routing_fwd,
)
from tritoncaps.kernels.conv_em_routing import conv_em_routing_bwd, conv_em_routing_fwd
from tritoncaps.kernels.dynamic_routing import dynamic_routing_bwd, dynamic_routing_fwd
from tritoncaps.kernels.em_routing import em_routing_bwd, em_routing_fwd
from tritoncaps.kernels.fused_dynamic_routing import (
    fused_dynamic_routing_bwd,
    fused_dynamic_routing_fwd,
)
from tritoncaps.kernels.prediction_vectors import prediction_vectors_bwd, prediction_vectors_fwd
from tritoncaps.kernels.routing_pass import routing_pass_bwd, routing_pass_fwd
from tritoncaps.kernels.squash import squash_bwd, squash_fwd

# A launcher raises this before it writes anything. Another backend should take over.
REFUSALS = (UnsupportedShape, OutOfResources)

__all__ = [
    "REFUSALS",
    "UnsupportedShape",
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
