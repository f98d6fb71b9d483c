"""EM routing, a few rows of the batch at a time, whose votes fit the cache.

The votes of g rows are (I, D, G) with G = g·J. What belongs to an output capsule is (D, G) or
(1, G), and what belongs to a pair of capsules is (I, 1, G). So broadcasts, and the sums over input
capsules or components, all work on long rows.

The backward computes votes and assignments again, from the mass, the mean and the variance of each
iteration. `kernels/em_routing.py` has the formulas.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tritoncaps._torch_path._competition import Competition
from tritoncaps._torch_path._precision import accumulation_dtype
from tritoncaps._torch_path._slices import buffer_for, length, slices, view

# An output capsule with no more mass has no mean and no variance. Both are 0, and pass no gradient.
NO_MASS = 1e-20


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
    """v (B, J, R, Q), logits (B, J), the last assignment (B, I, J) or an empty tensor, the moments.

    The moments are the mass (r, B, J), the mean and the variance (r, B, J, R, Q).
    """
    B, I, R, _ = poses.shape
    J, Q = weight.shape[2:]
    dtype = accumulation_dtype(poses.dtype)
    mass = poses.new_empty(iterations, B, J, dtype=dtype)
    mean, variance = (poses.new_empty(iterations, B, J, R, Q, dtype=dtype) for _ in range(2))
    logits = poses.new_empty(B, J)
    assignment = poses.new_empty((B, I, J) if return_assignment else (0,))
    betas = beta_u.to(dtype), beta_a.to(dtype)
    competition = Competition(grid, J)
    votes = _Votes(poses, weight, dtype, competition.together)
    buffers = votes.buffers(3)
    for rows in votes.groups:
        V, x, buffer = votes.views(buffers, rows)
        votes.write(rows, V)
        a = _pairs(activations[rows].to(dtype), J)
        R_ij = competition.first(a)
        for t in range(iterations):
            shares = R_ij * a
            n = shares.sum(dim=0)
            # Divided first, so that a single share is exactly 1, and its variance 0.
            shares = torch.where(n <= NO_MASS, 0, shares / n)
            average = torch.mul(shares, V, out=buffer).sum(dim=0)
            squares = torch.sub(V, average, out=x).square_()
            spread = torch.mul(shares, squares, out=buffer).sum(dim=0)
            fit = _Fit((n, average, spread), betas, temperature[t], min_variance)
            if t < iterations - 1:
                R_ij = fit.assign(squares, competition)
            mass[t, rows], mean[t, rows] = _outer(fit.mass, J), _outer(fit.mean, J, R)
            variance[t, rows] = _outer(fit.variance, J, R)
        logits[rows] = _outer(fit.logits, J)
        if return_assignment:
            assignment[rows] = R_ij.view(I, -1, J).transpose(0, 1)
    return mean[-1].to(poses.dtype, copy=True), logits, assignment, mass, mean, variance


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
    betas = beta_u.to(dtype), beta_a.to(dtype)
    competition = Competition(grid, J)
    votes = _Votes(poses, weight, dtype, competition.together, backward=True)
    buffers = votes.buffers(4)
    grad_activations = torch.empty_like(activations, memory_format=torch.contiguous_format)
    grad_betas = torch.zeros_like(beta_u, dtype=dtype), torch.zeros_like(beta_a, dtype=dtype)
    steps, last = range(iterations), iterations - 1
    first = 0 if gradient == "full" else last
    for rows in votes.groups:
        V, grad_V, x, buffer = votes.views(buffers, rows)
        votes.write(rows, V)
        grad_V.zero_()
        a = _pairs(activations[rows].to(dtype), J)
        moments = [tuple(_inner(of[t, rows]) for of in (mass, mean, variance)) for t in steps]
        fits = [_Fit(moments[t], betas, temperature[t], min_variance) for t in steps]
        assignments = [competition.first(a)]
        for fit in fits[max(first - 1, 0) : last]:
            squares = torch.sub(V, fit.mean, out=x).square_()
            assignments.append(fit.assign(squares, competition))
        grad_a = torch.zeros_like(a)
        grad_mean = _inner(grad_v[rows]).to(dtype)
        grad_variance = torch.zeros_like(grad_mean)
        grad_z = torch.zeros_like(grad_mean[:1])
        if grad_logits is not None:
            grad_z += _inner(grad_logits[rows])
        for t in range(last, first - 1, -1):
            fit, R = fits[t], assignments.pop()
            torch.sub(V, fit.mean, out=x)
            # M-step. The moments are sums over i of shares times 1, x and x².
            grad_n, of_variance, *of_betas = fit.backward(grad_z)
            for grad, part in zip(grad_betas, of_betas, strict=True):
                grad += part.view(-1, J).sum(dim=0)
            scale = _inverse_mass(fit.mass)
            slope, curve = grad_mean * scale, (grad_variance + of_variance) * scale
            grad_n -= (curve * fit.variance).sum(dim=0, keepdim=True)
            grad_V.addcmul_(torch.addcmul(slope, 2 * curve, x, out=buffer), R * a)
            torch.addcmul(slope, curve, x, out=buffer).mul_(x)
            grad_shares = buffer.sum(dim=1, keepdim=True).add_(grad_n)
            grad_a += R * grad_shares
            if t == first:
                break
            # E-step of the fit before.
            grad_R = grad_shares.mul_(a)
            if t == last and grad_assignment is not None:
                grad_R += grad_assignment[rows].transpose(0, 1).flatten(1).unsqueeze(1)
            fit = fits[t - 1]
            torch.sub(V, fit.mean, out=x)
            grad_l = competition.backward(R, grad_R)
            weighted = torch.mul(grad_l, x, out=buffer)
            grad_V.addcmul_(weighted, fit.inverse_variance, value=-1)
            g0, g1 = grad_l.sum(dim=0), weighted.sum(dim=0)
            g2 = weighted.mul_(x).sum(dim=0)
            grad_z = g0 * torch.sigmoid(-fit.logits)
            grad_mean = g1 * fit.inverse_variance
            grad_variance = (g2 * fit.inverse_variance - g0) * fit.inverse_variance / 2
        grad_activations[rows] = grad_a.view(len(a), -1, J).sum(dim=2).T
        votes.contract(rows, grad_V)
    grads = (*votes.gradients(), *grad_betas)
    grad_poses, grad_weight, grad_beta_u, grad_beta_a = (grad.to(poses.dtype) for grad in grads)
    return grad_poses, grad_activations, grad_weight, grad_beta_u, grad_beta_a


class _Votes:
    """The votes of some rows, (I, D, G), and the gradients of poses and weight from theirs.

    There is one product for each input capsule and column q of an output pose. So the votes come as
    (I, Q, R, g, J).
    """

    def __init__(
        self,
        poses: Tensor,
        weight: Tensor,
        dtype: torch.dtype,
        together: int,
        backward: bool = False,
    ) -> None:
        """Choose groups whose votes fit the cache. Runs of `together` rows are not divided."""
        B, I, R, _ = poses.shape
        _, _, J, Q = self._shape = weight.shape
        self._poses = poses
        self._weight = weight.to(dtype).movedim(3, 1).flatten(0, 1)  # (I·Q, P, J)
        self._numbers = I * R * Q * J  # of a row
        # Twice as many as fit into a slice: there are many small operations for each group.
        bytes_each = together * self._numbers * self._weight.element_size() // 2
        parts = slices(B // together, bytes_each, poses.device)
        self.groups = [slice(part.start * together, part.stop * together) for part in parts]
        if backward:
            self._grad_poses = torch.empty_like(poses, dtype=dtype)
            self._grad_weight = torch.zeros_like(self._weight)

    def buffers(self, count: int) -> list[Tensor]:
        """Flat buffers for the votes of the largest group."""
        return [buffer_for(self.groups, self._numbers, self._weight) for _ in range(count)]

    def views(self, buffers: list[Tensor], rows: slice) -> list[Tensor]:
        """The buffers as (I, D, G)."""
        I, _, J, Q = self._shape
        shape = I, Q * self._poses.shape[2], length(rows) * J
        return [view(buffer, *shape) for buffer in buffers]

    def write(self, rows: slice, out: Tensor) -> None:
        """V = M W."""
        I, P, J, Q = self._shape
        poses = self._poses[rows].to(self._weight.dtype).permute(1, 2, 0, 3)  # (I, R, g, P)
        self._repeated = poses.unsqueeze(1).expand(-1, Q, -1, -1, -1).reshape(I * Q, -1, P)
        torch.bmm(self._repeated, self._weight, out=out.view(I * Q, -1, J))

    def contract(self, rows: slice, grad: Tensor) -> None:
        """dM = Σ_j dV Wᵀ and dW = Σ_b Mᵀ dV, for the rows that were written last."""
        I, P, J, Q = self._shape
        R = self._poses.shape[2]
        grad = grad.view(I * Q, -1, J)
        of_poses = torch.bmm(grad, self._weight.mT).view(I, Q, R, -1, P).sum(dim=1)
        self._grad_poses[rows] = of_poses.permute(2, 0, 1, 3)
        self._grad_weight.baddbmm_(self._repeated.mT, grad)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of the poses and of the weight."""
        I, P, J, Q = self._shape
        return self._grad_poses, self._grad_weight.view(I, Q, P, J).movedim(1, 3).contiguous()


class _Fit:
    """The Gaussians of an iteration: mass and logits (1, G), mean and variance (D, G)."""

    def __init__(
        self,
        moments: Sequence[Tensor],
        betas: tuple[Tensor, Tensor],
        temperature: float,
        min_variance: float,
    ) -> None:
        self.mass, self.mean, self.variance = mass, mean, variance = moments
        self.temperature = temperature
        D, G = mean.shape
        beta_u, beta_a = (beta.repeat(G // len(beta)) for beta in betas)
        floored = variance + min_variance
        self.inverse_variance = floored.reciprocal()
        self.log_variance = floored.log_().sum(dim=0, keepdim=True)
        self.cost = D * beta_u + 0.5 * self.log_variance
        self.logits = temperature * (beta_a - mass * self.cost)

    def assign(self, squares: Tensor, competition: Competition) -> Tensor:
        """E-step: R ∝ a p, (I, 1, G). It overwrites the squares of V − mean, (I, D, G)."""
        distances = squares.mul_(self.inverse_variance).sum(dim=1, keepdim=True)
        log_2pi = len(self.mean) * math.log(2 * math.pi)
        constant = logsigmoid(self.logits) - 0.5 * (self.log_variance + log_2pi)
        return competition.softmax(constant - 0.5 * distances)

    def backward(self, grad_logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of the mass, the variance, and the betas of each output capsule."""
        scaled = self.temperature * grad_logits
        of_cost = -scaled * self.mass
        of_variance = 0.5 * of_cost * self.inverse_variance
        return -scaled * self.cost, of_variance, len(self.mean) * of_cost, scaled


def _inverse_mass(mass: Tensor) -> Tensor:
    return torch.where(mass <= NO_MASS, 0, mass.reciprocal())


def _pairs(activations: Tensor, J: int) -> Tensor:
    """The activations of g rows, (g, I), for each pair of capsules: (I, 1, G)."""
    return activations.T.unsqueeze(2).expand(-1, -1, J).flatten(1).unsqueeze(1)


def _inner(x: Tensor) -> Tensor:
    """(g, J, R, Q) → (D, G), in the order (Q, R) of components, or (g, J) → (1, G)."""
    axes = range(x.ndim - 1, 1, -1)
    return x.permute(*axes, 0, 1).reshape(x.shape[2:].numel(), -1)


def _outer(x: Tensor, J: int, R: int = 0) -> Tensor:
    """The inverse of `_inner`."""
    if R == 0:
        return x.view(-1, J)
    return x.view(len(x) // R, R, -1, J).permute(2, 3, 1, 0)
