"""What is measured: the operators, the named shapes and the inputs.

Everything about an operator comes from its row in `tritoncaps.testing.OPERATORS`.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritoncaps import testing

# The operator that matters most: measured first, and at every named shape.
MAIN = "fused_dynamic_routing"
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


class Shape(NamedTuple):
    """The axes of a routing, except the batch: capsules and pose dimension, input and output."""

    I: int
    P: int
    J: int
    D: int

    def __str__(self) -> str:
        return f"{self.I}x{self.P}->{self.J}x{self.D}"


SHAPES = {
    "mnist": Shape(1152, 8, 10, 16),  # the routing of CapsNet, and the first of DeepCapsNet
    "second": Shape(10, 16, 10, 16),  # the second routing of DeepCapsNet
    "cifar": Shape(2048, 8, 10, 16),  # CapsNet on 32×32 images
    "classes100": Shape(1152, 8, 100, 16),
    "classes1000": Shape(1152, 8, 1000, 16),
    "tiny": Shape(5, 3, 2, 4),
    "large": Shape(4608, 8, 32, 16),  # û takes 604 MB at B=64, routing it takes several times that
}


class Layer(NamedTuple):
    """A convolution of capsules: C types on a square grid, a kernel, J output types."""

    grid: int
    C: int
    kernel: int
    stride: int
    J: int


# The convolutions of the two networks of matrix capsules (Hinton, Sabour, Frosst 2018), for images
# of 32×32 pixels, and their last layers, which have one position.
MATRIX_LAYERS = {
    "small-conv1": Layer(14, 8, 3, 2, 16),
    "small-conv2": Layer(6, 16, 3, 1, 16),
    "small-class": Layer(4, 16, 4, 1, 5),
    "big-conv1": Layer(14, 32, 3, 2, 32),
    "big-conv2": Layer(6, 32, 3, 1, 32),
    "big-class": Layer(4, 32, 4, 1, 5),
}
# On a CPU the slowest rival needs 20 times the size of û, and memory may be a few gigabytes.
_CPU_BATCH = {"classes100": 16, "classes1000": 2}
_CUDA_BATCH = {"classes1000": 32}


def operator_names() -> list[str]:
    """Name the operators, the most important first."""
    return sorted(testing.OPERATORS, key=lambda name: name != MAIN)


def batch_size(shape: str, device: torch.device, quick: bool = False) -> int:
    """Choose the batch size for a named shape."""
    if quick:
        return 1 if shape == "classes1000" else 4
    if device.type == "cuda":
        return _CUDA_BATCH.get(shape, 128)
    return _CPU_BATCH.get(shape, 64)


@dataclass(frozen=True)
class Case:
    """One operator at one size and precision.

    Attributes:
        op: its name in the operator table.
        shape: its axes, except the batch.
        B: the batch size.
        iterations: r, for an operator that has iterations. If 0, the usual number of the operator.
        precision: a key of `DTYPES`.
        name: the name of the shape, if it has one.
        chosen: options that differ from the usual ones.
        optional: the optional inputs to give.
        more: the sizes of axes that `Shape` lacks: of grids, kernels and matrix poses.
    """

    op: str
    shape: Shape
    B: int
    iterations: int = 0
    precision: str = "fp32"
    name: str = ""
    chosen: Mapping[str, Any] = field(default_factory=dict, hash=False)
    optional: tuple[str, ...] = ()
    more: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        usual = self.operator.defaults.get("iterations", 0)
        object.__setattr__(self, "iterations", self.iterations or usual)

    def __str__(self) -> str:
        words = [self.op, self.name, f"{self.shape}", f"B={self.B}"]
        words += [f"r={self.iterations}"] if self.iterations else []
        words += [self.precision, *(f"with {name}" for name in self.optional)]
        words += [f"{name}={value}" for name, value in self.chosen.items()]
        return " ".join(word for word in words if word)

    @property
    def operator(self) -> testing.Operator:
        """The row of the operator table."""
        return testing.OPERATORS[self.op]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inputs."""
        return DTYPES[self.precision]

    @property
    def options(self) -> dict[str, Any]:
        """Every argument of a call that is not a tensor."""
        options = self.operator.defaults
        if "iterations" in options:
            options["iterations"] = self.iterations
        return {**options, **self.chosen}

    @property
    def is_sensitive(self) -> bool:
        """Whether two forms may differ in low precision by more than the 2x rule allows."""
        return bool(self.operator.sensitive_names(self.sizes, self.options))

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis. An axis that no named shape has is as small as in the tests."""
        sizes = {**self.operator.small_sizes, **self.shape._asdict(), "B": self.B}
        if self.op == "squash":  # squashes the primary capsules
            sizes |= {"J": self.shape.I, "D": self.shape.P}
        if self.op in ("margin_loss", "spread_loss"):  # K classes
            sizes["K"] = self.shape.J
        return {**sizes, **self.more}

    @property
    def votes(self) -> int:
        """The number of values of the votes, or prediction vectors û, that a routing has per image.

        They have all axes of its tensors, except P, which is summed over. A convolution has votes
        at each of its positions (H', W'), not at each point of its grid (H, W).
        """
        axes: Counter[str] = Counter()
        for of in (*self.operator.axes.values(), *self.operator.outputs.values()):
            axes |= Counter(of.split())  # a kernel has axis K twice
        positions = {
            axis: size(self.sizes, self.options) for axis, size in self.operator.sizes.items()
        }
        sizes = {**self.sizes, **positions}
        left_out = {"B", "P", *(axis.removesuffix("'") for axis in positions)}
        return math.prod(sizes[axis] ** n for axis, n in axes.items() if axis not in left_out)

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each input that is given."""
        left_out = set(self.operator.optional) - set(self.optional)
        return {
            name: tuple(self.sizes[axis] for axis in axes.split())
            for name, axes in self.operator.axes.items()
            if name not in left_out
        }

    @property
    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each requested output."""
        return self.operator.result_shapes(self.sizes, self.options)

    @property
    def shared(self) -> set[str]:
        """The inputs that all images of a batch share, such as the weight."""
        return {name for name, axes in self.operator.axes.items() if "B" not in axes.split()}

    def arguments(self, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """Draw the tensors of a call by name.

        Prediction vectors are scaled so that couplings are far from uniform, but not saturated.
        """
        I, _, J, D = self.shape
        if "pose" in self.input_shapes:  # its length is about √D, so logits are about 2
            scale = 2 / math.sqrt(D)
        else:  # the second term matters with hundreds of classes, whose poses start out short
            scale = max(0.7, J / (4 * math.sqrt(I * D)))
        return testing.draw_inputs(
            self.operator,
            self.sizes,
            dtype=self.dtype,
            device=device,
            seed=seed,
            scale=scale,
            optional=self.optional,
        )

    def output_gradients(self, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """Draw the gradients that a backward starts from, by the name of the output."""
        return {
            name: testing.normal(*shape, seed=seed + 1_000_003).to(device, self.dtype)
            for name, shape in self.output_shapes.items()
        }


def matrix_case(name: str, B: int, iterations: int, competition: str = "children") -> Case:
    """The EM routing of a layer of `MATRIX_LAYERS`."""
    grid, C, kernel, stride, J = MATRIX_LAYERS[name]
    shape, poses = Shape(kernel**2 * C, 4, J, 16), {"R": 4, "Q": 4}
    if kernel == grid:
        return Case("em_routing", shape, B, iterations, name=name, more=poses)
    return Case(
        *("conv_em_routing", shape, B, iterations),
        name=name,
        chosen={"stride": stride, "competition": competition},
        more={**poses, "H": grid, "W": grid, "C": C, "K": kernel},
    )


def folded_case(name: str, B: int, iterations: int) -> Case:
    """The EM routing of such a layer with its positions folded into the batch."""
    case = matrix_case(name, B, iterations)
    rows = math.prod(next(iter(case.output_shapes.values()))[:-3])
    more = {axis: case.more[axis] for axis in "RQ"}
    return Case("em_routing", case.shape, rows, iterations, name=name, more=more)


def conv_case(B: int) -> Case:
    """A convolution with routing by agreement, of the size of CIFAR-10's networks."""
    return Case(
        *("conv_dynamic_routing", Shape(288, 8, 32, 8), B),
        name="conv",
        chosen={"stride": 2},
        more={"H": 16, "W": 16, "C": 32, "K": 3},
    )


def train_images(B: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw a batch of the size of MNIST: images in [0, 1], (B, 1, 28, 28), and classes, (B,)."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.rand((B, 1, 28, 28), generator=generator, device=device)
    return images, torch.randint(10, (B,), generator=generator, device=device)
