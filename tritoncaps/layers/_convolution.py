"""Convolutions that keep the scale of their features, in one, two or three dimensions.

torch's default cuts the power of the features to about a third in each layer, and squash makes what
is short shorter still. The rule belongs to the module that owns the weights, because whoever puts
weights into a model made on "meta" calls `reset_parameters` of every module in turn.

On a CPU, those of primary capsules train in groups of images (`LinearConv2d`).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tritoncaps._tracing import is_proxy

_GROUP = 16  # images


class _KeepsScale(_ConvNd):
    """He's initialisation, with the gain of what follows the convolution."""

    nonlinearity: Literal["linear", "relu"] = "linear"

    def reset_parameters(self) -> None:
        """Draw the kernels, and set the bias to 0."""
        super().reset_parameters()  # its draws keep the weights of a seed as they have always been
        nn.init.kaiming_normal_(self.weight, nonlinearity=self.nonlinearity)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LinearConv1d(_KeepsScale, nn.Conv1d):
    """A `Conv1d` that keeps the scale."""


class LinearConv2d(_KeepsScale, nn.Conv2d):
    """A `Conv2d` that keeps the scale. On a CPU it trains faster where its rows are short.

    torch convolves along the rows of the maps, and short rows leave it idle: with the 9×9 kernels
    and rows of 6 in CapsNet's primary capsules, forward and backward reach 66 of 110 GFLOP/s (two
    threads, AVX2). With the images of a group as the innermost axis, a row has as many elements as
    the group has images: 84 GFLOP/s. A training step of `CapsNet` is 1.2 to 1.3 times as fast.
    Inference is slower this way, and so are longer rows, smaller kernels and fewer channels.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_proxy(input) or not self._trains_in_groups(input):
            return super()._conv_forward(input, weight, bias)
        maps = F.conv3d(
            input.unflatten(0, (-1, _GROUP)).permute(0, 2, 3, 4, 1),
            weight.contiguous()[..., None],
            bias,
            (*self.stride, 1),
            (*self.padding, 0),
        )
        return maps.permute(0, 4, 1, 2, 3).flatten(0, 1)

    def _trains_in_groups(self, features: Tensor) -> bool:
        """Whether groups are faster: a rule of what was measured, with float32 alone."""
        if not (
            features.device.type == "cpu"
            and features.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and torch.is_grad_enabled()
            and self.weight.requires_grad
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        ):
            return False
        is_plain = (
            self.groups == 1
            and self.dilation == (1, 1)
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
        )
        if not is_plain or features.ndim != 4:
            return False
        images = features.shape[0]
        width = features.shape[3] + 2 * int(self.padding[1])
        row = (width - self.kernel_size[1]) // self.stride[1] + 1
        return (
            self.in_channels >= 64
            and self.out_channels >= 256
            and min(self.kernel_size) >= 5
            and 1 <= row <= 8
            and images > 0
            and images % _GROUP == 0
        )


class LinearConv3d(_KeepsScale, nn.Conv3d):
    """A `Conv3d` that keeps the scale."""


class ReluConv2d(_KeepsScale, nn.Conv2d):
    """A `Conv2d` that keeps the scale if a ReLU follows."""

    nonlinearity = "relu"


# By the number of spatial dimensions.
LINEAR: dict[int, Any] = {1: LinearConv1d, 2: LinearConv2d, 3: LinearConv3d}
