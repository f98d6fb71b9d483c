"""Prediction vectors û = W u, in memory or a few input capsules at a time."""

import torch
from torch import Tensor

from tritoncaps._torch_path._slices import buffer_for, length, slices, view


class Projection:
    """û of some input capsules, (C, B, J, D), as one (B, P) × (P, J·D) product for each capsule.

    Given dû, it fills its gradients of u, (B, I, P), and of the weight, (I, P, J, D).
    """

    def __init__(
        self, u: Tensor, weight: Tensor, dtype: torch.dtype, backward: bool = False
    ) -> None:
        """Compute in `dtype`, which costs copies if it is another one."""
        self.shape = (*u.shape[:2], *weight.shape[2:])  # B, I, J, D
        self.u, self.weight = u.to(dtype), weight.to(dtype)
        self._columns, self._rows = self.u.transpose(0, 1), self.weight.flatten(2)
        if backward:
            self.grad_u = torch.empty_like(u, memory_format=torch.contiguous_format)
            self._grad_rows = torch.empty_like(self._rows, memory_format=torch.contiguous_format)

    def write(self, capsules: slice, out: Tensor) -> None:
        """û = W u."""
        torch.bmm(self._columns[capsules], self._rows[capsules], out=out.flatten(2))

    def contract(self, capsules: slice, grad_u_hat: Tensor) -> None:
        """du_i = Σ_j W_ij dû_ij and dW_ij = Σ_b u_i ⊗ dû_ij."""
        grad = grad_u_hat.flatten(2)
        self.grad_u[:, capsules] = torch.bmm(grad, self._rows[capsules].mT).transpose(0, 1)
        torch.bmm(self._columns[capsules].mT, grad, out=self._grad_rows[capsules])

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of u and the weight, in the type of u."""
        return self.grad_u, self._grad_rows.view(self.weight.shape).to(self.grad_u.dtype)


def prediction_vectors_fwd(u: Tensor, weight: Tensor) -> Tensor:
    """û_{j|i} = W_ij u_i, in slices. Products come out i-first and are copied to b-first."""
    votes = Projection(u, weight, u.dtype)
    B, I, J, D = votes.shape
    u_hat = u.new_empty(B, I, J, D)
    parts = slices(I, B * J * D * u.element_size(), u.device)
    buffer = buffer_for(parts, B * J * D, u)
    for capsules in parts:
        products = view(buffer, length(capsules), B, J, D)
        votes.write(capsules, products)
        u_hat[:, capsules] = products.transpose(0, 1)
    return u_hat


def prediction_vectors_bwd(grad_u_hat: Tensor, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """du_i = Σ_j W_ij dû_ij and dW_ij = Σ_b u_i ⊗ dû_ij."""
    votes = Projection(u, weight, u.dtype, backward=True)
    votes.contract(slice(0, u.shape[1]), grad_u_hat.transpose(0, 1))
    return votes.gradients()
