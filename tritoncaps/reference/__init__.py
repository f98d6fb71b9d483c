"""The mathematics of capsule routing in einsum, one file a family. Every test compares with it.

Read it to learn what the operators compute. Nothing here is fast, and votes, which are the
prediction vectors û, are written to memory in full. In float64 it is the standard that results are
measured against: `reference.fused_dynamic_routing(u.double(), weight.double())`.

A number after "Sabour 2017" is that of an equation.

Axes: B batch, I input capsules, P input pose dimension, J output capsules, D output pose dimension.
A matrix pose has R rows. Its columns are P in the input and Q in the output, so D = R·Q. Grids of
capsules have H×W positions with C capsules each, and a kernel is K×K.
"""

from tritoncaps.reference._attention_routing import attention_routing, inverted_attention_routing
from tritoncaps.reference._capsule_mixture import capsule_mixture_log_prob
from tritoncaps.reference._conv_dynamic_routing import conv_dynamic_routing
from tritoncaps.reference._dynamic_routing import (
    dynamic_routing,
    fused_dynamic_routing,
    prediction_vectors,
    routing_pass,
)
from tritoncaps.reference._em_routing import conv_em_routing, em_routing
from tritoncaps.reference._losses import margin_loss, spread_loss
from tritoncaps.reference._squash import squash

__all__ = [
    "attention_routing",
    "capsule_mixture_log_prob",
    "conv_dynamic_routing",
    "conv_em_routing",
    "dynamic_routing",
    "em_routing",
    "fused_dynamic_routing",
    "inverted_attention_routing",
    "margin_loss",
    "prediction_vectors",
    "routing_pass",
    "spread_loss",
    "squash",
]
