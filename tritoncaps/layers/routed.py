"""Capsules routed by agreement."""

import torch
from torch import Tensor, nn

from tritoncaps import _checks, ops
from tritoncaps.layers._initialisation import routing_weight_std


class RoutedCapsules(nn.Module):
    """Route input capsules to output capsules by agreement (Sabour 2017, procedure 1).

    Args:
        in_capsules: input capsules, I.
        in_dim: components of an input capsule, P.
        out_capsules: output capsules, J.
        out_dim: components of an output capsule, D.
        iterations: the number of weighted sums, at least 1.
        gradient: "full" differentiates through all iterations. "last" treats the last coupling as a
            constant.
        learned_prior: learn the initial logits, (I, J), which start at 0.

    Shapes: (B, I, P) → (B, J, D). `weight` is (I, P, J, D), `prior` (I, J) or None.

    Raises:
        TypeError, ValueError: a size is not an int of at least 1, or `gradient` is unknown. In
            `forward`, whatever `ops.fused_dynamic_routing` raises.

    Example:
        >>> import torch
        >>> routing = RoutedCapsules(in_capsules=1152, in_dim=8, out_capsules=10, out_dim=16)
        >>> routing(torch.rand(2, 1152, 8)).shape
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
        gradient: ops.Gradient = "full",
        learned_prior: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_capsules", in_capsules),
            ("in_dim", in_dim),
            ("out_capsules", out_capsules),
            ("out_dim", out_dim),
            ("iterations", iterations),
        ):
            _checks.check_size("RoutedCapsules", name, value)
        _checks.check_choice("RoutedCapsules", "gradient", gradient, ("full", "last"))
        _checks.check_flag("RoutedCapsules", "learned_prior", learned_prior)
        self.in_capsules = in_capsules
        self.in_dim = in_dim
        self.out_capsules = out_capsules
        self.out_dim = out_dim
        self.iterations = iterations
        self.gradient: ops.Gradient = gradient
        self.learned_prior = learned_prior
        self.weight = nn.Parameter(torch.empty(in_capsules, in_dim, out_capsules, out_dim))
        self.prior = nn.Parameter(torch.empty(in_capsules, out_capsules)) if learned_prior else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution that starts routing alive at every size.

        In a stack of more than two routings, or behind layers of your own, the lengths also depend
        on the inputs: call `calibrate` on a batch. `docs/initialisation.md` has the rule and
        figures.
        """
        sigma = routing_weight_std(self.in_capsules, self.out_capsules, self.out_dim)
        nn.init.normal_(self.weight, std=sigma)
        if self.prior is not None:
            nn.init.zeros_(self.prior)

    def forward(self, u: Tensor) -> Tensor:
        """Route input capsules, (B, I, P), to output capsules, (B, J, D)."""
        return ops.fused_dynamic_routing(
            u, self.weight, self.iterations, prior=self.prior, gradient=self.gradient
        )

    def extra_repr(self) -> str:
        """Return the arguments that build this layer."""
        return (
            f"in_capsules={self.in_capsules}, in_dim={self.in_dim}, "
            f"out_capsules={self.out_capsules}, out_dim={self.out_dim}, "
            f"iterations={self.iterations}, gradient={self.gradient!r}, "
            f"learned_prior={self.learned_prior}"
        )
