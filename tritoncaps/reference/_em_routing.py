"""EM routing: output capsules are Gaussians fitted to the votes of the input capsules.

Hinton, Sabour, Frosst: Matrix capsules with EM routing (2018), procedure 1.
"""

from collections.abc import Sequence

import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor
from torch.nn import functional as F

from tritoncaps.reference._windows import windows

# An output capsule with no more mass has no mean and no variance. Both are 0, and pass no gradient.
NO_MASS = 1e-20


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
    gradient: str = "full",
    return_logits: bool = False,
    return_assignment: bool = False,
) -> tuple[Tensor, ...]:
    """Route matrix capsules; (B, I, R, P), (B, I), (I, P, J, Q) → (B, J, R, Q), (B, J).

    `offset`, (I, R, Q), is added to each vote of an input capsule. `temperature` is the inverse
    temperature λ, one number or one an iteration. With `gradient="last"`, autograd treats the
    assignment of the last iteration as a constant. If asked for, the logits of the activations,
    (B, J), and the assignment of the last iteration, (B, I, J), follow.
    """
    votes = matrix_votes(poses, weight)
    if offset is not None:
        votes = votes + rearrange(offset, "I R Q -> I 1 R Q")
    v, logits, assignment = route(
        votes,
        activations,
        beta_u,
        beta_a,
        temperatures(temperature, iterations),
        min_variance,
        grid=(),
        gradient=gradient,
    )
    results = (v, torch.sigmoid(logits))
    return results + (logits,) * return_logits + (assignment,) * return_assignment


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
    competition: str = "children",
    temperature: float | Sequence[float] | None = None,
    min_variance: float = 1e-4,
    gradient: str = "full",
    return_logits: bool = False,
    return_assignment: bool = False,
) -> tuple[Tensor, ...]:
    """Route a grid of matrix capsules with a K×K kernel; → (B, H', W', J, R, Q), (B, H', W', J).

    `poses` are (B, H, W, C, R, P), `activations` (B, H, W, C), `weight` (K, K, C, P, J, Q). In the
    competition "children", the output capsules of all positions that an input capsule feeds
    compete for it, as in the paper. In "position", only those of the same position do. The
    logits, (B, H', W', J), and the assignment, (B, H', W', K, K, C, J), are returned if asked for.
    """
    K = len(weight)
    poses, activations = (windows(grid, K, stride, padding) for grid in (poses, activations))
    B, rows, columns = poses.shape[:3]
    v, logits, assignment = route(
        matrix_votes(poses.flatten(0, 2).flatten(1, 3), weight.flatten(0, 2)),
        activations.flatten(0, 2).flatten(1, 3),
        beta_u,
        beta_a,
        temperatures(temperature, iterations),
        min_variance,
        grid=(rows, columns, K, stride) if competition == "children" else (),
        gradient=gradient,
    )
    results = (v, torch.sigmoid(logits)) + (logits,) * return_logits
    grids = tuple(result.unflatten(0, (B, rows, columns)) for result in results)
    if not return_assignment:
        return grids
    return *grids, assignment.view(*activations.shape, len(beta_a))


def matrix_votes(poses: Tensor, weight: Tensor) -> Tensor:
    """V_ij = M_i W_ij, a product of matrices; (B, I, R, P), (I, P, J, Q) → (B, I, J, R, Q)."""
    return einsum(poses, weight, "B I R P, I P J Q -> B I J R Q")


def temperatures(temperature: float | Sequence[float] | None, iterations: int) -> list[float]:
    """λ of each iteration. The default is the schedule of the authors' code."""
    if temperature is None:
        return [0.01 * (1 - 0.95**t) for t in range(1, iterations + 1)]
    if isinstance(temperature, (int, float)):
        return [float(temperature)] * iterations
    return [float(number) for number in temperature]


def route(
    votes: Tensor,
    activations: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    temperature: Sequence[float],
    min_variance: float,
    grid: Sequence[int],
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit Gaussians to the votes, (B, I, J, R, Q): poses, logits, the last assignment.

    Without a `grid`, the output capsules of each row of the batch compete among themselves. With
    grid = (H', W', K, S), the rows are the positions of a convolution, and the output capsules of
    all positions that an input capsule feeds compete for it.
    """
    R = _first_assignment(votes, grid)
    for t, inverse_temperature in enumerate(temperature, start=1):
        if gradient == "last":
            R = R.detach()
        mass, mean, variance = _m_step(votes, R * activations[:, :, None], min_variance)
        # Each of the D components costs (β_u + log σ) N.
        log_deviation = 0.5 * reduce(torch.log(variance), "B J R Q -> B J", "sum")
        D = mean.shape[2] * mean.shape[3]
        logits = inverse_temperature * (beta_a - mass * (D * beta_u + log_deviation))
        if t < len(temperature):
            log_p = _log_densities(votes, mean, variance)
            R = _softmax(F.logsigmoid(logits)[:, None] + log_p, grid)
    return mean, logits, R


def _m_step(votes: Tensor, shares: Tensor, min_variance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mass (B, J), mean and variance (B, J, R, Q) of the votes, with the shares (B, I, J)."""
    mass = reduce(shares, "B I J -> B J", "sum")
    is_empty = mass <= NO_MASS
    inverse_mass = torch.where(is_empty, 0, 1 / torch.where(is_empty, 1, mass))
    shares = shares * inverse_mass[:, None]
    mean = einsum(shares, votes, "B I J, B I J R Q -> B J R Q")
    squares = (votes - mean[:, None]) ** 2
    variance = einsum(shares, squares, "B I J, B I J R Q -> B J R Q")
    return mass, mean, variance + min_variance


def _log_densities(votes: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log p_ij of each vote under its Gaussian, (B, I, J)."""
    squares = (votes - mean[:, None]) ** 2
    distances = einsum(squares, 1 / variance, "B I J R Q, B J R Q -> B I J")
    log_scale = reduce(torch.log(2 * torch.pi * variance), "B J R Q -> B 1 J", "sum")
    return -0.5 * (distances + log_scale)


# Convolution --------------------------------------------------------------------------------------


def _first_assignment(votes: Tensor, grid: Sequence[int]) -> Tensor:
    """1 / the number of output capsules that the input capsule feeds, (B, I, J)."""
    B, I, J = votes.shape[:3]
    if not grid:
        return votes.new_full((B, I, J), 1 / J)
    rows, columns, K, _ = grid
    _, is_fed = _places_of_input(grid, votes.device)
    shares = 1 / (J * is_fed.sum(dim=1).to(votes.dtype))
    shares = repeat(shares, "(W k) -> W (k C)", W=rows * columns, C=I // K**2)
    return repeat(shares, "W I -> (B W) I J", B=B // (rows * columns), J=J)


def _softmax(logits: Tensor, grid: Sequence[int]) -> Tensor:
    """Softmax over all output capsules that an input capsule feeds, (B, I, J)."""
    if not grid:
        return logits.softmax(dim=-1)
    B, I, _ = logits.shape
    rows, columns, K, _ = grid
    places, is_fed = _places_of_input(grid, logits.device)
    of_places = logits.logsumexp(dim=-1).view(B // (rows * columns), len(places), I // K**2)
    nothing = torch.finfo(logits.dtype).min
    of_inputs = torch.where(is_fed[:, :, None], of_places[:, places], nothing).logsumexp(dim=2)
    return torch.exp(logits - of_inputs.reshape(B, I, 1))


def _places_of_input(grid: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """For each place (y', x', ky, kx) in the windows, all places of the same input, (places, n).

    n is the largest number of windows that an input lies in. A mask, (places, n), says which of
    them there are. All is made of `arange`, which every exporter knows.
    """
    _, columns, K, stride = grid
    (y, ky, has_y), (x, kx, has_x) = (_windows_of_input(n, K, stride, device) for n in grid[:2])
    y, ky, has_y = (rearrange(t, "y ky n -> y 1 ky 1 n 1") for t in (y, ky, has_y))
    x, kx, has_x = (rearrange(t, "x kx n -> x 1 kx 1 n") for t in (x, kx, has_x))
    place = ((y * columns + x) * K + ky) * K + kx
    is_there = has_y & has_x
    pattern = "y x ky kx ny nx -> (y x ky kx) (ny nx)"
    return rearrange(place.where(is_there, 0), pattern), rearrange(is_there, pattern)


def _windows_of_input(
    count: int, K: int, stride: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: the windows of the input at (window, k), its k in them, and if they exist."""
    window, k = (torch.arange(n, device=device) for n in (count, K))
    back = torch.arange((K - 1) // stride + 1, device=device)
    position = (window[:, None] * stride + k)[:, :, None]
    windows = position // stride - back
    places = position - windows * stride
    return windows, places, (windows >= 0) & (windows < count) & (places < K)
