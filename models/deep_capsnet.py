"""DeepCapsNet: two convolutions, primary capsules, two routings in series, a decoder.

Tan, Yao: Deep Capsule Network Handwritten Digit Recognition (2020), Table I. The paper does not
print the size of the capsules between the two routes. It claims fewer parameters than CapsNet. With
everything else fixed, this forces hidden_capsules × hidden_dim ≤ 196. The default is 10 × 16, which
gives 7,869,200 parameters.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from tritoncaps import ops
from tritoncaps._checks import check_pair
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


class DeepCapsNet(nn.Module):
    """The deep capsule network, for images of any size.

    Args:
        num_classes: class capsules, K.
        in_channels: channels of the images.
        image_size: side of square images, or (height, width). At least 17.
        hidden_capsules: capsules between the two routes.
        hidden_dim: components of a capsule between the two routes.
        primary_iterations: iterations of the main route, from primary to hidden capsules.
        secondary_iterations: iterations of the secondary route, from hidden to class capsules.
        channels: feature maps of the two convolutions.
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
        >>> model = DeepCapsNet(hidden_capsules=12, hidden_dim=8, primary_iterations=2)
        >>> model(torch.rand(2, 1, 28, 28)).activations.shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        *,
        hidden_capsules: int = 10,
        hidden_dim: int = 16,
        primary_iterations: int = 3,
        secondary_iterations: int = 3,
        channels: tuple[int, int] = (512, 256),
        capsule_types: int = 32,
        class_dim: int = 16,
        gradient: ops.Gradient = "full",
        reconstruction: bool = True,
    ) -> None:
        super().__init__()
        check_arguments(
            "DeepCapsNet",
            {
                "num_classes": num_classes,
                "in_channels": in_channels,
                "hidden_capsules": hidden_capsules,
                "hidden_dim": hidden_dim,
                "primary_iterations": primary_iterations,
                "secondary_iterations": secondary_iterations,
                "capsule_types": capsule_types,
                "class_dim": class_dim,
            },
            gradient,
            reconstruction,
        )
        height, width = image_sides("DeepCapsNet", image_size)
        check_pair("DeepCapsNet", "channels", channels, "two ints")
        self.image_shape = (in_channels, height, width)
        self.conv1 = relu_convolution(in_channels, channels[0], kernel_size=9)
        self.conv2 = relu_convolution(channels[0], channels[1], kernel_size=5)
        self.primary = PrimaryCapsules(channels[1], capsule_types, dim=8, kernel_size=5, stride=2)
        in_capsules = self.primary.num_capsules(height - 12, width - 12)
        check_capsules("DeepCapsNet", in_capsules, (height, width), smallest=17)
        self.primary_routing = RoutedCapsules(
            in_capsules, 8, hidden_capsules, hidden_dim, primary_iterations, gradient=gradient
        )
        self.secondary_routing = RoutedCapsules(
            hidden_capsules,
            hidden_dim,
            num_classes,
            class_dim,
            secondary_iterations,
            gradient=gradient,
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
        check_images("DeepCapsNet", images, self.image_shape)
        features = F.relu(self.conv1(images))  # (B, 512, H-8, W-8)
        features = F.relu(self.conv2(features))  # (B, 256, H-12, W-12)
        hidden = self.primary_routing(self.primary(features))  # (B, hidden_capsules, hidden_dim)
        poses = self.secondary_routing(hidden)  # (B, K, D)
        reconstruction = None if self.decoder is None else self.decoder(poses, target)
        return CapsuleOutput(capsule_lengths(poses), poses, reconstruction)
