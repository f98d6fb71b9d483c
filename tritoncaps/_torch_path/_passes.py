"""Passes over the prediction vectors, a few input capsules of the whole batch at a time.

A pass with the poses V, (B, J, D), is

    c̃ = softmax_j(û·V + prior),  c = c̃ + bias,  s_j = Σ_i c_ij û_ij

and its backward, given ds and the gradient of c, is

    dc = û·ds + grad_coupling,  db = c̃ (dc − Σ_j c̃ dc),  dV_j = Σ_i db_ij û_ij
    dprior = Σ_b db,  dbias = Σ_b dc,  dû_ij = c_ij ds_j + db_ij V_j

Each slice holds the whole sum over the batch, so the gradients of the weight, the prior and the
bias are written once. One capsule's prediction vectors are no larger than s, so temporaries stay
bounded however large the batch or the layer.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from tritoncaps._torch_path._slices import buffer_for, length, slices, view

# Takes some input capsules and their vectors, (C, B, J, D). It writes them, or uses them at once.
OfCapsules = Callable[[slice, Tensor], object]


def slices_for(shape: Sequence[int], passes: int, like: Tensor) -> list[slice]:
    """Slices whose û and three coefficients for each of so many passes at once fit the cache.

    A backward has twice as much: dû and its coefficients.
    """
    B, I, J, D = shape
    return slices(I, B * J * (D + 3 * passes) * like.element_size(), like.device)


class Passes:
    """Passes over the same prediction vectors.

    Agreements are products of one matrix (C, D) for each image and output capsule. Logits and
    couplings of K passes at once are (B, J, K, C): torch's softmax over J is ten times as fast when
    the input capsules are innermost.
    """

    def __init__(
        self,
        write_u_hat: OfCapsules,
        shape: Sequence[int],
        prior: Tensor | None,
        leaky: bool,
        like: Tensor,
        at_once: int = 1,
    ) -> None:
        """Choose the slices, for at most so many passes at once.

        Args:
            write_u_hat: writes the prediction vectors of a slice to the tensor that it is given.
            shape: B, I, J, D.
            prior: (I, J).
            leaky: whether the softmax has an orphan class.
            like: a tensor with the device and the accumulation type.
            at_once: how many.
        """
        self.shape, self.like = shape, like
        self._write_u_hat, self._leaky = write_u_hat, leaky
        B, _, J, D = shape
        self._prior = None if prior is None else prior.to(like.dtype)
        self.slices = slices_for(shape, at_once, like)
        self._u_hat = buffer_for(self.slices, B * J * D, like)

    def _vectors(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some input capsules and their û, (C, B·J, D), to be used up before the next."""
        B, _, J, D = self.shape
        for capsules in self.slices:
            u_hat = view(self._u_hat, length(capsules), B, J, D)
            self._write_u_hat(capsules, u_hat)
            yield capsules, u_hat.flatten(1, 2)

    def add_weighted_sum(
        self,
        s: Tensor,
        V: Tensor | None,
        bias: Tensor | None = None,
        coupling: Tensor | None = None,
    ) -> None:
        """Add Σ_i c_ij û_ij to s, (B, J, D), and fill the coupling, (B, I, J).

        Without V there are no agreements.
        """
        B, _, J, D = self.shape
        rows = None if V is None else V.to(s.dtype).reshape(B * J, 1, D)
        for capsules, u_hat in self._vectors():
            if rows is None:
                b = s.new_zeros(B, J, 1, length(capsules))
            else:
                b = torch.bmm(rows, u_hat.permute(1, 2, 0)).view(B, J, 1, length(capsules))
            c = self._coupling(b, capsules)
            if bias is not None:
                c += _columns(bias, capsules)
            s += _weighted_sum(c, u_hat).view(B, J, D)
            if coupling is not None:
                coupling[:, capsules] = c.squeeze(2).transpose(1, 2)

    def backward(
        self,
        vectors: Tensor,
        passes: int,
        grad_coupling: Tensor | None,
        use: OfCapsules | None = None,
        *,
        through_coupling: bool = True,
        bias: Tensor | None = None,
        grad_pose: Tensor | None = None,
        grad_prior: Tensor | None = None,
        grad_bias: Tensor | None = None,
    ) -> None:
        """Go back through one or more passes at once.

        Args:
            vectors: V of each pass, or of each but the first, then ds of each, (B, J, M, D).
            passes: how many.
            grad_coupling: the gradient of the last pass's coupling, (B, I, J).
            use: is given the sum of dû over the passes.
            through_coupling: whether the coupling depends on its inputs; else db is taken to be 0.
            bias: (I, J).
            grad_pose: dV of a single pass is added to it, (B, J, D).
            grad_prior: filled with the gradient of the prior, (I, J).
            grad_bias: filled with the gradient of the bias, (I, J).
        """
        B, _, J, D = self.shape
        given = vectors.shape[2] - passes  # poses
        vectors = vectors.flatten(0, 1)
        buffer = buffer_for(self.slices if use is not None else [], B * J * D, self.like)
        for capsules, u_hat in self._vectors():
            C = length(capsules)
            agreements = torch.bmm(vectors, u_hat.permute(1, 2, 0)).view(B, J, given + passes, C)
            b, grad_c = agreements.split([given, passes], dim=2)
            c = self._coupling(pad(b, (0, 0, passes - given, 0)), capsules)
            factors, terms = c, vectors[:, given:]
            if through_coupling:
                if grad_coupling is not None:
                    grad_c[:, :, -1] += grad_coupling[:, capsules].transpose(1, 2)
                grad_b = coupling_gradient(c, grad_c)
                if grad_pose is not None:
                    grad_pose += _weighted_sum(grad_b, u_hat).view(B, J, D)
                if grad_prior is not None:
                    grad_prior[capsules] = grad_b.sum(dim=(0, 2)).T
                if grad_bias is not None:
                    grad_bias[capsules] = grad_c.sum(dim=(0, 2)).T
                if bias is not None:
                    c += _columns(bias, capsules)
                factors, terms = torch.cat([grad_b[:, :, passes - given :], c], dim=2), vectors
            if use is not None:
                product = view(buffer, B * J, C, D)
                torch.bmm(factors.flatten(0, 1).mT, terms, out=product)
                grad_u_hat = u_hat.copy_(product.transpose(0, 1))
                use(capsules, grad_u_hat.view(C, B, J, D))

    def _coupling(self, b: Tensor, capsules: slice) -> Tensor:
        """The softmax over the output capsules, and over an orphan class with logit 0 if leaky."""
        if self._prior is not None:
            b = b + _columns(self._prior, capsules)
        if not self._leaky:
            return torch.softmax(b, dim=1)
        top = b.amax(dim=1, keepdim=True).clamp_(min=0)
        shares = (b - top).exp_()
        return shares.div_(shares.sum(dim=1, keepdim=True).add_(top.neg_().exp_()))


def coupling_gradient(c: Tensor, grad_c: Tensor) -> Tensor:
    """db = c∘(dc − Σ_j c∘dc), the gradient of the softmax over the output capsules."""
    return (grad_c - (c * grad_c).sum(dim=1, keepdim=True)).mul_(c)


def _weighted_sum(c: Tensor, u_hat: Tensor) -> Tensor:
    """Σ_i c_ij û_ij of a single pass, (B·J, D), which uses up û.

    As a product for each image and output capsule it would be ten times slower where they are many
    and the input capsules few.
    """
    return u_hat.mul_(c.flatten(0, 2).T.unsqueeze(2)).sum(dim=0)


def _columns(pairs: Tensor, capsules: slice) -> Tensor:
    """A value for each pair, (I, J), as (J, 1, C)."""
    return pairs[capsules].T.unsqueeze(1)
