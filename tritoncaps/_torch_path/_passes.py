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


class Passes:
    """Passes over the same prediction vectors.

    For products there is one matrix (C, D) for each image and output capsule, (B·J, C, D). Logits
    and couplings of K passes at once are (B, J, K, C): torch's softmax over J is ten times as fast
    when the input capsules are innermost.
    """

    def __init__(
        self,
        write_u_hat: OfCapsules,
        shape: Sequence[int],
        prior: Tensor | None,
        leaky: bool,
        like: Tensor,
        backward_passes: int = 0,
    ) -> None:
        """Choose the slices, for at most so many backward passes at once.

        Args:
            write_u_hat: writes the prediction vectors of a slice to the tensor that it is given.
            shape: B, I, J, D.
            prior: (I, J).
            leaky: whether the softmax has an orphan class.
            like: a tensor with the device and the accumulation type.
            backward_passes: 0 for the forward.
        """
        self.shape, self.like = shape, like
        self._write_u_hat, self._leaky = write_u_hat, leaky
        B, I, J, D = shape
        self._prior = None if prior is None else prior.to(like.dtype)
        width = 2 * D + 6 * backward_passes if backward_passes else D + 3
        self.slices = slices(I, B * J * width * like.element_size(), like.device)
        self._u_hat = buffer_for(self.slices, B * J * D, like)
        self._grad_u_hat = buffer_for(self.slices if backward_passes else [], B * J * D, like)

    def _vectors(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some input capsules and their û, (B·J, C, D), valid until the next ones."""
        B, _, J, D = self.shape
        for capsules in self.slices:
            u_hat = view(self._u_hat, length(capsules), B, J, D)
            self._write_u_hat(capsules, u_hat)
            yield capsules, u_hat.flatten(1, 2).transpose(0, 1)

    def weighted_sum(
        self, V: Tensor | None, bias: Tensor | None = None, coupling: Tensor | None = None
    ) -> Tensor:
        """s, (B, J, D). Without V there are no agreements. Fills the coupling, (B, I, J)."""
        B, _, J, D = self.shape
        s = self.like.new_zeros(B * J, 1, D)
        row = None if V is None else V.to(s.dtype).reshape(s.shape)
        for capsules, u_hat in self._vectors():
            if row is None:
                b = self.like.new_zeros(B, J, 1, length(capsules))
            else:
                b = torch.bmm(row, u_hat.mT).view(B, J, 1, length(capsules))
            c = self._coupling(b, capsules)
            if bias is not None:
                c += _columns(bias, capsules)
            s.baddbmm_(c.flatten(0, 1), u_hat)
            if coupling is not None:
                coupling[:, capsules] = c.squeeze(2).transpose(1, 2)
        return s.view(B, J, D)

    def backward(
        self,
        poses: Sequence[Tensor | None],
        grad_s: Sequence[Tensor],
        grad_coupling: Tensor | None,
        use: OfCapsules | None = None,
        *,
        through_coupling: bool = True,
        bias: Tensor | None = None,
        grad_pose: Tensor | None = None,
        grad_prior: Tensor | None = None,
        grad_bias: Tensor | None = None,
    ) -> None:
        """Go back through K passes at once, given V and ds of each.

        Only the first V can be None. `grad_coupling`, (B, I, J), is that of the last pass. `use`
        gets the sum over the passes of dû. Gradients that are given are filled: of the pose of a
        single pass, (B, J, D), which must be zeros, and of the prior and the bias, (I, J). Without
        `through_coupling`, db is taken to be 0.
        """
        B, _, J, D = self.shape
        K, given = len(grad_s), [V for V in poses if V is not None]
        stacked = torch.stack([*given, *grad_s], dim=2).to(self.like.dtype)
        vectors = stacked.flatten(0, 1)  # (B·J, K and those given, D)
        for capsules, u_hat in self._vectors():
            C = length(capsules)
            agreements = torch.bmm(vectors, u_hat.mT).view(B, J, len(given) + K, C)
            b, grad_c = agreements.split([len(given), K], dim=2)
            c = self._coupling(pad(b, (0, 0, K - len(given), 0)), capsules)
            factors, terms = c, vectors[:, len(given) :]
            if through_coupling:
                if grad_coupling is not None:
                    grad_c[:, :, -1] += grad_coupling[:, capsules].transpose(1, 2)
                grad_b = coupling_gradient(c, grad_c)
                if grad_pose is not None:
                    grad_pose.flatten(0, 1).unsqueeze(1).baddbmm_(grad_b.flatten(0, 1), u_hat)
                if grad_prior is not None:
                    grad_prior[capsules] = grad_b.sum(dim=(0, 2)).T
                if grad_bias is not None:
                    grad_bias[capsules] = grad_c.sum(dim=(0, 2)).T
                if bias is not None:
                    c += _columns(bias, capsules)
                factors, terms = torch.cat([grad_b[:, :, K - len(given) :], c], dim=2), vectors
            if use is not None:
                product = view(self._grad_u_hat, B * J, C, D)
                torch.bmm(factors.flatten(0, 1).mT, terms, out=product)
                grad_u_hat = u_hat.transpose(0, 1).copy_(product.transpose(0, 1))
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


def _columns(pairs: Tensor, capsules: slice) -> Tensor:
    """A value for each pair, (I, J), as (J, 1, C)."""
    return pairs[capsules].T.unsqueeze(1)
