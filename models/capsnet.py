"""CapsNet: one convolution, primary capsules, one routing, a decoder.

Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (2017), section 4. With the defaults it has
8,215,568 parameters and is the baseline in Table I of the deep capsule network's paper.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from tritoncaps import ops
from tritoncaps.layers import (
    PrimaryCapsules,
    ReconstructionDecoder,
    RoutedCapsules,
    capsule_lengths,
)
from tritoncaps.models._parts import (
    CapsuleOutput,
    check_arguments,
    check_capsules,
    check_images,
    image_sides,
    relu_convolution,
)


class CapsNet(nn.Module):
    """The capsule network of Sabour 2017, for images of any size.

    Args:
        num_classes: class capsules, K.
        in_channels: channels of the images.
        image_size: side of square images, or (height, width). At least 17.
        iterations: routing iterations.
        channels: feature maps of the first convolution.
        capsule_types: primary capsules at each position, 8-dimensional.
        class_dim: components of a class capsule, D.
        gradient: "full" or "last". See `ops.fused_dynamic_routing`.
        reconstruction: build the decoder. Say False to train without it: DistributedDataParallel
            stops at parameters that the loss does not use.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range, or the images are too small
            for the convolutions. In `forward`, the images have the wrong type or shape.

    Example:
        >>> import torch
        >>> model = CapsNet(num_classes=5, in_channels=3, image_size=32)
        >>> output = model(torch.rand(2, 3, 32, 32))
        >>> output.activations.shape, output.poses.shape, output.reconstruction.shape
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
            target: the capsules to decode, as in training: class indices, (B,), or multi-hot,
                (B, K), for all the present ones in one picture. See `ReconstructionDecoder`.
                Without it the longest capsule of each image is decoded.
        """
        check_images("CapsNet", images, self.image_shape)
        features = F.relu(self.conv(images))  # (B, channels, H-8, W-8)
        poses = self.routing(self.primary(features))  # (B, K, D)
        reconstruction = None if self.decoder is None else self.decoder(poses, target)
        return CapsuleOutput(capsule_lengths(poses), poses, reconstruction)
