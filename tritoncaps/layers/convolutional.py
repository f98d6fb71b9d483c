"""Convolutional capsules routed by agreement."""

import torch
from torch import Tensor, nn

from tritoncaps import _checks, ops
from tritoncaps._patches import check_convolution
from tritoncaps._tracing import concrete
from tritoncaps.layers._initialisation import routing_weight_std


class ConvRoutedCapsules(nn.Module):
    """Route each K×K patch of a grid of capsules to the capsules at one position.

    A grid has H×W positions with capsules of `in_types` types at each. All positions share the
    weight, and a grid may have any size. `PrimaryCapsules` returns capsules in the order of a grid:
    `u.unflatten(1, (H, W, in_types))` makes one.

    Args:
        in_types: types of input capsules, C.
        in_dim: components of an input capsule, P.
        out_types: types of output capsules, J.
        out_dim: components of an output capsule, D.
        kernel_size: rows and columns of a patch, K.
        stride: steps between patches.
        padding: positions of zeros added on all four sides. They predict nothing.
        iterations: the number of weighted sums, at least 1.
        votes: "patch" lets each of the K·K·C capsules of a patch vote with its own matrix.
            "convolved" lets the capsules of one type share a vote, a convolution of their poses.
        shared_kernel: one kernel for all input types. Needs "convolved".
        pose_bias: learn a bias, (J, D), that is added to s before each squash. It starts at 0.1.
        leaky: add an orphan class to the softmax, which takes in what belongs to no output capsule.
        gradient: "full" differentiates through all iterations. "last" treats the last coupling as a
            constant.
        learned_prior: learn the initial logits, which start at 0.
        in_length: the usual length of the input capsules. It only scales the initial weight. Behind
            another routing, capsules are much shorter than 1. See also `calibrate`.
        device, dtype: of the parameters.

    Shapes: (B, H, W, C, P) → (B, H', W', J, D) with H' = (H + 2 padding - K) // stride + 1.
    `weight` is (K, K, C, P, J, D), or (K, K, 1, P, J, D) with `shared_kernel`. `prior` is
    (K, K, C, J), or (C, J) with "convolved", or None. `pose_bias` is (J, D) or None.

    Raises:
        TypeError, ValueError: a size is not an int in its range, `votes` or `gradient` is unknown,
            or `shared_kernel` comes without "convolved". In `forward`, whatever
            `ops.conv_dynamic_routing` raises.

    Example:
        >>> import torch
        >>> layer = ConvRoutedCapsules(8, 8, 16, 8, kernel_size=3, stride=2)
        >>> layer(torch.rand(2, 14, 14, 8, 8)).shape
        torch.Size([2, 6, 6, 16, 8])
        >>> layer = ConvRoutedCapsules(8, 8, 16, 8, 3, padding=1, votes="convolved")
        >>> layer(torch.rand(2, 14, 14, 8, 8)).shape
        torch.Size([2, 14, 14, 16, 8])
    """

    calibrated_weight = "weight"

    def __init__(
        self,
        in_types: int,
        in_dim: int,
        out_types: int,
        out_dim: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        iterations: int = 3,
        *,
        votes: ops.Votes = "patch",
        shared_kernel: bool = False,
        pose_bias: bool = False,
        leaky: bool = False,
        gradient: ops.Gradient = "full",
        learned_prior: bool = False,
        in_length: float = 1.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "ConvRoutedCapsules"
        for argument, value in (
            ("in_types", in_types),
            ("in_dim", in_dim),
            ("out_types", out_types),
            ("out_dim", out_dim),
            ("kernel_size", kernel_size),
            ("iterations", iterations),
        ):
            _checks.check_size(name, argument, value)
        check_convolution(name, stride, padding)
        for argument, flag in (
            ("shared_kernel", shared_kernel),
            ("pose_bias", pose_bias),
            ("leaky", leaky),
            ("learned_prior", learned_prior),
        ):
            _checks.check_flag(name, argument, flag)
        _checks.check_choice(name, "votes", votes, ("patch", "convolved"))
        _checks.check_choice(name, "gradient", gradient, ("full", "last"))
        _checks.check_positive(name, "in_length", in_length)
        if shared_kernel and votes == "patch":
            raise ValueError(
                f'{name}: shared_kernel=True needs votes="convolved", got votes="patch"'
            )
        self.in_types = in_types
        self.in_dim = in_dim
        self.out_types = out_types
        self.out_dim = out_dim
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.iterations = iterations
        self.votes: ops.Votes = votes
        self.shared_kernel = shared_kernel
        self.leaky = leaky
        self.gradient: ops.Gradient = gradient
        self.learned_prior = learned_prior
        self.in_length = in_length

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        kernel = kernel_size, kernel_size
        voters = (*kernel, in_types) if votes == "patch" else (in_types,)
        kernels = 1 if shared_kernel else in_types
        self.weight = parameter(*kernel, kernels, in_dim, out_types, out_dim)
        self.prior = parameter(*voters, out_types) if learned_prior else None
        self.pose_bias = parameter(out_types, out_dim) if pose_bias else None
        self.reset_parameters()

    @property
    def out_capsules(self) -> int:
        """The capsules that compete for an input, J."""
        return self.out_types

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution that starts routing alive at every size.

        The distribution is that of `RoutedCapsules`. With "convolved", I is C, and the joined poses
        of a patch are K times as long as the pose of one capsule.
        """
        positions = self.kernel_size**2
        if self.votes == "patch":
            inputs, length = positions * self.in_types, self.in_length
        else:
            inputs, length = self.in_types, self.in_length * self.kernel_size
        sigma = routing_weight_std(inputs, self.out_types, self.out_dim) / length
        nn.init.normal_(self.weight, std=sigma)
        if self.prior is not None:
            nn.init.zeros_(self.prior)
        if self.pose_bias is not None:
            nn.init.constant_(self.pose_bias, 0.1)

    def forward(
        self, u: Tensor, *, iterations: int | None = None, return_coupling: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Route a grid of capsules, (B, H, W, C, P), to another, (B, H', W', J, D).

        Args:
            u: input capsules, shape (B, H, W, C, P).
            iterations: used for this call instead of the layer's own number.
            return_coupling: also return the coupling of the last iteration:
                (B, H', W', K, K, C, J), or (B, H', W', C, J) with "convolved".
        """
        iterations = concrete("iterations", iterations, None)
        return_coupling = concrete("return_coupling", return_coupling, False)
        return ops.conv_dynamic_routing(
            u,
            self.weight,
            self.iterations if iterations is None else iterations,
            stride=self.stride,
            padding=self.padding,
            prior=self.prior,
            pose_bias=self.pose_bias,
            votes=self.votes,
            leaky=self.leaky,
            gradient=self.gradient,
            return_coupling=return_coupling,
        )

    def extra_repr(self) -> str:
        """Return the arguments that build this layer."""
        return (
            f"in_types={self.in_types}, in_dim={self.in_dim}, out_types={self.out_types}, "
            f"out_dim={self.out_dim}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, iterations={self.iterations}, votes={self.votes!r}, "
            f"shared_kernel={self.shared_kernel}, pose_bias={self.pose_bias is not None}, "
            f"leaky={self.leaky}, gradient={self.gradient!r}, "
            f"learned_prior={self.learned_prior}, in_length={self.in_length}"
        )
