"""What is measured: the operators, the named shapes and the inputs they are measured on."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tritoncaps import reference

OPS = ("fused_dynamic_routing", "dynamic_routing", "prediction_vectors", "squash", "margin_loss")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


class Shape(NamedTuple):
    """Axes of a routing without the batch: input capsules and pose, output capsules and pose."""

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
    "large": Shape(4608, 8, 32, 16),  # û takes 604 MB at B=64, and much more to route
}
# On a CPU, where the slowest rival needs 20 times û and the machine has a few gigabytes.
_CPU_BATCH = {"classes100": 16, "classes1000": 2}
_CUDA_BATCH = {"classes1000": 32}


def batch_size(shape: str, device: torch.device, quick: bool = False) -> int:
    """Choose the batch that a named shape is measured with."""
    if quick:
        return 1 if shape == "classes1000" else 4
    if device.type == "cuda":
        return _CUDA_BATCH.get(shape, 128)
    return _CPU_BATCH.get(shape, 64)


@dataclass(frozen=True)
class Case:
    """One operator at one size and precision."""

    op: str
    shape: Shape
    B: int
    iterations: int = 3
    precision: str = "fp32"
    name: str = ""  # of the shape, where it has one
    gradient: str = "full"
    with_prior: bool = False

    def __str__(self) -> str:
        name = f"{self.name} " if self.name else ""
        r = f" r={self.iterations}" if "routing" in self.op else ""
        extra = " with prior" if self.with_prior else ""
        extra += "" if self.gradient == "full" else f" gradient={self.gradient}"
        return f"{self.op} {name}{self.shape} B={self.B}{r} {self.precision}{extra}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inputs."""
        return DTYPES[self.precision]

    @property
    def options(self) -> dict[str, object]:
        """The keyword arguments that are not tensors."""
        if "routing" in self.op:
            return {"iterations": self.iterations, "gradient": self.gradient}
        # One loss an image, so that the batch can be cut.
        return {"reduction": "none"} if self.op == "margin_loss" else {}

    def arguments(self, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """Draw the tensors of a call, by argument name.

        Poses have lengths between 0 and 1, and the weight is scaled as `RoutedCapsules` does it,
        so that the couplings of the later iterations are far from uniform, but not saturated.
        """
        I, P, J, D = self.shape
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        if self.op == "squash":
            return {"s": normal(self.B, I, P).to(self.dtype)}
        if self.op == "margin_loss":
            activations = reference.squash(normal(self.B, J, D)).norm(dim=-1)
            target = torch.randint(J, (self.B,), generator=generator, device=device)
            return {"activations": activations.to(self.dtype), "target": target}
        u = reference.squash(normal(self.B, I, P))
        weight = normal(I, P, J, D).mul_(J / (I * D) ** 0.5)
        if self.op == "dynamic_routing":
            arguments = {"u_hat": reference.prediction_vectors(u, weight)}
        else:
            arguments = {"u": u, "weight": weight}
        if self.with_prior:
            arguments["prior"] = normal(I, J)
        return {name: tensor.to(self.dtype) for name, tensor in arguments.items()}

    def output_gradient(self, device: torch.device, seed: int = 0) -> Tensor:
        """Draw the gradient that a backward starts from."""
        I, P, J, D = self.shape
        size = {
            "squash": (self.B, I, P),
            "prediction_vectors": (self.B, I, J, D),
            "margin_loss": (self.B,),
        }.get(self.op, (self.B, J, D))
        generator = torch.Generator(device).manual_seed(seed + 1_000_003)
        return torch.randn(size, generator=generator, device=device).to(self.dtype)


# The arguments that all images of a batch share.
SHARED = ("weight", "prior")


def train_images(B: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw a batch of MNIST's size: images in [0, 1], (B, 1, 28, 28), and their classes, (B,)."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.rand((B, 1, 28, 28), generator=generator, device=device)
    return images, torch.randint(10, (B,), generator=generator, device=device)
