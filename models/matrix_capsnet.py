"""MatrixCapsNet: four layers of matrix capsules, with EM routing.

Hinton, Sabour, Frosst: Matrix Capsules with EM Routing (2018). For smallNORB (two channels, 32×32,
five classes) it has 68,754 parameters, and the large one 317,194.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tritoncaps import ops
from tritoncaps._checks import check_choice, check_flag, check_size, shown
from tritoncaps._tracing import concrete
from tritoncaps.layers import ClassMatrixCapsules, ConvMatrixCapsules, PrimaryMatrixCapsules
from tritoncaps.layers._convolution import ReluConv2d
from tritoncaps.layers.matrix import Scale, check_options
from tritoncaps.models._mixin import PretrainedMixin
from tritoncaps.models._parts import CapsuleOutput, check_images, check_sides, image_sides

# Maps of the convolution, A, and types of the primary and both convolutional capsules, B, C and D.
_SIZES = {"small": (64, 8, 16, 16), "big": (32, 32, 32, 32)}


class MatrixCapsNet(PretrainedMixin, nn.Module):
    """The network of Hinton 2018, for images of any size.

    A convolution, 5×5 with stride 2; primary capsules; convolutional capsules, 3×3 with stride 2
    and then 1; class capsules with coordinate addition. It is trained with the cross entropy of
    `logits`, or with the spread loss of `activations`. It has no decoder.

    Args:
        num_classes: class capsules, K.
        in_channels: channels of the images.
        image_size: side of square images, or (height, width). At least 17.
        iterations: M-steps of each routing. Two train best; see docs/matrix-capsules.md.
        size: "small" or "big", the two networks of the paper.
        channels: maps of the convolution, and types of the primary and both convolutional
            capsules, (A, B, C, D), in place of `size`.
        whiten: subtract the mean of each image and divide by its standard deviation first, over all
            its channels. The paper does this for smallNORB.
        competition: of the convolutional routings.
        scale, temperature, min_variance, identity, noise, beta_u, beta_a, gradient: of all
            routings. See `tritoncaps.layers.ConvMatrixCapsules`.
        class_options: options of the class capsules that differ from those of the other routings,
            such as ``{"temperature": 0.1}``, or ``{"coordinates": False}``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range, or the images are too small
            for the convolutions. In `forward`, the images have the wrong type or shape.

    Example:
        >>> import torch
        >>> model = MatrixCapsNet(num_classes=5, in_channels=2, image_size=32)
        >>> sum(p.numel() for p in model.parameters())
        68754
        >>> output = model(torch.rand(2, 2, 32, 32))
        >>> output.logits.shape, output.poses.shape
        (torch.Size([2, 5]), torch.Size([2, 5, 16]))
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        *,
        iterations: int = 2,
        size: Literal["small", "big"] = "small",
        channels: tuple[int, int, int, int] | None = None,
        whiten: bool = False,
        competition: ops.Competition = "children",
        scale: Scale = "mean",
        temperature: float | Sequence[float] | None = None,
        min_variance: float = 1e-4,
        identity: float = 1.0,
        noise: float = 0.1,
        beta_u: float = 0.0,
        beta_a: float = 0.0,
        gradient: ops.Gradient = "full",
        class_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_size(name, "num_classes", num_classes)
        check_size(name, "in_channels", in_channels)
        check_choice(name, "size", size, ("small", "big"))
        channels = _SIZES[size] if channels is None else channels
        if not isinstance(channels, (tuple, list)) or len(channels) != 4:
            raise TypeError(f"{name}: channels must be four ints, got {shown(channels)}")
        for count in channels:
            check_size(name, "channels", count)
        if class_options is not None and not isinstance(class_options, dict):
            raise TypeError(
                f"{name}: class_options must be a dict or None, got {type(class_options).__name__}"
            )
        sides = image_sides(name, image_size)
        check_sides(name, sides, smallest=17)
        self.image_shape = (in_channels, *sides)
        maps, primary, first, second = channels
        shared: dict[str, Any] = {
            "iterations": iterations,
            "scale": scale,
            "temperature": temperature,
            "min_variance": min_variance,
            "identity": identity,
            "noise": noise,
            "beta_u": beta_u,
            "beta_a": beta_a,
            "gradient": gradient,
        }
        check_choice(name, "competition", competition, ("children", "position"))
        check_options(name, **shared)
        for option in class_options or {}:
            if option not in (*shared, "coordinates"):
                known = ", ".join([*shared, "coordinates"])
                raise ValueError(f"{name}: class_options has {option!r}, but takes only {known}")
        check_flag(name, "whiten", whiten)
        self.whiten = whiten
        self.features = nn.Sequential(
            ReluConv2d(in_channels, maps, kernel_size=5, stride=2), nn.ReLU()
        )
        self.primary = PrimaryMatrixCapsules(maps, primary)
        self.capsules = nn.ModuleList(
            [
                ConvMatrixCapsules(primary, first, 3, 2, competition=competition, **shared),
                ConvMatrixCapsules(first, second, 3, 1, competition=competition, **shared),
            ]
        )
        self.classes = ClassMatrixCapsules(
            second, num_classes, **{**shared, **(class_options or {})}
        )

    def forward(
        self,
        images: Tensor,
        target: Tensor | None = None,
        *,
        iterations: int | None = None,
        return_coupling: bool = False,
    ) -> CapsuleOutput:
        """Classify.

        Args:
            images: shape (B, C, H, W), values in [0, 1].
            target: not used. The models with a decoder decode it.
            iterations: M-steps of each routing in this call, instead of the model's own.
            return_coupling: also return how much of each input goes to each output in the last
                iteration, one tensor for each routing. Those of the convolutional routings are
                (B, H', W', 3, 3, C, J): the output position, the place in its window, the input
                type and the output type. That of the class capsules is (B, H, W, C, K).
        """
        iterations = concrete("iterations", iterations, None)
        return_coupling = concrete("return_coupling", return_coupling, False)
        check_images(type(self).__name__, images, self.image_shape, self.features[0])
        if self.whiten:
            images = F.layer_norm(images, self.image_shape)
        grid = self.primary(self.features(images))
        couplings = []
        for layer in self.capsules:
            routed = layer(grid, iterations=iterations, return_assignment=return_coupling)
            grid, coupling = routed if return_coupling else (routed, None)
            couplings.append(coupling)
        classes = self.classes(grid, iterations=iterations, return_assignment=return_coupling)
        coupling = (*couplings, classes.assignment) if return_coupling else None
        poses = classes.poses.flatten(2)
        return CapsuleOutput(classes.activations, poses, None, classes.logits, coupling)
