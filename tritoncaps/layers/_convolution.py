"""Convolutions that keep the scale of their features, in one, two or three dimensions.

torch's default cuts the power of the features to about a third in each layer, and squash makes what
is short shorter still. The rule belongs to the module that owns the weights, because whoever puts
weights into a model made on "meta" calls `reset_parameters` of every module in turn.
"""

from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd


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
    """A `Conv2d` that keeps the scale."""


class LinearConv3d(_KeepsScale, nn.Conv3d):
    """A `Conv3d` that keeps the scale."""


class ReluConv2d(_KeepsScale, nn.Conv2d):
    """A `Conv2d` that keeps the scale if a ReLU follows."""

    nonlinearity = "relu"


# By the number of spatial dimensions.
LINEAR: dict[int, Any] = {1: LinearConv1d, 2: LinearConv2d, 3: LinearConv3d}
