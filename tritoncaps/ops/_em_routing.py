"""`em_routing`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritoncaps import _checks
from tritoncaps._operators.em_routing import em_routing as _registered
from tritoncaps._tracing import one_node
from tritoncaps.ops._dynamic_routing import Gradient


@one_node
def em_routing(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    iterations: int = 2,
    *,
    offset: Tensor | None = None,
    temperature: float | Sequence[float] | None = None,
    min_variance: float = 1e-4,
    gradient: Gradient = "full",
    return_logits: bool = False,
    return_assignment: bool = False,
) -> tuple[Tensor, ...]:
    """Route matrix capsules by expectation-maximisation.

    Input capsule i votes for output capsule j with V_ij = M_i W_ij. Each output capsule is a
    Gaussian with a diagonal covariance. The M-step fits it to the votes, with the weights R_ij a_i.
    The E-step then assigns each input capsule to the output capsules by the densities of its votes:
    R_ij ∝ a_j p_ij. The first assignment is 1/J. No E-step follows the last M-step. The votes of a
    whole batch are never in memory at once.

    The activation is the sigmoid of z_j = λ (β_a − N_j (D β_u + ½ Σ_h log σ²_jh)), with the mass
    N_j = Σ_i R_ij a_i and the sum over the D = R·Q components of a pose. So β_u counts once for
    each component, as in the paper. An output capsule without mass, N_j ≤ 10⁻²⁰, has pose 0.

    Args:
        poses: input poses M, shape (B, I, R, P).
        activations: input activations a, in [0, 1], shape (B, I).
        weight: one P×Q matrix per pair of capsules, shape (I, P, J, Q).
        beta_u: β_u, what a unit of mass costs an output capsule, shape (J,).
        beta_a: β_a, the benefit of an active output capsule, shape (J,).
        iterations: the number of M-steps, at least 1.
        offset: added to every vote of an input capsule, shape (I, R, Q). If all positions share
            the weight, it can hold the coordinates of the position.
        temperature: the inverse temperature λ ≥ 0, one number or one for each iteration. The
            default is that of the authors' code, 0.01·(1 − 0.95ᵗ) in iteration t = 1, 2, ...
        min_variance: added to every variance, in the M-step and in the E-step. It is above 0.
        gradient: "full" differentiates through every iteration. "last" treats the assignment of the
            last iteration as a constant.
        return_logits: also return z. A loss of z keeps its gradient where the sigmoid saturates.
        return_assignment: also return R of the last iteration. With "full" it is differentiable.

    Returns:
        Poses, shape (B, J, R, Q), and activations, shape (B, J). With `return_logits` then z, shape
        (B, J), and with `return_assignment` then R, shape (B, I, J).

    Raises:
        TypeError: an argument of the wrong type, dtypes that differ, `iterations` not an int.
        ValueError: wrong rank, axes that do not match, an empty axis other than B, two devices,
            `iterations` < 1, `min_variance` ≤ 0, a negative `temperature` or not one for each
            iteration, an unknown `gradient`.

    Example:
        >>> import torch
        >>> poses, activations = torch.randn(2, 72, 4, 4), torch.rand(2, 72)
        >>> weight, beta_u, beta_a = torch.randn(72, 4, 16, 4), torch.zeros(16), torch.zeros(16)
        >>> poses, activations = em_routing(poses, activations, weight, beta_u, beta_a)
        >>> poses.shape, activations.shape
        (torch.Size([2, 16, 4, 4]), torch.Size([2, 16]))

    Hinton, Sabour, Frosst: Matrix capsules with EM routing (2018), procedure 1. The paper has no
    minimal variance. Without it, an output capsule with a single vote has an infinite logit.
    """
    name = "em_routing"
    _checks.check_inputs(
        name,
        {**_registered.inputs, "offset?": "I R Q"},
        poses=poses,
        activations=activations,
        weight=weight,
        beta_u=beta_u,
        beta_a=beta_a,
        offset=offset,
    )
    _checks.check_em_options(
        name, iterations, temperature, min_variance, gradient, return_logits, return_assignment
    )
    if offset is not None:
        poses, weight = _with_offset(poses, weight, offset)
    v, logits, assignment, *_ = _registered.forward(
        poses,
        activations,
        weight,
        beta_u,
        beta_a,
        iterations,
        temperatures(temperature, iterations),
        float(min_variance),
        gradient,
        return_assignment,
    )
    results = (v, torch.sigmoid(logits)) + (logits,) * return_logits
    if not return_assignment:
        return results
    return *results, assignment if gradient == "full" else assignment.detach()


def temperatures(temperature: float | Sequence[float] | None, iterations: int) -> list[float]:
    """Return λ of each iteration."""
    if temperature is None:
        return [0.01 * (1 - 0.95**t) for t in range(1, iterations + 1)]
    if isinstance(temperature, (int, float)):
        return [float(temperature)] * iterations
    return [float(number) for number in temperature]


def _with_offset(poses: Tensor, weight: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Append the offset to the poses, and an identity to the weight: P grows by Q.

    The product is then V + offset = (M, offset) (W, 1).
    """
    poses, weight, offset = (x.to(_checks.routed_dtype(x)) for x in (poses, weight, offset))
    I, _, J, Q = weight.shape
    identity = torch.eye(Q, dtype=weight.dtype, device=weight.device)[None, :, None]
    poses = torch.cat([poses, offset.expand(poses.shape[0], *offset.shape)], dim=3)
    return poses, torch.cat([weight, identity.expand(I, Q, J, Q)], dim=1)
