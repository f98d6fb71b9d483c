"""The operators in plain torch: what a CPU runs, and any device without Triton kernels.

Every function here has a twin of the same name and signature in `tritoncaps.kernels`. The routing
never holds more than a slice of the prediction vectors: it walks over the input capsules in chunks
whose temporaries stay in the cache. The derivation of the backward is in `kernels/README.md`; in
short, with V⁽ᵗ⁾ = Σ_{k≤t} v⁽ᵏ⁾ the logits are û·V⁽ᵗ⁻¹⁾, so each iteration, forward or backward, is
one pass over (u, W) that reduces over i, and only s⁽ᵗ⁾ has to be kept between the two.
"""

import math
import os
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# squash -------------------------------------------------------------------------------------------


def _polar(s: Tensor) -> tuple[Tensor, Tensor]:
    """Length n, (N, 1), and direction s/n, (N, D), 0 where s is 0; no square overflows."""
    largest = s.abs().amax(dim=-1, keepdim=True)
    scaled = s / torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return largest * length, scaled / torch.where(length > 0, length, 1)


def squash_fwd(s: Tensor) -> Tensor:
    """v = n² / (1 + n²) · s/n of each row of s, (N, D) → (N, D).

    With m = max(n, 1) and k = min(n, 1), n² / (1 + n²) = k² / (1/m² + k²): no square overflows.
    """
    if s.numel() == 0:
        return torch.empty_like(s, memory_format=torch.contiguous_format)
    length, direction = _polar(s.to(accumulation_dtype(s.dtype)))
    inverse_square = (1 / length.clamp(min=1)).square()
    small_square = length.clamp(max=1).square()
    return (direction * (small_square / (inverse_square + small_square))).to(s.dtype)


def squash_bwd(grad_v: Tensor, s: Tensor) -> Tensor:
    """Gradient of squash, (N, D).

    With f(n) = n/(1+n²) and ŝ = s/n, v = f·s. The part of dv across s is scaled by f, the part
    along it, ρ = ŝ·dv, by f + n·f' = 2f/(1+n²): ds = f·(dv − ρŝ) + 2f/(1+n²)·ρŝ. Kept apart, the
    two lose nothing to cancellation where n is large and the second is tiny.
    """
    if s.numel() == 0:
        return torch.empty_like(s, memory_format=torch.contiguous_format)
    dtype = accumulation_dtype(s.dtype)
    length, direction = _polar(s.to(dtype))
    grad_v = grad_v.to(dtype)
    f = 1 / (length + 1 / length)
    along = (direction * grad_v).sum(dim=-1, keepdim=True) * direction
    return (f * ((grad_v - along) + 2 / (1 + length.square()) * along)).to(s.dtype)


# prediction vectors -------------------------------------------------------------------------------


def prediction_vectors_fwd(u: Tensor, weight: Tensor) -> Tensor:
    """û_{j|i} = W_ij u_i, chunk by chunk, since torch batches products by i, not by b."""
    B, I, _ = u.shape
    _, _, J, D = weight.shape
    u_hat = u.new_empty(B, I, J, D)
    for chunk in _chunks(I, B * J * D, u):
        u_hat[:, chunk] = _votes(u[:, chunk], weight[chunk])
    return u_hat


def _votes(u: Tensor, weight: Tensor) -> Tensor:
    """û as one (B, P) × (P, J·D) product for each input capsule; (B, I, J, D) with I outermost."""
    votes = torch.bmm(u.transpose(0, 1), weight.flatten(2))
    return votes.view(*votes.shape[:2], *weight.shape[2:]).transpose(0, 1)


def prediction_vectors_bwd(grad_u_hat: Tensor, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """du_i = Σ_j W_ij dû_ij and dW_ij = Σ_b u_i ⊗ dû_ij."""
    grad = grad_u_hat.flatten(2).transpose(0, 1)  # (I, B, J·D)
    grad_u = torch.bmm(grad, weight.flatten(2).transpose(1, 2)).transpose(0, 1)
    grad_weight = torch.bmm(u.permute(1, 2, 0), grad).view(weight.shape)
    return grad_u.contiguous(), grad_weight


# the routing loop, shared by both routing operators -----------------------------------------------

# Where the size of the cache is unknown: the level-2 cache of a common desktop core.
_DEFAULT_CACHE_BYTES = 1 << 20
# Chunks for an accelerator that runs this path: few launches matter there, not the cache.
_ACCELERATOR_CHUNK_BYTES = 1 << 28


def _chunk_bytes(device: torch.device) -> int:
    """How large the temporary of one chunk may be: the level-2 caches of the threads in use."""
    if device.type != "cpu":
        return _ACCELERATOR_CHUNK_BYTES
    try:
        cache = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows, macOS: no such name
        cache = 0
    return (cache if cache > 0 else _DEFAULT_CACHE_BYTES) * torch.get_num_threads()


def _chunks(I: int, elements_per_capsule: int, like: Tensor) -> list[slice]:
    """Slices of the input capsules, of about one size, whose largest temporary fits the cache."""
    capsule_bytes = max(1, elements_per_capsule) * like.element_size()
    largest = max(1, _chunk_bytes(like.device) // capsule_bytes)
    size = max(1, math.ceil(I / math.ceil(I / largest)))
    return [slice(start, min(start + size, I)) for start in range(0, I, size)]


def _squash_capsules(s: Tensor) -> Tensor:
    return squash_fwd(s.flatten(0, -2)).view(s.shape)  # (B, J, D)


def _route(
    iterations: int, weighted_sum: Callable[[int, Tensor | None], Tensor]
) -> tuple[Tensor, Tensor]:
    """Run the iterations; returns v⁽ʳ⁾, (B, J, D), and every s⁽ᵗ⁾, (r, B, J, D).

    `weighted_sum(t, v_sum)` returns s⁽ᵗ⁾, given V⁽ᵗ⁻¹⁾; t counts from 0, and V⁽⁰⁾ is None.
    """
    sums: list[Tensor] = []
    v_sum: Tensor | None = None
    for t in range(iterations):
        sums.append(weighted_sum(t, v_sum))
        v = _squash_capsules(sums[-1])
        v_sum = v if v_sum is None else v_sum + v
    return v, torch.stack(sums)


def _route_backward(
    grad_v: Tensor,
    sums: Tensor,
    full: bool,
    step: Callable[[int, Tensor | None, Tensor], Tensor],
) -> None:
    """Walk the iterations backwards; without `full` the last one alone.

    `step(t, v_sum, grad_s)` adds the share of iteration t to the gradients of the inputs, given
    V⁽ᵗ⁻¹⁾ and ds⁽ᵗ⁾, and returns Σ_i db_ij û_ij, its share of dV⁽ᵗ⁻¹⁾.
    """
    v_sums = [None, *accumulate(_squash_capsules(s) for s in sums[:-1])]
    grad_out = grad_v.to(sums.dtype)
    for t in reversed(range(len(sums))):
        grad_s = squash_bwd(grad_out.flatten(0, -2), sums[t].flatten(0, -2)).view(sums[t].shape)
        share = step(t, v_sums[t], grad_s)
        if not full:
            return
        grad_out = share if t == len(sums) - 1 else grad_out + share


def _coupling_gradient(c: Tensor, grad_c: Tensor, dim: int) -> Tensor:
    """db = c∘(dc − Σ_j c∘dc), the gradient of the softmax over the output capsules."""
    return c * (grad_c - (c * grad_c).sum(dim=dim, keepdim=True))


# dynamic routing of prediction vectors in memory --------------------------------------------------


def dynamic_routing_fwd(
    u_hat: Tensor, prior: Tensor | None, iterations: int, return_coupling: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """v (B, J, D), the last coupling (B, I, J) or an empty tensor, and all s⁽ᵗ⁾ (r, B, J, D)."""
    B, I, J, D = u_hat.shape
    dtype = accumulation_dtype(u_hat.dtype)
    coupling = u_hat.new_empty((B, I, J) if return_coupling else (0,))

    def weighted_sum(t: int, v_sum: Tensor | None) -> Tensor:
        s = u_hat.new_zeros((B, J, D), dtype=dtype)
        for chunk in _chunks(I, B * J * D, s):
            votes = u_hat[:, chunk].to(dtype)
            c = _coupling(votes, v_sum, prior, chunk)
            s += torch.einsum("bij,bijd->bjd", c, votes)
            if return_coupling and t == iterations - 1:
                coupling[:, chunk] = c
        return s

    v, sums = _route(iterations, weighted_sum)
    return v.to(u_hat.dtype), coupling, sums


def _coupling(votes: Tensor, v_sum: Tensor | None, prior: Tensor | None, chunk: slice) -> Tensor:
    """c = softmax_j(prior + û·V) of a chunk of prediction vectors, (B, C, J)."""
    if v_sum is None:
        b = votes.new_zeros(votes.shape[:-1])
    else:
        b = torch.einsum("bijd,bjd->bij", votes, v_sum)
    if prior is not None:
        b = b + prior[chunk].to(votes.dtype)
    return b.softmax(dim=-1)


def dynamic_routing_bwd(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u_hat: Tensor,
    prior: Tensor | None,
    sums: Tensor,
    full: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of u_hat, (B, I, J, D), and of the prior, (I, J)."""
    B, I, J, D = u_hat.shape
    dtype = sums.dtype
    grad_u_hat = u_hat.new_zeros((B, I, J, D), dtype=dtype)
    grad_prior = None if prior is None else torch.zeros_like(prior, dtype=dtype)

    def step(t: int, v_sum: Tensor | None, grad_s: Tensor) -> Tensor:
        grad_v_sum = torch.zeros_like(grad_s)
        for chunk in _chunks(I, B * J * D, grad_s):
            votes = u_hat[:, chunk].to(dtype)
            c = _coupling(votes, v_sum, prior, chunk)
            grad_u_hat[:, chunk] += c.unsqueeze(-1) * grad_s.unsqueeze(1)
            if not full or (v_sum is None and prior is None and grad_coupling is None):
                continue
            grad_c = torch.einsum("bijd,bjd->bij", votes, grad_s)
            if grad_coupling is not None and t == len(sums) - 1:
                grad_c += grad_coupling[:, chunk]
            grad_b = _coupling_gradient(c, grad_c, dim=-1)
            if v_sum is not None:
                grad_u_hat[:, chunk] += grad_b.unsqueeze(-1) * v_sum.unsqueeze(1)
                grad_v_sum += torch.einsum("bij,bijd->bjd", grad_b, votes)
            if grad_prior is not None:
                grad_prior[chunk] += grad_b.sum(0)
        return grad_v_sum

    _route_backward(grad_v, sums, full, step)
    return (
        grad_u_hat.to(u_hat.dtype),
        None if grad_prior is None else grad_prior.to(u_hat.dtype),
    )


# capsule routing: prediction vectors and routing fused --------------------------------------------
#
# Layout of the temporaries: the batch comes last, so that every element-wise step runs over
# contiguous rows of B, and a chunk of the weight, (C·P, J, D), needs no repacking. For each output
# capsule j a chunk takes two products: T_j = W_j V_j, (C·P, D) × (D, B), whose contraction with u
# over p is the logit, and s_j += W_jᵀ (c∘u), (D, C·P) × (C·P, B). All chunks share one set of
# buffers: a fresh one for each would be paid for in page faults.
#
# A small batch gives those products too few columns. Up to B = P the prediction vectors take no
# more memory than the weight, and are made.


def capsule_routing_fwd(
    u: Tensor, weight: Tensor, prior: Tensor | None, iterations: int, return_coupling: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """v (B, J, D), the last coupling (B, I, J) or an empty tensor, and all s⁽ᵗ⁾ (r, B, J, D)."""
    (B, I, P), (_, _, J, D) = u.shape, weight.shape
    dtype = accumulation_dtype(u.dtype)
    if B <= P:
        u_hat = _votes(u.to(dtype), weight.to(dtype))
        v, coupling, sums = dynamic_routing_fwd(u_hat, prior, iterations, return_coupling)
        return v.to(u.dtype), coupling.to(u.dtype), sums
    poses = _batch_last(u.to(dtype))  # (I, P, B)
    chunks = _chunks(I, J * P * B, poses)
    (scratch,) = _buffers(1, chunks, J * P * B, poses)
    coupling = u.new_empty((B, I, J) if return_coupling else (0,))

    def weighted_sum(t: int, v_sum: Tensor | None) -> Tensor:
        keep_coupling = return_coupling and t == iterations - 1
        if v_sum is None and prior is None:
            if keep_coupling:
                coupling.fill_(1 / J)
            flat = u.to(dtype).flatten(1) @ weight.to(dtype).flatten(0, 1).flatten(1)
            return flat.view(B, J, D) / J
        s = poses.new_zeros(J, D, B)
        V = None if v_sum is None else v_sum.permute(1, 2, 0).contiguous()  # (J, D, B)
        for chunk in chunks:
            w = _weight_rows(weight[chunk].to(dtype))  # (J, C·P, D)
            x = poses[chunk]  # (C, P, B)
            T = _view(scratch, (J, *x.shape))
            b = None if V is None else _contract(_product(w, V, T), x, out=T)
            c = _fused_coupling(b, prior, chunk, x, J)  # (J, C, B)
            torch.mul(c.unsqueeze(2), x, out=T)  # c∘u, (J, C, P, B)
            s.baddbmm_(w.transpose(1, 2), T.flatten(1, 2))
            if keep_coupling:
                coupling[:, chunk] = c.permute(2, 1, 0)
        return s.permute(2, 0, 1).contiguous()

    v, sums = _route(iterations, weighted_sum)
    return v.to(u.dtype), coupling, sums


def _batch_last(u: Tensor) -> Tensor:
    """(B, I, P) → (I, P, B), as a transposition of two axes, which torch does in blocks."""
    return u.flatten(1).t().contiguous().view(*u.shape[1:], u.shape[0])


def _buffers(count: int, chunks: list[slice], elements: int, like: Tensor) -> tuple[Tensor, ...]:
    """Flat buffers for the largest chunk, with so many elements per input capsule."""
    largest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    return like.new_empty(count, largest * elements).unbind()


def _view(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The beginning of a flat buffer in a shape."""
    return buffer[: math.prod(shape)].view(shape)


def _weight_rows(weight: Tensor) -> Tensor:
    """(C, P, J, D) → (J, C·P, D) without a copy: one matrix of rows (i, p) per output capsule."""
    return weight.flatten(0, 1).transpose(0, 1)


def _product(w: Tensor, X: Tensor, out: Tensor) -> Tensor:
    """W_j X_j for all j, (J, C·P, D) × (J, D, B), written to `out`, (J, C, P, B)."""
    torch.bmm(w, X, out=out.flatten(1, 2))
    return out


def _contract(T: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Σ_p T∘u, (J, C, P, B) and (C, P, B) → (J, C, B); `out` takes the product T∘u."""
    return torch.mul(T, x, out=out).sum(dim=2)


def _fused_coupling(
    b: Tensor | None, prior: Tensor | None, chunk: slice, x: Tensor, J: int
) -> Tensor:
    """c = softmax_j(prior + b) of a chunk, (J, C, B); without agreements b yet, of the prior."""
    if b is None:
        b = x.new_zeros(J, len(x), x.shape[-1])
    if prior is not None:
        b = b + prior[chunk].to(x.dtype).T.unsqueeze(-1)
    return b.softmax(dim=0)


def capsule_routing_bwd(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    sums: Tensor,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of u, (B, I, P), of the weight, (I, P, J, D), and of the prior, (I, J).

    dû_ij = Σ_t (c⁽ᵗ⁾ ds⁽ᵗ⁾ + db⁽ᵗ⁾ V⁽ᵗ⁻¹⁾) is contracted at once, in the pass of iteration t, so it
    never exists: a term k·x of it, k a coefficient and x a vector per output capsule, adds
    Σ_j k∘(W_j x_j) to du_i and (k∘u) x_jᵀ to dW_j.
    """
    (B, I, P), (_, _, J, D) = u.shape, weight.shape
    dtype = sums.dtype
    if B <= P:
        exact = u.to(dtype), weight.to(dtype)
        grad_u_hat, grad_prior = dynamic_routing_bwd(
            grad_v, grad_coupling, _votes(*exact), prior, sums, full
        )
        grad_u, grad_weight = prediction_vectors_bwd(grad_u_hat, *exact)
        return (
            grad_u.to(u.dtype),
            grad_weight.to(u.dtype),
            None if grad_prior is None else grad_prior.to(u.dtype),
        )
    poses = _batch_last(u.to(dtype))  # (I, P, B)
    chunks = _chunks(I, J * P * B, poses)
    scratch = _buffers(3, chunks, J * P * B, poses)
    (rows_scratch,) = _buffers(1, chunks, J * P * D, poses)
    grad_poses = torch.zeros_like(poses)
    grad_weight = poses.new_zeros(weight.shape)
    grad_prior = None if prior is None else torch.zeros_like(prior, dtype=dtype)

    def uniform_step(grad_s: Tensor) -> None:
        """Iteration 1 without a prior: c = 1/J, two plain products."""
        flat = grad_s.flatten(1) / J  # (B, J·D)
        rows = weight.to(dtype).flatten(0, 1).flatten(1)  # (I·P, J·D)
        grad_poses.flatten(0, 1).addmm_(rows, flat.T)
        grad_weight.flatten(0, 1).flatten(1).addmm_(poses.flatten(0, 1), flat)

    def step(t: int, v_sum: Tensor | None, grad_s: Tensor) -> Tensor:
        if v_sum is None and prior is None:
            uniform_step(grad_s)
            return torch.zeros_like(grad_s)
        ds = grad_s.permute(1, 2, 0).contiguous()  # (J, D, B)
        V = None if v_sum is None else v_sum.permute(1, 2, 0).contiguous()
        grad_v_sum = torch.zeros_like(ds)
        for chunk in chunks:
            w = _weight_rows(weight[chunk].to(dtype))  # (J, C·P, D)
            x = poses[chunk]  # (C, P, B)
            W_V, W_ds, scaled = (_view(buffer, (J, *x.shape)) for buffer in scratch)
            grad_w = _view(rows_scratch, (J, w.shape[1], D))
            b = None if V is None else _contract(_product(w, V, W_V), x, out=scaled)
            c = _fused_coupling(b, prior, chunk, x, J).unsqueeze(2)  # (J, C, 1, B)
            _product(w, ds, W_ds)
            if full:
                grad_c = _contract(W_ds, x, out=scaled).unsqueeze(2)
                if grad_coupling is not None and t == len(sums) - 1:
                    grad_c += grad_coupling[:, chunk].permute(2, 1, 0).unsqueeze(2)
                grad_b = _coupling_gradient(c, grad_c, dim=0)  # (J, C, 1, B)
                if grad_prior is not None:
                    grad_prior[chunk] += grad_b.sum(dim=(2, 3)).T
            if full and V is not None:
                grad_poses[chunk] += W_V.mul_(grad_b).addcmul_(W_ds, c).sum(dim=0)
                torch.mul(grad_b, x, out=scaled)  # db∘u
                torch.bmm(scaled.flatten(1, 2), V.transpose(1, 2), out=grad_w)
                grad_v_sum.baddbmm_(w.transpose(1, 2), scaled.flatten(1, 2))
            else:
                grad_poses[chunk] += W_ds.mul_(c).sum(dim=0)
                grad_w.zero_()
            torch.mul(c, x, out=scaled)  # c∘u
            grad_w.baddbmm_(scaled.flatten(1, 2), ds.transpose(1, 2))
            # Added at the end, since torch batches products into contiguous results alone.
            _weight_rows(grad_weight[chunk]).add_(grad_w)
        return grad_v_sum.permute(2, 0, 1).contiguous()

    _route_backward(grad_v, sums, full, step)
    return (
        grad_poses.flatten(0, 1).t().to(u.dtype).contiguous().view(u.shape),
        grad_weight.to(weight.dtype),
        None if grad_prior is None else grad_prior.to(u.dtype),
    )
