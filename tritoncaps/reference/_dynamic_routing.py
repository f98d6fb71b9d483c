"""Routing by agreement, and the pass that it is made of."""

from einops import einsum, repeat
from torch import Tensor
from torch.nn import functional as F

from tritoncaps.reference._squash import squash


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
