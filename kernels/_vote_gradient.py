# ruff: noqa: RUF005 - Triton does not unpack tuples
"""The gradients of u and W from those of the prediction vectors, which are summed over all passes.

    dû_ij = Σ_t (c⁽ᵗ⁾_ij ds⁽ᵗ⁾_j + db⁽ᵗ⁾_ij pose⁽ᵗ⁾_j)
    du_i = Σ_j W_ij dû_ij,  dW_ij = Σ_b u_i ⊗ dû_ij,  dprior_ij = Σ_t Σ_b db⁽ᵗ⁾_ij

A warp owns an input capsule. It walks over pairs of output capsules, and for each over the batch,
16 rows a step. log Σ_j exp and δ of the passes are given, so it evaluates a pair without the other
output capsules, and nothing here grows with J.

dû is summed over the passes before it meets u and W, so both take one product a step, however many
passes there were. The product û = u W leaves batch rows and components (j, d) where the product
dû Wᵀ wants them, if the components are ordered (d / 4, j, d % 4 / 2, d % 2): a thread has columns
2n and 2n + 1 of the first result, and takes columns n and n + 4 of a factor. Only dûᵀ u changes
the owner of values.

`_pack` brings poses and ds into the order in which a thread reads them: 4 values at once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritoncaps.kernels._launch import Target, divide, measured, strides, target_of
from tritoncaps.kernels._patches import Patches
from tritoncaps.kernels._prepared import Prepared
from tritoncaps.kernels._slots import write_sum
from tritoncaps.kernels._tiles import classes, dot, round_to_tf32

# Gradients of u, the weight, and of the prior and the bias, if there are any.
Grads = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

# Of an H200: two programs for every processor, and 16.
_FEWEST_PROGRAMS, _ENOUGH_PROGRAMS = 264, 2112
_FEWEST_STEPS = 32  # batch steps of a program that shares a long batch
# Triton 3.9 needs two registers more.
_FITS_200 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
_MOST_STEPS = 2  # passes of one launch: more would not fit into the registers


# Launch rule --------------------------------------------------------------------------------------


def vote_gradient_launch(
    I: int, P: int, J: int, D: int, dtype: torch.dtype, target: Target
) -> dict[str, int] | None:
    """Launch keywords, or None where this form does not serve.

    It needs NVIDIA's matrix units and room for five tiles of a pair of output capsules.
    GROUPS: warps, with a capsule each. They share poses and ds, which are most of the traffic.
    num_stages: the next batch rows are fetched while the warps work on these.
    """
    block_p = max(triton.next_power_of_2(max(P, 1)), 8)
    block_d = max(triton.next_power_of_2(max(D, 1)), 8)
    fits = block_p <= 16 and block_d <= 16
    if not target.architecture.startswith("sm") or dtype == torch.float64 or not fits:
        return None
    groups = 2 if I > 64 else 1
    launch = {
        "GROUPS": groups,
        "BLOCK_P": block_p,
        "BLOCK_D": block_d,
        "num_warps": groups,
        "num_stages": 2,
    }
    return measured("vote_gradient", launch, target, dtype, I=I, P=P, J=J, D=D)


def share_batch(
    programs: int, steps_b: int, numbers_of_u: int, numbers_of_weight: int
) -> tuple[int, int]:
    """Into how many splits the batch is divided, and the batch steps of each.

    Few input capsules make few programs. Then these share the batch, however short it is. They also
    share a long one, such as that of a convolution, whose rows are the positions of all images: the
    call takes as long as the walk of one program over its rows. Each split leaves dW in a slot of
    its own. So it has at least 32 steps, which make up for that, and the slots take no more memory
    than u.
    """
    of_a_short_batch = _FEWEST_PROGRAMS // programs
    of_a_long_batch = min(
        _ENOUGH_PROGRAMS // programs,
        steps_b // _FEWEST_STEPS,
        numbers_of_u // max(numbers_of_weight, 1),
    )
    return divide(steps_b, 1, max(of_a_short_batch, of_a_long_batch, 1))


def launch_for(u: Tensor | Patches, weight: Tensor) -> dict[str, int] | None:
    """The launch of a contraction of these inputs, or None."""
    I, P, J, D = weight.shape
    return vote_gradient_launch(I, P, J, D, u.dtype, target_of(u))


# Packed vectors -----------------------------------------------------------------------------------
#
# A block is one pair of output capsules and 16 batch rows of a tensor (B, J, D), 32 BLOCK_D values
# in the order (d / 8, b / 8, b % 8, j, d % 4 / 2, d / 4 % 2, d % 2). Blocks are ordered (pair, b).


@triton.jit
def _pack_kernel(
    # pointers
    poses_ptr, ds_ptr, packed_ptr,
    # extents
    B, J, D, steps, steps_b,
    # meta-parameters
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one block of one tensor. What does not exist is zero."""
    block = tl.program_id(0)
    tensor = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, 32 * BLOCK_D)
    d = n // 256 * 8 + n // 2 % 2 * 4 + n // 4 % 2 * 2 + n % 2
    b = block % steps_b * 16 + n // 128 % 2 * 8 + n // 16 % 8
    j = block // steps_b * 2 + n // 8 % 2
    exists = (b < B) & (j < J) & (d < D)
    vectors_ptr = poses_ptr + tensor * B * J * D
    if tensor >= steps:
        vectors_ptr = ds_ptr + (tensor - steps) * B * J * D
    x = tl.load(vectors_ptr + (b.to(tl.int64) * J + j) * D + d, exists, other=0.0)
    packed_ptr += (tensor * tl.num_programs(0) + block) * (32 * BLOCK_D)
    tl.store(packed_ptr + n, x.to(tl.float32))


def _pack(poses: Tensor, ds: Tensor, block_d: int) -> Tensor:
    """Pack contiguous (steps, B, J, D) both: (2, steps, pairs, batch steps, 32 block_d)."""
    steps, B, J, D = poses.shape
    pairs, steps_b = triton.cdiv(J, 2), triton.cdiv(B, 16)
    packed = poses.new_empty((2, steps, pairs, steps_b, 32 * block_d), dtype=torch.float32)
    _pack_kernel[(pairs * steps_b, 2 * steps)](
        poses, ds, packed, B, J, D, steps, steps_b, BLOCK_D=block_d, num_warps=1
    )
    return packed


# Kernel -------------------------------------------------------------------------------------------


@triton.jit
def _load_packed(ptr, BLOCK_D: tl.constexpr):
    """A block as (1, 16, BLOCK_D / 4, 2, 2, 2), with axes (b, d / 4, j, d % 4 / 2, d % 2)."""
    x = tl.load(ptr + tl.arange(0, 32 * BLOCK_D))
    x = tl.reshape(x, (BLOCK_D // 8, 2, 8, 2, 2, 2, 2))
    x = tl.permute(x, (1, 2, 0, 5, 3, 4, 6))
    return tl.reshape(x, (1, 16, BLOCK_D // 4, 2, 2, 2))


@triton.jit
def _over_d(x):
    """The sum over d, (GROUPS, 16, 2)."""
    return tl.sum(tl.sum(tl.sum(x, axis=2), axis=4), axis=3)


@triton.jit
def _along_d(c):
    """(GROUPS, 16, 2) as (GROUPS, 16, 1, 2, 1, 1): the steps of `_over_d` from last to first."""
    return tl.expand_dims(tl.expand_dims(tl.expand_dims(c, 3), 4), 2)


@triton.jit
def _as_factor(x):
    """(GROUPS, M, N) with the columns of a result as a factor has them: (…, 4, 2) as (…, 2, 4)."""
    G: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[2]
    x = tl.permute(tl.reshape(x, (G, M, N // 8, 4, 2)), (0, 1, 2, 4, 3))
    return tl.reshape(x, (G, M, N))


@triton.jit
def _factor_order(n):
    """The columns of a result, 0 to N, in the order of `_as_factor`."""
    return n // 8 * 8 + n % 4 * 2 + n // 4 % 2


@triton.jit
def _repeat(w, K: tl.constexpr):
    """W_i, (GROUPS, rows, P), repeated along K, as the second factor: (GROUPS, K, rows)."""
    G: tl.constexpr = w.shape[0]
    ROWS: tl.constexpr = w.shape[1]
    P: tl.constexpr = w.shape[2]
    w = tl.reshape(tl.broadcast_to(w[:, :, None, :], (G, ROWS, K // P, P)), (G, ROWS, K))
    return tl.permute(w, (0, 2, 1))


@triton.jit
def _step_gradient(
    vote, pose, ds, prior, bias, grad_coupling, normaliser, delta,
    FULL: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A pass's share of dû, and db and dc, (GROUPS, 16, 2)."""
    softmax = tl.exp(_over_d(vote * pose) + prior - normaliser[:, :, None])
    c = softmax
    if HAS_BIAS:
        c += bias
    grad = _along_d(c) * ds
    db = tl.zeros_like(softmax)
    dc = tl.zeros_like(softmax)
    if FULL:
        dc = _over_d(vote * ds) + grad_coupling
        db = softmax * (dc - delta[:, :, None])
        grad += _along_d(db) * pose
    return grad, db, dc


@triton.jit
def _vote_gradient_kernel(
    # pointers
    columns_ptr, weight_ptr, poses_ptr, ds_ptr, uniform_ptr, prior_ptr, bias_ptr,
    grad_coupling_ptr, normaliser_ptr, delta_ptr,
    du_ptr, grad_u_ptr, slots_ptr, prior_slots_ptr, bias_slots_ptr,
    # extents
    B, I, J, D, padded_b, steps_b, each,
    # strides
    stride_prior_i, stride_prior_j, stride_bias_i, stride_bias_j,
    # meta-parameters
    STEPS: tl.constexpr, UNIFORM: tl.constexpr, ADD_DU: tl.constexpr, FULL: tl.constexpr,
    HAS_PRIOR: tl.constexpr, HAS_BIAS: tl.constexpr, LEAKY: tl.constexpr,
    HAS_GRAD_COUPLING: tl.constexpr, IS_ODD: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """du, and a slot's share of dW, dprior and dbias, of GROUPS capsules and `each` batch steps.

    STEPS passes have logits. UNIFORM adds one without. With ADD_DU, du already holds other passes.
    """
    ROWS: tl.constexpr = 2 * BLOCK_D
    slot = tl.program_id(1).to(tl.int64)
    first_step = tl.program_id(1) * each
    i = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    is_capsule = i < I
    near = tl.minimum(i, I - 1)
    b = tl.arange(0, 16)
    p = tl.arange(0, BLOCK_P)
    k = tl.arange(0, K)
    row = tl.arange(0, ROWS)
    pairs = (J + 1) // 2
    step_size = tl.cast(pairs, tl.int64) * steps_b * (32 * BLOCK_D)
    pair_size = tl.cast(padded_b, tl.int64) * I
    inverse_classes = 1.0 / classes(J, LEAKY)
    columns_ptrs = columns_ptr + (near * padded_b * K)[:, None, None]
    factor_ptrs = columns_ptrs + (b * K)[None, :, None] + p[None, None, :]
    columns_ptrs += (b * K)[None, :, None] + k[None, None, :]
    pair_ptrs = (near * padded_b)[:, None] + b[None, :]
    offs_u = ((b.to(tl.int64) * I)[None, :] + near[:, None]) * P
    offs_u = offs_u[:, :, None] + p[None, None, :]
    for pair in range(pairs):
        first_block = tl.cast(pair, tl.int64) * steps_b * (32 * BLOCK_D)
        j = 2 * pair + tl.arange(0, 2)
        is_pair = is_capsule[:, None] & (j < J)[None, :]
        w_ptrs = weight_ptr + ((near * pairs + pair) * (ROWS * BLOCK_P))[:, None, None]
        w_ptrs += p[None, None, :]
        w = tl.load(w_ptrs + (row * BLOCK_P)[None, :, None])
        factor = tl.load(w_ptrs + (_factor_order(row) * BLOCK_P)[None, :, None]).to(tl.float32)
        high = w
        low = w
        if SPLIT:
            high = round_to_tf32(w)
            low = _repeat(w - high, K)
        high = _repeat(high, K)
        prior = tl.zeros((GROUPS, 1, 2), tl.float32)
        bias = tl.zeros((GROUPS, 1, 2), tl.float32)
        if HAS_PRIOR:
            ptrs = (
                prior_ptr
                + (i * stride_prior_i)[:, None]
                + (j.to(tl.int64) * stride_prior_j)[None, :]
            )
            prior += tl.load(ptrs, is_pair, other=float("-inf")).to(tl.float32)[:, None, :]
        elif IS_ODD:
            prior = tl.where((j < J)[None, None, :], prior, float("-inf"))
        if HAS_BIAS:
            ptrs = (
                bias_ptr + (i * stride_bias_i)[:, None] + (j.to(tl.int64) * stride_bias_j)[None, :]
            )
            bias += tl.load(ptrs, is_pair, other=0.0).to(tl.float32)[:, None, :]

        dw = tl.zeros((GROUPS, ROWS, BLOCK_P), tl.float32)
        dprior = tl.zeros((GROUPS, 16, 2), tl.float32)
        dbias = tl.zeros((GROUPS, 16, 2), tl.float32)
        for step_b in range(first_step, tl.minimum(first_step + each, steps_b)):
            block = first_block + step_b * (32 * BLOCK_D)
            first_b = tl.cast(step_b, tl.int64) * 16
            exists = is_capsule[:, None] & (b < B - first_b)[None, :]
            # Loads come before the product. Then everything takes the layout of its result.
            poses = ()
            grads = ()
            normalisers = ()
            deltas = ()
            for t in tl.static_range(STEPS):
                poses = poses + (_load_packed(poses_ptr + t * step_size + block, BLOCK_D),)
                grads = grads + (_load_packed(ds_ptr + t * step_size + block, BLOCK_D),)
                offs_ib = pair_ptrs + (t * pair_size + first_b)
                normalisers = normalisers + (tl.load(normaliser_ptr + offs_ib),)
                deltas = deltas + (tl.load(delta_ptr + offs_ib),)
            if UNIFORM:
                uniform = _load_packed(uniform_ptr + block, BLOCK_D)
            columns = tl.load(columns_ptrs + first_b * K)
            u = tl.load(factor_ptrs + first_b * K).to(tl.float32)
            if columns.dtype == tl.float32:
                u += tl.load(factor_ptrs + (first_b * K + BLOCK_P))

            if STEPS > 0:
                vote = tl.dot(columns, high, input_precision="tf32")
                if SPLIT:
                    vote = tl.dot(columns, low, acc=vote, input_precision="tf32")
                vote = tl.reshape(vote, (GROUPS, 16, BLOCK_D // 4, 2, 2, 2))
            for t in tl.static_range(STEPS):
                grad_coupling = tl.zeros((GROUPS, 16, 2), tl.float32)
                if HAS_GRAD_COUPLING and t == STEPS - 1:
                    offs_c = (((first_b + b) * I)[None, :] + i[:, None]) * J
                    mask_c = exists[:, :, None] & (j < J)[None, None, :]
                    coupling_ptrs = grad_coupling_ptr + offs_c[:, :, None] + j[None, None, :]
                    grad_coupling += tl.load(coupling_ptrs, mask_c, other=0.0).to(tl.float32)
                share, db, dc = _step_gradient(
                    vote, poses[t], grads[t], prior, bias, grad_coupling, normalisers[t], deltas[t],
                    FULL, HAS_BIAS,
                )  # fmt: skip
                if t == 0:
                    grad = share
                else:
                    grad += share
                if HAS_PRIOR:
                    dprior += db
                if HAS_BIAS:
                    dbias += dc
            if STEPS == 0:
                grad = tl.broadcast_to(
                    uniform * inverse_classes, (GROUPS, 16, BLOCK_D // 4, 2, 2, 2)
                )
            elif UNIFORM:
                grad += uniform * inverse_classes
            grad = tl.reshape(grad, (GROUPS, 16, ROWS))

            mask_u = exists[:, :, None] & (p < P)[None, None, :]
            first_u = first_b * I * P
            du = dot(_as_factor(grad), factor, PRECISION)
            if ADD_DU or pair > 0:
                du += tl.load(du_ptr + first_u + offs_u, mask_u, other=0.0)
            if pair < pairs - 1:
                tl.store(du_ptr + first_u + offs_u, du, mask_u)
            else:
                tl.store(grad_u_ptr + first_u + offs_u, du, mask_u)
            dw += dot(tl.permute(grad, (0, 2, 1)), u, PRECISION)

        jd = row // 4 % 2
        j_row = 2 * pair + jd
        d = row // 8 * 4 + row % 4
        offs = ((slot * I + i)[:, None] * P + p[None, :]) * J
        offs_w = (offs[:, None, :] + j_row[None, :, None]) * D + d[None, :, None]
        mask_w = is_capsule[:, None, None] & ((j_row < J) & (d < D))[None, :, None]
        tl.store(slots_ptr + offs_w, dw, mask_w & (p < P)[None, None, :])
        offs = (slot * I + i)[:, None] * J + j[None, :]
        if HAS_PRIOR and FULL:
            tl.store(prior_slots_ptr + offs, tl.sum(dprior, axis=1), is_pair)
        if HAS_BIAS and FULL:
            tl.store(bias_slots_ptr + offs, tl.sum(dbias, axis=1), is_pair)
        # The next pair adds to du that other threads of the program may have written.
        tl.debug_barrier()


# Launcher -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contraction:
    """What the passes of a call have in common, and the gradients that they lead to.

    Attributes:
        launch: of `launch_for`.
        prior, bias: (I, J), any strides, or None.
        grads: contiguous outputs.
        full: whether the couplings depend on û. If not, dprior and dbias are not written.
        leaky: whether an orphan class with logit 0 takes part in the softmax.
    """

    launch: dict[str, int]
    prior: Tensor | None
    bias: Tensor | None
    grads: Grads
    full: bool
    leaky: bool

    def write(
        self,
        prepared: Prepared,
        poses: Tensor,
        ds: Tensor,
        grad_coupling: Tensor | None,
        saved: Tensor,
        *,
        uniform: bool,
    ) -> None:
        """Write du, dW, dprior and dbias of all passes.

        Args:
            prepared: u and W.
            poses, ds: contiguous, (steps, B, J, D).
            grad_coupling: gradient of the last step's coupling, contiguous, (B, I, J), or None.
            saved: log Σ_j exp and δ, contiguous, (2, steps, I, B').
            uniform: whether the first step has no logits.
        """
        prior, bias, launch = self.prior, self.bias, self.launch
        grad_u, grad_weight, grad_prior, grad_bias = self.grads
        normaliser, delta = saved
        I, P, J, D = grad_weight.shape
        B, padded_b = len(grad_u), prepared.columns.shape[1]
        if I == 0:
            return
        is_plain = prior is None and bias is None and grad_coupling is None
        if _FITS_200 and is_plain and not target_of(poses).architecture.startswith("sm1"):
            # Enough for everything then, except on Blackwell, and ten warps fit into a processor.
            launch = {**launch, "maxnreg": 200}
        packed_poses, packed_ds = _pack(poses, ds, launch["BLOCK_D"])
        steps_b = packed_ds.shape[2]
        programs = triton.cdiv(I, launch["GROUPS"])
        splits, each = share_batch(programs, steps_b, grad_u.numel(), grad_weight.numel())
        logged = list(range(1 if uniform else 0, len(ds)))
        chunks = [logged[n : n + _MOST_STEPS] for n in range(0, len(logged), _MOST_STEPS)] or [[]]
        slots = grad_weight[None]
        if splits * len(chunks) > 1:
            slots = grad_weight.new_empty((splits * len(chunks), I, P, J, D), dtype=torch.float32)
        pair_slots = normaliser.new_empty((2, splits * len(chunks), I, J))
        du = (
            grad_u
            if grad_u.dtype == torch.float32
            else torch.empty_like(grad_u, dtype=torch.float32)
        )
        for number, chunk in enumerate(chunks):
            step = chunk[0] if chunk else 0
            is_last = number == len(chunks) - 1
            first_slot = number * splits
            _vote_gradient_kernel[(programs, splits)](
                prepared.columns, prepared.weight, packed_poses[step:], packed_ds[step:], packed_ds,
                # In place of a missing tensor, the kernel gets the columns, which it only reads.
                *(prepared.columns if x is None else x for x in (prior, bias, grad_coupling)),
                normaliser[step:], delta[step:],
                du, grad_u if is_last else du,
                slots[first_slot:], pair_slots[0, first_slot:], pair_slots[1, first_slot:],
                B, I, J, D, padded_b, steps_b, each,
                *strides(prior, 2), *strides(bias, 2),
                STEPS=len(chunk),
                UNIFORM=uniform and number == 0,
                ADD_DU=number > 0,
                FULL=self.full,
                HAS_PRIOR=prior is not None,
                HAS_BIAS=bias is not None,
                LEAKY=self.leaky,
                HAS_GRAD_COUPLING=grad_coupling is not None and is_last,
                IS_ODD=J % 2 == 1,
                SPLIT=prepared.split,
                PRECISION="tf32x3" if prepared.split else "tf32",
                P=P,
                K=prepared.columns.shape[2],
                **launch,
            )  # fmt: skip
        if slots.shape[0] > 1:
            write_sum(slots.view(-1, I * P, J, D), grad_weight.view(I * P, J, D))
        if self.full:
            for grad, shares in ((grad_prior, pair_slots[0]), (grad_bias, pair_slots[1])):
                if grad is not None:
                    grad.copy_(shares.sum(0))
