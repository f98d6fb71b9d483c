"""EM routing of matrix capsules (Hinton 2018): a Gaussian of the votes for every output capsule.

    V_ij = u_i W_ij,  a matrix (R, Q) of D = R·Q components
    R⁽¹⁾ = 1 / (the output capsules that i feeds);  R⁽ᵗ⁾_ij = softmax_j ℓ⁽ᵗ⁻¹⁾_ij
    N_j = Σ_i R_ij a_i,  μ_j = Σ_i R_ij a_i V_ij / N_j,  S_j = Σ_i R_ij a_i (V_ij − μ_j)² / N_j
    S̃ = S + min_variance,  z_j = λ⁽ᵗ⁾ (β_a − N_j (D β_u + ½ Σ log S̃_j))
    ℓ_ij = log σ(z_j) − ½ Σ log 2π S̃_j − ½ Σ (V_ij − μ_j)² / S̃_j

The votes are computed where they are needed and never stored. A vote costs P multiply-adds for each
component. P is 4 in the paper, a quarter of what a matrix unit would take, so they are plain
multiply-adds. A lane has a row of the batch, and a thread all D components of a pair (i, j):
`_em_tiles.py` says how everything is ordered for that.

Forward. A pass finds the normaliser of every (b, i): the largest ℓ, and Σ_j exp(ℓ − largest). A
second one finds N, μ and N S, input after input, with the weights R a. Several programs share the
inputs of an output, and a small kernel merges what they have found. `_em_passes.py` says how.
Nothing cancels there, as it would in Σ R a V² / N − μ².

Backward. Iterations run from the last, with gμ, gS and gz of the mean, variance and logit:

    gN = −λ gz (D β_u + ½ Σ log S̃),  gS ← gS − λ gz N / (2 S̃)
    gR_ij a_i⁻¹ = gR′_ij = gN_j + Σ (gμ_j x + gS_j (x² − S_j)) / N_j,  x = V − μ⁽ᵗ⁾
    gℓ_ij = R_ij (gR_ij − δ_i),  δ_i = Σ_j R_ij gR_ij
    dV_ij = R_ij a_i (gμ_j + 2 gS_j x) / N_j − gℓ_ij y / S̃⁽ᵗ⁻¹⁾_j,  y = V − μ⁽ᵗ⁻¹⁾
    gz = Σ_i gℓ (1 − σ(z)),  gμ = Σ_i gℓ y / S̃,  gS = ½ (Σ_i gℓ y² / S̃² − Σ_i gℓ / S̃)

the last line for the iteration before. A small kernel finds the coefficients of gR′, a polynomial
in x. A user's gradient of the assignment adds to gR of the last iteration. So an iteration takes
the two passes of the forward, with δ in the first, and sums of gℓ in the second. They leave the
normaliser and δ of every (b, i). With these, a pair needs no other, so dV is summed over the
iterations first and contracted once, in a kernel that has all outputs of an input for du and da,
and in one that has all rows of a pair for dW.

Where N is at most `NO_MASS`, mean and variance are 0, and 1/N is taken as 0 in the backward.

In a convolution, the output capsules of all positions that an input capsule feeds compete for it.
Between the two passes a kernel then gathers the normalisers, and δ, of these positions, in a fixed
order. Nothing else joins rows of the batch.
"""

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from tritoncaps.kernels._em_backward import (
    matrix_gradient_kernel,
    pose_gradient_kernel,
    pull_back_em_kernel,
)
from tritoncaps.kernels._em_passes import (
    competition_kernel,
    expectation_kernel,
    statistics_kernel,
    sums_kernel,
)
from tritoncaps.kernels._em_tiles import from_lanes, in_lanes, pack_size
from tritoncaps.kernels._launch import (
    Target,
    UnsupportedShape,
    accumulation_dtype,
    device_of,
    divide,
    measured,
    target_of,
)
from tritoncaps.kernels._patches import Patches

# Launch rules -------------------------------------------------------------------------------------

# Inputs in a thread: what a warp loads of an output's Gaussian serves all of them.
_INPUTS = {"em_expectation": 4, "em_expectation_bwd": 2, "em_sums": 1, "em_gradient": 1}
_FEWEST_PROGRAMS = 1024  # of dW: two for each of 4 places on 128 processors


def em_routing_launch(
    rule: str, I: int, P: int, R: int, J: int, Q: int, dtype: torch.dtype, target: Target
) -> tuple[dict[str, int], int, int]:
    """Launch keywords of a pass, the splits of the inputs, and the inputs in each.

    LANES: a lane for each row of a tile. A smaller batch leaves lanes idle.
    num_warps: warps share what they read through the first-level cache. In `em_sums` 4 of them have
    an output each and share poses. Elsewhere they have inputs and share an output's Gaussian.
    `em_gradient` reads two packs for each iteration, so there are 8.
    BLOCK_I: inputs in a program. `em_sums` takes one after another. A pack takes 2 D + 1 loads, as
    many as the votes of two inputs. Four inputs in a thread make up for it. With the pack of
    gradients there is room for two, and beside sums over i or j for one. A vote of more than 16
    components halves that. Where there is one already, its values spill.
    MAX_SPLITS: the programs that share an output's inputs, so that a tile of rows has at least 128
    warps. 16 inputs or more are worth a slot, which has half as much as their votes.

    Raises:
        UnsupportedShape: a vote has more than 32 components, or P is above 16.
    """
    block_r, block_q = (triton.next_power_of_2(max(n, 1)) for n in (R, Q))
    if block_r * block_q > 32 or P > 16:
        raise UnsupportedShape(
            f"votes of R={R} × Q={Q} with P={P}; a thread holds 32 components (R and Q rounded up "
            "to powers of two), and P up to 16"
        )
    warps = 8 if rule == "em_gradient" else 4
    inputs = max(_INPUTS[rule] // (2 if block_r * block_q > 16 else 1), 1)
    launch = {
        "BLOCK_I": inputs * (1 if rule == "em_sums" else warps),
        "MAX_SPLITS": triton.cdiv(128, max(J, 1)),
        "num_warps": warps,
    }
    if target.architecture == "interpreter":
        # Its time is that of the steps, whatever their size.
        launch |= {"BLOCK_I": 1 if rule == "em_sums" else 16, "num_warps": 8}
    launch = measured(rule, launch, target, dtype, I=I, P=P, J=J, D=R * Q)
    splits, each = divide(I, max(16, launch["BLOCK_I"]), launch.pop("MAX_SPLITS"))
    each *= max(16, launch["BLOCK_I"])
    block_i, warps = launch.pop("BLOCK_I"), launch["num_warps"]
    launch |= {
        "BLOCK_R": block_r,
        "BLOCK_Q": block_q,
        "BLOCK_N": warps,
        "LANES": lanes_of(target),
    }
    if rule != "em_sums":
        launch["BLOCK_G"] = max(block_i // warps, 1)
    return launch, splits, each


def lanes_of(target: Target) -> int:
    """The rows in a tile: those of a warp."""
    return 32 if target.architecture.startswith("sm") else 64


# Launchers ----------------------------------------------------------------------------------------


def _in_two(x: float) -> tuple[float, float]:
    """A number as the sum of two that float32 holds, because a kernel takes no other."""
    (high,) = struct.unpack("f", struct.pack("f", x))
    return high, x - high


def _in_lanes(x: Tensor | Patches, lanes: int, *order: int) -> Tensor:
    return x.in_lanes(lanes) if isinstance(x, Patches) else in_lanes(x, lanes, *order)


class _Passes:
    """The passes over the inputs of one call, which hold u, W and a in the order of the kernels."""

    def __init__(
        self,
        poses: Tensor | Patches,
        activations: Tensor | Patches,
        weight: Tensor,
        beta_u: Tensor,
        beta_a: Tensor,
        min_variance: float,
        grid: Sequence[int],
    ) -> None:
        self.B, self.I, self.R, self.P = poses.shape
        _, _, self.J, self.Q = weight.shape
        self.dtype = accumulation_dtype(poses.dtype)
        self.target = target_of(poses)
        self._poses_dtype = poses.dtype
        self.launch("em_sums")  # refuses a shape before anything is launched
        self.lanes = lanes_of(self.target)
        self.tiles = triton.cdiv(self.B, self.lanes)
        self.inputs = (
            _in_lanes(poses, self.lanes, 0, 2, 4, 1, 3),
            weight.permute(0, 2, 1, 3).contiguous(),
            _in_lanes(activations, self.lanes, 0, 2, 1),
        )
        self.betas = beta_u.contiguous(), beta_a.contiguous()
        self.min_variance = _in_two(min_variance)
        self.grid = grid
        self.pack = self.tiles, self.J, pack_size(2, self.R, self.Q, self.lanes)
        self.slots = self.empty(self.launch("em_sums")[1], *self.pack)

    def empty(self, *shape: int) -> Tensor:
        """A new tensor of the accumulation type."""
        return self.inputs[0].new_empty(shape, dtype=self.dtype)

    def launch(self, rule: str) -> tuple[dict[str, int], int, int]:
        """`em_routing_launch` of this call."""
        extents = self.I, self.P, self.R, self.J, self.Q
        return em_routing_launch(rule, *extents, self._poses_dtype, self.target)

    def sizes(self, rule: str) -> dict[str, Any]:
        """The meta-parameters of a kernel over inputs."""
        return {"P": self.P, "R": self.R, "Q": self.Q, **self.launch(rule)[0]}

    def pairs(self) -> tuple[int, dict[str, Any]]:
        """Programs and meta-parameters of a kernel over pairs (b, j)."""
        sizes = self.sizes("em_sums")
        del sizes["P"]
        return self.tiles * triton.cdiv(self.J, sizes["BLOCK_N"]), sizes

    def uniform(self, normaliser: Tensor) -> None:
        """Write the normaliser of iteration 1, whose ℓ is 0."""
        normaliser[:, :, 0] = 0
        normaliser[:, :, 1] = 1 / self.J
        self._compete(normaliser, None)

    def expectation(
        self,
        state: Tensor,
        normaliser: Tensor,
        grads: Tensor | None = None,
        grad_assignment: Tensor | None = None,
        delta: Tensor | None = None,
    ) -> None:
        """Write the normaliser, (tiles, I, 2, lanes), and with `grads` δ, (tiles, I, lanes)."""
        sizes = self.sizes("em_expectation" if grads is None else "em_expectation_bwd")
        groups = triton.cdiv(self.I, sizes["BLOCK_G"] * sizes["BLOCK_N"])
        if self.I == 0:
            return
        expectation_kernel[(self.tiles * groups,)](
            # In place of a missing tensor, a kernel gets one that it does not touch.
            *self.inputs, state, *(state if x is None else x for x in (grads, grad_assignment)),
            normaliser, normaliser if delta is None else delta,
            self.I, self.J,
            GRADIENT=grads is not None,
            HAS_GRAD_ASSIGNMENT=grad_assignment is not None,
            **sizes,
        )  # fmt: skip
        self._compete(normaliser, delta)

    def _compete(self, normaliser: Tensor, delta: Tensor | None) -> None:
        """Join the positions that an input capsule feeds, if there is a grid."""
        if not self.grid or self.I == 0:
            return
        rows, columns, kernel, stride = self.grid
        block_i = min(triton.next_power_of_2(self.I), 8)
        given = normaliser.clone(), None if delta is None else delta.clone()
        competition_kernel[(self.tiles * triton.cdiv(self.I, block_i),)](
            *(given[0] if x is None else x for x in (*given, normaliser, delta)),
            self.B, self.I, self.I // kernel**2,
            ROWS=rows,
            COLUMNS=columns,
            KERNEL=kernel,
            STRIDE=stride,
            GRADIENT=delta is not None,
            BLOCK_I=block_i,
            LANES=self.lanes,
            num_warps=min(block_i, 4),
        )  # fmt: skip

    def sums(
        self,
        state: Tensor,
        normaliser: Tensor,
        grads: Tensor | None = None,
        grad_assignment: Tensor | None = None,
        delta: Tensor | None = None,
        *,
        has_logits: bool = True,
        assignment: Tensor | None = None,
    ) -> None:
        """Fill the slots with μ, N S and N, or with the sums of gℓ if `grads` is given."""
        launch, splits, each = self.launch("em_sums")
        programs = self.tiles * splits * triton.cdiv(self.J, launch["BLOCK_N"])
        sums_kernel[(programs,)](
            *self.inputs,
            *(self.slots if x is None else x for x in (state, grads, grad_assignment)),
            normaliser, *(normaliser if x is None else x for x in (delta, assignment)),
            self.slots,
            self.tiles, self.I, self.J, splits, each,
            HAS_LOGITS=has_logits,
            GRADIENT=grads is not None,
            HAS_GRAD_ASSIGNMENT=grad_assignment is not None,
            SAVE_ASSIGNMENT=assignment is not None,
            **self.sizes("em_sums"),
        )  # fmt: skip


def em_routing_fwd(
    poses: Tensor | Patches,
    activations: Tensor | Patches,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    iterations: int,
    temperature: list[float],
    min_variance: float,
    grid: list[int],
    gradient: str,
    return_assignment: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Route the votes u W without storing them.

    Args:
        poses: shape (B, I, R, P), any strides, or the patches of a grid.
        activations: likewise, shape (B, I), dtype of `poses`, as all others.
        weight: shape (I, P, J, Q), any strides.
        beta_u: cost of a component of a vote, shape (J,).
        beta_a: gain of an output capsule, shape (J,).
        iterations: T, the number of Gaussians that are fitted one after the other, at least 1.
        temperature: inverse temperature λ of each iteration, T numbers.
        min_variance: added to every variance.
        grid: empty, or (H', W', K, S) of a convolution whose output capsules compete for an input
            capsule across positions. B is then images · H' · W', and I is K · K · C.
        gradient: only the backward needs it.
        return_assignment: whether to write R of the last iteration.

    Returns:
        v (B, J, R, Q); logits z of the activations, (B, J); R (B, I, J), or an empty tensor; and in
        the accumulation type, for `em_routing_bwd`, mass (T, B, J), mean (T, B, J, R, Q) and
        variance (T, B, J, R, Q).
    """
    B, I, R, _ = poses.shape
    _, _, J, Q = weight.shape
    dtype = accumulation_dtype(poses.dtype)
    logits = poses.new_empty((B, J), dtype=dtype)
    mass = poses.new_empty((iterations, B, J), dtype=dtype)
    # Results must not share memory.
    mean, variance = (poses.new_empty((iterations, B, J, R, Q), dtype=dtype) for _ in range(2))
    if B == 0 or J == 0:
        assignment = poses.new_empty((B, I, J) if return_assignment else (0,))
        v = poses.new_empty(B, J, R, Q)
        return v, logits.to(poses.dtype), assignment, mass, mean, variance

    with device_of(poses):
        passes = _Passes(poses, activations, weight, beta_u, beta_a, min_variance, grid)
        state = passes.empty(*passes.pack)
        normaliser = passes.empty(passes.tiles, I, 2, passes.lanes)
        saved = None
        if return_assignment:
            saved = poses.new_empty(passes.tiles, I, J, passes.lanes)
        programs, sizes = passes.pairs()

        passes.uniform(normaliser)
        for step in range(iterations):
            if step > 0:
                passes.expectation(state, normaliser)
            wanted = saved if step == iterations - 1 else None
            passes.sums(state, normaliser, has_logits=step > 0, assignment=wanted)
            statistics_kernel[(programs,)](
                passes.slots, *passes.betas, state, mass[step], mean[step], variance[step], logits,
                B, J, passes.tiles, len(passes.slots),
                *_in_two(temperature[step]), *passes.min_variance,
                **sizes,
            )  # fmt: skip
        assignment = poses.new_empty(0)
        if saved is not None:
            assignment = from_lanes(saved, B, poses.dtype, 0, 3, 1, 2)
    return (
        mean[-1].to(poses.dtype, copy=True),
        logits.to(poses.dtype),
        assignment,
        mass,
        mean,
        variance,
    )


def em_routing_bwd(
    grad_v: Tensor,
    grad_logits: Tensor | None,
    grad_assignment: Tensor | None,
    poses: Tensor | Patches,
    activations: Tensor | Patches,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    mass: Tensor,
    mean: Tensor,
    variance: Tensor,
    iterations: int,
    temperature: list[float],
    min_variance: float,
    grid: list[int],
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the poses, the activations, the weight, beta_u and beta_a.

    Args:
        grad_v: shape (B, J, R, Q), any strides.
        grad_logits: shape (B, J), any strides, or None.
        grad_assignment: shape (B, I, J), any strides, or None. Ignored unless `gradient` is "full".
        poses, activations, weight, beta_u, beta_a, iterations, temperature, min_variance, grid: as
            given to `em_routing_fwd`.
        mass, mean, variance: as returned by it, any strides: a `vmap` takes slices of them.
        gradient: "full" differentiates through every iteration. "last" treats the last assignment
            as a constant.
    """
    B, I, R, P = poses.shape
    _, _, J, Q = weight.shape
    given = poses, activations, weight, beta_u, beta_a
    if B == 0 or J == 0:
        return tuple(x.new_empty(x.shape).zero_() for x in given)  # type: ignore[return-value]

    full = gradient == "full"
    first = 0 if full else iterations - 1
    steps = iterations - first
    mass, mean, variance = mass.contiguous(), mean.contiguous(), variance.contiguous()
    with device_of(poses):
        passes = _Passes(*given, min_variance, grid)
        lanes, tiles = passes.lanes, passes.tiles
        state = passes.empty(steps, *passes.pack)
        grads = passes.empty(steps, tiles, J, pack_size(3, R, Q, lanes))
        normaliser = passes.empty(steps, tiles, I, 2, lanes)
        delta = passes.empty(steps, tiles, I, lanes) if full else normaliser
        grad_z = passes.empty(iterations, B, J)
        if grad_assignment is not None:
            grad_assignment = in_lanes(grad_assignment, lanes, 0, 2, 3, 1) if full else None
        programs, sizes = passes.pairs()
        grad_v = grad_v.contiguous()
        grad_logits = None if grad_logits is None else grad_logits.contiguous()
        for t in range(iterations - 1, first - 1, -1):
            step, is_last = t - first, t == iterations - 1
            pull_back_em_kernel[(programs,)](
                passes.slots, grad_v, grad_v if grad_logits is None else grad_logits,
                *passes.betas, mass, mean, variance, state[step], grads[step], grad_z,
                B, J, tiles, len(passes.slots), t,
                *_in_two(temperature[t]), *_in_two(temperature[max(t - 1, 0)]),
                *passes.min_variance,
                IS_FIRST=t == 0,
                IS_LAST=is_last,
                HAS_GRAD_LOGITS=grad_logits is not None,
                **sizes,
            )  # fmt: skip
            if t == 0:
                passes.uniform(normaliser[step])
            elif not full:
                passes.expectation(state[step], normaliser[step])
            else:
                of_step = state[step], normaliser[step], grads[step]
                of_assignment = grad_assignment if is_last else None
                passes.expectation(*of_step, of_assignment, delta[step])
                passes.sums(*of_step, of_assignment, delta[step])

        arguments = (
            *passes.inputs, state, grads, state if grad_assignment is None else grad_assignment,
            normaliser, delta,
        )  # fmt: skip
        modes = {"FULL": full, "HAS_GRAD_ASSIGNMENT": grad_assignment is not None}
        modes |= passes.sizes("em_gradient")
        du = passes.empty(tiles, I, P, lanes, R)
        da = passes.empty(tiles, I, lanes)
        block_i = modes["BLOCK_G"] * modes["BLOCK_N"]
        groups = triton.cdiv(I, block_i)
        splits, each = divide(tiles, 1, max(_FEWEST_PROGRAMS // max(groups * J, 1), 1))
        dw = passes.empty(splits, I, J, P, Q)
        if I > 0:
            pose_gradient_kernel[(tiles * groups,)](
                *arguments, du, da, tiles, I, J, steps, first, **modes
            )
            matrix_gradient_kernel[(groups * J * splits,)](
                *arguments, dw, tiles, I, J, steps, first, splits, each, **modes
            )
        grad_z = grad_z[first:]
        return (
            from_lanes(du, B, poses.dtype, 0, 3, 1, 4, 2),
            from_lanes(da, B, poses.dtype, 0, 2, 1),
            dw.sum(0).permute(0, 2, 1, 3).to(weight.dtype).contiguous(),
            -R * Q * (grad_z * mass[first:]).sum((0, 1)).to(beta_u.dtype),
            grad_z.sum((0, 1)).to(beta_a.dtype),
        )
