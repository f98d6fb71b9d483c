"""Route a chunk of input capsules at a time, where groups of images would be slower.

Each iteration, forward or backward, is one pass over (u, W) that reduces over i. The batch comes
last in the temporaries. So every element-wise step runs over contiguous rows of B, and a chunk of
the weight, (C·P, J, D), needs no repacking. Each output capsule j takes two products:
T_j = W_j V_j, (C·P, D) × (D, B), whose contraction with u over p is the logit, and
s_j += W_jᵀ (c∘u), (D, C·P) × (C·P, B).
"""

import torch
from torch import Tensor

from tritoncaps._torch_path._loop import coupling_gradient, leaky_softmax, route, route_backward
from tritoncaps._torch_path._precision import accumulation_dtype
from tritoncaps._torch_path._slices import (
    buffers,
    fitting_slices,
    longest,
    view,
)


def route_chunks(
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    iterations: int,
    leaky: bool,
    output: str,
    return_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return v or s, the last coupling, (B, I, J) or an empty tensor, and all s⁽ᵗ⁾."""
    (B, I, P), (_, _, J, D) = u.shape, weight.shape
    dtype = accumulation_dtype(u.dtype)
    u_last = _batch_last(u.to(dtype))  # (I, P, B)
    chunks = fitting_slices(I, J * P * B, u_last)
    (scratch,) = buffers(1, longest(chunks) * J * P * B, u_last)
    coupling = u.new_empty((B, I, J) if return_coupling else (0,))

    def weighted_sum(t: int, V: Tensor | None) -> Tensor:
        keep_coupling = return_coupling and t == iterations - 1
        if V is None and prior is None:
            if keep_coupling:
                coupling.fill_(1 / (J + leaky))
            flat = u.to(dtype).flatten(1) @ weight.to(dtype).flatten(0, 1).flatten(1)
            return flat.view(B, J, D) / (J + leaky)
        s = u_last.new_zeros(J, D, B)
        V_last = None if V is None else V.permute(1, 2, 0).contiguous()  # (J, D, B)
        for chunk in chunks:
            w = _weight_rows(weight[chunk].to(dtype))  # (J, C·P, D)
            x = u_last[chunk]  # (C, P, B)
            T = view(scratch, (J, *x.shape))
            b = None if V_last is None else _contract(_product(w, V_last, T), x, out=T)
            c = _coupling(b, prior, leaky, chunk, x, J)  # (J, C, B)
            torch.mul(c.unsqueeze(2), x, out=T)  # c∘u, (J, C, P, B)
            s.baddbmm_(w.transpose(1, 2), T.flatten(1, 2))
            if keep_coupling:
                coupling[:, chunk] = c.permute(2, 1, 0)
        return s.permute(2, 0, 1).contiguous()

    sums = u_last.new_empty(iterations, B, J, D)
    pose_bias = None if pose_bias is None else pose_bias.to(dtype)
    v = route(weighted_sum, sums, pose_bias, output)
    return v.to(u.dtype), coupling, sums


def _batch_last(u: Tensor) -> Tensor:
    """(B, I, P) → (I, P, B), as a transposition of two axes, which torch does block by block."""
    return u.flatten(1).t().contiguous().view(*u.shape[1:], u.shape[0])


def _weight_rows(weight: Tensor) -> Tensor:
    """(C, P, J, D) → (J, C·P, D) without a copy: one matrix of rows (i, p) per output capsule."""
    return weight.flatten(0, 1).transpose(0, 1)


def _product(w: Tensor, X: Tensor, out: Tensor) -> Tensor:
    """W_j X_j for all j, (J, C·P, D) × (J, D, B), written to `out`, (J, C, P, B)."""
    torch.bmm(w, X, out=out.flatten(1, 2))
    return out


def _contract(T: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Σ_p T∘u, (J, C, P, B) and (C, P, B) → (J, C, B). `out` receives the product T∘u."""
    return torch.mul(T, x, out=out).sum(dim=2)


def _coupling(
    b: Tensor | None, prior: Tensor | None, leaky: bool, chunk: slice, x: Tensor, J: int
) -> Tensor:
    """c = softmax_j(prior + b) of a chunk, (J, C, B). b is None before there are agreements."""
    if b is None:
        b = x.new_zeros(J, len(x), x.shape[-1])
    if prior is not None:
        b = b + prior[chunk].to(x.dtype).T.unsqueeze(-1)
    return leaky_softmax(b, leaky, dim=0)


def chunk_gradients(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    pose_bias: Tensor | None,
    sums: Tensor,
    leaky: bool,
    gradient: str,
    output: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of u, (B, I, P), the weight, (I, P, J, D), the prior, (I, J), and the pose bias.

    dû_ij = Σ_t (c⁽ᵗ⁾ ds⁽ᵗ⁾ + db⁽ᵗ⁾ V⁽ᵗ⁻¹⁾) is never stored: iteration t contracts its share at
    once. A term k·x, with a coefficient k and a vector x for each output capsule, adds
    Σ_j k∘(W_j x_j) to du_i and (k∘u) x_jᵀ to dW_j.
    """
    (B, I, P), (_, _, J, D) = u.shape, weight.shape
    dtype, is_full = sums.dtype, gradient == "full"
    u_last = _batch_last(u.to(dtype))  # (I, P, B)
    chunks = fitting_slices(I, J * P * max(B, D), u_last)
    scratch = buffers(3, longest(chunks) * J * P * B, u_last)
    (weight_scratch,) = buffers(1, longest(chunks) * J * P * D, u_last)
    grad_u_last = torch.zeros_like(u_last)
    grad_weight = u_last.new_zeros(weight.shape)
    grad_prior, grad_pose_bias = (
        None if x is None else u_last.new_zeros(x.shape) for x in (prior, pose_bias)
    )

    def uniform_step(grad_s: Tensor) -> None:
        """Iteration 1 without a prior: c is uniform, two plain products."""
        flat = grad_s.flatten(1) / (J + leaky)  # (B, J·D)
        rows = weight.to(dtype).flatten(0, 1).flatten(1)  # (I·P, J·D)
        grad_u_last.flatten(0, 1).addmm_(rows, flat.T)
        grad_weight.flatten(0, 1).flatten(1).addmm_(u_last.flatten(0, 1), flat)

    def step(t: int, V: Tensor | None, grad_s: Tensor) -> Tensor | None:
        if V is None and prior is None:
            uniform_step(grad_s)
            return None
        ds = grad_s.permute(1, 2, 0).contiguous()  # (J, D, B)
        V_last = None if V is None else V.permute(1, 2, 0).contiguous()
        grad_V = torch.zeros_like(ds)
        for chunk in chunks:
            w = _weight_rows(weight[chunk].to(dtype))  # (J, C·P, D)
            x = u_last[chunk]  # (C, P, B)
            W_V, W_ds, scaled = (view(buffer, (J, *x.shape)) for buffer in scratch)
            grad_w = view(weight_scratch, (J, w.shape[1], D))
            b = None if V_last is None else _contract(_product(w, V_last, W_V), x, out=scaled)
            c = _coupling(b, prior, leaky, chunk, x, J).unsqueeze(2)  # (J, C, 1, B)
            _product(w, ds, W_ds)
            if is_full:
                grad_c = _contract(W_ds, x, out=scaled).unsqueeze(2)
                if grad_coupling is not None and t == len(sums) - 1:
                    grad_c += grad_coupling[:, chunk].permute(2, 1, 0).unsqueeze(2)
                grad_b = coupling_gradient(c, grad_c, dim=0)  # (J, C, 1, B)
                if grad_prior is not None:
                    grad_prior[chunk] += grad_b.sum(dim=(2, 3)).T
            if is_full and V_last is not None:
                grad_u_last[chunk] += W_V.mul_(grad_b).addcmul_(W_ds, c).sum(dim=0)
                torch.mul(grad_b, x, out=scaled)  # db∘u
                torch.bmm(scaled.flatten(1, 2), V_last.transpose(1, 2), out=grad_w)
                grad_V.baddbmm_(w.transpose(1, 2), scaled.flatten(1, 2))
            else:
                grad_u_last[chunk] += W_ds.mul_(c).sum(dim=0)
                grad_w.zero_()
            torch.mul(c, x, out=scaled)  # c∘u
            grad_w.baddbmm_(scaled.flatten(1, 2), ds.transpose(1, 2))
            # torch batches a product only into a contiguous result, so the sum comes afterwards.
            _weight_rows(grad_weight[chunk]).add_(grad_w)
        return grad_V.permute(2, 0, 1).contiguous()

    route_backward(grad_v, sums, gradient, output, step, grad_pose_bias)
    return (
        grad_u_last.flatten(0, 1).t().to(u.dtype).contiguous().view(u.shape),
        grad_weight.to(u.dtype),
        None if grad_prior is None else grad_prior.to(u.dtype),
        None if grad_pose_bias is None else grad_pose_bias.to(u.dtype),
    )
