"""Class capsules on the feature maps of any network."""

import torch
from torch import Tensor, nn

from tritoncaps import _checks, ops
from tritoncaps.layers.capsules import Capsules, capsule_lengths
from tritoncaps.layers.primary import PrimaryCapsules
from tritoncaps.layers.routed import RoutedCapsules, route


class CapsuleHead(nn.Module):
    """Put class capsules on a backbone, in place of its pooling and its linear classifier.

    One convolution turns the feature maps into primary capsules, which are routed to a capsule for
    each class. The primary capsules of a type share their matrices at all positions. So the number
    of parameters does not depend on the size of the image, and images may differ in size. Memory
    does: see `positions` of `RoutedCapsules`.

    For new classes, build a new head and let it keep the primary capsules that have been trained:
    `new.primary = head.primary`. An optimiser needs the parameters of the new head.

    Args:
        in_channels: channels of the feature maps.
        num_classes: class capsules, K.
        capsule_types: primary capsules at each position.
        dim: components of a primary capsule, P.
        class_dim: components of a class capsule, D.
        kernel_size, stride, padding: of the convolution. See `PrimaryCapsules`.
        feature_size: side of square feature maps, or (height, width). A torchvision network makes
            7×7 of an image of 224×224. With shared weights this is the usual size. It only scales
            the initial weight; any other size works too. On maps with many more positions, the
            class capsules start at a length of nearly 1: call `calibrate` on a batch.
        shared_weights: without it, each position has matrices of its own, and the feature maps must
            have `feature_size`.
        iterations, pose_bias, leaky, gradient, learned_prior: of the routing. See `RoutedCapsules`.
        device, dtype: of the parameters.

    Shapes: (B, in_channels, H, W) → `Capsules` with poses (B, K, class_dim) and activations (B, K),
    their lengths.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range, or `feature_size` is smaller
            than the kernel. In `forward`, what `PrimaryCapsules` and `RoutedCapsules` raise.

    Example:
        >>> import torch
        >>> head = CapsuleHead(in_channels=512, num_classes=100)
        >>> head(torch.rand(2, 512, 7, 7)).activations.shape
        torch.Size([2, 100])
        >>> new = CapsuleHead(in_channels=512, num_classes=3)
        >>> new.primary = head.primary  # keep what is known, learn new classes
        >>> new(torch.rand(2, 512, 10, 8)).poses.shape
        torch.Size([2, 3, 16])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        capsule_types: int = 32,
        dim: int = 8,
        class_dim: int = 16,
        kernel_size: int | tuple[int, ...] = 1,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        feature_size: int | tuple[int, int] = 7,
        shared_weights: bool = True,
        iterations: int = 3,
        pose_bias: bool = False,
        leaky: bool = False,
        gradient: ops.Gradient = "full",
        learned_prior: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("num_classes", num_classes),
            ("capsule_types", capsule_types),
            ("dim", dim),
            ("class_dim", class_dim),
        ):
            _checks.check_size("CapsuleHead", name, value)
        _checks.check_flag("CapsuleHead", "shared_weights", shared_weights)
        size = (feature_size, feature_size) if isinstance(feature_size, int) else feature_size
        _checks.check_pair("CapsuleHead", "feature_size", size, "an int or (height, width)")
        self.primary = PrimaryCapsules(
            in_channels,
            capsule_types,
            dim,
            kernel_size,
            stride,
            padding,
            device=device,
            dtype=dtype,
        )
        in_capsules = self.primary.num_capsules(*size)
        if in_capsules == 0:
            raise ValueError(
                f"CapsuleHead: feature_size={feature_size} leaves no primary capsule, "
                f"kernel_size={kernel_size} is larger"
            )
        self.routing = RoutedCapsules(
            capsule_types if shared_weights else in_capsules,
            dim,
            num_classes,
            class_dim,
            iterations,
            positions=in_capsules // capsule_types if shared_weights else None,
            pose_bias=pose_bias,
            leaky=leaky,
            gradient=gradient,
            learned_prior=learned_prior,
            device=device,
            dtype=dtype,
        )

    def forward(
        self, features: Tensor, *, iterations: int | None = None, return_coupling: bool = False
    ) -> Capsules | tuple[Capsules, Tensor]:
        """Classify feature maps.

        Args:
            features: shape (B, in_channels, H, W).
            iterations: used for this call instead of the head's own number.
            return_coupling: also return the coupling of the last iteration, (B, I, K).
        """
        if self.routing.positions and self.primary.capsule_types != self.routing.in_capsules:
            raise ValueError(
                f"CapsuleHead: primary has capsule_types={self.primary.capsule_types} but routing "
                f"has in_capsules={self.routing.in_capsules}; build the new head with the "
                "capsule_types of the primary capsules that it keeps"
            )
        u = self.primary(features)  # (B, I, dim)
        poses, coupling = route(self.routing, u, iterations, return_coupling)
        capsules = Capsules(poses, capsule_lengths(poses))
        return capsules if coupling is None else (capsules, coupling)
