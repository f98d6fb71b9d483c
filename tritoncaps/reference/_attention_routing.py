"""Routing by attention."""

from einops import reduce
from torch import Tensor

from tritoncaps.reference._dynamic_routing import prediction_vectors, routing_pass


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
