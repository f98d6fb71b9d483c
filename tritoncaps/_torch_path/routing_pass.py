"""One pass of routing with a given pose, a few images at a time.

c̃ = softmax_j(û·pose + prior), c = c̃ + bias, s_j = Σ_i c_ij û_ij. Backward, given ds and the
gradient of c:

    dc = û·ds + grad_coupling,  db = c̃ (dc − Σ_j c̃ dc),  dpose_j = Σ_i db_ij û_ij
    dprior = Σ_b db,  dbias = Σ_b dc,  dû_ij = c_ij ds_j + db_ij pose_j

dû is contracted at once: du_i = Σ_j W_ij dû_ij, dW_ij = Σ_b u_i ⊗ dû_ij.
"""

import torch
from torch import Tensor

from tritoncaps._torch_path._images import Expansion, Group, as_rows
from tritoncaps._torch_path._loop import coupling_gradient
from tritoncaps._torch_path._precision import accumulation_dtype
from tritoncaps._torch_path._slices import (
    buffers,
    even_size,
    group_bytes,
    length,
    longest,
    slices,
    view,
)
from tritoncaps._torch_path.fused_dynamic_routing import predicted


def routing_pass_fwd(
    u: Tensor,
    weight: Tensor,
    pose: Tensor,
    prior: Tensor | None,
    bias: Tensor | None,
    leaky: bool,
    return_coupling: bool,
) -> tuple[Tensor, Tensor]:
    """s (B, J, D), and the coupling (B, I, J) or an empty tensor."""
    (B, I, _), (_, _, J, D) = u.shape, weight.shape
    dtype = accumulation_dtype(u.dtype)
    s = u.new_empty(B, J, D)
    coupling = u.new_empty((B, I, J) if return_coupling else (0,))
    pose, prior, bias = pose.to(dtype), _columns(prior, dtype), _columns(bias, dtype)
    groups = _groups(u, weight)
    u_hat_of = predicted(u.to(dtype), weight.to(dtype).flatten(2), J, longest(groups))
    scratch = buffers(2, longest(groups) * I * J, pose)
    for images in groups:
        logits, c = (view(buffer, (length(images), J, I)) for buffer in scratch)
        group = Group(u_hat_of(images), prior, logits, leaky)
        group.coupling(as_rows(pose[images].contiguous()), out=c)
        if bias is not None:
            c += bias
        s[images] = group.weighted_sum(c).view(s[images].shape)
        if return_coupling:
            coupling[images] = c.transpose(1, 2)
    return s, coupling


def routing_pass_bwd(
    grad_s: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
    weight: Tensor,
    pose: Tensor,
    prior: Tensor | None,
    bias: Tensor | None,
    leaky: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of u, weight, pose, prior and bias. Each is None if its input is None."""
    (B, I, P), (_, _, J, D) = u.shape, weight.shape
    dtype = accumulation_dtype(u.dtype)
    rows, raised = weight.to(dtype).flatten(2), u.to(dtype)
    pose, grad_s = pose.to(dtype), grad_s.to(dtype)
    grad_u, grad_pose = u.new_empty(B, I, P), u.new_empty(B, J, D)
    grad_rows = rows.new_zeros(I, P, J * D)
    grad_prior = None if prior is None else rows.new_zeros(J, I)
    grad_bias = None if bias is None else rows.new_zeros(J, I)
    prior, bias = _columns(prior, dtype), _columns(bias, dtype)
    groups = _groups(u, weight)
    u_hat_of = predicted(raised, rows, J, longest(groups))
    expand = Expansion(longest(groups), I, J, D, like=rows)
    (logits,) = buffers(1, longest(groups) * I * J, rows)
    (scratch,) = buffers(1, 2 * longest(groups) * I * J, rows)
    for images in groups:
        n = length(images)
        group = Group(u_hat_of(images), prior, view(logits, (n, J, I)), leaky)
        x, ds = (as_rows(tensor[images].contiguous()) for tensor in (pose, grad_s))
        coefficients = view(scratch, (2, n, J, I))
        c, grad_b = coefficients
        group.coupling(x, out=c)
        grad_c = group.agreements(ds, out=group.logits)
        if grad_coupling is not None:
            grad_c += grad_coupling[images].transpose(1, 2)
        coupling_gradient(c, grad_c, dim=1, out=grad_b)
        if grad_prior is not None:
            grad_prior += grad_b.sum(dim=0)
        if bias is not None and grad_bias is not None:
            grad_bias += grad_c.sum(dim=0)
            c += bias
        grad_pose[images] = group.weighted_sum(grad_b).view(n, J, D)
        factors = coefficients.flatten(1, 2).permute(1, 2, 0)  # (n·J, I, 2)
        for capsules, grad_u_hat in expand(factors, torch.cat([ds, x], dim=1), n):
            grad = grad_u_hat.flatten(2)  # (C, n, J·D)
            product = torch.bmm(grad, rows[capsules].transpose(1, 2))
            grad_u[images, capsules] = product.transpose(0, 1)
            grad_rows[capsules].baddbmm_(raised[images, capsules].permute(1, 2, 0), grad)
    return (
        grad_u,
        grad_rows.view(weight.shape).to(u.dtype),
        grad_pose,
        None if grad_prior is None else grad_prior.T.to(u.dtype).contiguous(),
        None if grad_bias is None else grad_bias.T.to(u.dtype).contiguous(),
    )


def _columns(pairs: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Transpose a value for each pair, (I, J), to (J, I)."""
    return None if pairs is None else pairs.to(dtype).T


def _groups(u: Tensor, weight: Tensor) -> list[slice]:
    """Groups of images whose prediction vectors, logits and couplings fit the cache."""
    (B, I, _), (_, _, J, D) = u.shape, weight.shape
    image_bytes = I * J * (D + 3) * accumulation_dtype(u.dtype).itemsize
    return slices(B, even_size(B, group_bytes(u.device) // max(1, image_bytes)))
