"""InvertedCapsNet: a residual network, and capsules routed by inverted dot-product attention.

Tsai, Srivastava, Goh, Salakhutdinov: Capsules with Inverted Dot-Product Attention Routing (2020).
The defaults are their network for CIFAR-10, which has 1,829,329 parameters.
"""

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from tritoncaps._checks import check_choice, check_pair, check_size
from tritoncaps._patches import patches
from tritoncaps._tracing import concrete, rearrange
from tritoncaps.layers import InvertedAttentionCapsules
from tritoncaps.layers._convolution import LinearConv2d
from tritoncaps.models._mixin import PretrainedMixin
from tritoncaps.models._parts import (
    CapsuleOutput,
    check_images,
    check_sides,
    image_sides,
    normalised_conv,
)
from tritoncaps.ops._inverted_attention_routing import normalised

# A pose is a 4×4 matrix.
_DIM, _ROWS = 16, 4


class InvertedCapsNet(PretrainedMixin, nn.Module):
    """The network of Tsai 2020, for images of any size.

    Residual blocks, primary capsules, two layers of convolutional capsules, class capsules. The
    class is read from the poses by one linear layer, which all classes share. It is trained with
    the cross entropy of `logits`. It has no decoder.

    Args:
        num_classes: class capsules, K.
        in_channels: channels of the images.
        image_size: side of square images, or (height, width). At least 13.
        iterations: passes of the routing. With 1, every coupling is uniform.
        routing: "concurrent" lets all layers take one pass at a time, each from the poses of the
            pass before. "sequential" routes each layer to its end before the next one.
        channels: feature maps of the first and the second group of residual blocks.
        blocks: residual blocks in each group.
        capsule_types: capsules at each position, of the primary and both convolutional layers.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range, or the images are too small
            for the convolutions. In `forward`, the images have the wrong type or shape.

    Example:
        >>> import torch
        >>> model = InvertedCapsNet(channels=(16, 32), blocks=(1, 1), capsule_types=4)
        >>> output = model(torch.rand(2, 3, 32, 32))
        >>> output.logits.shape, output.poses.shape
        (torch.Size([2, 10]), torch.Size([2, 10, 16]))
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        *,
        iterations: int = 2,
        routing: Literal["concurrent", "sequential"] = "concurrent",
        channels: tuple[int, int] = (64, 128),
        blocks: tuple[int, int] = (3, 4),
        capsule_types: int = 32,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, size in (
            ("num_classes", num_classes),
            ("in_channels", in_channels),
            ("iterations", iterations),
            ("capsule_types", capsule_types),
        ):
            check_size(name, argument, size)
        check_choice(name, "routing", routing, ("concurrent", "sequential"))
        check_pair(name, "channels", channels, "two ints")
        check_pair(name, "blocks", blocks, "two ints")
        sides = image_sides(name, image_size)
        check_sides(name, sides, smallest=13)
        self.image_shape = (in_channels, *sides)
        self.iterations = iterations
        self.routing = routing
        self.features = nn.Sequential(
            *normalised_conv(in_channels, channels[0]),
            nn.ReLU(),
            *_group(channels[0], channels[0], blocks[0], stride=1),
            *_group(channels[0], channels[1], blocks[1], stride=2),
        )
        self.primary = LinearConv2d(channels[1], capsule_types * _DIM, kernel_size=1)
        self.norm = nn.LayerNorm(_DIM)
        rows, columns = (((side + 1) // 2 - 3) // 2 - 1 for side in sides)
        self.capsules = nn.ModuleList(
            [
                CapsuleConvolution(capsule_types, capsule_types, (3, 3), stride=2),
                CapsuleConvolution(capsule_types, capsule_types, (3, 3), stride=1),
                CapsuleConvolution(capsule_types, num_classes, (rows, columns), stride=1),
            ]
        )
        self.score = nn.Linear(_DIM, 1)

    def forward(
        self, images: Tensor, target: Tensor | None = None, *, iterations: int | None = None
    ) -> CapsuleOutput:
        """Classify.

        Args:
            images: shape (B, C, H, W), values in [0, 1].
            target: not used. The other models decode it.
            iterations: passes of this call, instead of the model's own.
        """
        iterations = concrete("iterations", iterations, None)
        count = self.iterations if iterations is None else iterations
        check_images(type(self).__name__, images, self.image_shape, self.features[0])
        check_size(type(self).__name__, "iterations", count)
        maps = self.primary(self.features(images))
        grid = rearrange(maps, "B (T D) H W -> B H W T D", D=_DIM)
        grid = normalised(grid, self.norm.weight, self.norm.bias)
        route = self._concurrently if self.routing == "concurrent" else self._sequentially
        poses = route(grid, count).flatten(1, 3)  # (B, K, D)
        logits = self.score(poses).squeeze(2).to(poses.dtype)
        return CapsuleOutput(logits.softmax(dim=1), poses, None, logits)

    def _sequentially(self, grid: Tensor, iterations: int) -> Tensor:
        for layer in self.capsules:
            grid = layer(grid, iterations=iterations)
        return grid

    def _concurrently(self, grid: Tensor, iterations: int) -> Tensor:
        """Let each layer take a pass from the poses of the pass before, its own and those below.

        A pass of a layer reaches the classes one pass later for each layer between. What cannot
        reach them any more is left out: in the last pass, all layers but that of the classes.
        """
        grids = [grid]
        for layer in self.capsules:
            grids.append(layer(grids[-1], iterations=1))
        for left in reversed(range(iterations - 1)):
            skipped = max(0, len(self.capsules) - 1 - left)
            passed = [
                above if index < skipped else layer(below, above, iterations=1)
                for index, (layer, (below, above)) in enumerate(
                    zip(self.capsules, pairwise(grids), strict=True)
                )
            ]
            grids = [grid, *passed]
        return grids[-1]


class CapsuleConvolution(nn.Module):
    """Route the capsules of each window of a grid to the capsules at one position.

    (B, H, W, T, D) → (B, H', W', J, D). Positions become a part of the batch.
    """

    def __init__(self, types: int, out_types: int, kernel: tuple[int, int], stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        inputs = kernel[0] * kernel[1] * types
        self.routing = InvertedAttentionCapsules(inputs, _DIM, out_types, _DIM, rows=_ROWS)

    def forward(self, grid: Tensor, pose: Tensor | None = None, *, iterations: int) -> Tensor:
        """Route so many passes, from the poses of an earlier call if there was one."""
        rows, columns = (
            (grid.shape[axis] - side) // self.stride + 1
            for axis, side in enumerate(self.kernel, start=1)
        )
        u = patches(grid, self.kernel, self.stride)  # (B·H'·W', I, D)
        pose = None if pose is None else pose.flatten(0, 2)
        v = self.routing(u, pose, iterations=iterations)
        return v.unflatten(0, (grid.shape[0], rows, columns))


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *normalised_conv(in_channels, channels, stride),
            nn.ReLU(),
            *normalised_conv(channels, channels),
        )
        is_same = stride == 1 and in_channels == channels
        shortcut = [] if is_same else normalised_conv(in_channels, channels, stride, kernel_size=1)
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, maps: Tensor) -> Tensor:
        """Add both ways."""
        return F.relu(self.convolutions(maps) + self.shortcut(maps))


def _group(in_channels: int, channels: int, count: int, stride: int) -> list[nn.Module]:
    return [
        Block(channels if index else in_channels, channels, 1 if index else stride)
        for index in range(count)
    ]
