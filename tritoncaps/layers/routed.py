"""Capsules routed by agreement."""

import torch
from torch import Tensor, nn

from tritoncaps import _checks, ops
from tritoncaps._tracing import concrete, one_node
from tritoncaps.layers._initialisation import routing_weight_std


class RoutedCapsules(nn.Module):
    """Route input capsules to output capsules by agreement (Sabour 2017, procedure 1).

    By default each input capsule has matrices of its own, and their number is fixed. With
    `positions` the matrices are shared, as a convolution shares its kernel: the input is
    a grid (or a set) of positions with `in_capsules` capsules each, ordered by position, then type,
    and may have any number of positions. `in_capsules=1` is one matrix per
    output capsule, shared by all inputs.

    Args:
        in_capsules: input capsules, I. With `positions`, the capsules at each position, T.
        in_dim: components of an input capsule, P.
        out_capsules: output capsules, J.
        out_dim: components of an output capsule, D.
        iterations: the number of weighted sums, at least 1.
        positions: share the matrices over all positions. The value is the usual number. It only
            scales the initial weight; any other number works too. The matrices are copied for every
            position: n·T·P·J·D numbers during a call.
        pose_bias: learn a bias, (J, D), that is added to s before each squash. It starts at 0.1, as
            in the authors' code.
        leaky: add an orphan class to the softmax, which takes in what belongs to no output capsule.
        gradient: "full" differentiates through all iterations. "last" treats the last coupling as a
            constant.
        learned_prior: learn the initial logits, (I, J), which start at 0.
        device, dtype: of the parameters.

    Shapes: (B, I, P) → (B, J, D). `weight` is (I, P, J, D), `prior` (I, J) or None,
    `pose_bias` (J, D) or None. With `positions`, u is (B, n·T, P) for any n ≥ 1, `weight`
    (T, P, J, D) and `prior` (T, J).

    Raises:
        TypeError, ValueError: a size is not an int of at least 1, or `gradient` is unknown. In
            `forward`, the inputs do not fill whole positions, the mask has the wrong dtype, shape
            or device, and whatever `ops.fused_dynamic_routing` raises.

    Example:
        >>> import torch
        >>> routing = RoutedCapsules(in_capsules=1152, in_dim=8, out_capsules=10, out_dim=16)
        >>> routing(torch.rand(2, 1152, 8)).shape
        torch.Size([2, 10, 16])

        The same network with 32 matrices per class instead of 1152, on a larger grid:

        >>> shared = RoutedCapsules(32, 8, 10, 16, positions=6 * 6)
        >>> shared(torch.rand(2, 9 * 9 * 32, 8)).shape
        torch.Size([2, 10, 16])
    """

    calibrated_weight = "weight"

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        iterations: int = 3,
        *,
        positions: int | None = None,
        pose_bias: bool = False,
        leaky: bool = False,
        gradient: ops.Gradient = "full",
        learned_prior: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_capsules", in_capsules),
            ("in_dim", in_dim),
            ("out_capsules", out_capsules),
            ("out_dim", out_dim),
            ("iterations", iterations),
            ("positions", 1 if positions is None else positions),
        ):
            _checks.check_size("RoutedCapsules", name, value)
        for name, flag in (
            ("pose_bias", pose_bias),
            ("leaky", leaky),
            ("learned_prior", learned_prior),
        ):
            _checks.check_flag("RoutedCapsules", name, flag)
        _checks.check_choice("RoutedCapsules", "gradient", gradient, ("full", "last"))
        self.in_capsules = in_capsules
        self.in_dim = in_dim
        self.out_capsules = out_capsules
        self.out_dim = out_dim
        self.iterations = iterations
        self.positions = positions
        self.leaky = leaky
        self.gradient: ops.Gradient = gradient
        self.learned_prior = learned_prior

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(in_capsules, in_dim, out_capsules, out_dim)
        self.prior = parameter(in_capsules, out_capsules) if learned_prior else None
        self.pose_bias = parameter(out_capsules, out_dim) if pose_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution that starts routing alive at every size.

        In a stack of more than two routings, or behind layers of your own, the lengths also depend
        on the inputs: call `calibrate` on a batch. `docs/initialisation.md` has the rule and
        figures.
        """
        inputs = self.in_capsules * (self.positions or 1)
        sigma = routing_weight_std(inputs, self.out_capsules, self.out_dim)
        nn.init.normal_(self.weight, std=sigma)
        if self.prior is not None:
            nn.init.zeros_(self.prior)
        if self.pose_bias is not None:
            nn.init.constant_(self.pose_bias, 0.1)

    def forward(
        self,
        u: Tensor,
        mask: Tensor | None = None,
        *,
        iterations: int | None = None,
        return_coupling: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Route input capsules, (B, I, P), to output capsules, (B, J, D).

        Args:
            u: input capsules, shape (B, I, P).
            mask: bool, shape (B, I). False marks padding, which contributes nothing whatever it
                holds, NaN included.
            iterations: used for this call instead of the layer's own number.
            return_coupling: also return the coupling of the last iteration, (B, I, J). It is 0
                where the mask is False.
        """
        iterations = concrete("iterations", iterations, None)
        return_coupling = concrete("return_coupling", return_coupling, False)
        u = _without_padding(u, mask)
        weight: Tensor = self.weight
        prior: Tensor | None = self.prior
        if self.positions is not None:
            weight = _at_all_positions(weight, u)
            prior = None if prior is None else _at_all_positions(prior, u)
        result = ops.fused_dynamic_routing(
            u,
            weight,
            self.iterations if iterations is None else iterations,
            prior=prior,
            pose_bias=self.pose_bias,
            leaky=self.leaky,
            gradient=self.gradient,
            return_coupling=return_coupling,
        )
        if mask is None or not return_coupling:
            return result
        v, coupling = result
        return v, torch.where(mask.unsqueeze(2), coupling, 0)

    def extra_repr(self) -> str:
        """Return the arguments that build this layer."""
        return (
            f"in_capsules={self.in_capsules}, in_dim={self.in_dim}, "
            f"out_capsules={self.out_capsules}, out_dim={self.out_dim}, "
            f"iterations={self.iterations}, positions={self.positions}, "
            f"pose_bias={self.pose_bias is not None}, leaky={self.leaky}, "
            f"gradient={self.gradient!r}, learned_prior={self.learned_prior}"
        )


def route(
    layer: nn.Module, u: Tensor, iterations: int | None, return_coupling: bool
) -> tuple[Tensor, Tensor | None]:
    """Route, and return the coupling as well, or None if it is not wanted."""
    return_coupling = concrete("return_coupling", return_coupling, False)
    result = layer(u, iterations=iterations, return_coupling=return_coupling)
    if not return_coupling:
        return result, None
    poses, coupling = result
    return poses, coupling


@one_node
def _without_padding(u: Tensor, mask: Tensor | None) -> Tensor:
    """Put zeros, which predict nothing, in place of the capsules that the mask leaves out."""
    if mask is None:
        return u
    _checks.check_mask("RoutedCapsules", mask, u)
    return torch.where(mask.unsqueeze(2), u, 0)


@one_node
def _at_all_positions(parameter: Tensor, u: Tensor) -> Tensor:
    """Repeat a shared parameter, (T, ...), for each position of u: (n·T, ...)."""
    count = _checks.count_positions("RoutedCapsules", u, len(parameter))
    return parameter.expand(count, *parameter.shape).flatten(0, 1)
