"""CapsNet: one convolution, primary capsules, one routing, a decoder.

Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (2017), section 4. With the defaults it has
8,215,568 parameters and is the baseline in Table I of the deep capsule network's paper.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from tritoncaps import ops
from tritoncaps._checks import check_size
from tritoncaps.layers import (
    PrimaryCapsules,
    ReconstructionDecoder,
    RoutedCapsules,
    capsule_lengths,
)
from tritoncaps.layers._convolution import ReluConv2d
from tritoncaps.layers.routed import route
from tritoncaps.models._mixin import PretrainedMixin
from tritoncaps.models._parts import (
    CapsuleOutput,
    check_arguments,
    check_images,
    check_sides,
    image_sides,
    warn_of_size,
)


class CapsNet(PretrainedMixin, nn.Module):
    """The capsule network of Sabour 2017, for images of any size.

    Args:
        num_classes: class capsules, K.
        in_channels: channels of the images.
        image_size: side of square images, or (height, width). At least 17 by default.
        iterations: routing iterations.
        channels: feature maps of the first convolution.
        stride: stride of the first convolution. The primary capsules of a large image are many, and
            a larger stride divides their number by its square.
        capsule_types: primary capsules at each position, 8-dimensional.
        padding: zeros around the feature maps for the convolution of the primary capsules.
        class_dim: components of a class capsule, D.
        shared_weights: primary capsules of one type share their matrices at all positions. With the
            defaults these are 40,960 parameters instead of 1,474,560. They are copied for every
            position: I·8·K·D numbers during a call, as many as without sharing.
        learned_prior: learn the initial logits of the routing.
        pose_bias: learn a bias, added to the sums before each squash.
        leaky: add an orphan class to each softmax. See `layers.RoutedCapsules`.
        gradient: "full" or "last". See `ops.fused_dynamic_routing`.
        reconstruction: build the decoder. Set it to False to train without a decoder:
            DistributedDataParallel stops at parameters that the loss does not use.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range, or the images are too small
            for the convolutions. In `forward`, the images have the wrong type or shape.

    Warns:
        UserWarning: routing and decoder have more than 100 million parameters, or copies of shared
            ones.

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
        stride: int = 1,
        capsule_types: int = 32,
        padding: int = 0,
        class_dim: int = 16,
        shared_weights: bool = False,
        learned_prior: bool = False,
        pose_bias: bool = False,
        leaky: bool = False,
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
                "stride": stride,
                "capsule_types": capsule_types,
                "class_dim": class_dim,
            },
            gradient,
            {
                "shared_weights": shared_weights,
                "learned_prior": learned_prior,
                "pose_bias": pose_bias,
                "leaky": leaky,
                "reconstruction": reconstruction,
            },
        )
        height, width = image_sides("CapsNet", image_size)
        check_size("CapsNet", "padding", padding, smallest=0)
        needed = max(1, 9 - 2 * padding)  # rows of the first convolution
        check_sides("CapsNet", (height, width), smallest=9 + (needed - 1) * stride)
        self.image_shape = (in_channels, height, width)
        self.conv = ReluConv2d(in_channels, channels, kernel_size=9, stride=stride)
        self.primary = PrimaryCapsules(
            channels, capsule_types, dim=8, kernel_size=9, stride=2, padding=padding
        )
        in_capsules = self.primary.num_capsules(
            (height - 9) // stride + 1, (width - 9) // stride + 1
        )
        weights = in_capsules * 8 * num_classes * class_dim
        warn_of_size(
            "CapsNet",
            in_capsules,
            weights,
            self.image_shape,
            reconstruction=reconstruction,
            shared_weights=shared_weights,
        )
        self.routing = RoutedCapsules(
            capsule_types if shared_weights else in_capsules,
            8,
            num_classes,
            class_dim,
            iterations,
            positions=in_capsules // capsule_types if shared_weights else None,
            pose_bias=pose_bias,
            leaky=leaky,
            gradient=gradient,
            learned_prior=learned_prior,
        )
        self.decoder = (
            ReconstructionDecoder(num_classes, class_dim, self.image_shape)
            if reconstruction
            else None
        )

    def forward(
        self,
        images: Tensor,
        target: Tensor | None = None,
        *,
        iterations: int | None = None,
        return_coupling: bool = False,
    ) -> CapsuleOutput:
        """Classify and reconstruct.

        Args:
            images: shape (B, C, H, W), values in [0, 1].
            target: the capsules to decode, as in training: class indices, (B,), or multi-hot,
                (B, K), for all the present ones in one picture. See `ReconstructionDecoder`.
                Without it the longest capsule of each image is decoded.
            iterations: routing iterations of this call, instead of the model's own.
            return_coupling: also return the coupling of the last iteration, (B, I, K).
        """
        check_images("CapsNet", images, self.image_shape, self.conv)
        features = F.relu(self.conv(images))  # (B, channels, H', W')
        u = self.primary(features)  # (B, I, 8)
        poses, coupling = route(self.routing, u, iterations, return_coupling)  # (B, K, D)
        reconstruction = None if self.decoder is None else self.decoder(poses, target)
        return CapsuleOutput(capsule_lengths(poses), poses, reconstruction, None, coupling)
