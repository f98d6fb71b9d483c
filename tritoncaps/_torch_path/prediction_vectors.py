"""Prediction vectors û = W u in memory."""

import torch
from torch import Tensor

from tritoncaps._torch_path._slices import buffers, fitting_slices, length, longest, view


def prediction_vectors_fwd(u: Tensor, weight: Tensor) -> Tensor:
    """û_{j|i} = W_ij u_i, chunk by chunk. Products come out i-first and are copied to b-first."""
    (B, I, _), (_, _, J, D) = u.shape, weight.shape
    u_hat = u.new_empty(B, I, J, D)
    rows = weight.flatten(2)
    chunks = fitting_slices(I, B * J * D, u)
    (buffer,) = buffers(1, longest(chunks) * B * J * D, u)
    for chunk in chunks:
        products = view(buffer, (length(chunk), B, J, D))
        u_hat[:, chunk] = predict(u[:, chunk], rows[chunk], out=products).transpose(0, 1)
    return u_hat


def predict(u: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """û as one (B, P) × (P, J·D) product for each input capsule, written to `out`, (I, B, J, D).

    `rows` is the weight, (I, P, J·D). The caller flattens it once, because that may be a copy.
    """
    torch.bmm(u.transpose(0, 1), rows, out=out.flatten(2))
    return out


def prediction_vectors_bwd(grad_u_hat: Tensor, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """du_i = Σ_j W_ij dû_ij and dW_ij = Σ_b u_i ⊗ dû_ij."""
    grad = grad_u_hat.flatten(2).transpose(0, 1)  # (I, B, J·D)
    grad_u = torch.bmm(grad, weight.flatten(2).transpose(1, 2)).transpose(0, 1)
    grad_weight = torch.bmm(u.permute(1, 2, 0), grad).view(weight.shape)
    return grad_u.contiguous(), grad_weight
