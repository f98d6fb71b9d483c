"""The mathematics of capsule routing in einsum. Every test compares with it.

Read it to learn what the operators compute. Nothing here is fast, and the prediction vectors û are
written to memory in full. In float64 it is the standard that results are measured against:
`reference.fused_dynamic_routing(u.double(), weight.double())`.

A number after "Sabour 2017" is that of an equation.

Axes: B batch, I input capsules, P input pose dimension, J output capsules, D output pose dimension.
"""

import torch
from einops import einsum, reduce, repeat
from torch import Tensor
from torch.nn import functional as F


def squash(s: Tensor, dim: int = -1, *, form: str = "quadratic") -> Tensor:
    """Scale vectors of length n = |s| to a length in [0, 1], keeping their direction.

    "quadratic": v = n² / (1 + n²) · s / n (Sabour 2017, 1).
    "exponential": v = (1 − e⁻ⁿ) · s / n (Mazzia, Salvetti, Chiaberge 2021, 4).
    """
    if s.shape[dim] == 0:
        return s.clone()
    finfo = torch.finfo(s.dtype)
    # n = |s| without a square that overflows. The scale cancels, so it needs no gradient.
    largest = s.detach().abs().amax(dim=dim, keepdim=True)
    # Nor may n itself. At such a length v is the direction alone, so s may be shorter.
    too_long = largest > finfo.max / 256
    s, largest = (torch.where(too_long, x / 256, x) for x in (s, largest))
    scale = largest.clamp(min=finfo.tiny)
    # At 0, n has no derivative. A constant stands in there, so derivatives of v are finite.
    not_zero = torch.where(largest != 0, s / scale, 1)
    length = scale * not_zero.square().sum(dim=dim, keepdim=True).sqrt()
    n = torch.where(largest != 0, length, 0)
    # v = f(n) · s. Either branch of `where` is finite where the other one is taken.
    if form == "quadratic":
        k = torch.where(n < 1, n, 1 / n.clamp(min=1))  # f is the same for n and 1/n
        f = k / (1 + k**2)
    else:
        # Near 0, the derivatives of the quotient cancel. Its series does not.
        small = n < finfo.eps**0.25
        near, far = torch.where(small, n, 0), torch.where(small, 1, n)
        series = 1 - near / 2 * (1 - near / 3 * (1 - near / 4))
        f = torch.where(small, series, -torch.expm1(-far) / far)
    # Rounding must not make v longer than 1.
    longest = 1 - 4 * min(finfo.eps, 2**-23)
    return torch.minimum(f, longest / n.clamp(min=0.5)) * s


def prediction_vectors(u: Tensor, weight: Tensor) -> Tensor:
    """Compute û_{j|i} = W_ij u_i; (B, I, P), (I, P, J, D) → (B, I, J, D) (Sabour 2017, 2)."""
    return einsum(u, weight, "B I P, I P J D -> B I J D")


def _softmax(b: Tensor, leaky: bool) -> Tensor:
    """Softmax over the *output* capsules j, and over an orphan class with logit 0 if leaky."""
    return F.softmax(F.pad(b, (0, 1)), dim=-1)[..., :-1] if leaky else F.softmax(b, dim=-1)


def routing_pass(
    u: Tensor,
    weight: Tensor,
    pose: Tensor,
    *,
    prior: Tensor | None = None,
    bias: Tensor | None = None,
    leaky: bool = False,
    return_coupling: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run one pass of agreement with given poses; (B, I, P), (I, P, J, D) → (B, J, D).

    c = softmax_j(û·pose + prior) + bias and s_j = Σ_i c_ij û_{j|i}. `pose` is (B, J, D), `prior`
    and `bias` are (I, J), the coupling c is (B, I, J). `leaky` is that of `dynamic_routing`.
    """
    u_hat = prediction_vectors(u, weight)
    b = einsum(u_hat, pose, "B I J D, B J D -> B I J")
    c = _softmax(b if prior is None else b + prior, leaky)
    if bias is not None:
        c = c + bias
    s = einsum(c, u_hat, "B I J, B I J D -> B J D")
    return (s, c) if return_coupling else s


def dynamic_routing(
    u_hat: Tensor,
    iterations: int = 3,
    *,
    prior: Tensor | None = None,
    pose_bias: Tensor | None = None,
    leaky: bool = False,
    gradient: str = "full",
    output: str = "v",
    return_coupling: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Route by agreement (Sabour 2017, procedure 1); (B, I, J, D) → (B, J, D).

    `iterations` counts weighted sums. `pose_bias`, (J, D), is added to each of them. If `leaky`, an
    orphan class with logit 0 takes its share of every input capsule. With `gradient="last"`,
    autograd treats the coupling of the last iteration as a constant. With `output="s"`, the last
    sum is returned instead of its squash. With `return_coupling`, the coupling of the last
    iteration, (B, I, J), is returned too.
    """
    B, I, J, _ = u_hat.shape
    b = u_hat.new_zeros(B, I, J) if prior is None else repeat(prior, "I J -> B I J", B=B)
    for iteration in range(1, iterations + 1):
        c = _softmax(b, leaky)
        if gradient == "last":
            c = c.detach()
        s = einsum(c, u_hat, "B I J, B I J D -> B J D")
        if pose_bias is not None:
            s = s + pose_bias
        if iteration < iterations:
            b = b + einsum(u_hat, squash(s), "B I J D, B J D -> B I J")
    result = s if output == "s" else squash(s)
    return (result, c) if return_coupling else result


def fused_dynamic_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = 3,
    *,
    prior: Tensor | None = None,
    pose_bias: Tensor | None = None,
    leaky: bool = False,
    gradient: str = "full",
    output: str = "v",
    return_coupling: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Route the prediction vectors of `u`; (B, I, P), (I, P, J, D) → (B, J, D)."""
    return dynamic_routing(
        prediction_vectors(u, weight),
        iterations,
        prior=prior,
        pose_bias=pose_bias,
        leaky=leaky,
        gradient=gradient,
        output=output,
        return_coupling=return_coupling,
    )


def attention_routing(
    u: Tensor, weight: Tensor, bias: Tensor | None = None, *, return_coupling: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Route by self-attention (Mazzia, Salvetti, Chiaberge 2021, 5 to 8); → (B, J, D).

    Prediction vectors are compared with their sum, pose_j = Σ_i û_{j|i} / √D. `bias` is (I, J).
    """
    pose = reduce(prediction_vectors(u, weight), "B I J D -> B J D", "sum") / weight.shape[3] ** 0.5
    return routing_pass(u, weight, pose, bias=bias, return_coupling=return_coupling)


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
    """Route by inverted dot-product attention (Tsai et al. 2020, algorithm 1); → (B, J, D).

    c = softmax_j(û·v / √D) with the v of the iteration before, and v = LayerNorm(Σ_i c_ij û_{j|i}).
    The first v is `pose`, (B, J, D). Without it, the first coupling is 1/J. `norm_weight` and
    `norm_bias`, (D,), are those of the normalisation.
    """
    B, J, D = len(u), *weight.shape[2:]
    v = u.new_zeros(B, J, D) if pose is None else pose
    for _ in range(iterations):
        s, c = routing_pass(u, weight, v / D**0.5, return_coupling=True)
        centred = s - reduce(s, "B J D -> B J 1", "mean")
        v = centred * (reduce(centred**2, "B J D -> B J 1", "mean") + 1e-5).rsqrt()
        v = v if norm_weight is None else v * norm_weight
        v = v if norm_bias is None else v + norm_bias
    return (v, c) if return_coupling else v


def margin_loss(
    activations: Tensor,
    target: Tensor,
    m_pos: float = 0.9,
    m_neg: float = 0.1,
    down_weight: float = 0.5,
    reduction: str = "mean",
    *,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Sum T_k·max(0, m⁺−|v_k|)² + λ(1−T_k)·max(0, |v_k|−m⁻)² over classes k (Sabour 2017, 4).

    `activations` is (B, K). `target` is (B,) class indices or (B, K) multi-hot. `class_weight`,
    (K,), multiplies the term of each class.
    """
    classes = torch.arange(activations.shape[1], device=target.device)
    present = target[:, None] == classes if target.ndim == 1 else target
    present = present.to(activations.dtype)
    too_short = (m_pos - activations).clamp(min=0) ** 2
    too_long = (activations - m_neg).clamp(min=0) ** 2
    terms = present * too_short + down_weight * (1 - present) * too_long
    if class_weight is not None:
        terms = terms * class_weight.to(terms.dtype)
    loss = reduce(terms, "B K -> B", "sum")
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def spread_loss(
    activations: Tensor, target: Tensor, margin: float = 0.9, reduction: str = "mean"
) -> Tensor:
    """Sum max(0, m − (a_t − a_i))² over the classes i other than the true one, t (Hinton 2018, 3).

    `activations` is (B, K) and `target` (B,), class indices.
    """
    true = activations.gather(1, target[:, None])
    others = torch.arange(activations.shape[1], device=target.device) != target[:, None]
    loss = reduce(others * (margin - (true - activations)).clamp(min=0) ** 2, "B K -> B", "sum")
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
