"""ConvCapsNet: convolutions, and three layers of capsules routed by agreement.

This network is our own. It resembles DeepCaps (Rajasegaran et al. 2019), and differs from it in
three ways:

- Every layer of capsules is routed. DeepCaps routes one of its convolutional layers. The other 15
  are convolutions with a squash.
- An input capsule is shared among the types at one position, and each capsule is squashed alone.
  DeepCaps takes the softmax over all types and positions, and squashes the map of a type as one
  vector.
- A capsule stays at its position. The published code of DeepCaps reshapes its maps without
  transposing them, which mixes the components of a capsule with its neighbours.

The defaults are for CIFAR-10, with 6,331,200 parameters, of which the decoder has 3,756,544.
"""

from typing import Any

from torch import Tensor, nn

from tritoncaps import ops
from tritoncaps._checks import check_choice, check_pair
from tritoncaps.layers import (
    ConvRoutedCapsules,
    PrimaryCapsules,
    ReconstructionDecoder,
    RoutedCapsules,
    capsule_lengths,
)
from tritoncaps.layers._initialisation import routed_length
from tritoncaps.layers.routed import route
from tritoncaps.models._mixin import PretrainedMixin
from tritoncaps.models._parts import (
    CapsuleOutput,
    check_arguments,
    check_images,
    check_sides,
    image_sides,
    normalised_conv,
    warn_of_size,
)


class ConvCapsNet(PretrainedMixin, nn.Module):
    """Convolutional capsules, for images of any size.

    Two convolutions, primary capsules, two layers of convolutional capsules with kernels of 3×3,
    and class capsules.

    Args:
        num_classes: class capsules, K.
        in_channels: channels of the images.
        image_size: side of square images, or (height, width). At least 13 by default.
        iterations: routing iterations of each layer.
        channels: feature maps of the two convolutions.
        stride: stride of the first convolution. The second has a stride of 2. A larger stride keeps
            the last grid of a large image small, and with it the matrices of the class capsules.
        capsule_types: capsules at each position, 8-dimensional, of the primary and both
            convolutional layers.
        class_dim: components of a class capsule, D.
        votes: of the convolutional capsules, "patch" or "convolved". See
            `layers.ConvRoutedCapsules`.
        learned_prior: learn the initial logits of all routings.
        pose_bias: learn a bias, added to the sums before each squash.
        leaky: add an orphan class to each softmax. See `layers.RoutedCapsules`.
        gradient: "full" or "last". See `ops.fused_dynamic_routing`.
        reconstruction: build the decoder. Set it to False to train without a decoder:
            DistributedDataParallel stops at parameters that the loss does not use.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range, or the images are too small
            for the convolutions. In `forward`, the images have the wrong type or shape.

    Warns:
        UserWarning: the routing to the class capsules and the decoder together have more than 100
            million parameters.

    Example:
        >>> import torch
        >>> model = ConvCapsNet(channels=(8, 16), capsule_types=4)
        >>> output = model(torch.rand(2, 3, 32, 32))
        >>> output.activations.shape, output.poses.shape, output.reconstruction.shape
        (torch.Size([2, 10]), torch.Size([2, 10, 16]), torch.Size([2, 3, 32, 32]))
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        *,
        iterations: int = 3,
        channels: tuple[int, int] = (64, 128),
        stride: int = 1,
        capsule_types: int = 32,
        class_dim: int = 16,
        votes: ops.Votes = "patch",
        learned_prior: bool = False,
        pose_bias: bool = False,
        leaky: bool = False,
        gradient: ops.Gradient = "full",
        reconstruction: bool = True,
    ) -> None:
        super().__init__()
        name = "ConvCapsNet"
        sizes = {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "iterations": iterations,
            "stride": stride,
            "capsule_types": capsule_types,
            "class_dim": class_dim,
        }
        options: dict[str, Any] = {
            "learned_prior": learned_prior,
            "pose_bias": pose_bias,
            "leaky": leaky,
        }
        check_arguments(name, sizes, gradient, {**options, "reconstruction": reconstruction})
        check_choice(name, "votes", votes, ("patch", "convolved"))
        check_pair(name, "channels", channels, "two ints")
        height, width = image_sides(name, image_size)
        # The convolutional capsules turn seven rows into three, and three into one.
        check_sides(name, (height, width), smallest=12 * stride + 1)
        self.image_shape = (in_channels, height, width)
        self.features = nn.Sequential(
            *normalised_conv(in_channels, channels[0], stride),
            nn.ReLU(),
            *normalised_conv(channels[0], channels[1], stride=2),
            nn.ReLU(),
        )
        T, P = capsule_types, 8
        self.primary = PrimaryCapsules(channels[1], T, P, kernel_size=3, stride=1, padding=1)
        # The rows and columns of the grids: of primary, convolutional and last capsules.
        grid = [((side - 1) // stride) // 2 + 1 for side in (height, width)]
        last = [(side - 3) // 2 - 1 for side in grid]
        self._grid = (*grid, T)
        in_capsules = last[0] * last[1] * T
        weights = in_capsules * P * num_classes * class_dim
        warn_of_size(name, in_capsules, weights, self.image_shape, reconstruction=reconstruction)
        # The capsules of a routing are short. Those of the second are longer, for its inputs agree.
        in_length = routed_length(9 * T if votes == "patch" else T, T, P)

        def convolutional(stride: int, in_length: float) -> ConvRoutedCapsules:
            return ConvRoutedCapsules(
                T, P, T, P, 3, stride, iterations=iterations,
                votes=votes, gradient=gradient, in_length=in_length, **options,
            )  # fmt: skip

        self.convolutional = nn.ModuleList([convolutional(2, 1.0), convolutional(1, in_length)])
        self.routing = RoutedCapsules(
            in_capsules, P, num_classes, class_dim, iterations, gradient=gradient, **options
        )  # fmt: skip
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
            iterations: iterations of each routing in this call, instead of the model's own.
            return_coupling: also return the coupling of the last iterations, one tensor for each
                routing: those of the convolutional capsules as `ops.conv_dynamic_routing` returns
                them, and (B, I, K) of the class capsules.
        """
        check_images("ConvCapsNet", images, self.image_shape, self.features[0])
        grid = self.primary(self.features(images)).unflatten(1, self._grid)
        grid, first = route(self.convolutional[0], grid, iterations, return_coupling)
        grid, second = route(self.convolutional[1], grid, iterations, return_coupling)
        u = grid.flatten(1, 3)  # (B, I, 8)
        poses, last = route(self.routing, u, iterations, return_coupling)  # (B, K, D)
        reconstruction = None if self.decoder is None else self.decoder(poses, target)
        couplings = tuple(each for each in (first, second, last) if each is not None)
        coupling = couplings or None
        return CapsuleOutput(capsule_lengths(poses), poses, reconstruction, None, coupling)
