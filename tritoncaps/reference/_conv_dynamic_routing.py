"""Routing by agreement in the patches of a grid."""

from einops import einsum
from torch import Tensor

from tritoncaps.reference._dynamic_routing import dynamic_routing
from tritoncaps.reference._windows import windows


def conv_dynamic_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = 3,
    *,
    stride: int = 1,
    padding: int = 0,
    prior: Tensor | None = None,
    pose_bias: Tensor | None = None,
    votes: str = "patch",
    leaky: bool = False,
    gradient: str = "full",
    output: str = "v",
    return_coupling: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Route each K×K patch of a grid; (B, H, W, C, P), (K, K, C, P, J, D) → (B, H', W', J, D).

    With `votes="patch"`, each capsule of a patch votes (Hinton, Sabour, Frosst 2018). With
    "convolved", those of one type vote once together, by a convolution; the weight may then be
    (K, K, 1, P, J, D). `prior` is (K, K, C, J) or (C, J), the coupling (B, H', W', K, K, C, J) or
    (B, H', W', C, J). The other arguments are those of `dynamic_routing`.
    """
    patches = windows(u, len(weight), stride, padding)
    weight = weight.expand(-1, -1, u.shape[3], -1, -1, -1)
    votes_of = "B Y X y x C J D" if votes == "patch" else "B Y X C J D"
    u_hat = einsum(patches, weight, f"B Y X y x C P, y x C P J D -> {votes_of}")
    result = dynamic_routing(
        u_hat.flatten(0, 2).flatten(1, -3),
        iterations,
        prior=None if prior is None else prior.flatten(0, -2),
        pose_bias=pose_bias,
        leaky=leaky,
        gradient=gradient,
        output=output,
        return_coupling=return_coupling,
    )
    if isinstance(result, Tensor):
        return result.unflatten(0, u_hat.shape[:3])
    result, coupling = result
    return result.unflatten(0, u_hat.shape[:3]), coupling.reshape(u_hat.shape[:-1])
