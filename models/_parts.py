"""What the networks share: their output, their first convolution and the argument checks."""

from typing import NamedTuple

from torch import Tensor, nn

from tritoncaps._checks import (
    check_choice,
    check_flag,
    check_floating,
    check_pair,
    check_size,
    shape_of,
)
from tritoncaps.layers._convolution import ReluConv2d


class CapsuleOutput(NamedTuple):
    """What a capsule network returns.

    `activations` (B, K): how present each class is, in [0, 1]. For vector capsules, their lengths.
    `poses` (B, K, D): the class capsules.
    `reconstruction` (B, C, H, W): the decoded image, or None for a model without a decoder.
    `logits` (B, K): scores, for a model that trains on them, or None.
    """

    activations: Tensor
    poses: Tensor
    reconstruction: Tensor | None = None
    logits: Tensor | None = None


def relu_convolution(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    """Build a convolution that a ReLU follows, with He initialisation, which keeps the scale.

    With torch's default, each convolution cuts the power of the features to about a third, and the
    squashed primary capsules start with lengths of a few hundredths.
    """
    return ReluConv2d(in_channels, out_channels, kernel_size)


def check_arguments(
    model: str, sizes: dict[str, object], gradient: object, reconstruction: object
) -> None:
    """Raise an error, which names the model, for an argument of the wrong type or range."""
    for name, size in sizes.items():
        check_size(model, name, size)
    check_choice(model, "gradient", gradient, ("full", "last"))
    check_flag(model, "reconstruction", reconstruction)


def image_sides(model: str, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width), given one side or both."""
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    check_pair(model, "image_size", sides, "an int or (height, width)")
    return sides


def check_capsules(model: str, in_capsules: int, image: tuple[int, int], smallest: int) -> None:
    """Raise ValueError if the convolutions leave no primary capsule."""
    if in_capsules == 0:
        raise ValueError(
            f"{model}: image_size={image} leaves no primary capsule, "
            f"both sides must be at least {smallest}"
        )


def check_images(model: str, images: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Raise if the images do not have the type or shape that the model was built for."""
    check_floating(model, "images", images)
    if images.shape[1:] != image_shape:
        raise ValueError(
            f"{model}: images must be (B, {', '.join(map(str, image_shape))}), "
            f"got {shape_of(images)}"
        )
