"""Primary capsules, the first capsules of a network, made from feature maps."""

from einops import rearrange
from torch import Tensor, nn

from tritoncaps import _checks, ops


class PrimaryCapsules(nn.Module):
    """Turn feature maps into capsules with one convolution and squash (Sabour 2017, section 4).

    A capsule consists of `dim` channels at *one* position. The convolution's output channels form
    `capsule_types` groups of `dim`, and each position (y, x) holds one capsule of each type.

    Args:
        in_channels: channels of the feature maps.
        capsule_types: capsules at each position.
        dim: components of a capsule, P.
        kernel_size: kernel size of the convolution, which has no padding.
        stride: stride of the convolution.

    Shapes: (B, in_channels, H, W) → (B, I, dim) with I = H'·W'·capsule_types, ordered by position,
    then type.

    Raises:
        TypeError, ValueError: a size is not an int of at least 1. In `forward`, the feature maps
            have the wrong type or shape, or are smaller than the kernel.

    Example:
        >>> import torch
        >>> primary = PrimaryCapsules(256, capsule_types=32, dim=8, kernel_size=9, stride=2)
        >>> primary(torch.rand(2, 256, 20, 20)).shape
        torch.Size([2, 1152, 8])
    """

    calibrated_weight = "conv.weight"

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
        """Draw kernels that keep the scale of the features (gain 1)."""
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="linear")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def num_capsules(self, height: int, width: int) -> int:
        """Return the number of capsules, I, for feature maps of this size."""
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
        """Return the arguments that build this layer."""
        return (
            f"in_channels={self.in_channels}, capsule_types={self.capsule_types}, dim={self.dim}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}"
        )
