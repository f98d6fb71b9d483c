"""`inverted_attention_routing`."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from tritoncaps import _checks
from tritoncaps._operators.routing_pass import routing_pass
from tritoncaps._tracing import one_node
from tritoncaps.ops._attention_routing import summed_predictions

# Added to the variance, as torch does by default.
EPS = 1e-5

_AXES = {
    "u": "B I P",
    "weight": "I P J D",
    "pose?": "B J D",
    "norm_weight?": "D",
    "norm_bias?": "D",
}


@overload
def inverted_attention_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = ...,
    *,
    pose: Tensor | None = ...,
    norm_weight: Tensor | None = ...,
    norm_bias: Tensor | None = ...,
    return_coupling: Literal[False] = ...,
) -> Tensor: ...
@overload
def inverted_attention_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = ...,
    *,
    pose: Tensor | None = ...,
    norm_weight: Tensor | None = ...,
    norm_bias: Tensor | None = ...,
    return_coupling: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def inverted_attention_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = ...,
    *,
    pose: Tensor | None = ...,
    norm_weight: Tensor | None = ...,
    norm_bias: Tensor | None = ...,
    return_coupling: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
@one_node
def inverted_attention_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = 2,
    *,
    pose: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    return_coupling: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Route input capsules to output capsules by inverted dot-product attention.

    Start with c = 1/J, or with v = pose and c from it. Each iteration computes
    v_j = LayerNorm(Σ_i c_ij û_{j|i}) with û_{j|i} = W_ij u_i, and c = softmax_j(û·v / √D) for the
    next one. Unlike in dynamic routing, only the last v counts in the agreement, and v is not
    squashed. The prediction vectors of a batch never exist in memory.

    Args:
        u: input capsules, shape (B, I, P).
        weight: one P×D matrix per pair of capsules, shape (I, P, J, D).
        iterations: the number of weighted sums, at least 1.
        pose: the output capsules of an earlier call, to go on from, shape (B, J, D). Concurrent
            routing lets all layers take one iteration at a time, each from the poses before.
        norm_weight: a factor for each component after the normalisation, shape (D,). May be
            learned. All output capsules and iterations share it.
        norm_bias: added to each component after that, shape (D,). May be learned.
        return_coupling: also return the coupling of the last iteration.

    Returns:
        v, shape (B, J, D). With `return_coupling`, the pair (v, c), where c has shape (B, I, J).

    Raises:
        TypeError: an argument of the wrong type, dtypes that differ, `iterations` not an int.
        ValueError: wrong rank, axes that do not match, an empty axis other than B, two devices,
            `iterations` < 1.

    Example:
        >>> import torch
        >>> u, weight = torch.randn(2, 288, 16), torch.randn(288, 16, 32, 16) * 0.1
        >>> v = inverted_attention_routing(u, weight, iterations=2)
        >>> first = inverted_attention_routing(u, weight, iterations=1)
        >>> second = inverted_attention_routing(u, weight, iterations=1, pose=first)
        >>> v.shape, torch.equal(v, second)
        (torch.Size([2, 32, 16]), True)

    Tsai, Srivastava, Goh, Salakhutdinov: Capsules with Inverted Dot-Product Attention Routing
    (2020), algorithm 1.
    """
    name = "inverted_attention_routing"
    given = {"pose": pose, "norm_weight": norm_weight, "norm_bias": norm_bias}
    _checks.check_inputs(name, _AXES, u=u, weight=weight, **given)
    _checks.check_size(name, "iterations", iterations)
    _checks.check_flag(name, "return_coupling", return_coupling)
    # Once, so that 16-bit gradients are rounded once.
    u, weight = (tensor.to(_checks.routed_dtype(tensor)) for tensor in (u, weight))
    v, norm_weight, norm_bias = (
        None if tensor is None else tensor.to(_checks.routed_dtype(tensor))
        for tensor in (pose, norm_weight, norm_bias)
    )
    (B, I, _), (_, _, J, D) = u.shape, weight.shape
    coupling = u.new_full((B, I, J), 1 / J) if return_coupling else u.new_empty(0)
    for iteration in range(iterations):
        if v is None:
            s = summed_predictions(u, weight) / J
        else:
            is_last = iteration == iterations - 1
            s, coupling = routing_pass.forward(
                u, weight, v / math.sqrt(D), None, None, False, return_coupling and is_last
            )
        v = normalised(s, norm_weight, norm_bias)
    assert v is not None  # there is an iteration
    return (v, coupling) if return_coupling else v


@one_node
def normalised(s: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A LayerNorm over the last axis.

    That of torch has a wrong gradient of its forward-mode derivative: it takes mean and variance
    for constants there.
    """
    raised = s.to(torch.promote_types(s.dtype, torch.float32))
    centred = raised - raised.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    v = (centred * (variance + EPS).rsqrt()).to(s.dtype)
    v = v if weight is None else v * weight
    return v if bias is None else v + bias
