"""Routing of a few images at a time, through all iterations before the next few."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tritoncaps._torch_path._loop import coupling_gradient, route, route_backward
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
    """The prediction vectors of a few images, (I, n, J, D), and the products of them.

    Seen as one matrix (I, D) for each image and output capsule, agreements and weighted sums are
    batched products, and what has one vector for each of these is (n·J, 1, D). Logits and couplings
    are (n, J, I), since torch's softmax over J is ten times as fast where I lies innermost as where
    J does.
    """

    def __init__(self, votes: Tensor, prior: Tensor | None, logits: Tensor) -> None:
        """Take the prediction vectors, the prior (J, I) and a buffer for the logits (n, J, I)."""
        self.votes, self.prior, self.logits = votes, prior, logits
        self.columns = votes.flatten(1, 2).permute(1, 2, 0)  # (n·J, D, I), a view
        self.matrices = self.columns.mT  # (n·J, I, D)

    def agreements(self, x: Tensor, out: Tensor) -> Tensor:
        """Σ_d û_ijd x_jd of x (n·J, 1, D), written to `out`, (n, J, I)."""
        torch.bmm(x, self.columns, out=_rows(out))
        return out

    def weighted_sum(self, c: Tensor) -> Tensor:
        """Σ_i c_ij û_ij of c (n, J, I), as (n·J, 1, D)."""
        return torch.bmm(_rows(c), self.matrices)

    def coupling(self, v_sum: Tensor | None, out: Tensor) -> Tensor:
        """c = softmax_j(prior + û·V) of V (n·J, 1, D), written to `out`, (n, J, I)."""
        if v_sum is None and self.prior is None:
            return out.fill_(1 / out.shape[1])
        if v_sum is None:
            self.logits.zero_()
        else:
            self.agreements(v_sum, out=self.logits)
        if self.prior is not None:
            self.logits += self.prior
        return torch.softmax(self.logits, dim=1, out=out)

    def route(self, sums: Tensor, c: Tensor) -> Tensor:
        """v, (n·J, 1, D), of the last iteration.

        `sums`, (r, n·J, 1, D), and the last coupling, `c`, (n, J, I), are filled.
        """

        def weighted_sum(t: int, v_sum: Tensor | None) -> Tensor:
            if v_sum is None and self.prior is None and len(sums) > 1:
                return self.votes.sum(dim=0).div_(self.votes.shape[2]).view(sums[t].shape)
            return self.weighted_sum(self.coupling(v_sum, out=c))

        return route(weighted_sum, sums)

    def gradient_terms(
        self,
        grad_v: Tensor,
        grad_coupling: Tensor | None,
        sums: Tensor,
        full: bool,
        grad_prior: Tensor | None,
        rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The two factors of dû_ij = Σ_t (c⁽ᵗ⁾_ij ds⁽ᵗ⁾_j + db⁽ᵗ⁾_ij V⁽ᵗ⁻¹⁾_j).

        They are the coefficients, (n·J, I, terms), collected in `rows`, (terms, n, J, I), and the
        vectors, (n·J, terms, D), given dv, (n·J, 1, D), and s, (r, n·J, 1, D). The gradient of the
        prior is added to `grad_prior`, (J, I).
        """
        vectors: list[Tensor] = []

        def step(t: int, v_sum: Tensor | None, grad_s: Tensor) -> Tensor | None:
            c = self.coupling(v_sum, out=rows[len(vectors)])
            vectors.append(grad_s)
            if not full or (v_sum is None and grad_prior is None):
                return None
            grad_c = self.agreements(grad_s, out=self.logits)
            if grad_coupling is not None and t == len(sums) - 1:
                grad_c += grad_coupling.transpose(1, 2)
            grad_b = coupling_gradient(c, grad_c, dim=1, out=rows[len(vectors)])
            if grad_prior is not None:
                grad_prior.add_(grad_b.sum(dim=0))
            if v_sum is None:
                return None
            vectors.append(v_sum)
            return self.weighted_sum(grad_b)

        route_backward(grad_v, sums, full, step)
        coefficients = rows[: len(vectors)].flatten(1, 2).permute(1, 2, 0)
        return coefficients, torch.cat(vectors, dim=1)


def _rows(x: Tensor) -> Tensor:
    """(..., n, J, K) → (..., n·J, 1, K): a row for each image and output capsule, always a view."""
    return x.view(*x.shape[:-3], -1, 1, x.shape[-1])


def group_width(D: int, iterations: int, backward: bool) -> int:
    """Values that a group has at most for each pair of capsules: û, logits and couplings."""
    return D + 1 + (2 * iterations if backward else 1)


# Returns the prediction vectors of some images, (I, n, J, D), until it is called again. They may be
# the caller's own and are not written to.
Votes = Callable[[slice], Tensor]


def route_images(
    votes: Votes,
    shape: Sequence[int],
    size: int,
    prior: Tensor | None,
    iterations: int,
    return_coupling: bool,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Route `size` images at a time.

    Returns v, (B, J, D), the last coupling, (B, I, J) or an empty tensor, both in the dtype of
    `like`, and all s⁽ᵗ⁾, (r, B, J, D).
    """
    B, I, J, D = shape
    dtype = accumulation_dtype(like.dtype)
    v, sums = like.new_empty(B, J, D), like.new_empty(iterations, B, J, D, dtype=dtype)
    coupling = like.new_empty((B, I, J) if return_coupling else (0,))
    prior = None if prior is None else prior.to(dtype).T
    groups = slices(B, size)
    scratch = buffers(2, longest(groups) * I * J, sums)
    for images in groups:
        logits, c = (view(buffer, (length(images), J, I)) for buffer in scratch)
        group = Group(votes(images), prior, logits)
        v[images] = group.route(_rows(sums[:, images]), c).view(v[images].shape)
        if return_coupling:
            coupling[images] = c.transpose(1, 2)
    return v, coupling, sums


def image_gradients(
    votes: Votes,
    shape: Sequence[int],
    size: int,
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    prior: Tensor | None,
    sums: Tensor,
    full: bool,
    grad_prior: Tensor | None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield some images, some of their input capsules, and these' dû, (C, n, J, D).

    dû is in a buffer, to be used before the next is asked for. When all are through, the gradient
    of the prior has been added to `grad_prior`, (I, J).
    """
    B, I, J, D = shape
    prior = None if prior is None else prior.to(sums.dtype).T
    terms = 1 if not full else 2 * len(sums) - (prior is None)
    groups = slices(B, size)
    n = longest(groups)
    chunks = fitting_slices(I, 2 * n * J * D, sums)  # dû as it is made, and as it is handed out
    made, handed_out = buffers(2, n * longest(chunks) * J * D, sums)
    (logits,) = buffers(1, n * I * J, sums)
    (rows,) = buffers(1, terms * n * I * J, sums)
    for images in groups:
        n = length(images)
        group = Group(votes(images), prior, view(logits, (n, J, I)))
        coefficients, vectors = group.gradient_terms(
            _rows(grad_v[images].contiguous()),
            None if grad_coupling is None else grad_coupling[images],
            _rows(sums[:, images]),
            full,
            None if grad_prior is None else grad_prior.T,
            view(rows, (terms, n, J, I)),
        )
        for chunk in chunks:
            C = length(chunk)
            product = view(made, (n * J, C, D))
            torch.bmm(coefficients[:, chunk], vectors, out=product)
            grad_votes = view(handed_out, (C, n * J, D)).copy_(product.transpose(0, 1))
            yield images, chunk, grad_votes.view(C, n, J, D)
