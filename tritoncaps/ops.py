"""Functional capsule operators: squash, prediction vectors, routing by agreement, margin loss.

Every operator is differentiable and gives the same result on every backend, within the tolerance
that the tests state: Triton kernels on a CUDA or ROCm device, a cache-sized torch path elsewhere.

Axes: B batch, I input capsules, P input pose dimension, J output capsules, D output pose dimension.

Common to all: the arguments of a call share one device and one dtype (float16, bfloat16, float32 or
float64); sums are accumulated in float32, for float64 in float64. Inside `torch.autocast` the
16-bit types are raised to float32 first, mixtures with float32 are taken, and results are float32.
Derivatives are of reverse mode and first order. Forward mode, and a second derivative, raise an
error that names the operator: there is no formula for them.
"""

from typing import Literal, overload

from torch import Tensor
from torch.nn import functional as F

from tritoncaps import _checks, _operators, _transforms  # noqa: F401  (registers the rules)

__all__ = [
    "dynamic_routing",
    "fused_dynamic_routing",
    "margin_loss",
    "prediction_vectors",
    "squash",
]

Gradient = Literal["full", "last"]
Reduction = Literal["mean", "sum", "none"]


def squash(s: Tensor, dim: int = -1) -> Tensor:
    """Squash vectors to a length in [0, 1) and keep their direction: v = |s|²/(1+|s|²) · s/|s|.

    Args:
        s: vectors along the axis `dim`, any shape.
        dim: the axis of the vectors' components.

    Returns:
        Tensor of the shape and dtype of `s`.

    Raises:
        TypeError: `s` is not a floating-point tensor, or `dim` not an int.
        ValueError: `s` has no axis `dim`.

    Note:
        Value and gradient are finite from 0 to the largest float32; both are 0 at 0. In a 16-bit
        type a long vector's length may round to 1.

    Example:
        >>> import torch
        >>> poses = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> squash(poses).norm(dim=-1)
        tensor([0.9615, 0.0000])

    Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (2017), equation 1.
    """
    _checks.check_floating("squash", "s", s)
    _checks.check_dim("squash", dim, s.ndim)
    _checks.check_no_tangent("squash", "s", s)
    return _operators.squash(s.movedim(dim, -1)).movedim(-1, dim)


def prediction_vectors(u: Tensor, weight: Tensor) -> Tensor:
    """Compute what each input capsule predicts for each output capsule: û_{j|i} = W_ij u_i.

    Args:
        u: input capsules, shape (B, I, P).
        weight: one P×D matrix per pair of capsules, shape (I, P, J, D).

    Returns:
        û, shape (B, I, J, D), dtype of `u`.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes differ.
        ValueError: wrong rank, axes that do not match, an empty axis other than B, two devices.

    Example:
        >>> import torch
        >>> u, weight = torch.randn(2, 1152, 8), torch.randn(1152, 8, 10, 16)
        >>> prediction_vectors(u, weight).shape
        torch.Size([2, 1152, 10, 16])

    Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (2017), equation 2.
    """
    _check_routing("prediction_vectors", [("u", u, "B I P"), ("weight", weight, "I P J D")])
    return _operators.prediction_vectors(u, weight)


@overload
def dynamic_routing(
    u_hat: Tensor,
    iterations: int = ...,
    *,
    prior: Tensor | None = ...,
    gradient: Gradient = ...,
    return_coupling: Literal[False] = ...,
) -> Tensor: ...
@overload
def dynamic_routing(
    u_hat: Tensor,
    iterations: int = ...,
    *,
    prior: Tensor | None = ...,
    gradient: Gradient = ...,
    return_coupling: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def dynamic_routing(
    u_hat: Tensor,
    iterations: int = 3,
    *,
    prior: Tensor | None = None,
    gradient: Gradient = "full",
    return_coupling: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Route prediction vectors to output capsules by agreement.

    b = prior or 0; then `iterations` times: c = softmax_j(b), s_j = Σ_i c_ij û_{j|i},
    v_j = squash(s_j), b_ij += û_{j|i}·v_j.

    Args:
        u_hat: prediction vectors, shape (B, I, J, D).
        iterations: the number of weighted sums, at least 1.
        prior: initial logits, shape (I, J); may be learned.
        gradient: "full" differentiates through every iteration; "last" takes the coupling of the
            last iteration as a constant, which is cheaper and what many implementations do.
        return_coupling: return the coupling of the last iteration too. With "full" it is
            differentiable.

    Returns:
        v, shape (B, J, D); with `return_coupling` the pair (v, c), c of shape (B, I, J).

    Raises:
        TypeError: an argument of the wrong kind, dtypes that differ, `iterations` not an int.
        ValueError: wrong rank, axes that do not match, an empty axis other than B, two devices,
            `iterations` < 1, an unknown `gradient`.

    Example:
        >>> import torch
        >>> u_hat = torch.randn(2, 1152, 10, 16)
        >>> v, c = dynamic_routing(u_hat, iterations=3, return_coupling=True)
        >>> v.shape, c.shape
        (torch.Size([2, 10, 16]), torch.Size([2, 1152, 10]))

    Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (2017), procedure 1.
    """
    tensors = [("u_hat", u_hat, "B I J D")]
    _check_routing("dynamic_routing", tensors, prior, iterations, gradient, return_coupling)
    v, coupling, _ = _operators.dynamic_routing(
        u_hat, prior, iterations, gradient == "full", return_coupling
    )
    if not return_coupling:
        return v
    return v, coupling if gradient == "full" else coupling.detach()


@overload
def fused_dynamic_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = ...,
    *,
    prior: Tensor | None = ...,
    gradient: Gradient = ...,
    return_coupling: Literal[False] = ...,
) -> Tensor: ...
@overload
def fused_dynamic_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = ...,
    *,
    prior: Tensor | None = ...,
    gradient: Gradient = ...,
    return_coupling: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def fused_dynamic_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = 3,
    *,
    prior: Tensor | None = None,
    gradient: Gradient = "full",
    return_coupling: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Route input capsules to output capsules: `prediction_vectors` and `dynamic_routing` in one.

    The prediction vectors of a batch never exist in memory. They are computed tile by tile, where
    they are used, which takes less time than moving them: with one image of MNIST in a `CapsNet`
    they are 184,320 numbers, and all that is kept for the backward is r·J·D = 480.

    Args:
        u: input capsules, shape (B, I, P).
        weight: one P×D matrix per pair of capsules, shape (I, P, J, D).
        iterations: the number of weighted sums, at least 1.
        prior: initial logits, shape (I, J); may be learned.
        gradient: "full" differentiates through every iteration; "last" takes the coupling of the
            last iteration as a constant, which is cheaper and what many implementations do.
        return_coupling: return the coupling of the last iteration too. With "full" it is
            differentiable.

    Returns:
        v, shape (B, J, D); with `return_coupling` the pair (v, c), c of shape (B, I, J).

    Raises:
        TypeError: an argument of the wrong kind, dtypes that differ, `iterations` not an int.
        ValueError: wrong rank, axes that do not match, an empty axis other than B, two devices,
            `iterations` < 1, an unknown `gradient`.

    Example:
        >>> import torch
        >>> u, weight = torch.randn(2, 1152, 8), torch.randn(1152, 8, 10, 16)
        >>> fused_dynamic_routing(u, weight, iterations=3).shape
        torch.Size([2, 10, 16])

    Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (2017), equation 2 and procedure 1.
    """
    tensors = [("u", u, "B I P"), ("weight", weight, "I P J D")]
    _check_routing("fused_dynamic_routing", tensors, prior, iterations, gradient, return_coupling)
    v, coupling, _ = _operators.fused_dynamic_routing(
        u, weight, prior, iterations, gradient == "full", return_coupling
    )
    if not return_coupling:
        return v
    return v, coupling if gradient == "full" else coupling.detach()


def margin_loss(
    activations: Tensor,
    target: Tensor,
    m_pos: float = 0.9,
    m_neg: float = 0.1,
    down_weight: float = 0.5,
    reduction: Reduction = "mean",
) -> Tensor:
    """Push the capsules of present classes to lengths over `m_pos`, the others under `m_neg`.

    L = Σ_k T_k·max(0, m⁺ − |v_k|)² + λ·(1 − T_k)·max(0, |v_k| − m⁻)², summed over the classes k.

    Args:
        lengths: lengths of the class capsules, shape (B, K).
        target: class indices, shape (B,), int64; or multi-hot, shape (B, K), values in [0, 1].
        m_pos: m⁺, the length from which a present class costs nothing.
        m_neg: m⁻, the length up to which an absent class costs nothing.
        down_weight: λ, the weight of absent classes.
        reduction: over the batch: "mean" (0 for an empty batch), "sum" or "none".

    Returns:
        A scalar, or shape (B,) with "none"; dtype of `activations`, under autocast float32.

    Raises:
        TypeError: an argument of the wrong kind, class indices that are not int64.
        ValueError: shapes that do not match, K = 0, two devices, an unknown `reduction`, and, on
            a CPU, class indices outside 0 .. K−1 or multi-hot values outside 0 .. 1.

    Example:
        >>> import torch
        >>> margin_loss(torch.tensor([[0.9, 0.1, 0.3]]), torch.tensor([0]))
        tensor(0.0200)

    Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (2017), equation 4.
    """
    _checks.check_tensor("margin_loss", "activations", activations, "B K")
    _checks.check_not_empty("margin_loss", "activations", activations, "B K")
    _checks.check_target("margin_loss", target, activations)
    _checks.check_margins("margin_loss", m_pos, m_neg, down_weight)
    _checks.check_choice("margin_loss", "reduction", reduction, ("mean", "sum", "none"))
    activations = activations.to(_checks.routed_dtype(activations))
    present = F.one_hot(target, activations.shape[1]) if target.ndim == 1 else target
    present = present.to(activations.dtype)
    too_short = (m_pos - activations).clamp(min=0).square()
    too_long = (activations - m_neg).clamp(min=0).square()
    loss = (present * too_short + down_weight * (1 - present) * too_long).sum(dim=1)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(1, len(loss))


def _check_routing(
    function: str,
    tensors: list[tuple[str, Tensor, str]],
    prior: Tensor | None = None,
    iterations: int = 1,
    gradient: str = "full",
    return_coupling: bool = False,
) -> None:
    """Everything that `prediction_vectors` and the two routings ask of their arguments."""
    if prior is not None:
        tensors = [*tensors, ("prior", prior, "I J")]
    for name, tensor, axes in tensors:
        _checks.check_tensor(function, name, tensor, axes)
        _checks.check_not_empty(function, name, tensor, axes)
        _checks.check_no_tangent(function, name, tensor)
    _checks.check_axes(function, tensors)
    _checks.check_same_kind(function, [(name, tensor) for name, tensor, _ in tensors])
    _checks.check_iterations(function, iterations)
    _checks.check_choice(function, "gradient", gradient, ("full", "last"))
    _checks.check_flag(function, "return_coupling", return_coupling)
