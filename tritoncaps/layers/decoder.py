"""The decoder that reconstructs an image from class capsules."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from tritoncaps import _checks, _targets
from tritoncaps._tracing import is_proxy, one_node, rearrange
from tritoncaps.layers.capsules import Capsules, capsule_lengths


class _Hidden(nn.Linear):
    """A hidden layer with He's initialisation, for a sum over `used` of the inputs.

    The capsules that are masked add nothing to the first layer. Torch's default would count them,
    and a pose would begin with little effect on the image.
    """

    def __init__(self, inputs: int, outputs: int, used: int, **options: Any) -> None:
        self.used = used
        super().__init__(inputs, outputs, **options)

    def reset_parameters(self) -> None:
        """Draw the weights, and set the bias to 0."""
        nn.init.normal_(self.weight, std=math.sqrt(2 / self.used))
        nn.init.zeros_(self.bias)


class ReconstructionDecoder(nn.Module):
    """Decode the present capsules to an image, by three fully connected layers (Sabour 2017, 4.1).

    The other capsules are masked with zeros. The target says what is present:

    - class indices (B,): one capsule of each image.
    - multi-hot (B, K): each capsule is multiplied by its target, so all the present ones make one
      picture together, and a share between 0 and 1 scales its capsule.
    - None: the most active capsule. For vector capsules, this is the longest one.

    To draw several capsules of an image one by one, decode once for each, with class indices.

    Args:
        num_classes: class capsules, K.
        dim: components of a class capsule, D.
        image_shape: (channels, height, width) of the image, or (channels, length) of a sequence, or
            any other shape after the batch.
        hidden: widths of the two hidden layers.
        device, dtype: of the parameters, as for torch's layers.

    Shapes: poses (B, K, D), or `Capsules` of such poses with activations (B, K), and optionally a
    target (B,), int64, or (B, K) → (B, *image_shape), in (0, 1).

    Raises:
        TypeError, ValueError: a size is not an int of at least 1. In `forward`, the poses or the
            target have the wrong type, shape or range.

    Example:
        >>> import torch
        >>> decoder = ReconstructionDecoder(10, 16, image_shape=(1, 28, 28))
        >>> decoder(torch.rand(2, 10, 16), torch.tensor([3, 7])).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        image_shape: tuple[int, ...] | list[int],
        hidden: tuple[int, int] = (512, 1024),
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(image_shape, (tuple, list)) or len(image_shape) < 2:
            kind = ValueError if isinstance(image_shape, (tuple, list)) else TypeError
            raise kind(
                f"ReconstructionDecoder: image_shape must be (channels, height, width), or the "
                f"like of other dimensions, got {_checks.shown(image_shape)}"
            )
        _checks.check_size("ReconstructionDecoder", "num_classes", num_classes)
        _checks.check_size("ReconstructionDecoder", "dim", dim)
        for size in image_shape:
            _checks.check_size("ReconstructionDecoder", "image_shape", size)
        _checks.check_pair("ReconstructionDecoder", "hidden", hidden, "two ints")
        self.num_classes = num_classes
        self.dim = dim
        self.image_shape = tuple(image_shape)
        self.hidden = hidden
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = nn.Sequential(
            _Hidden(num_classes * dim, hidden[0], used=dim, **options),
            nn.ReLU(),
            _Hidden(hidden[0], hidden[1], used=hidden[0], **options),
            nn.ReLU(),
            nn.Linear(hidden[1], math.prod(image_shape), **options),
            nn.Sigmoid(),
        )

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def forward(self, capsules: Tensor | Capsules, target: Tensor | None = None) -> Tensor:
        """Mask the absent capsules and decode the rest."""
        masked = _masked(capsules, target, self.num_classes, self.dim)
        if not is_proxy(masked):
            _checks.check_layer_dtype("ReconstructionDecoder", "poses", masked, self.layers[0])
        flat = self.layers(rearrange(masked, "B K D -> B (K D)"))
        return flat.unflatten(1, self.image_shape)

    def extra_repr(self) -> str:
        """Return the arguments that build this layer."""
        return (
            f"num_classes={self.num_classes}, dim={self.dim}, image_shape={self.image_shape}, "
            f"hidden={self.hidden}"
        )


# One node of a traced graph, so that the graph takes calls with and without a target.
@one_node
def _masked(
    capsules: Tensor | Capsules, target: Tensor | None, num_classes: int, dim: int
) -> Tensor:
    """Return the poses, (B, K, D), with zeros in place of the absent capsules."""
    poses, activations = capsules if isinstance(capsules, Capsules) else (capsules, None)
    _checks.check_tensor("ReconstructionDecoder", "poses", poses, "B K D")
    if poses.shape[1:] != (num_classes, dim):
        raise ValueError(
            f"ReconstructionDecoder: poses must be (B, {num_classes}, {dim}), "
            f"got {_checks.shape_of(poses)}"
        )
    if target is None:
        activations = capsule_lengths(poses) if activations is None else activations
        if activations.shape != poses.shape[:2]:
            raise ValueError(
                f"ReconstructionDecoder: activations must be {_checks.shape_of(poses)[:2]}, one "
                f"for each pose, got {_checks.shape_of(activations)}"
            )
        target = activations.argmax(dim=1)
    else:
        _targets.check_target("ReconstructionDecoder", target, "poses", poses)
    present = _targets.present_classes(target, num_classes, poses.dtype)
    return poses * present.unsqueeze(-1)
