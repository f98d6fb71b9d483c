"""EM routing, a few rows of the batch at a time, whose votes fit the cache.

The backward computes the votes and the assignments again, from the mass, the mean and the variance
of each iteration. `kernels/README.md` derives it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from tritoncaps._torch_path._precision import accumulation_dtype

# An output capsule with less mass has no mean and no variance: both are 0, without a gradient.
NO_MASS = 1e-20


class Competition:
    """Which output capsules compete for an input capsule.

    Without a grid they are those of its row. With grid = (H', W', K, S), where rows are positions
    of a convolution and input capsules are (ky, kx, c), they are those of all positions that the
    input capsule feeds.
    """

    def __init__(self, grid: Sequence[int], device: torch.device) -> None:
        """Find the places (y', x', ky, kx) at which each input position occurs."""
        self.rows = 1  # that compete, and have to be together
        self._is_shared = bool(grid)
        if not grid:
            return
        height, width, K, stride = grid
        self.rows = height * width
        inputs = torch.arange(((height - 1) * stride + K) * ((width - 1) * stride + K))
        windows = inputs.view(-1, (width - 1) * stride + K).unfold(0, K, stride)
        self._inputs = windows.unfold(1, K, stride).flatten()
        order = self._inputs.argsort(stable=True)
        counts = self._inputs.bincount(minlength=len(inputs))
        starts = counts.cumsum(0) - counts
        nth = torch.arange(int(counts.max()))
        nowhere = len(order)
        places = pad(order, (0, len(nth)), value=nowhere)[starts[:, None] + nth]
        self._places = places.where(nth < counts[:, None], nowhere).to(device)
        self._inputs = self._inputs.to(device)

    def log_sum(self, x: Tensor) -> Tensor:
        """log Σ exp x over all rows with the same input capsule, for x of (B, I)."""
        if not self._is_shared:
            return x
        return self._everywhere(self._gathered(x, -torch.inf).logsumexp(dim=2), x)

    def sum(self, x: Tensor) -> Tensor:
        """Σ x over all rows with the same input capsule, for x of (B, I)."""
        if not self._is_shared:
            return x
        return self._everywhere(self._gathered(x, 0).sum(dim=2), x)

    def _gathered(self, x: Tensor, elsewhere: float) -> Tensor:
        """The numbers of each input capsule, (images, input positions, places, C)."""
        C = x.shape[1] * self.rows // len(self._inputs)
        x = x.reshape(len(x) // self.rows, len(self._inputs), C)
        return pad(x, (0, 0, 0, 1), value=elsewhere)[:, self._places]

    def _everywhere(self, of_inputs: Tensor, like: Tensor) -> Tensor:
        return of_inputs[:, self._inputs].reshape(like.shape)


def em_routing_fwd(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    iterations: int,
    temperature: Sequence[float],
    min_variance: float,
    grid: Sequence[int],
    gradient: str,
    return_assignment: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """v (B, J, R, Q), logits (B, J), the last assignment (B, I, J) or an empty tensor, the state.

    The state are the mass (r, B, J), the mean and the variance (r, B, J, R, Q) of each iteration.
    """
    dtype = accumulation_dtype(poses.dtype)
    B, I, rows, _ = poses.shape
    J, columns = weight.shape[2:]
    mass = poses.new_zeros(iterations, B, J, dtype=dtype)
    mean = poses.new_zeros(iterations, B, J, rows, columns, dtype=dtype)
    variance = torch.zeros_like(mean)
    assignment = poses.new_empty((B, I, J) if return_assignment else (0,))
    competition = Competition(grid, poses.device)
    beta_u, beta_a = beta_u.to(dtype), beta_a.to(dtype)
    a = activations.to(dtype)[:, :, None]
    V = _votes(poses.to(dtype), weight.to(dtype))
    R = _first(a, J, competition)
    for t in range(iterations):
        if t > 0:
            R = _assignment(
                V,
                mass[t - 1],
                mean[t - 1],
                variance[t - 1],
                beta_u,
                beta_a,
                temperature[t - 1],
                min_variance,
                competition,
            )
        shares = R * a
        mass[t] = shares.sum(dim=1)
        shares = shares * _inverse(mass[t])[:, None]
        centre = mean[t - 1] if t > 0 else torch.einsum("bij,bijrq->bjrq", shares, V)
        x = V - centre[:, None]
        delta = torch.einsum("bij,bijrq->bjrq", shares, x)
        has_mass = (mass[t] > NO_MASS)[:, :, None, None]
        mean[t] = (centre + delta) * has_mass
        second = torch.einsum("bij,bijrq->bjrq", shares, x.square())
        variance[t] = (second - delta.square()).clamp_(min=0)
    logits = _logits(mass[-1], variance[-1], beta_u, beta_a, temperature[-1], min_variance)
    if return_assignment:
        assignment.copy_(R.expand(B, I, J))
    v = mean[-1].to(poses.dtype, copy=True)
    return v, logits.to(poses.dtype), assignment, mass, mean, variance


def em_routing_bwd(
    grad_v: Tensor,
    grad_logits: Tensor | None,
    grad_assignment: Tensor | None,
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    mass: Tensor,
    mean: Tensor,
    variance: Tensor,
    iterations: int,
    temperature: Sequence[float],
    min_variance: float,
    grid: Sequence[int],
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of poses, activations, weight, beta_u and beta_a."""
    dtype = mean.dtype
    J = len(beta_u)
    D = mean[0, 0, 0].numel() if mean.numel() else 1
    competition = Competition(grid, poses.device)
    bu, ba = beta_u.to(dtype), beta_a.to(dtype)
    a = activations.to(dtype)[:, :, None]
    V = _votes(poses.to(dtype), weight.to(dtype))
    g_mean = grad_v.to(dtype)
    g_variance = torch.zeros_like(g_mean)
    g_logits = torch.zeros_like(mass[0]) if grad_logits is None else grad_logits.to(dtype)
    g_a, g_V = torch.zeros_like(a), torch.zeros_like(V)
    g_beta_u, g_beta_a = torch.zeros_like(bu), torch.zeros_like(ba)
    last = iterations - 1
    for t in range(last, -1 if gradient == "full" else last - 1, -1):
        S = variance[t] + min_variance
        scaled = temperature[t] * g_logits
        g_beta_a += scaled.sum(dim=0)
        g_beta_u -= D * (scaled * mass[t]).sum(dim=0)
        g_mass = -scaled * (D * bu + 0.5 * S.log().sum(dim=(2, 3)))
        g_variance = g_variance - 0.5 * (scaled * mass[t])[:, :, None, None] / S
        inverse = _inverse(mass[t])[:, :, None, None]
        first, second = g_mean * inverse, g_variance * inverse
        x = V - mean[t][:, None]
        g_shares = (
            torch.einsum("bijrq,bjrq->bij", x, first)
            + torch.einsum("bijrq,bjrq->bij", x.square(), second)
            + (g_mass - (second * variance[t]).sum(dim=(2, 3)))[:, None]
        )
        if t > 0:
            R = _assignment(
                V,
                mass[t - 1],
                mean[t - 1],
                variance[t - 1],
                bu,
                ba,
                temperature[t - 1],
                min_variance,
                competition,
            )
        else:
            R = _first(a, J, competition)
        g_a += (R * g_shares).sum(dim=2, keepdim=True)
        g_V += (R * a)[..., None, None] * (first + 2 * second * x.movedim(1, 0)).movedim(0, 1)
        if t == 0 or gradient == "last":
            break
        g_R = g_shares * a
        if t == last and grad_assignment is not None:
            g_R = g_R + grad_assignment
        g_l = R * (g_R - competition.sum((R * g_R).sum(dim=2))[:, :, None])
        S = variance[t - 1] + min_variance
        y = V - mean[t - 1][:, None]
        g_V -= g_l[..., None, None] * y / S[:, None]
        g0 = g_l.sum(dim=1)
        g1 = torch.einsum("bij,bijrq->bjrq", g_l, y)
        g2 = torch.einsum("bij,bijrq->bjrq", g_l, y.square())
        z = _logits(mass[t - 1], variance[t - 1], bu, ba, temperature[t - 1], min_variance)
        g_logits = g0 * torch.sigmoid(-z)
        g_mean = g1 / S
        g_variance = 0.5 * (g2 / S.square() - g0[:, :, None, None] / S)
    g_poses = torch.einsum("bijrq,ipjq->birp", g_V, weight.to(dtype))
    g_weight = torch.einsum("bijrq,birp->ipjq", g_V, poses.to(dtype))
    grads = (g_poses, g_a.squeeze(2), g_weight, g_beta_u, g_beta_a)
    g0, g1, g2, g3, g4 = (grad.to(poses.dtype).contiguous() for grad in grads)
    return g0, g1, g2, g3, g4


def _votes(poses: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("birp,ipjq->bijrq", poses, weight)


def _first(a: Tensor, J: int, competition: Competition) -> Tensor:
    """The assignment of the first iteration, (B, I, J)."""
    return (1 / (J * competition.sum(torch.ones_like(a[:, :, 0]))))[:, :, None].expand(-1, -1, J)


def _logits(
    mass: Tensor,
    variance: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    temperature: float,
    min_variance: float,
) -> Tensor:
    D = variance.shape[2] * variance.shape[3]
    cost = D * beta_u + 0.5 * (variance + min_variance).log().sum(dim=(2, 3))
    return temperature * (beta_a - mass * cost)


def _inverse(mass: Tensor) -> Tensor:
    return torch.where(mass > NO_MASS, 1 / mass, 0)


def _assignment(
    V: Tensor,
    mass: Tensor,
    mean: Tensor,
    variance: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    temperature: float,
    min_variance: float,
    competition: Competition,
) -> Tensor:
    """E-step: R (B, I, J)."""
    z = _logits(mass, variance, beta_u, beta_a, temperature, min_variance)
    S = variance + min_variance
    constant = logsigmoid(z) - 0.5 * (2 * torch.pi * S).log().sum(dim=(2, 3))
    x = V - mean[:, None]
    logits = constant[:, None] - 0.5 * torch.einsum("bijrq,bjrq->bij", x.square(), 1 / S)
    total = competition.log_sum(logits.logsumexp(dim=2))
    return (logits - total[:, :, None]).exp()
