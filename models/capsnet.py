"""CapsNet: one convolution, primary capsules, one routing, a decoder.

Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (2017), section 4. With the defaults it is
the baseline of the deep capsule network's Table I, with 8,215,568 parameters.
"""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from tritoncaps import ops
from tritoncaps._checks import (
    check_choice,
    check_flag,
    check_floating,
    check_pair,
    check_size,
    shape_of,
)
from tritoncaps.layers import (
    PrimaryCapsules,
    ReconstructionDecoder,
    RoutedCapsules,
    capsule_lengths,
)


class CapsuleOutput(NamedTuple):
    """What a capsule network returns.

    `lengths` (B, K): how present each class is, in [0, 1). `poses` (B, K, D): the class capsules.
    `reconstruction` (B, C, H, W), or None for a model without a decoder.
    """

    lengths: Tensor
    poses: Tensor
    reconstruction: Tensor | None


class CapsNet(nn.Module):
    """The capsule network of Sabour 2017, for images of any size.

    Args:
        num_classes: class capsules, K.
        in_channels: channels of the images.
        image_size: side of square images, or (height, width); at least 17.
        iterations: routing iterations.
        channels: feature maps of the first convolution.
        capsule_types: primary capsules at each position, 8-dimensional.
        class_dim: components of a class capsule, D.
        gradient: "full" or "last", see `ops.capsule_routing`.
        reconstruction: build the decoder.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range, an image that is too small
            for the convolutions, and in `forward` images of another kind or shape.

    Example:
        >>> import torch
        >>> model = CapsNet(num_classes=5, in_channels=3, image_size=32)
        >>> output = model(torch.rand(2, 3, 32, 32))
        >>> output.lengths.shape, output.poses.shape, output.reconstruction.shape
        (torch.Size([2, 5]), torch.Size([2, 5, 16]), torch.Size([2, 3, 32, 32]))
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        *,
        iterations: int = 3,
        channels: int = 256,
        capsule_types: int = 32,
        class_dim: int = 16,
        gradient: ops.Gradient = "full",
        reconstruction: bool = True,
    ) -> None:
        super().__init__()
        check_arguments(
            "CapsNet",
            {
                "num_classes": num_classes,
                "in_channels": in_channels,
                "iterations": iterations,
                "channels": channels,
                "capsule_types": capsule_types,
                "class_dim": class_dim,
            },
            gradient,
            reconstruction,
        )
        height, width = image_sides("CapsNet", image_size)
        self.image_shape = (in_channels, height, width)
        self.conv = relu_convolution(in_channels, channels, kernel_size=9)
        self.primary = PrimaryCapsules(channels, capsule_types, dim=8, kernel_size=9, stride=2)
        in_capsules = self.primary.num_capsules(height - 8, width - 8)
        check_capsules("CapsNet", in_capsules, (height, width), smallest=17)
        self.routing = RoutedCapsules(
            in_capsules, 8, num_classes, class_dim, iterations, gradient=gradient
        )
        self.decoder = (
            ReconstructionDecoder(num_classes, class_dim, self.image_shape)
            if reconstruction
            else None
        )

    def forward(self, images: Tensor, target: Tensor | None = None) -> CapsuleOutput:
        """Classify and reconstruct.

        Args:
            images: shape (B, C, H, W), values in [0, 1].
            target: class indices, (B,), that choose the capsule to decode, as in training;
                without it the longest capsule is decoded.
        """
        check_images("CapsNet", images, self.image_shape)
        features = F.relu(self.conv(images))  # (B, channels, H-8, W-8)
        poses = self.routing(self.primary(features))  # (B, K, D)
        reconstruction = None if self.decoder is None else self.decoder(poses, target)
        return CapsuleOutput(capsule_lengths(poses), poses, reconstruction)


def relu_convolution(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    """Build a convolution for a ReLU to follow, with He's initialisation, which keeps its scale.

    With torch's default every convolution shrinks the features about threefold in power, and the
    primary capsules, squashed, start with lengths of a few hundredths.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel_size)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def check_arguments(
    model: str, sizes: dict[str, object], gradient: object, reconstruction: object
) -> None:
    """Raise for an argument of the wrong kind or range, by the name that the model gives it."""
    for name, size in sizes.items():
        check_size(model, name, size)
    check_choice(model, "gradient", gradient, ("full", "last"))
    check_flag(model, "reconstruction", reconstruction)


def image_sides(model: str, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Read a side or a (height, width)."""
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    check_pair(model, "image_size", sides, "an int or (height, width)")
    return sides


def check_capsules(model: str, in_capsules: int, image: tuple[int, int], smallest: int) -> None:
    """Raise ValueError where the convolutions leave no primary capsule."""
    if in_capsules == 0:
        raise ValueError(
            f"{model}: image_size={image} leaves no primary capsule, "
            f"both sides must be at least {smallest}"
        )


def check_images(model: str, images: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Raise where the images are not of the kind or the shape that the model was built for."""
    check_floating(model, "images", images)
    if images.shape[1:] != image_shape:
        raise ValueError(
            f"{model}: images must be (B, {', '.join(map(str, image_shape))}), "
            f"got {shape_of(images)}"
        )
