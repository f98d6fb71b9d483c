"""`attention_routing`."""

import math
from typing import Literal, overload

from torch import Tensor

from tritoncaps import _checks
from tritoncaps._operators.prediction_vectors import prediction_vectors
from tritoncaps._operators.routing_pass import routing_pass
from tritoncaps._tracing import one_node

_AXES = {"u": "B I P", "weight": "I P J D", "bias?": "I J"}


@overload
def attention_routing(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    return_coupling: Literal[False] = ...,
) -> Tensor: ...
@overload
def attention_routing(
    u: Tensor, weight: Tensor, bias: Tensor | None = ..., *, return_coupling: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_routing(
    u: Tensor, weight: Tensor, bias: Tensor | None = ..., *, return_coupling: bool
) -> Tensor | tuple[Tensor, Tensor]: ...
@one_node
def attention_routing(
    u: Tensor, weight: Tensor, bias: Tensor | None = None, *, return_coupling: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Route input capsules to output capsules by self-attention, in one pass.

    Each prediction vector û_{j|i} = W_ij u_i is compared with all those for the same output
    capsule: b_ij = Σ_k û_{j|i}·û_{j|k} / √D, c = softmax_j(b) + bias, s_j = Σ_i c_ij û_{j|i}. The
    sum over k needs no pairs of input capsules: b_ij = û_{j|i}·pose_j with
    pose_j = Σ_k û_{j|k} / √D. The prediction vectors of a batch never exist in memory.

    Args:
        u: input capsules, shape (B, I, P).
        weight: one P×D matrix per pair of capsules, shape (I, P, J, D).
        bias: added to the coupling after the softmax, shape (I, J). May be learned.
        return_coupling: also return the coupling c.

    Returns:
        s, shape (B, J, D), before a squash. With `return_coupling`, the pair (s, c), where c has
        shape (B, I, J).

    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ.
        ValueError: wrong rank, axes that do not match, an empty axis other than B, two devices.

    Example:
        >>> import torch
        >>> from tritoncaps.ops import squash
        >>> u, weight = torch.randn(2, 16, 8), torch.randn(16, 8, 10, 16) * 0.1
        >>> squash(attention_routing(u, weight), form="exponential").shape
        torch.Size([2, 10, 16])

    Mazzia, Salvetti, Chiaberge: Efficient-CapsNet (2021), equations 5 to 8.
    """
    name = "attention_routing"
    _checks.check_inputs(name, _AXES, u=u, weight=weight, bias=bias)
    _checks.check_flag(name, "return_coupling", return_coupling)
    # Once, so that 16-bit gradients are rounded once.
    u, weight = (tensor.to(_checks.routed_dtype(tensor)) for tensor in (u, weight))
    pose = summed_predictions(u, weight) / math.sqrt(weight.shape[3])
    s, coupling = routing_pass.forward(u, weight, pose, None, bias, False, return_coupling)
    return (s, coupling) if return_coupling else s


def summed_predictions(u: Tensor, weight: Tensor) -> Tensor:
    """Σ_i û_ij, (B, J, D): prediction vectors of groups of input capsules, then their sum.

    A single product over I·P loses digits: for 1152 input capsules of 8 components its error is up
    to 25 times that of the plain form. In √I groups of √I it is about twice.
    """
    inputs = weight.shape[0]
    root = int(inputs**0.5)
    # A divisor near the root spares the product of a rest.
    groups = next((n for n in range(root, root // 2, -1) if inputs % n == 0), root)
    rest = inputs % groups
    if rest == 0:
        return _sum_of_groups(u, weight, groups)
    first_u, rest_u = u.split([inputs - rest, rest], dim=1)
    first_weight, rest_weight = weight.split([inputs - rest, rest])
    first = _sum_of_groups(first_u, first_weight, groups)
    return first + _sum_of_groups(rest_u, rest_weight, 1)


def _sum_of_groups(u: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Σ_i û_ij by a product for each of so many groups of equal size."""
    u = u.unflatten(1, (groups, -1)).flatten(2)
    weight = weight.unflatten(0, (groups, -1)).flatten(1, 2)
    return prediction_vectors.forward(u, weight).sum(dim=1)
