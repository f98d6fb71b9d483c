"""Capsule layers: primary capsules, routed capsules and the reconstruction decoder.

Each takes any image size, channel count and number of classes. Capsules travel between layers as
(B, capsules, dimension) tensors.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tritoncaps import _checks, ops

__all__ = ["PrimaryCapsules", "ReconstructionDecoder", "RoutedCapsules", "capsule_lengths"]


def capsule_lengths(poses: Tensor) -> Tensor:
    """Compute the length of each capsule, (..., D) → (...); the gradient at a zero capsule is 0."""
    return torch.linalg.vector_norm(poses, dim=-1)


class PrimaryCapsules(nn.Module):
    """Turn feature maps into capsules with one convolution and squash (Sabour 2017, section 4).

    A capsule is `dim` channels of *one* position: the output channels of the convolution are
    `capsule_types` groups of `dim`, and position (y, x) holds one capsule of each type.

    Args:
        in_channels: channels of the feature maps.
        capsule_types: capsules at each position.
        dim: components of a capsule, P.
        kernel_size: of the convolution, without padding.
        stride: of the convolution.

    Shapes: (B, in_channels, H, W) → (B, I, dim) with I = H'·W'·capsule_types, ordered by position,
    then type.

    Raises:
        TypeError, ValueError: a size that is not an int of at least 1, feature maps of another
            kind or shape, or smaller than the kernel.
    """

    def __init__(
        self,
        in_channels: int,
        capsule_types: int = 32,
        dim: int = 8,
        kernel_size: int = 9,
        stride: int = 2,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("capsule_types", capsule_types),
            ("dim", dim),
            ("kernel_size", kernel_size),
            ("stride", stride),
        ):
            _checks.check_size("PrimaryCapsules", name, value)
        self.in_channels = in_channels
        self.capsule_types = capsule_types
        self.dim = dim
        self.kernel_size = kernel_size
        self.stride = stride
        self.conv = nn.Conv2d(in_channels, capsule_types * dim, kernel_size, stride)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the kernels so that the channels keep the size of the features (gain 1)."""
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="linear")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def num_capsules(self, height: int, width: int) -> int:
        """Count the capsules that feature maps of this size give."""
        rows, columns = ((size - self.kernel_size) // self.stride + 1 for size in (height, width))
        return max(0, rows) * max(0, columns) * self.capsule_types

    def forward(self, features: Tensor) -> Tensor:
        """Convolve, cut into capsules, squash."""
        _checks.check_floating("PrimaryCapsules", "features", features)
        if features.ndim != 4 or features.shape[1] != self.in_channels:
            raise ValueError(
                f"PrimaryCapsules: features must be (B, {self.in_channels}, H, W), "
                f"got {_checks.shape_of(features)}"
            )
        if self.num_capsules(*features.shape[2:]) == 0:
            height, width = features.shape[2:]
            raise ValueError(
                f"PrimaryCapsules: features of {height}x{width} are smaller than the kernel, "
                f"{self.kernel_size}x{self.kernel_size}"
            )
        maps = self.conv(features)
        return ops.squash(rearrange(maps, "B (T P) H W -> B (H W T) P", P=self.dim))

    def extra_repr(self) -> str:
        """The arguments that build this layer."""
        return (
            f"in_channels={self.in_channels}, capsule_types={self.capsule_types}, dim={self.dim}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}"
        )


class RoutedCapsules(nn.Module):
    """Route input capsules to output capsules by agreement (Sabour 2017, procedure 1).

    Args:
        in_capsules: input capsules, I.
        in_dim: their components, P.
        out_capsules: output capsules, J.
        out_dim: their components, D.
        iterations: weighted sums, at least 1.
        gradient: "full" differentiates through all iterations, "last" takes the last coupling as
            a constant.
        learned_prior: learn the initial logits, (I, J), which start at 0.
        input_length: ρ, the expected length of an input capsule; see `reset_parameters`.

    Shapes: (B, I, P) → (B, J, D). `weight` is (I, P, J, D), `prior` (I, J) or None.

    Raises:
        TypeError, ValueError: a size that is not an int of at least 1, an unknown `gradient`, an
            `input_length` that is not a number over 0, and in `forward` whatever
            `ops.capsule_routing` raises.
    """

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
        input_length: float = 1.0,
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
        _checks.check_number("RoutedCapsules", "input_length", input_length)
        if not input_length > 0:
            raise ValueError(f"RoutedCapsules: input_length must be > 0, got {input_length}")
        self.in_capsules = in_capsules
        self.in_dim = in_dim
        self.out_capsules = out_capsules
        self.out_dim = out_dim
        self.iterations = iterations
        self.gradient: ops.Gradient = gradient
        self.learned_prior = learned_prior
        self.input_length = input_length
        self.weight = nn.Parameter(torch.empty(in_capsules, in_dim, out_capsules, out_dim))
        self.prior = nn.Parameter(torch.empty(in_capsules, out_capsules)) if learned_prior else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution with σ = J / (ρ·√(I·D)).

        At uniform coupling and with inputs of length ρ, |s_j| ≈ σ·ρ·√(I·D)/J, so the sums start
        near length 1 whatever the sizes. A smaller σ kills the signal of routings in series: each
        squash squares what is short. A larger one saturates them: the iterations move the coupling
        to the votes that agree, which lengthens the sums beyond the uniform estimate. So the
        default is ρ = 1, the most that a squashed capsule has.
        """
        fan = math.sqrt(self.in_capsules * self.out_dim)
        nn.init.normal_(self.weight, std=self.out_capsules / (self.input_length * fan))
        if self.prior is not None:
            nn.init.zeros_(self.prior)

    def forward(self, u: Tensor) -> Tensor:
        """Route; (B, I, P) → (B, J, D)."""
        return ops.capsule_routing(
            u, self.weight, self.iterations, prior=self.prior, gradient=self.gradient
        )

    def extra_repr(self) -> str:
        """The arguments that build this layer."""
        return (
            f"in_capsules={self.in_capsules}, in_dim={self.in_dim}, "
            f"out_capsules={self.out_capsules}, out_dim={self.out_dim}, "
            f"iterations={self.iterations}, gradient={self.gradient!r}, "
            f"learned_prior={self.learned_prior}, input_length={self.input_length}"
        )


class ReconstructionDecoder(nn.Module):
    """Draw the image of one class capsule with three fully connected layers (Sabour 2017, 4.1).

    All capsules but the chosen one are masked with zeros: the target's where a target is given,
    the longest otherwise.

    Args:
        num_classes: class capsules, K.
        dim: their components, D.
        image_shape: (channels, height, width) of the image.
        hidden: widths of the two hidden layers.

    Shapes: poses (B, K, D) [, target (B,) int64] → (B, channels, height, width), in (0, 1).

    Raises:
        TypeError, ValueError: a size that is not an int of at least 1; in `forward` poses or
            target of another kind, shape or range.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        image_shape: Sequence[int],
        hidden: tuple[int, int] = (512, 1024),
    ) -> None:
        super().__init__()
        if not isinstance(image_shape, Sequence) or len(image_shape) != 3:
            kind = ValueError if isinstance(image_shape, Sequence) else TypeError
            raise kind(
                f"ReconstructionDecoder: image_shape must be (channels, height, width), "
                f"got {_checks.shown(image_shape)}"
            )
        channels, height, width = image_shape
        for name, value in (
            ("num_classes", num_classes),
            ("dim", dim),
            ("channels", channels),
            ("height", height),
            ("width", width),
        ):
            _checks.check_size("ReconstructionDecoder", name, value)
        _checks.check_pair("ReconstructionDecoder", "hidden", hidden, "two ints")
        self.num_classes = num_classes
        self.dim = dim
        self.image_shape = (channels, height, width)
        self.hidden = hidden
        self.layers = nn.Sequential(
            nn.Linear(num_classes * dim, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], channels * height * width),
            nn.Sigmoid(),
        )

    def forward(self, poses: Tensor, target: Tensor | None = None) -> Tensor:
        """Mask all but one capsule and decode it."""
        _checks.check_tensor("ReconstructionDecoder", "poses", poses, "B K D")
        if poses.shape[1:] != (self.num_classes, self.dim):
            raise ValueError(
                f"ReconstructionDecoder: poses must be (B, {self.num_classes}, {self.dim}), "
                f"got {_checks.shape_of(poses)}"
            )
        if target is None:
            target = capsule_lengths(poses).argmax(dim=1)
        else:
            _checks.check_class_indices(
                "ReconstructionDecoder", target, poses.shape[0], self.num_classes, poses.device
            )
        mask = F.one_hot(target, self.num_classes).to(poses.dtype)
        flat = self.layers(rearrange(poses * mask.unsqueeze(-1), "B K D -> B (K D)"))
        channels, height, width = self.image_shape
        return rearrange(flat, "B (C H W) -> B C H W", C=channels, H=height, W=width)

    def extra_repr(self) -> str:
        """The arguments that build this layer."""
        return (
            f"num_classes={self.num_classes}, dim={self.dim}, image_shape={self.image_shape}, "
            f"hidden={self.hidden}"
        )
