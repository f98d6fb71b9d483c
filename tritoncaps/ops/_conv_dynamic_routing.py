"""`conv_dynamic_routing`."""

from typing import Literal, overload

from torch import Tensor

from tritoncaps import _checks
from tritoncaps._operators.conv_dynamic_routing import conv_dynamic_routing as _registered
from tritoncaps._patches import check_convolution, output_size, pad, patches_by_type
from tritoncaps._tracing import one_node
from tritoncaps.ops._dynamic_routing import Gradient, Output
from tritoncaps.ops._fused_dynamic_routing import fused_dynamic_routing

Votes = Literal["patch", "convolved"]


@overload
def conv_dynamic_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = ...,
    *,
    stride: int = ...,
    padding: int = ...,
    prior: Tensor | None = ...,
    pose_bias: Tensor | None = ...,
    votes: Votes = ...,
    leaky: bool = ...,
    gradient: Gradient = ...,
    output: Output = ...,
    return_coupling: Literal[False] = ...,
) -> Tensor: ...
@overload
def conv_dynamic_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = ...,
    *,
    stride: int = ...,
    padding: int = ...,
    prior: Tensor | None = ...,
    pose_bias: Tensor | None = ...,
    votes: Votes = ...,
    leaky: bool = ...,
    gradient: Gradient = ...,
    output: Output = ...,
    return_coupling: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def conv_dynamic_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = ...,
    *,
    stride: int = ...,
    padding: int = ...,
    prior: Tensor | None = ...,
    pose_bias: Tensor | None = ...,
    votes: Votes = ...,
    leaky: bool = ...,
    gradient: Gradient = ...,
    output: Output = ...,
    return_coupling: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
@one_node
def conv_dynamic_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = 3,
    *,
    stride: int = 1,
    padding: int = 0,
    prior: Tensor | None = None,
    pose_bias: Tensor | None = None,
    votes: Votes = "patch",
    leaky: bool = False,
    gradient: Gradient = "full",
    output: Output = "v",
    return_coupling: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Route each K×K patch of a grid of capsules to the capsules at one position.

    This is `fused_dynamic_routing` at every position of a convolution. The positions become a part
    of the batch. Neither the prediction vectors nor the patches are kept for the backward. The
    patches would be (K / stride)² times as large as u. Only "convolved" votes keep a copy of them.

    There are two kinds of votes:

    - "patch": each of the K·K·C capsules of a patch has a matrix of its own and votes for itself
      (Hinton, Sabour, Frosst 2018).
    - "convolved": the capsules of one type in a patch share one vote, a K×K convolution of their
      poses. There are K·K times fewer votes. All types may also share the kernel (LaLonde, Bagci
      2018).

    Args:
        u: input capsules, shape (B, H, W, C, P): C types at each of H×W positions.
        weight: shape (K, K, C, P, J, D). With "convolved" also (K, K, 1, P, J, D), one kernel for
            all types.
        iterations: the number of weighted sums, at least 1.
        stride: steps between patches, at least 1.
        padding: positions of zeros added on all four sides, at least 0. Capsules of zeros add
            nothing.
        prior: initial logits, shape (K, K, C, J), or (C, J) with "convolved".
        pose_bias: added to s in every iteration, shape (J, D).
        votes: "patch" or "convolved".
        leaky: let an orphan class with logit 0 take part in the softmax. See
            `fused_dynamic_routing`.
        gradient: "full", or "last" for a constant coupling of the last iteration.
        output: "v" returns the output capsules v. "s" returns the last s, before its squash.
        return_coupling: also return the coupling of the last iteration. With "full" it is
            differentiable.

    Returns:
        v or s, shape (B, H', W', J, D) with H' = (H + 2 padding - K) // stride + 1. With
        `return_coupling`, the pair (v, c) or (s, c), where c has shape (B, H', W', K, K, C, J), or
        (B, H', W', C, J) with "convolved". The softmax runs over J, at each position on its own.

    Raises:
        TypeError: an argument of the wrong type, dtypes that differ.
        ValueError: wrong rank, axes that do not match, an empty axis other than B, two devices, a
            kernel larger than the padded grid, a number out of range, an unknown `votes`,
            `gradient` or `output`.

    Example:
        >>> import torch
        >>> u = torch.randn(2, 14, 14, 8, 8)
        >>> conv_dynamic_routing(u, torch.randn(3, 3, 8, 8, 16, 8), stride=2).shape
        torch.Size([2, 6, 6, 16, 8])
        >>> shared = torch.randn(3, 3, 1, 8, 16, 8)
        >>> conv_dynamic_routing(u, shared, padding=1, votes="convolved").shape
        torch.Size([2, 14, 14, 16, 8])
    """
    name = "conv_dynamic_routing"
    _checks.check_choice(name, "votes", votes, ("patch", "convolved"))
    _checks.check_inputs(
        name, _axes(votes, weight), u=u, weight=weight, prior=prior, pose_bias=pose_bias
    )
    check_convolution(name, stride, padding)
    _checks.check_routing_options(name, iterations, leaky, gradient, output, return_coupling)
    B, H, W, C, _ = u.shape
    kernel_size, J = weight.shape[0], weight.shape[4]
    rows, columns = output_size(name, (H, W), kernel_size, stride, padding)
    if votes == "patch":
        v, coupling, _ = _registered.forward(
            pad(u, padding),
            weight,
            prior,
            pose_bias,
            iterations,
            stride,
            leaky,
            output,
            return_coupling,
            gradient,
        )
        if not return_coupling:
            return v
        return v, coupling if gradient == "full" else coupling.detach()
    # Gradients of overlapping patches are summed in the dtype of the routing.
    u = pad(u.to(_checks.routed_dtype(u)), padding)
    weight = weight.movedim(2, 0).flatten(1, 3)
    result = fused_dynamic_routing(
        patches_by_type(u, kernel_size, stride),
        weight.expand(C, *weight.shape[1:]),
        iterations,
        prior=prior,
        pose_bias=pose_bias,
        leaky=leaky,
        gradient=gradient,
        output=output,
        return_coupling=return_coupling,
    )
    if isinstance(result, Tensor):
        return result.unflatten(0, (B, rows, columns))
    v, coupling = result
    return (
        v.unflatten(0, (B, rows, columns)),
        coupling.reshape(B, rows, columns, C, J),
    )


def _axes(votes: Votes, weight: object) -> dict[str, str]:
    """Return the axes of the tensors, as `check_inputs` needs them."""
    is_shared = isinstance(weight, Tensor) and weight.ndim == 6 and weight.shape[2] == 1
    if votes == "patch":
        types, prior = "C", "K K C J"
    else:
        types, prior = "1" if is_shared else "C", "C J"
    return {
        "u": "B H W C P",
        "weight": f"K K {types} P J D",
        "prior?": prior,
        "pose_bias?": "J D",
    }
