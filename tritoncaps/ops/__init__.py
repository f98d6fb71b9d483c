"""Functional capsule operators, one file per operator.

Every operator is differentiable. It runs Triton kernels on a CUDA or ROCm device, and C++ or plain
torch elsewhere. All backends give the same result, within the tolerance that the tests state.

Axes: B batch, I input capsules, P input pose dimension, J output capsules, D output pose dimension.
A matrix pose has R rows. Its columns are P in the input and Q in the output, so D = R·Q. Grids of
capsules have H×W positions with C capsules each, and a kernel is K×K.

The arguments of a call share one device and one dtype (float16, bfloat16, float32 or float64). Sums
are accumulated in float32, or in float64 for float64 inputs. Inside `torch.autocast`, 16-bit inputs
are raised to float32 first and may be mixed with float32, and results are float32.

Derivatives of any order work, in reverse and in forward mode, and so do the transforms of
`torch.func`. First derivatives in reverse mode are fast. All others come from the formulas in
`tritoncaps.reference`, with û in memory.
"""

from tritoncaps.ops._attention_routing import attention_routing
from tritoncaps.ops._capsule_mixture_log_prob import capsule_mixture_log_prob
from tritoncaps.ops._conv_dynamic_routing import Votes, conv_dynamic_routing
from tritoncaps.ops._conv_em_routing import Competition, conv_em_routing
from tritoncaps.ops._dynamic_routing import Gradient, Output, dynamic_routing
from tritoncaps.ops._em_routing import em_routing
from tritoncaps.ops._fused_dynamic_routing import fused_dynamic_routing
from tritoncaps.ops._inverted_attention_routing import inverted_attention_routing
from tritoncaps.ops._margin_loss import Reduction, margin_loss
from tritoncaps.ops._prediction_vectors import prediction_vectors
from tritoncaps.ops._routing_pass import routing_pass
from tritoncaps.ops._spread_loss import spread_loss
from tritoncaps.ops._squash import Form, squash

__all__ = [
    "Competition",
    "Form",
    "Gradient",
    "Output",
    "Reduction",
    "Votes",
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
