"""What a CPU runs where it was built: routing and squash in C++, the twin of `_torch_path`.

A library may be missing, and it does not have every operator and dtype; `takes` says what it has.
"""

import torch
from torch import Tensor

from tritoncaps._native._library import library, variant
from tritoncaps._native.conv_dynamic_routing import (
    conv_dynamic_routing_bwd,
    conv_dynamic_routing_fwd,
)
from tritoncaps._native.conv_em_routing import conv_em_routing_bwd, conv_em_routing_fwd
from tritoncaps._native.dynamic_routing import dynamic_routing_bwd, dynamic_routing_fwd
from tritoncaps._native.em_routing import em_routing_bwd, em_routing_fwd
from tritoncaps._native.fused_dynamic_routing import (
    fused_dynamic_routing_bwd,
    fused_dynamic_routing_fwd,
)
from tritoncaps._native.routing_pass import routing_pass_bwd, routing_pass_fwd
from tritoncaps._native.squash import squash_bwd, squash_fwd

__all__ = [
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
    "library",
    "routing_pass_bwd",
    "routing_pass_fwd",
    "squash_bwd",
    "squash_fwd",
    "takes",
    "variant",
]

_DTYPES = (torch.float32, torch.bfloat16)


def takes(tensor: Tensor) -> bool:
    """Whether the functions here can compute with tensors of this dtype and device."""
    return tensor.is_cpu and tensor.dtype in _DTYPES and library() is not None
