"""The decoder that reconstructs an image from a class capsule."""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn

from tritoncaps import _checks
from tritoncaps._targets import present_classes
from tritoncaps.layers.capsules import Capsules, capsule_lengths


class ReconstructionDecoder(nn.Module):
    """Decode one class capsule to an image with three fully connected layers (Sabour 2017, 4.1).

    All capsules but one are masked with zeros. The remaining one is the target's. Without a target
    it is the most active capsule. For vector capsules, this is the longest one.

    Args:
        num_classes: class capsules, K.
        dim: components of a class capsule, D.
        image_shape: (channels, height, width) of the image.
        hidden: widths of the two hidden layers.

    Shapes: poses (B, K, D), or `Capsules` of such poses with activations (B, K), and optionally a
    target (B,), int64 → (B, channels, height, width), in (0, 1).

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
        image_shape: Sequence[int],
        hidden: tuple[int, int] = (512, 1024),
    ) -> None:
        super().__init__()
        if not isinstance(image_shape, Sequence) or len(image_shape) != 3:
            kind = ValueError if isinstance(image_shape, Sequence) else TypeError
            raise kind(
                f"ReconstructionDecoder: image_shape must be (channels, height, width), "
                f"got {_checks.shown(image_shape)}"
            )
        channels, height, width = image_shape
        for name, value in (
            ("num_classes", num_classes),
            ("dim", dim),
            ("channels", channels),
            ("height", height),
            ("width", width),
        ):
            _checks.check_size("ReconstructionDecoder", name, value)
        _checks.check_pair("ReconstructionDecoder", "hidden", hidden, "two ints")
        self.num_classes = num_classes
        self.dim = dim
        self.image_shape = (channels, height, width)
        self.hidden = hidden
        self.layers = nn.Sequential(
            nn.Linear(num_classes * dim, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], channels * height * width),
            nn.Sigmoid(),
        )

    def forward(self, capsules: Tensor | Capsules, target: Tensor | None = None) -> Tensor:
        """Mask all but one capsule and decode it."""
        poses, activations = capsules if isinstance(capsules, Capsules) else (capsules, None)
        _checks.check_tensor("ReconstructionDecoder", "poses", poses, "B K D")
        if poses.shape[1:] != (self.num_classes, self.dim):
            raise ValueError(
                f"ReconstructionDecoder: poses must be (B, {self.num_classes}, {self.dim}), "
                f"got {_checks.shape_of(poses)}"
            )
        if target is None:
            activations = capsule_lengths(poses) if activations is None else activations
            target = activations.argmax(dim=1)
        else:
            _checks.check_class_indices(
                "ReconstructionDecoder", target, poses.shape[0], self.num_classes, poses.device
            )
        mask = present_classes(target, self.num_classes, poses.dtype)
        flat = self.layers(rearrange(poses * mask.unsqueeze(-1), "B K D -> B (K D)"))
        channels, height, width = self.image_shape
        return rearrange(flat, "B (C H W) -> B C H W", C=channels, H=height, W=width)

    def extra_repr(self) -> str:
        """Return the arguments that build this layer."""
        return (
            f"num_classes={self.num_classes}, dim={self.dim}, image_shape={self.image_shape}, "
            f"hidden={self.hidden}"
        )
