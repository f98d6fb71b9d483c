"""Efficient-CapsNet: four convolutions, sixteen primary capsules, self-attention, a decoder.

Mazzia, Salvetti, Chiaberge: Efficient-CapsNet: Capsule Network with Self-Attention Routing (2021).
On 28×28 grey images it has 161,824 parameters without its decoder.
"""

from torch import Tensor, nn

from tritoncaps import ops
from tritoncaps._checks import check_flag, check_pair, check_size
from tritoncaps._tracing import concrete, rearrange
from tritoncaps.layers import AttentionCapsules, ReconstructionDecoder, capsule_lengths
from tritoncaps.layers._convolution import LinearConv2d, ReluConv2d
from tritoncaps.models._mixin import PretrainedMixin
from tritoncaps.models._parts import CapsuleOutput, check_images, check_sides, image_sides


class EfficientCapsNet(PretrainedMixin, nn.Module):
    """The network of Mazzia 2021, for images of any size.

    A depthwise convolution as large as the last feature maps makes the primary capsules: 9×9 for
    images of 28×28. On images of any size there are therefore `primary_capsules` of them, and only
    this kernel grows. A larger stride keeps it small: 7×7 for images of 48×48 with a stride of 2.

    Args:
        num_classes: class capsules, K.
        in_channels: channels of the images.
        image_size: side of square images, or (height, width). At least 11 by default.
        stride: stride of the first convolution.
        primary_capsules: capsules in front of the routing, 8-dimensional.
        class_dim: components of a class capsule, D.
        decoder_hidden: widths of the two hidden layers of the decoder. The paper's decoder has 1.4
            million parameters on MNIST, nine times as many as the rest. With (128, 240) it has
            240,512, which are less than 1 MB in float32.
        reconstruction: build the decoder. Set it to False to train without a decoder:
            DistributedDataParallel stops at parameters that the loss does not use.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range, or the images are too small
            for the convolutions. In `forward`, the images have the wrong type or shape.

    Example:
        >>> import torch
        >>> model = EfficientCapsNet(reconstruction=False)
        >>> sum(p.numel() for p in model.parameters())
        161824
        >>> model(torch.rand(2, 1, 28, 28)).activations.shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        *,
        stride: int = 1,
        primary_capsules: int = 16,
        class_dim: int = 16,
        decoder_hidden: tuple[int, int] = (512, 1024),
        reconstruction: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, size in (
            ("num_classes", num_classes),
            ("in_channels", in_channels),
            ("stride", stride),
            ("primary_capsules", primary_capsules),
            ("class_dim", class_dim),
        ):
            check_size(name, argument, size)
        check_pair(name, "decoder_hidden", decoder_hidden, "two ints")
        check_flag(name, "reconstruction", reconstruction)
        sides = image_sides(name, image_size)
        # The last convolution needs 3 rows, and the first 4 more than that and its kernel of 5.
        check_sides(name, sides, smallest=5 + 6 * stride)
        self.image_shape = (in_channels, *sides)
        width = 8 * primary_capsules
        self.features = nn.Sequential(
            *_conv(in_channels, 32, kernel_size=5, stride=stride),
            *_conv(32, 64, kernel_size=3),
            *_conv(64, 64, kernel_size=3),
            *_conv(64, width, kernel_size=3, stride=2),
        )
        rows, columns = (((side - 5) // stride - 6) // 2 + 1 for side in sides)
        self.primary = LinearConv2d(width, width, (rows, columns), groups=width)
        self.routing = AttentionCapsules(primary_capsules, 8, num_classes, class_dim)
        self.decoder = (
            ReconstructionDecoder(num_classes, class_dim, self.image_shape, decoder_hidden)
            if reconstruction
            else None
        )

    def forward(
        self, images: Tensor, target: Tensor | None = None, *, return_coupling: bool = False
    ) -> CapsuleOutput:
        """Classify and reconstruct.

        Args:
            images: shape (B, C, H, W), values in [0, 1].
            target: the capsules to decode, as in training: class indices, (B,), or multi-hot,
                (B, K), for all the present ones in one picture. See `ReconstructionDecoder`.
                Without it the longest capsule of each image is decoded.
            return_coupling: also return the coupling, (B, I, K).
        """
        return_coupling = concrete("return_coupling", return_coupling, False)
        check_images(type(self).__name__, images, self.image_shape, self.features[0])
        maps = self.primary(self.features(images))  # (B, I·8, 1, 1)
        u = ops.squash(rearrange(maps, "B (I P) 1 1 -> B I P", P=8), form="exponential")
        result = self.routing(u, return_coupling=return_coupling)
        poses, coupling = result if return_coupling else (result, None)  # (B, K, D)
        reconstruction = None if self.decoder is None else self.decoder(poses, target)
        return CapsuleOutput(capsule_lengths(poses), poses, reconstruction, None, coupling)


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
) -> list[nn.Module]:
    """A convolution, ReLU, and then the normalisation."""
    return [
        ReluConv2d(in_channels, out_channels, kernel_size, stride),
        nn.ReLU(),
        nn.BatchNorm2d(out_channels),
    ]
