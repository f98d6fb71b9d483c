"""What the networks share: their output, and the checks of their arguments."""

import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from tritoncaps._checks import (
    check_choice,
    check_flag,
    check_floating,
    check_layer_dtype,
    check_pair,
    check_size,
    shape_of,
)
from tritoncaps._tracing import is_proxy
from tritoncaps.layers._convolution import ReluConv2d

# More is rarely meant: the largest network of the papers has 8 million parameters.
_MANY_NUMBERS = 100_000_000


class CapsuleOutput(NamedTuple):
    """What a capsule network returns.

    `activations` (B, K): how present each class is, in [0, 1]. For vector capsules, their lengths.
    `poses` (B, K, D): the class capsules.
    `reconstruction` (B, C, H, W): the decoded image, or None for a model without a decoder.
    `logits` (B, K): scores, for a model that trains on them, or None.
    `coupling` (B, I, J): how much of each input capsule goes to each output capsule in the last
    iteration, or None if it was not asked for. `InvertedCapsNet` has none to ask for. A model with
    several routings returns a tuple with one for each. For capsules on a grid, several axes stand
    in the place of I and J. See `forward` of the model.
    """

    activations: Tensor
    poses: Tensor
    reconstruction: Tensor | None = None
    logits: Tensor | None = None
    coupling: Tensor | tuple[Tensor, ...] | None = None


# torch.export writes an output by the name of its type.
_register_namedtuple(CapsuleOutput, serialized_type_name="tritoncaps.CapsuleOutput")


def check_arguments(
    model: str, sizes: Mapping[str, object], gradient: object, flags: Mapping[str, object]
) -> None:
    """Raise an error, which names the model, for an argument of the wrong type or range."""
    for name, size in sizes.items():
        check_size(model, name, size)
    check_choice(model, "gradient", gradient, ("full", "last"))
    for name, flag in flags.items():
        check_flag(model, name, flag)


def image_sides(model: str, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width), given one side or both."""
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    check_pair(model, "image_size", sides, "an int or (height, width)")
    return sides


def check_sides(model: str, image: tuple[int, int], smallest: int) -> None:
    """Raise ValueError if an image is too small for the convolutions."""
    if min(image) < smallest:
        raise ValueError(
            f"{model}: image_size={image} is too small for the convolutions, "
            f"both sides must be at least {smallest}; enlarge or pad the images"
        )


def warn_of_size(
    model: str,
    in_capsules: int,
    routing: int,
    image_shape: tuple[int, int, int],
    *,
    reconstruction: bool,
    shared_weights: bool = False,
) -> None:
    """Warn before building a routing and a decoder with very many numbers.

    `routing` is the number of its parameters, or of their copies in a call if they are shared. Of
    the decoder, only the last layer counts. The others are small beside it.
    """
    decoder = 1024 * math.prod(image_shape) if reconstruction else 0
    if routing + decoder <= _MANY_NUMBERS:
        return
    kind = "numbers, copied from shared ones in each call," if shared_weights else "parameters"
    numbers = f"{routing / 1e6:,.0f} M {kind} in the routing of {in_capsules:,} capsules"
    remedies = "use a larger stride for the routing, "
    if reconstruction:
        numbers += f" and {decoder / 1e6:,.0f} M parameters in the decoder"
        remedies += "reconstruction=False for the decoder, "
    warnings.warn(
        f"{model}: image_size={image_shape[1:]} needs {numbers}, more than "
        f"{_MANY_NUMBERS / 1e6:,.0f} M; {remedies}or tritoncaps.layers.CapsuleHead on a backbone",
        stacklevel=3,
    )


def normalised_conv(
    in_channels: int, channels: int, stride: int = 1, kernel_size: int = 3
) -> list[nn.Module]:
    """Return a convolution and the batch normalisation of its output."""
    padding = kernel_size // 2
    conv = ReluConv2d(in_channels, channels, kernel_size, stride, padding, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


def check_images(
    model: str, images: Tensor, image_shape: tuple[int, int, int], first: nn.Module
) -> None:
    """Raise if the images do not have the type or shape that the model was built for.

    `first` is the layer that they go through first.
    """
    if is_proxy(images):
        return
    check_floating(model, "images", images)
    if images.shape[1:] != image_shape:
        raise ValueError(
            f"{model}: images must be (B, {', '.join(map(str, image_shape))}), "
            f"got {shape_of(images)}"
        )
    check_layer_dtype(model, "images", images, first)
