"""Primary capsules, the first capsules of a network, made from feature maps."""

import math

import torch
from torch import Tensor, nn

from tritoncaps import _checks, ops
from tritoncaps._tracing import is_proxy, rearrange
from tritoncaps.layers._convolution import LINEAR

# The axes of the features after (B, in_channels), as torch names them.
_AXES = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}


class PrimaryCapsules(nn.Module):
    """Turn feature maps into capsules with one convolution and squash (Sabour 2017, section 4).

    A capsule consists of `dim` channels at *one* position. The convolution's output channels form
    `capsule_types` groups of `dim`, and each position holds one capsule of each type.

    On a CPU, a layer as large as that of `CapsNet` trains faster in float32 if the batch is a
    multiple of 16.

    Args:
        in_channels: channels of the feature maps.
        capsule_types: capsules at each position.
        dim: components of a capsule, P.
        kernel_size: kernel size of the convolution, an int or one for each spatial axis.
        stride: stride of the convolution, likewise.
        padding: zeros on both sides of each axis, likewise, or "valid" (none) or "same" (as many
            positions as the features have; needs stride 1).
        spatial_dims: 1 for sequences (`Conv1d`), 2 for images (`Conv2d`), 3 for volumes (`Conv3d`).
        device, dtype: of the parameters, as for torch's layers.

    Shapes: (B, in_channels, H, W) → (B, I, dim) with I = H'·W'·capsule_types. The order is position
    (row by row), then type: capsule i is of type i mod capsule_types. For `spatial_dims` 1 and 3
    the features are (B, in_channels, L) and (B, in_channels, D, H, W).

    Raises:
        TypeError, ValueError: a size is not an int of at least 1, or not one for each axis;
            `padding` is neither such a size, from 0 on, nor a known word; `spatial_dims` is not 1,
            2 or 3. In `forward`, the features have the wrong type or shape, or are smaller than the
            kernel.

    Example:
        >>> import torch
        >>> primary = PrimaryCapsules(256, capsule_types=32, dim=8, kernel_size=9, stride=2)
        >>> primary(torch.rand(2, 256, 20, 20)).shape
        torch.Size([2, 1152, 8])
        >>> sequences = PrimaryCapsules(12, 4, kernel_size=5, padding=2, spatial_dims=1)
        >>> sequences(torch.rand(2, 12, 100)).shape
        torch.Size([2, 200, 8])
    """

    calibrated_weight = "conv.weight"

    def __init__(
        self,
        in_channels: int,
        capsule_types: int = 32,
        dim: int = 8,
        kernel_size: int | tuple[int, ...] = 9,
        stride: int | tuple[int, ...] = 2,
        padding: int | tuple[int, ...] | str = 0,
        *,
        spatial_dims: int = 2,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("capsule_types", capsule_types),
            ("dim", dim),
            ("spatial_dims", spatial_dims),
        ):
            _checks.check_size("PrimaryCapsules", name, value)
        if spatial_dims not in _AXES:
            raise ValueError(f"PrimaryCapsules: spatial_dims must be 1, 2 or 3, got {spatial_dims}")
        _checks.check_per_axis("PrimaryCapsules", "kernel_size", kernel_size, spatial_dims)
        _checks.check_per_axis("PrimaryCapsules", "stride", stride, spatial_dims)
        if isinstance(padding, str):
            _checks.check_choice("PrimaryCapsules", "padding", padding, ("same", "valid"))
        else:
            _checks.check_per_axis("PrimaryCapsules", "padding", padding, spatial_dims, smallest=0)
        self.in_channels = in_channels
        self.capsule_types = capsule_types
        self.dim = dim
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.spatial_dims = spatial_dims
        strides = (stride,) if isinstance(stride, int) else stride
        if padding == "same" and any(step != 1 for step in strides):
            raise ValueError(
                f'PrimaryCapsules: padding="same" needs stride=1, got {stride}; '
                f"with a stride, give the padding as a number"
            )
        self.conv = LINEAR[spatial_dims](
            in_channels,
            capsule_types * dim,
            kernel_size,
            stride,
            padding,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """Draw kernels that keep the scale of the features (gain 1)."""
        self.conv.reset_parameters()

    def num_capsules(self, *size: int) -> int:
        """Return the number of capsules, I, for feature maps of this size, such as (H, W).

        The number of positions is that number divided by `capsule_types`.

        Raises:
            ValueError: there is not one size for each spatial axis.
        """
        if len(size) != self.spatial_dims:
            raise ValueError(
                f"PrimaryCapsules: num_capsules needs {', '.join(_AXES[self.spatial_dims])}, "
                f"got {size}"
            )
        return math.prod(self._positions(size)) * self.capsule_types

    def _positions(self, size: tuple[int, ...]) -> list[int]:
        """Return the number of positions along each axis."""
        if self.padding == "same":
            return [max(0, length) for length in size]
        padding = (0,) * len(size) if self.padding == "valid" else self.conv.padding
        return [
            max(0, (length + 2 * pad - kernel) // step + 1) if length > 0 else 0
            for length, pad, kernel, step in zip(
                size, padding, self.conv.kernel_size, self.conv.stride, strict=True
            )
        ]

    def forward(self, features: Tensor) -> Tensor:
        """Convolve, cut into capsules, squash."""
        if not is_proxy(features):
            self._check(features)
        maps = self.conv(features)
        return ops.squash(rearrange(maps, "B (T P) ... -> B (... T) P", P=self.dim))

    def _check(self, features: Tensor) -> None:
        _checks.check_floating("PrimaryCapsules", "features", features)
        axes = _AXES[self.spatial_dims]
        if features.ndim != 2 + len(axes) or features.shape[1] != self.in_channels:
            raise ValueError(
                f"PrimaryCapsules: features must be (B, {self.in_channels}, {', '.join(axes)}), "
                f"got {_checks.shape_of(features)}"
            )
        _checks.check_layer_dtype("PrimaryCapsules", "features", features, self.conv)
        size = features.shape[2:]
        if self.num_capsules(*size) == 0:
            raise ValueError(
                f"PrimaryCapsules: features of {_by(size)} with padding={self.padding!r} are "
                f"smaller than the kernel, {_by(self.conv.kernel_size)}"
            )

    def extra_repr(self) -> str:
        """Return the arguments that build this layer."""
        return (
            f"in_channels={self.in_channels}, capsule_types={self.capsule_types}, dim={self.dim}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}, "
            f"spatial_dims={self.spatial_dims}"
        )


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
