"""The least that a computation must move and compute, and how fast the machine does either."""

from dataclasses import dataclass

import torch

from benchmarks.cases import DTYPES, Case
from benchmarks.timing import Clock, Task, time_alternately


@dataclass(frozen=True)
class Floor:
    """Compulsory work: each input read once, each result written once, no û unless it is asked for.

    Attributes:
        bytes: moved to and from memory.
        flops: additions and multiplications, without softmax and squash.
    """

    bytes: int
    flops: int

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches: a large copy, and large products by precision."""

    copy_bytes_per_second: float
    gemm_flops_per_second: dict[str, float]

    def seconds(self, floor: Floor, precision: str) -> float:
        """How long the compulsory work takes at these rates, moved and computed at once."""
        flops_per_second = self.gemm_flops_per_second[precision]
        return max(floor.bytes / self.copy_bytes_per_second, floor.flops / flops_per_second)


def floor(case: Case, phase: str) -> Floor:
    """Count the compulsory work of a phase: "forward", "backward" or "both"."""
    if phase == "both":
        return floor(case, "forward") + floor(case, "backward")
    (I, P, J, D), B, r = case.shape, case.B, case.iterations
    u, weight, u_hat, v = B * I * P, I * P * J * D, B * I * J * D, B * J * D
    project = 2 * B * I * P * J * D  # û = W u, and as much for du or dW
    agree = 2 * u_hat  # û·V, and as much for a sum of û or for dû
    forward = {
        "squash": (2 * u, 0),
        "margin_loss": (B * J, 0),
        "prediction_vectors": (u + weight + u_hat, project),
        "dynamic_routing": (u_hat + v, (2 * r - 1) * agree),
        # û is computed anew in each iteration, the sum of the first is part of that product.
        "fused_dynamic_routing": (u + weight + v, r * project + 2 * (r - 1) * agree),
    }
    backward = {
        "squash": (3 * u, 0),
        "margin_loss": (2 * B * J, 0),
        "prediction_vectors": (u_hat + 2 * (u + weight), 2 * project),
        # Each iteration but the first: û·V, û·ds, Σ db û; and dû has 2r − 1 terms.
        "dynamic_routing": (2 * u_hat + v, (3 * (r - 1) + 2 * r - 1) * agree),
        # û once for each of these iterations and once for dû, then du and dW.
        "fused_dynamic_routing": (
            2 * (u + weight) + v,
            (r + 2) * project + (3 * (r - 1) + 2 * r - 1) * agree,
        ),
    }
    elements, flops = (forward if phase == "forward" else backward)[case.op]
    return Floor(elements * case.dtype.itemsize, flops)


def measure_ceilings(device: torch.device, clock: Clock, precisions: list[str]) -> Ceilings:
    """Measure a copy far larger than any cache, and square products."""
    cuda = device.type == "cuda"
    source = torch.zeros((1 << 30) if cuda else (1 << 26), device=device)  # 4 GiB, 256 MiB
    destination = torch.empty_like(source)
    n = 8192 if cuda else 1536
    random = torch.randn(n, n, device=device)
    matrices = {precision: random.to(DTYPES[precision]) for precision in precisions}

    def product(precision: str) -> Task:
        return Task(lambda _: matrices[precision] @ matrices[precision])

    tasks = {"copy": Task(lambda _: destination.copy_(source))}
    tasks |= {precision: product(precision) for precision in precisions}
    timings = time_alternately(tasks, clock, rounds=(5, 20), seconds=1.0)
    return Ceilings(
        2 * source.nbytes / timings["copy"].median,
        {precision: 2 * n**3 / timings[precision].median for precision in precisions},
    )
