"""Route a few images at a time, through all iterations before the next few."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tritoncaps._torch_path._loop import coupling_gradient, leaky_softmax, route, route_backward
from tritoncaps._torch_path._precision import accumulation_dtype
from tritoncaps._torch_path._slices import (
    buffers,
    fitting_slices,
    length,
    longest,
    slices,
    view,
)


class Group:
    """The prediction vectors of a few images, (I, n, J, D), and products with them.

    There is one matrix (I, D) for each image and output capsule, so agreements and weighted sums
    are batched products. A vector for each image and output capsule is (n·J, 1, D). Logits and
    couplings are (n, J, I): torch's softmax over J is ten times as fast when I is innermost.
    """

    def __init__(self, u_hat: Tensor, prior: Tensor | None, logits: Tensor, leaky: bool) -> None:
        """Keep the prediction vectors, the prior (J, I) and a buffer for the logits (n, J, I)."""
        self.u_hat, self.prior, self.logits, self.leaky = u_hat, prior, logits, leaky
        self.columns = u_hat.flatten(1, 2).permute(1, 2, 0)  # (n·J, D, I), a view
        self.matrices = self.columns.mT  # (n·J, I, D)

    def agreements(self, x: Tensor, out: Tensor) -> Tensor:
        """Σ_d û_ijd x_jd of x (n·J, 1, D), written to `out`, (n, J, I)."""
        torch.bmm(x, self.columns, out=as_rows(out))
        return out

    def weighted_sum(self, c: Tensor) -> Tensor:
        """Σ_i c_ij û_ij of c (n, J, I), as (n·J, 1, D)."""
        return torch.bmm(as_rows(c), self.matrices)

    def coupling(self, V: Tensor | None, out: Tensor) -> Tensor:
        """c = softmax_j(prior + û·V) of V (n·J, 1, D), written to `out`, (n, J, I)."""
        if V is None and self.prior is None:
            return out.fill_(1 / (out.shape[1] + self.leaky))
        if V is None:
            self.logits.zero_()
        else:
            self.agreements(V, out=self.logits)
        if self.prior is not None:
            self.logits += self.prior
        return leaky_softmax(self.logits, self.leaky, dim=1, out=out)

    def route(self, sums: Tensor, c: Tensor, pose_bias: Tensor | None, output: str) -> Tensor:
        """Return v or s, (n·J, 1, D), of the last iteration.

        This fills `sums`, (r, n·J, 1, D), and the last coupling `c`, (n, J, I). The pose bias is
        (J, D).
        """
        if pose_bias is not None:
            pose_bias = pose_bias.repeat(len(c), 1).unsqueeze(1)  # (n·J, 1, D)

        def weighted_sum(t: int, V: Tensor | None) -> Tensor:
            if V is None and self.prior is None and len(sums) > 1:
                parts = self.u_hat.shape[2] + self.leaky
                return self.u_hat.sum(dim=0).div_(parts).view(sums[t].shape)
            return self.weighted_sum(self.coupling(V, out=c))

        return route(weighted_sum, sums, pose_bias, output)

    def gradient_terms(
        self,
        grad_v: Tensor,
        grad_coupling: Tensor | None,
        sums: Tensor,
        gradient: str,
        output: str,
        grad_prior: Tensor | None,
        grad_pose_bias: Tensor | None,
        rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The two factors of dû_ij = Σ_t (c⁽ᵗ⁾_ij ds⁽ᵗ⁾_j + db⁽ᵗ⁾_ij V⁽ᵗ⁻¹⁾_j).

        The inputs are dv, (n·J, 1, D), and s, (r, n·J, 1, D). The coefficients, (n·J, I, terms),
        are collected in `rows`, (terms, n, J, I). The vectors are (n·J, terms, D). The gradients of
        the prior and of the pose bias are added to `grad_prior`, (J, I), and `grad_pose_bias`,
        (J, D).
        """
        vectors: list[Tensor] = []

        def step(t: int, V: Tensor | None, grad_s: Tensor) -> Tensor | None:
            c = self.coupling(V, out=rows[len(vectors)])
            vectors.append(grad_s)
            if gradient == "last" or (V is None and grad_prior is None):
                return None
            grad_c = self.agreements(grad_s, out=self.logits)
            if grad_coupling is not None and t == len(sums) - 1:
                grad_c += grad_coupling.transpose(1, 2)
            grad_b = coupling_gradient(c, grad_c, dim=1, out=rows[len(vectors)])
            if grad_prior is not None:
                grad_prior.add_(grad_b.sum(dim=0))
            if V is None:
                return None
            vectors.append(V)
            return self.weighted_sum(grad_b)

        route_backward(grad_v, sums, gradient, output, step, grad_pose_bias)
        coefficients = rows[: len(vectors)].flatten(1, 2).permute(1, 2, 0)
        return coefficients, torch.cat(vectors, dim=1)


def as_rows(x: Tensor) -> Tensor:
    """(..., n, J, K) → (..., n·J, 1, K): a row for each image and output capsule, always a view."""
    return x.view(*x.shape[:-3], -1, 1, x.shape[-1])


def group_width(D: int, iterations: int, backward: bool) -> int:
    """The most values that a group has for each pair of capsules: û, logits and couplings."""
    return D + 1 + (2 * iterations if backward else 1)


# Returns the prediction vectors of some images, (I, n, J, D). They are valid until the next call
# and must not be written to.
PredictionVectors = Callable[[slice], Tensor]


def route_images(
    u_hat_of: PredictionVectors,
    shape: Sequence[int],
    size: int,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    iterations: int,
    leaky: bool,
    output: str,
    return_coupling: bool,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Route `size` images at a time.

    Returns v or s, (B, J, D), the last coupling, (B, I, J) or an empty tensor, both in the dtype of
    `like`, and all s⁽ᵗ⁾, (r, B, J, D).
    """
    B, I, J, D = shape
    dtype = accumulation_dtype(like.dtype)
    v, sums = like.new_empty(B, J, D), like.new_empty(iterations, B, J, D, dtype=dtype)
    coupling = like.new_empty((B, I, J) if return_coupling else (0,))
    prior = None if prior is None else prior.to(dtype).T
    pose_bias = None if pose_bias is None else pose_bias.to(dtype)
    groups = slices(B, size)
    scratch = buffers(2, longest(groups) * I * J, sums)
    for images in groups:
        logits, c = (view(buffer, (length(images), J, I)) for buffer in scratch)
        group = Group(u_hat_of(images), prior, logits, leaky)
        result = group.route(as_rows(sums[:, images]), c, pose_bias, output)
        v[images] = result.view(v[images].shape)
        if return_coupling:
            coupling[images] = c.transpose(1, 2)
    return v, coupling, sums


def image_gradients(
    u_hat_of: PredictionVectors,
    shape: Sequence[int],
    size: int,
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    prior: Tensor | None,
    sums: Tensor,
    leaky: bool,
    gradient: str,
    output: str,
    grad_prior: Tensor | None,
    grad_pose_bias: Tensor | None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield dû piece by piece: images, input capsules, and their dû, (C, n, J, D).

    The next piece overwrites the buffer of dû. By the end, the gradients of the prior and of the
    pose bias have been added to `grad_prior`, (I, J), and `grad_pose_bias`, (J, D).
    """
    B, I, J, D = shape
    prior = None if prior is None else prior.to(sums.dtype).T
    terms = 1 if gradient == "last" else 2 * len(sums) - (prior is None)
    groups = slices(B, size)
    expand = Expansion(longest(groups), I, J, D, like=sums)
    (logits,) = buffers(1, longest(groups) * I * J, sums)
    (rows,) = buffers(1, terms * longest(groups) * I * J, sums)
    for images in groups:
        n = length(images)
        group = Group(u_hat_of(images), prior, view(logits, (n, J, I)), leaky)
        coefficients, vectors = group.gradient_terms(
            as_rows(grad_v[images].contiguous()),
            None if grad_coupling is None else grad_coupling[images],
            as_rows(sums[:, images]),
            gradient,
            output,
            None if grad_prior is None else grad_prior.T,
            grad_pose_bias,
            view(rows, (terms, n, J, I)),
        )
        for chunk, grad_u_hat in expand(coefficients, vectors, n):
            yield images, chunk, grad_u_hat


class Expansion:
    """Multiplies the two factors of dû, a chunk of input capsules at a time, in its own buffers."""

    def __init__(self, most_images: int, I: int, J: int, D: int, like: Tensor) -> None:
        """Allocate buffers for the largest group."""
        self.J, self.D = J, D
        self.chunks = fitting_slices(I, 2 * most_images * J * D, like)  # two buffers
        self.buffers = buffers(2, most_images * longest(self.chunks) * J * D, like)

    def __call__(
        self, coefficients: Tensor, vectors: Tensor, n: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield some input capsules and their dû, (C, n, J, D), valid until the next one."""
        J, D = self.J, self.D
        made, handed_out = self.buffers
        for chunk in self.chunks:
            C = length(chunk)
            product = view(made, (n * J, C, D))
            torch.bmm(coefficients[:, chunk], vectors, out=product)
            grad_u_hat = view(handed_out, (C, n * J, D)).copy_(product.transpose(0, 1))
            yield chunk, grad_u_hat.view(C, n, J, D)
