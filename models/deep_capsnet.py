"""DeepCapsNet: two convolutions, primary capsules, two routings in series, a decoder.

Tan, Yao: Deep Capsule Network Handwritten Digit Recognition (2020), Table I. The paper does not
print the size of the capsules between the two routes. It claims fewer parameters than CapsNet. With
everything else fixed, this forces hidden_capsules × hidden_dim ≤ 196. The default is 10 × 16, which
gives 7,869,200 parameters.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from tritoncaps import ops
from tritoncaps._checks import check_pair, check_size
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


class DeepCapsNet(PretrainedMixin, nn.Module):
    """The deep capsule network, for images of any size.

    Args:
        num_classes: class capsules, K.
        in_channels: channels of the images.
        image_size: side of square images, or (height, width). At least 17 by default.
        hidden_capsules: capsules between the two routes.
        hidden_dim: components of a capsule between the two routes.
        primary_iterations: iterations of the main route, from primary to hidden capsules.
        secondary_iterations: iterations of the secondary route, from hidden to class capsules.
        channels: feature maps of the two convolutions.
        stride: stride of the first convolution. The primary capsules of a large image are many, and
            a larger stride divides their number by its square.
        capsule_types: primary capsules at each position, 8-dimensional.
        padding: zeros around the feature maps for the convolution of the primary capsules.
        class_dim: components of a class capsule, D.
        shared_weights: primary capsules of one type share their matrices at all positions. They are
            copied for every position: I·8·hidden_capsules·hidden_dim numbers during a call, as many
            as without sharing.
        learned_prior: learn the initial logits of both routings.
        pose_bias: learn a bias, added to the sums before each squash in both routes.
        leaky: add an orphan class to each softmax in both routes. See `layers.RoutedCapsules`.
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
            "DeepCapsNet",
            {
                "num_classes": num_classes,
                "in_channels": in_channels,
                "hidden_capsules": hidden_capsules,
                "hidden_dim": hidden_dim,
                "primary_iterations": primary_iterations,
                "secondary_iterations": secondary_iterations,
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
        height, width = image_sides("DeepCapsNet", image_size)
        check_size("DeepCapsNet", "padding", padding, smallest=0)
        needed = 4 + max(1, 5 - 2 * padding)  # rows of the first convolution
        check_sides("DeepCapsNet", (height, width), smallest=9 + (needed - 1) * stride)
        check_pair("DeepCapsNet", "channels", channels, "two ints")
        self.image_shape = (in_channels, height, width)
        self.conv1 = ReluConv2d(in_channels, channels[0], kernel_size=9, stride=stride)
        self.conv2 = ReluConv2d(channels[0], channels[1], kernel_size=5)
        self.primary = PrimaryCapsules(
            channels[1], capsule_types, dim=8, kernel_size=5, stride=2, padding=padding
        )
        in_capsules = self.primary.num_capsules(
            (height - 9) // stride - 3, (width - 9) // stride - 3
        )
        weights = in_capsules * 8 * hidden_capsules * hidden_dim
        warn_of_size(
            "DeepCapsNet",
            in_capsules,
            weights,
            self.image_shape,
            reconstruction=reconstruction,
            shared_weights=shared_weights,
        )
        self.primary_routing = RoutedCapsules(
            capsule_types if shared_weights else in_capsules,
            8,
            hidden_capsules,
            hidden_dim,
            primary_iterations,
            positions=in_capsules // capsule_types if shared_weights else None,
            pose_bias=pose_bias,
            leaky=leaky,
            gradient=gradient,
            learned_prior=learned_prior,
        )
        self.secondary_routing = RoutedCapsules(
            hidden_capsules,
            hidden_dim,
            num_classes,
            class_dim,
            secondary_iterations,
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
            iterations: iterations of each route in this call, instead of the model's own.
            return_coupling: also return the coupling of the last iterations, a pair: (B, I, hidden)
                of the main route and (B, hidden, K) of the secondary route.
        """
        check_images("DeepCapsNet", images, self.image_shape, self.conv1)
        features = F.relu(self.conv1(images))  # (B, channels[0], H', W')
        features = F.relu(self.conv2(features))  # (B, channels[1], H'-4, W'-4)
        u = self.primary(features)  # (B, I, 8)
        hidden, primary = route(self.primary_routing, u, iterations, return_coupling)
        poses, secondary = route(self.secondary_routing, hidden, iterations, return_coupling)
        reconstruction = None if self.decoder is None else self.decoder(poses, target)
        coupling = None if primary is None or secondary is None else (primary, secondary)
        return CapsuleOutput(capsule_lengths(poses), poses, reconstruction, None, coupling)
