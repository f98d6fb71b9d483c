"""Part capsules: an encoder finds them in an image, and templates draw the image from them.

Axes: B batch, I parts, C channels. These are the lower half of a stacked capsule autoencoder.
`objects` has the upper half.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import _register_namedtuple

from tritoncaps import _checks
from tritoncaps.layers._convolution import LinearConv2d, ReluConv2d
from tritoncaps.layers._noise import NoisyPresence
from tritoncaps.layers._poses import affine_pose, inverse


class Parts(NamedTuple):
    """The parts of an image.

    `poses` (B, I, 2, 3): affine maps from the template of each part to the image.
    `presence` (B, I): how present each part is, in [0, 1].
    `features` (B, I, F): what else the encoder says of each part.
    """

    poses: Tensor
    presence: Tensor
    features: Tensor


class DrawnParts(NamedTuple):
    """The mixture that describes each pixel: I templates, and the background last.

    `means` (B, I + 1, C, H, W): the value of each component at each pixel.
    `log_weights` (B, I + 1, 1, H, W): the logarithms of their weights, which sum to 1 over I + 1.
    """

    means: Tensor
    log_weights: Tensor

    def log_prob(self, images: Tensor, scale: float = 1.0) -> Tensor:
        """Sum log Σ_i w_i N(x; mean_i, scale²) over the pixels and channels of each image, (B,).

        Args:
            images: shape (B, C, H, W).
            scale: standard deviation of a pixel, from 1e-6 to 1e6.

        Raises:
            TypeError, ValueError: the images are not a floating-point tensor of the shape of what
                was drawn, or the scale is out of range.
        """
        name = "DrawnParts.log_prob"
        axes = {"images": "B C H W", "means": "B I C H W"}
        _checks.check_inputs(name, axes, images=images, means=self.means)
        check_pixel_scale(name, "scale", scale)
        distances = (images.unsqueeze(1) - self.means).square()
        log_densities = torch.add(self.log_weights, distances, alpha=-0.5 / scale**2)
        log_mixture = log_densities.logsumexp(dim=1)
        constant = math.log(scale) + math.log(2 * math.pi) / 2
        return (log_mixture - constant).sum(dim=(1, 2, 3))

    def mean(self) -> Tensor:
        """Return the mean of the mixture, (B, C, H, W): the reconstruction."""
        return (self.log_weights.exp() * self.means).sum(dim=1)


# torch.export writes a module's outputs by the names of their types.
_register_namedtuple(Parts, serialized_type_name="tritoncaps.Parts")
_register_namedtuple(DrawnParts, serialized_type_name="tritoncaps.DrawnParts")


def check_pixel_scale(function: str, name: str, scale: Any) -> None:
    """A standard deviation of pixels, whose inverse square is a number in float32."""
    _checks.check_positive(function, name, scale)
    if not 1e-6 <= scale <= 1e6:
        raise ValueError(f"{function}: {name} must be from 1e-6 to 1e6, got {scale}")


class _Readout(LinearConv2d):
    """Numbers that start small. At full scale, many translations start where tanh is flat."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.weight.mul_(0.1)


class PartEncoder(NoisyPresence):
    """Find a given number of parts in an image (Kosiorek 2019, section 2.2).

    Convolutions of 3×3 without padding, with a ReLU each; a learned bias for each position; a 1×1
    convolution with 6 + F + 1 maps for each part and one map more for its attention. The attention
    is a softmax over the positions. It pools the other maps of its part to the six numbers of the
    pose, see `affine_pose`, F features, and the logit of the presence.

    Args:
        in_channels: channels of the images.
        image_size: (height, width).
        parts: parts of an image, I.
        features: components that describe a part beside its pose, F. May be 0.
        channels: maps of each convolution.
        strides: of each convolution.
        noise: in training, a uniform number in ±noise is added to the logits of the presences.
        noisy_evaluation: add the noise in evaluation too, as the authors' code does.
        device, dtype: of the parameters.

    Shapes: images (B, in_channels, height, width) → `Parts`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range, or the images are too small
            for the convolutions. In `forward`, the images have the wrong type or shape.

    Example:
        >>> import torch
        >>> encoder = PartEncoder(1, (40, 40), parts=24)
        >>> poses, presence, features = encoder(torch.rand(2, 1, 40, 40))
        >>> poses.shape, presence.shape, features.shape
        (torch.Size([2, 24, 2, 3]), torch.Size([2, 24]), torch.Size([2, 24, 16]))
    """

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        parts: int,
        *,
        features: int = 16,
        channels: Sequence[int] = (128, 128, 128, 128),
        strides: Sequence[int] = (2, 2, 1, 1),
        noise: float = 2.0,
        noisy_evaluation: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(noise, noisy_evaluation)
        name = type(self).__name__
        _checks.check_size(name, "in_channels", in_channels)
        _checks.check_pair(name, "image_size", image_size, "(height, width)")
        _checks.check_size(name, "parts", parts)
        _checks.check_size(name, "features", features, 0)
        for argument, sizes in (("channels", channels), ("strides", strides)):
            if not isinstance(sizes, (tuple, list)) or not sizes:
                raise TypeError(
                    f"{name}: {argument} must be a tuple of ints, got {_checks.shown(sizes)}"
                )
            for size in sizes:
                _checks.check_size(name, argument, size)
        if len(channels) != len(strides):
            raise ValueError(
                f"{name}: channels and strides must have the same length, got {len(channels)} and "
                f"{len(strides)}"
            )
        self.image_shape = (in_channels, *image_size)
        self.parts, self.features = parts, features
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        before, sides = in_channels, list(image_size)
        for after, stride in zip(channels, strides, strict=True):
            layers += [ReluConv2d(before, after, 3, stride, **options), nn.ReLU()]
            before, sides = after, [(side - 3) // stride + 1 for side in sides]
            if min(sides) < 1:
                raise ValueError(
                    f"{name}: image_size={tuple(image_size)} is too small for {len(channels)} "
                    f"convolutions with strides={tuple(strides)}; enlarge or pad the images"
                )
        self.convolutions = nn.Sequential(*layers)
        self.position_bias = nn.Parameter(torch.empty(before, *sides, **options))
        self.readout = _Readout(before, parts * (6 + features + 2), 1, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the bias of the positions to 0."""
        nn.init.zeros_(self.position_bias)

    def forward(self, images: Tensor) -> Parts:
        """Encode."""
        name = type(self).__name__
        _checks.check_floating(name, "images", images)
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"{name}: images must be (B, {', '.join(map(str, self.image_shape))}), "
                f"got {_checks.shape_of(images)}"
            )
        _checks.check_layer_dtype(name, "images", images, self.readout)
        maps = self.readout(self.convolutions(images) + self.position_bias)
        maps = maps.flatten(2).unflatten(1, (self.parts, -1))  # (B, I, 6 + F + 2, H'·W')
        attention = maps[:, :, -1:].softmax(dim=3)
        pooled = (maps[:, :, :-1] * attention).sum(dim=3)
        pose, features, logit = pooled.split([6, self.features, 1], dim=2)
        presence = self.noisy(logit.squeeze(2)).sigmoid()
        return Parts(affine_pose(pose), presence, features)

    def extra_repr(self) -> str:
        """Return the arguments that are not those of a module inside."""
        return f"parts={self.parts}, features={self.features}, noise={self.noise}"


def _grid(poses: Tensor, sides: tuple[int, int]) -> Tensor:
    """Where each pixel of an image lies on the template that a pose (B, 2, 3) puts there.

    Both are points of the square from −1 to 1; the result is (B, H, W, 2). The map is affine, so it
    is the sum of one part for each column and one for each row.
    """
    y, x = (torch.linspace(-1, 1, side, dtype=poses.dtype, device=poses.device) for side in sides)
    by_x, by_y, shift = inverse(poses).unsqueeze(1).unbind(3)  # (B, 1, 2) each
    columns, rows = by_x * x[:, None], by_y * y[:, None] + shift
    return columns.unsqueeze(1) + rows.unsqueeze(2)


class TemplateDecoder(nn.Module):
    """Draw an image from the poses of its parts, with a learned template for each part.

    A template has a colour and an opacity, both learned, at each of its pixels. The pose puts it on
    the image, by bilinear interpolation, and it is black and has opacity 0 outside. Each pixel of
    the image is a mixture of the templates and a background, with the weights

        softmax over i of opacity_i + log presence_i

    and a Gaussian around each colour (Kosiorek 2019, section 2.2), as wide as
    `DrawnParts.log_prob` is told. Features of a part may scale the colours of its template.

    Args:
        channels: of the image, C.
        image_size: (height, width).
        parts: templates, I.
        template_size: (height, width) of a template.
        features: components that describe a part, F, see `PartEncoder`. With 0, a template has the
            same colours in every image.
        hidden: width of the perceptron from the features to the colours.
        device, dtype: of the parameters.

    Shapes: poses (B, I, 2, 3), presence (B, I) in [0, 1], and features (B, I, F) unless F = 0 →
    `DrawnParts`, whose `log_prob` is the likelihood of images.

    A pose maps the square from −1 to 1, whose corners are the middles of the corner pixels of the
    template, to the same square of the image. Its determinant must not be 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range. In `forward`, a tensor has
            the wrong type or shape.

    Example:
        >>> import torch
        >>> decoder = TemplateDecoder(1, (40, 40), parts=24, features=0)
        >>> poses = torch.eye(2, 3).expand(2, 24, 2, 3)
        >>> drawn = decoder(poses, torch.ones(2, 24))
        >>> drawn.mean().shape, drawn.log_prob(torch.rand(2, 1, 40, 40)).shape
        (torch.Size([2, 1, 40, 40]), torch.Size([2]))
    """

    def __init__(
        self,
        channels: int,
        image_size: tuple[int, int],
        parts: int,
        template_size: tuple[int, int] = (11, 11),
        *,
        features: int = 16,
        hidden: int = 32,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        _checks.check_size(name, "channels", channels)
        _checks.check_size(name, "parts", parts)
        _checks.check_pair(name, "image_size", image_size, "(height, width)")
        _checks.check_pair(name, "template_size", template_size, "(height, width)")
        _checks.check_size(name, "features", features, 0)
        _checks.check_size(name, "hidden", hidden)
        self.channels, self.parts = channels, parts
        self.image_size = (image_size[0], image_size[1])
        self.features = features
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.template_logits = nn.Parameter(torch.empty(parts, channels, *template_size, **options))
        self.opacity = nn.Parameter(torch.empty(parts, 1, *template_size, **options))
        self.background = nn.Parameter(torch.empty(channels, **options))
        self.background_opacity = nn.Parameter(torch.empty((), **options))
        self.colour = None
        if features:
            self.colour = nn.Sequential(
                nn.Linear(features, hidden, **options),
                nn.ReLU(),
                nn.Linear(hidden, channels, **options),
                nn.Sigmoid(),
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw orthogonal templates, scaled to [0, 1] before the sigmoid, and set the rest to 0."""
        nn.init.orthogonal_(self.template_logits)
        with torch.no_grad():
            low, high = self.template_logits.aminmax()
            # One template of one pixel has no range.
            self.template_logits.sub_(low).div_((high - low).clamp(min=1e-6))
        for parameter in (self.opacity, self.background, self.background_opacity):
            nn.init.zeros_(parameter)

    @property
    def templates(self) -> Tensor:
        """The templates without the colours of an image, (I, C, h, w), in [0, 1]."""
        return self.template_logits.sigmoid()

    def colours(self, features: Tensor | None) -> Tensor | None:
        """Return what multiplies the templates of each image, (B, I, C), or None for nothing."""
        name = type(self).__name__
        if self.colour is None:
            if features is not None:
                raise ValueError(f"{name}: features must be None, for the decoder has features=0")
            return None
        if features is None:
            raise ValueError(
                f"{name}: features must be (B, {self.parts}, {self.features}), got None"
            )
        _checks.check_tensor(name, "features", features, "B I F")
        if features.shape[1:] != (self.parts, self.features):
            raise ValueError(
                f"{name}: features must be (B, {self.parts}, {self.features}), "
                f"got {_checks.shape_of(features)}"
            )
        _checks.check_layer_dtype(name, "features", features, self.colour[0])
        colours: Tensor = self.colour(features)
        return colours

    def forward(
        self, poses: Tensor, presence: Tensor, features: Tensor | None = None
    ) -> DrawnParts:
        """Draw."""
        name = type(self).__name__
        axes = {"poses": "B I R C", "presence": "B I", "features?": "B I F"}
        _checks.check_inputs(name, axes, poses=poses, presence=presence, features=features)
        _checks.check_same_kind(name, [("poses", poses), ("opacity", self.opacity)])
        if poses.shape[1:] != (self.parts, 2, 3):
            raise ValueError(
                f"{name}: poses must be (B, {self.parts}, 2, 3), got {_checks.shape_of(poses)}"
            )
        colours = self.colours(features)
        B, sides = poses.shape[0], self.image_size
        # Both are warped at once. Outside of a template, they are 0.
        both = torch.cat([self.templates, self.opacity], dim=1)
        grid = _grid(poses.flatten(0, 1), sides)
        stacked = both.expand(B, *both.shape).flatten(0, 1)
        warped = F.grid_sample(stacked, grid, align_corners=True).unflatten(0, (B, self.parts))
        values, opacity = warped.split([self.channels, 1], dim=2)
        if colours is not None:
            values = values * colours[..., None, None]
        background = self.background.sigmoid()[:, None, None].expand(B, 1, -1, *sides)
        tiny = torch.finfo(presence.dtype).tiny
        opacity = opacity + presence.clamp(min=tiny).log()[..., None, None, None]
        rest = F.softplus(self.background_opacity).expand(B, 1, 1, *sides)
        return DrawnParts(
            torch.cat([values, background], dim=1),
            torch.cat([opacity, rest], dim=1).log_softmax(dim=1),
        )

    def extra_repr(self) -> str:
        """Return the sizes."""
        template = tuple(self.opacity.shape[2:])
        return (
            f"channels={self.channels}, image_size={self.image_size}, parts={self.parts}, "
            f"template_size={template}, features={self.features}"
        )
