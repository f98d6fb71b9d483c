"""`conv_em_routing`."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tritoncaps import _checks, _patches
from tritoncaps._operators.conv_em_routing import conv_em_routing as _registered
from tritoncaps._tracing import one_node
from tritoncaps.ops._dynamic_routing import Gradient
from tritoncaps.ops._em_routing import temperatures

Competition = Literal["children", "position"]

_AXES = {
    "poses": "B H W C R P",
    "activations": "B H W C",
    "weight": "K K C P J Q",
    "beta_u": "J",
    "beta_a": "J",
}


@one_node
def conv_em_routing(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    iterations: int = 2,
    *,
    stride: int = 1,
    padding: int = 0,
    competition: Competition = "children",
    temperature: float | Sequence[float] | None = None,
    min_variance: float = 1e-4,
    gradient: Gradient = "full",
    return_logits: bool = False,
    return_assignment: bool = False,
) -> tuple[Tensor, ...]:
    """Route a grid of matrix capsules with a convolution, by expectation-maximisation.

    The input has C capsules at each of H×W positions. The output has J capsules at each of H'×W'
    positions of a K×K kernel, where H' = (H + 2·padding − K) // stride + 1. An output capsule gets
    the votes of the K·K·C input capsules under the kernel. All positions share the weight. The rest
    is as in `em_routing`.

    Args:
        poses: input poses, shape (B, H, W, C, R, P).
        activations: input activations, in [0, 1], shape (B, H, W, C).
        weight: a P×Q matrix for each pair of capsules, shape (K, K, C, P, J, Q).
        beta_u: β_u of each output type, shape (J,).
        beta_a: β_a of each output type, shape (J,).
        iterations: the number of M-steps, at least 1.
        stride: the step from one position of the kernel to the next, at least 1.
        padding: positions added on all four sides, at least 0. Their capsules have pose 0 and
            activation 0, and add nothing.
        competition: which output capsules compete for an input capsule. With "children", as in the
            paper, these are all that it votes for, of all types and positions. The first
            assignment is 1 divided by their number. With "position", the J output capsules of each
            position compete on their own. This is faster, but an input capsule then counts in full
            at every position that it votes for.
        temperature: as for `em_routing`.
        min_variance: as for `em_routing`.
        gradient: as for `em_routing`.
        return_logits: as for `em_routing`.
        return_assignment: as for `em_routing`.

    Returns:
        Poses, shape (B, H', W', J, R, Q), and activations, shape (B, H', W', J). With
        `return_logits` then the logits, shape (B, H', W', J), and with `return_assignment` then the
        assignment, shape (B, H', W', K, K, C, J).

    Raises:
        TypeError, ValueError: as for `em_routing`.
        ValueError: `stride` < 1, `padding` < 0, a kernel that is larger than the padded grid or not
            square, an unknown `competition`.

    Example:
        >>> import torch
        >>> poses, activations = torch.randn(2, 14, 14, 8, 4, 4), torch.rand(2, 14, 14, 8)
        >>> weight = torch.randn(3, 3, 8, 4, 16, 4)
        >>> beta_u, beta_a = torch.zeros(16), torch.zeros(16)
        >>> poses, _ = conv_em_routing(poses, activations, weight, beta_u, beta_a, stride=2)
        >>> poses.shape
        torch.Size([2, 6, 6, 16, 4, 4])

    Hinton, Sabour, Frosst: Matrix capsules with EM routing (2018), sections 3 and 4.
    """
    name = "conv_em_routing"
    _checks.check_inputs(
        name,
        _AXES,
        poses=poses,
        activations=activations,
        weight=weight,
        beta_u=beta_u,
        beta_a=beta_a,
    )
    _patches.check_convolution(name, stride, padding)
    _checks.check_choice(name, "competition", competition, ("children", "position"))
    _checks.check_em_options(
        name, iterations, temperature, min_variance, gradient, return_logits, return_assignment
    )
    _patches.output_size(name, activations.shape[1:3], len(weight), stride, padding)
    v, logits, assignment, *_ = _registered.forward(
        _patches.pad(poses, padding),
        _patches.pad(activations, padding),
        weight,
        beta_u,
        beta_a,
        iterations,
        temperatures(temperature, iterations),
        float(min_variance),
        stride,
        competition,
        gradient,
        return_assignment,
    )
    results = (v, torch.sigmoid(logits)) + (logits,) * return_logits
    if not return_assignment:
        return results
    return *results, assignment if gradient == "full" else assignment.detach()
