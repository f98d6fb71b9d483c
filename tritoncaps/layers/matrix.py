"""Matrix capsules: each has a matrix as its pose and a separate activation. EM routes them.

These layers exchange grids of capsules, as `Capsules` with poses (B, H, W, C, R, P) and activations
(B, H, W, C). A position has C types of capsules, and a pose has R rows and P columns.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from tritoncaps import _checks, _patches, ops
from tritoncaps._tracing import concrete, is_proxy, one_node
from tritoncaps.layers._convolution import LinearConv2d
from tritoncaps.layers.capsules import Capsules

Scale = Literal["mean", "sum"]


class PrimaryMatrixCapsules(nn.Module):
    """Turn feature maps into matrix capsules with one convolution (Hinton 2018, section 4).

    Each capsule takes R·P channels for its pose, and one channel, with a sigmoid, for its
    activation.

    Args:
        in_channels: channels of the feature maps.
        capsule_types: capsules at each position, C.
        pose: rows and columns of a pose, (R, P).
        kernel_size, stride, padding: of the convolution, one int each. The paper's kernel is 1×1.
        device, dtype: of the parameters.

    Shapes: (B, in_channels, H, W) → `Capsules` with poses (B, H', W', C, R, P) and activations
    (B, H', W', C).

    Raises:
        TypeError, ValueError: an argument has the wrong type or range. In `forward`, the features
            have the wrong type or shape, or are smaller than the kernel.

    Example:
        >>> import torch
        >>> primary = PrimaryMatrixCapsules(64, capsule_types=8)
        >>> poses, activations = primary(torch.rand(2, 64, 14, 14))
        >>> poses.shape, activations.shape
        (torch.Size([2, 14, 14, 8, 4, 4]), torch.Size([2, 14, 14, 8]))
    """

    def __init__(
        self,
        in_channels: int,
        capsule_types: int = 8,
        pose: tuple[int, int] = (4, 4),
        *,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "PrimaryMatrixCapsules"
        _checks.check_size(name, "in_channels", in_channels)
        _checks.check_size(name, "capsule_types", capsule_types)
        _checks.check_pair(name, "pose", pose, "two ints")
        _checks.check_size(name, "kernel_size", kernel_size)
        _patches.check_convolution(name, stride, padding)
        self.in_channels = in_channels
        self.capsule_types = capsule_types
        self.pose = pose
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        channels = capsule_types * (math.prod(pose) + 1)
        self.conv = LinearConv2d(
            in_channels, channels, kernel_size, stride, padding, device=device, dtype=dtype
        )

    def reset_parameters(self) -> None:
        """Draw kernels that keep the scale of the features (gain 1)."""
        self.conv.reset_parameters()

    def forward(self, features: Tensor) -> Capsules:
        """Convolve, and split the channels into poses and activations."""
        if not is_proxy(features):
            _checks.check_floating("PrimaryMatrixCapsules", "features", features)
            if features.ndim != 4 or features.shape[1] != self.in_channels:
                raise ValueError(
                    f"PrimaryMatrixCapsules: features must be (B, {self.in_channels}, H, W), "
                    f"got {_checks.shape_of(features)}"
                )
            _checks.check_not_empty("PrimaryMatrixCapsules", "features", features, "B C H W")
            _checks.check_layer_dtype("PrimaryMatrixCapsules", "features", features, self.conv)
            _patches.output_size(
                "PrimaryMatrixCapsules",
                features.shape[2:],
                self.kernel_size,
                self.stride,
                self.padding,
            )
        maps = self.conv(features).permute(0, 2, 3, 1)
        count = self.capsule_types
        poses = maps[..., count:].unflatten(3, (count, *self.pose))
        return Capsules(poses, maps[..., :count].sigmoid())

    def extra_repr(self) -> str:
        """Return the arguments that build this layer."""
        return (
            f"in_channels={self.in_channels}, capsule_types={self.capsule_types}, "
            f"pose={self.pose}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}"
        )


class _MatrixCapsules(nn.Module):
    """What both routed layers share: their parameters, and the checks of a call."""

    def __init__(
        self,
        kernel: tuple[int, ...],
        in_types: int,
        out_types: int,
        iterations: int,
        pose: tuple[int, int],
        scale: Scale,
        temperature: float | Sequence[float] | None,
        min_variance: float,
        identity: float,
        noise: float,
        beta_u: float,
        beta_a: float,
        gradient: ops.Gradient,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        _checks.check_size(name, "in_types", in_types)
        _checks.check_size(name, "out_types", out_types)
        _checks.check_pair(name, "pose", pose, "two ints")
        check_options(
            name, iterations, scale, temperature, min_variance, identity, noise, beta_u, beta_a,
            gradient,
        )  # fmt: skip
        self.in_types = in_types
        self.out_types = out_types
        self.iterations = iterations
        self.pose = pose
        self.scale: Scale = scale
        self.temperature = temperature
        self.min_variance = min_variance
        self.gradient: ops.Gradient = gradient
        self._start = identity, noise, beta_u, beta_a

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        columns = pose[1]
        self.weight = parameter(*kernel, in_types, columns, out_types, columns)
        self.beta_u = parameter(out_types)
        self.beta_a = parameter(out_types)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a weight near the identity, and set both costs to their start.

        The votes of an input capsule are then similar for all outputs, so the first assignments are
        soft. With independent matrices, they are nearly decided before anything is learned. See
        docs/matrix-capsules.md for figures.
        """
        start, noise, beta_u, beta_a = self._start
        with torch.no_grad():
            identity = torch.eye(self.pose[1], device=self.weight.device, dtype=self.weight.dtype)
            nn.init.normal_(self.weight, std=noise).add_(start * identity[:, None])
        nn.init.constant_(self.beta_u, beta_u)
        nn.init.constant_(self.beta_a, beta_a)

    def _options(self, iterations: int | None, return_assignment: bool) -> dict[str, Any]:
        """Return the checked options of a call, and what else its routing needs of the layer."""
        options = {
            "iterations": concrete("iterations", iterations, None),
            "temperature": self.temperature,
            "min_variance": self.min_variance,
            "gradient": self.gradient,
            "return_assignment": concrete("return_assignment", return_assignment, False),
        }
        if options["iterations"] is None:
            options["iterations"] = self.iterations
        _checks.check_em_options(type(self).__name__, **options)
        return {**options, "pose": self.pose, "scale": self.scale}

    def extra_repr(self) -> str:
        """Return the arguments that build this layer."""
        identity, noise, beta_u, beta_a = self._start
        return (
            f"in_types={self.in_types}, out_types={self.out_types}, iterations={self.iterations}, "
            f"pose={self.pose}, scale={self.scale!r}, temperature={self.temperature}, "
            f"min_variance={self.min_variance}, identity={identity}, noise={noise}, "
            f"beta_u={beta_u}, beta_a={beta_a}, "
            f"gradient={self.gradient!r}"
        )


class ConvMatrixCapsules(_MatrixCapsules):
    """Route the matrix capsules of each window of a grid to those at one position (Hinton 2018).

    These are the convolutional capsules of the paper. Each place in the window has one matrix for
    each input type and output type. All positions share these matrices.

    Args:
        in_types, out_types: capsules at each position of the input and of the output, C and J.
        kernel_size, stride, padding: of the windows, one int each. The padding has activation 0.
        iterations: M-steps, at least 1. Two train best; see docs/matrix-capsules.md.
        pose: rows and columns of a pose, (R, P), here and in the output.
        competition: which output capsules compete for an input capsule. "children", as in the
            paper, lets all compete whose windows contain it. "position" lets only those of one
            position compete, which is faster.
        scale: of the logits. "sum" is the formula of the paper. "mean" divides the mass of an
            output capsule by the usual mass, and the sum over the components of a pose by their
            number. The same β_u and β_a then suit layers of any size. The usual mass is for input
            activations of 1. With "children" it is the mean over all outputs. With "position" it is
            that of a window without padding, K·K·C / J.
        temperature: the inverse temperature λ, one number or one for each iteration. By default it
            is t/T in iteration t of T with "mean", and 0.01·(1 − 0.95^t) with "sum".
        min_variance: added to every variance, above 0.
        identity, noise: the initial weight is `identity` times the identity matrix, plus normal
            noise with the standard deviation `noise`.
        beta_u, beta_a: the initial values of both costs. Each output type learns its own.
        gradient: "full" differentiates through all iterations. "last" treats the last assignment as
            a constant.
        device, dtype: of the parameters.

    Shapes: `Capsules` with poses (B, H, W, C, R, P) and activations (B, H, W, C) → the same with
    (B, H', W', J, R, P) and (B, H', W', J). `weight` is (K, K, C, P, J, P).

    Raises:
        TypeError, ValueError: an argument has the wrong type or range. In `forward`, the capsules
            have the wrong type or shape, or the grid is smaller than the kernel.

    Example:
        >>> import torch
        >>> capsules = PrimaryMatrixCapsules(64, 8)(torch.rand(2, 64, 14, 14))
        >>> routing = ConvMatrixCapsules(8, 16, kernel_size=3, stride=2)
        >>> poses, activations = routing(capsules)
        >>> poses.shape, activations.shape
        (torch.Size([2, 6, 6, 16, 4, 4]), torch.Size([2, 6, 6, 16]))
    """

    def __init__(
        self,
        in_types: int,
        out_types: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        iterations: int = 2,
        *,
        pose: tuple[int, int] = (4, 4),
        competition: ops.Competition = "children",
        scale: Scale = "mean",
        temperature: float | Sequence[float] | None = None,
        min_variance: float = 1e-4,
        identity: float = 1.0,
        noise: float = 0.1,
        beta_u: float = 0.0,
        beta_a: float = 0.0,
        gradient: ops.Gradient = "full",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = "ConvMatrixCapsules"
        _checks.check_size(name, "kernel_size", kernel_size)
        _patches.check_convolution(name, stride, padding)
        _checks.check_choice(name, "competition", competition, ("children", "position"))
        super().__init__(
            (kernel_size, kernel_size), in_types, out_types, iterations, pose, scale, temperature,
            min_variance, identity, noise, beta_u, beta_a, gradient, device, dtype,
        )  # fmt: skip
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.competition: ops.Competition = competition

    def forward(
        self,
        capsules: Capsules,
        *,
        iterations: int | None = None,
        return_assignment: bool = False,
    ) -> Capsules | tuple[Capsules, Tensor]:
        """Route a grid of capsules to another.

        Args:
            capsules: poses (B, H, W, C, R, P) and activations (B, H, W, C).
            iterations: used for this call instead of the layer's own number.
            return_assignment: also return how much of each input goes to each output in the last
                iteration, (B, H', W', K, K, C, J).
        """
        _check_capsules("ConvMatrixCapsules", capsules)
        options = self._options(iterations, return_assignment)
        result = _route_windows(
            capsules.poses,
            capsules.activations,
            self.weight,
            self.beta_u,
            self.beta_a,
            stride=self.stride,
            padding=self.padding,
            competition=self.competition,
            **options,
        )
        routed = Capsules(result[0], result[1])
        return (routed, result[2]) if options["return_assignment"] else routed

    def extra_repr(self) -> str:
        """Return the arguments that build this layer."""
        return (
            f"{super().extra_repr()}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, competition={self.competition!r}"
        )


class ClassCapsules(NamedTuple):
    """What `ClassMatrixCapsules` returns.

    `poses` (B, K, R, P), `activations` (B, K), which are the sigmoid of `logits` (B, K), and
    `assignment` (B, H, W, C, K) or None: how much of each input goes to each class.
    """

    poses: Tensor
    activations: Tensor
    logits: Tensor
    assignment: Tensor | None = None


# torch.export writes an output by the name of its type.
_register_namedtuple(ClassCapsules, serialized_type_name="tritoncaps.ClassCapsules")


class ClassMatrixCapsules(_MatrixCapsules):
    """Route all matrix capsules of a grid to one capsule for each class (Hinton 2018, section 4).

    All positions share one matrix for each type and class, so the grid may have any size. A shared
    matrix does not know where a capsule lies. The row and the column of the capsule, scaled to
    0 .. 1, are therefore added to its votes: to the first two rows of the last column. The paper
    calls this coordinate addition.

    Args:
        in_types: capsules at each position, C.
        num_classes: class capsules, K.
        coordinates: add the coordinates to the votes. Poses then need at least two rows.
        iterations, pose, scale, temperature, min_variance, identity, noise, beta_u, beta_a: as in
            `ConvMatrixCapsules`.
        gradient, device, dtype: as in `ConvMatrixCapsules`.

    Shapes: `Capsules` with poses (B, H, W, C, R, P) and activations (B, H, W, C) → `ClassCapsules`.
    `weight` is (C, P, K, P).

    Raises:
        TypeError, ValueError: an argument has the wrong type or range. In `forward`, the capsules
            have the wrong type or shape.

    Example:
        >>> import torch
        >>> grid = Capsules(torch.rand(2, 4, 4, 16, 4, 4), torch.rand(2, 4, 4, 16))
        >>> classes = ClassMatrixCapsules(16, 5)(grid)
        >>> classes.poses.shape, classes.logits.shape
        (torch.Size([2, 5, 4, 4]), torch.Size([2, 5]))
    """

    def __init__(
        self,
        in_types: int,
        num_classes: int,
        iterations: int = 2,
        *,
        coordinates: bool = True,
        pose: tuple[int, int] = (4, 4),
        scale: Scale = "mean",
        temperature: float | Sequence[float] | None = None,
        min_variance: float = 1e-4,
        identity: float = 1.0,
        noise: float = 0.1,
        beta_u: float = 0.0,
        beta_a: float = 0.0,
        gradient: ops.Gradient = "full",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = "ClassMatrixCapsules"
        _checks.check_size(name, "num_classes", num_classes)
        _checks.check_flag(name, "coordinates", coordinates)
        super().__init__(
            (), in_types, num_classes, iterations, pose, scale, temperature,
            min_variance, identity, noise, beta_u, beta_a, gradient, device, dtype,
        )  # fmt: skip
        if coordinates and pose[0] < 2:
            raise ValueError(
                f"{name}: coordinates need poses of at least 2 rows, got pose={pose}; "
                "use coordinates=False"
            )
        self.coordinates = coordinates

    def forward(
        self,
        capsules: Capsules,
        *,
        iterations: int | None = None,
        return_assignment: bool = False,
    ) -> ClassCapsules:
        """Route all capsules of a grid to the classes.

        Args:
            capsules: poses (B, H, W, C, R, P) and activations (B, H, W, C).
            iterations: used for this call instead of the layer's own number.
            return_assignment: also return the assignment of the last iteration.
        """
        _check_capsules("ClassMatrixCapsules", capsules)
        options = self._options(iterations, return_assignment)
        result = _route_grid(
            capsules.poses,
            capsules.activations,
            self.weight,
            self.beta_u,
            self.beta_a,
            coordinates=self.coordinates,
            **options,
        )
        # A tracer's proxy cannot be unpacked.
        assignment = result[3] if options["return_assignment"] else None
        return ClassCapsules(result[0], result[1], result[2], assignment)

    def extra_repr(self) -> str:
        """Return the arguments that build this layer."""
        text = super().extra_repr().replace("out_types", "num_classes")
        return f"{text}, coordinates={self.coordinates}"


def check_options(
    function: str,
    iterations: object,
    scale: object,
    temperature: object,
    min_variance: object,
    identity: object,
    noise: object,
    beta_u: object,
    beta_a: object,
    gradient: object,
) -> None:
    """Raise an error if an option of the routed layers has the wrong type or range."""
    _checks.check_em_options(function, iterations, temperature, min_variance, gradient)
    _checks.check_choice(function, "scale", scale, ("mean", "sum"))
    _checks.check_finite(function, "identity", identity)
    _checks.check_not_negative(function, "noise", noise)
    _checks.check_finite(function, "beta_u", beta_u)
    _checks.check_finite(function, "beta_a", beta_a)


def _check_capsules(layer: str, capsules: object) -> None:
    """Raise TypeError, unless it is `Capsules` or a tracer's proxy."""
    if not isinstance(capsules, Capsules) and not is_proxy(capsules):
        raise TypeError(
            f"{layer}: capsules must be Capsules(poses, activations), got {type(capsules).__name__}"
        )


def _check_grid(
    layer: str, poses: Tensor, activations: Tensor, weight: Tensor, axes: str, pose: tuple[int, int]
) -> None:
    """Raise an error for a grid that does not fit the weight, which has these axes, or the pose."""
    named = {"poses": "B H W C R P", "activations": "B H W C", "weight": axes}
    _checks.check_inputs(layer, named, poses=poses, activations=activations, weight=weight)
    if poses.shape[4] != pose[0]:
        raise ValueError(
            f"{layer}: poses has R={poses.shape[4]} but the layer has pose={pose} "
            f"(poses: {_checks.shape_of(poses)}); build it with the pose of its input"
        )


@one_node
def _route_windows(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    *,
    stride: int,
    padding: int,
    competition: ops.Competition,
    pose: tuple[int, int],
    scale: Scale,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Call `ops.conv_em_routing`, with the scale of a layer."""
    name = "ConvMatrixCapsules"
    _check_grid(name, poses, activations, weight, "K K C P J Q", pose)
    _patches.output_size(name, poses.shape[1:3], len(weight), stride, padding)
    if scale == "mean":
        mass = _usual_mass(activations, weight, stride, padding, competition)
        beta_a = _by_means(beta_a, mass, poses, options)
    result: tuple[Tensor, ...] = ops.conv_em_routing(
        poses,
        activations,
        weight,
        beta_u,
        beta_a,
        stride=stride,
        padding=padding,
        competition=competition,
        **options,
    )
    return result


@one_node
def _route_grid(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    *,
    coordinates: bool,
    pose: tuple[int, int],
    scale: Scale,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Call `ops.em_routing` for all capsules of a grid. Returns the fields of `ClassCapsules`."""
    _check_grid("ClassMatrixCapsules", poses, activations, weight, "C P K Q", pose)
    height, width = poses.shape[1:3]
    offset = _coordinates(poses, weight.shape[3]) if coordinates else None
    if scale == "mean":
        mass = height * width * weight.shape[0] / weight.shape[2]
        beta_a = _by_means(beta_a, mass, poses, options)
    poses, activations, logits, *assignment = ops.em_routing(
        poses.flatten(1, 3),
        activations.flatten(1),
        weight.expand(height * width, *weight.shape).flatten(0, 1),
        beta_u,
        beta_a,
        offset=offset,
        return_logits=True,
        **options,
    )
    grids = [each.unflatten(1, (height, width, -1)) for each in assignment]
    return poses, activations, logits, *grids


def _usual_mass(
    activations: Tensor, weight: Tensor, stride: int, padding: int, competition: str
) -> float:
    """Return the mass of an output of a convolution, if all activations of the grid are 1.

    With "position", an output depends on its window alone. So does this mass, which is that of a
    window without padding. With "children" it is the mean over all outputs.
    """
    K, C, J = weight.shape[1], weight.shape[2], weight.shape[4]
    if competition == "position":
        return K * K * C / J
    mass = C / J
    for size in activations.shape[1:3]:
        starts = range(-padding, size + padding - K + 1, stride)
        # Each input that lies in a window shares itself out once. The padding has nothing to share.
        inputs = {row for start in starts for row in range(start, start + K) if 0 <= row < size}
        mass *= len(inputs) / len(starts)
    return mass or 1.0  # All windows lie in the padding, and no output has any mass.


def _by_means(beta_a: Tensor, mass: float, poses: Tensor, options: dict[str, Any]) -> Tensor:
    """Convert the temperature in `options`, and β_a, from the scale "mean" to "sum".

    λ (β_a − N/M (β_u + 1/(2D) Σ log σ²)) = λ/(M·D) (M·D·β_a − N (D·β_u + ½ Σ log σ²)).
    """
    count, temperature = options["iterations"], options["temperature"]
    if temperature is None:
        temperature = [t / count for t in range(1, count + 1)]
    elif not isinstance(temperature, Sequence):
        temperature = [temperature] * count
    unit = mass * math.prod(poses.shape[-2:])
    options["temperature"] = [each / unit for each in temperature]
    return beta_a * unit


def _coordinates(poses: Tensor, columns: int) -> Tensor:
    """Return the rows and columns of a grid, in 0 .. 1, as offsets of its votes: (I, R, Q)."""
    _, height, width, types, rows, _ = poses.shape
    offset = poses.new_zeros(height, width, types, rows, columns)
    y, x = ((torch.arange(n, device=poses.device) + 0.5) / n for n in (height, width))
    offset[..., 0, -1] = y.to(poses.dtype)[:, None, None]
    offset[..., 1, -1] = x.to(poses.dtype)[None, :, None]
    return offset.flatten(0, 2)
