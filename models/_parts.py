"""What the networks share: their output, their first convolution and the argument checks."""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from tritoncaps._checks import (
    check_choice,
    check_flag,
    check_floating,
    check_pair,
    check_size,
    shape_of,
)
from tritoncaps._tracing import concrete, is_proxy
from tritoncaps.layers import RoutedCapsules

# A network with more is rarely meant: the largest of the papers has 8 million.
_MANY_PARAMETERS = 100_000_000


class CapsuleOutput(NamedTuple):
    """What a capsule network returns.

    `activations` (B, K): how present each class is, in [0, 1]. For vector capsules, their lengths.
    `poses` (B, K, D): the class capsules.
    `reconstruction` (B, C, H, W): the decoded image, or None for a model without a decoder.
    `logits` (B, K): scores, for a model that trains on them, or None.
    `coupling` (B, I, J): how much of each input capsule goes to each output capsule in the last
    iteration, or None if it was not asked for. A model with several routings returns a tuple with
    one for each.
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
    """Raise ValueError if the convolutions leave no primary capsule."""
    if min(image) < smallest:
        raise ValueError(
            f"{model}: image_size={image} leaves no primary capsule, "
            f"both sides must be at least {smallest}"
        )


def warn_of_size(model: nn.Module, in_capsules: int, routing: int, pixels: int) -> None:
    """Warn before building a routing and a decoder with very many parameters.

    `routing` is the number of its parameters, `pixels` of the decoded image, or 0. The last layer
    of the decoder outweighs the others by far.
    """
    decoder = 1024 * pixels
    if routing + decoder <= _MANY_PARAMETERS:
        return
    total = routing + decoder + sum(parameter.numel() for parameter in model.parameters())
    warnings.warn(
        f"{type(model).__name__}: {total / 1e6:,.0f} M parameters, {routing / 1e6:,.0f} M of them "
        f"in the routing of {in_capsules:,} primary capsules and {decoder / 1e6:,.0f} M in the "
        "decoder; use a larger stride or shared_weights=True for the routing, "
        "reconstruction=False for the decoder, or tritoncaps.layers.CapsuleHead on a backbone",
        stacklevel=3,
    )


def check_images(model: str, images: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Raise if the images do not have the type or shape that the model was built for."""
    if is_proxy(images):
        return
    check_floating(model, "images", images)
    if images.shape[1:] != image_shape:
        raise ValueError(
            f"{model}: images must be (B, {', '.join(map(str, image_shape))}), "
            f"got {shape_of(images)}"
        )


def route(
    layer: RoutedCapsules, u: Tensor, iterations: int | None, return_coupling: bool
) -> tuple[Tensor, Tensor | None]:
    """Route, and return the coupling as well, or None if it is not wanted."""
    return_coupling = concrete("return_coupling", return_coupling, False)
    result = layer(u, iterations=iterations, return_coupling=return_coupling)
    if not return_coupling:
        return result, None
    poses, coupling = result
    return poses, coupling
