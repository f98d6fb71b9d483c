"""The least that a computation must move and compute, and how fast the machine does both."""

import math
from dataclasses import dataclass, field

import torch
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import DTYPES, Case
from benchmarks.rivals import flops_formula
from benchmarks.timing import Clock, Task, time_alternately


@dataclass(frozen=True)
class Floor:
    """Compulsory work: each input read once, each result written once, and no û in between.

    Attributes:
        bytes: moved to and from memory.
        flops: operations in products; softmax and squash do not count.
    """

    bytes: int
    flops: int

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Ceilings:
    """The rates that this machine reaches in a large copy, and in large products by precision.

    On a CPU, torch multiplies float32 matrices with MKL, and convolves with oneDNN. Their products
    may differ in speed, so both are here.
    """

    copy_bytes_per_second: float
    gemm_flops_per_second: dict[str, float]
    onednn_flops_per_second: dict[str, float] = field(default_factory=dict)

    def seconds(self, floor: Floor, precision: str) -> float:
        """How long the compulsory work takes at these rates, if moving and computing overlap."""
        rates = (self.gemm_flops_per_second, self.onednn_flops_per_second)
        flops_per_second = max(rate.get(precision, 0.0) for rate in rates)
        return max(floor.bytes / self.copy_bytes_per_second, floor.flops / flops_per_second)


def floor(case: Case, phase: str) -> Floor:
    """Count the compulsory work of a phase: "forward", "backward" or "both"."""
    if phase == "both":
        return floor(case, "forward") + floor(case, "backward")
    inputs = sum(map(math.prod, case.input_shapes.values()))
    outputs = sum(map(math.prod, case.output_shapes.values()))
    # The backward reads inputs and gradients of outputs, and writes gradients of inputs.
    elements = (inputs if phase == "forward" else 2 * inputs) + outputs
    flops = flops_formula(case.op) or counted_flops
    return Floor(elements * case.dtype.itemsize, flops(case, phase))


def counted_flops(case: Case, phase: str) -> int:
    """Return what torch's FLOP counter knows about the operator. It needs only shapes."""
    inputs = {
        name: torch.empty(shape, dtype=case.dtype, device="meta", requires_grad=True)
        for name, shape in case.input_shapes.items()
    }
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward:
        outputs = case.operator.call(inputs, case.options)
    with backward:
        torch.autograd.grad(
            outputs, list(inputs.values()), [torch.empty_like(output) for output in outputs]
        )
    return (forward if phase == "forward" else backward).get_total_flops()


def measure_ceilings(
    device: torch.device, clock: Clock, precisions: list[str], quick: bool = False
) -> Ceilings:
    """Measure a copy far larger than any cache, and square products. If quick, only run them."""
    cuda = device.type == "cuda"
    size = (1 << 30) if cuda else (1 << 26)  # 4 GiB, 256 MiB
    source = torch.zeros(1 << 16 if quick else size, device=device)
    destination = torch.empty_like(source)
    n = 64 if quick else 8192 if cuda else 1536
    random = torch.randn(n, n, device=device)
    matrices = {precision: random.to(DTYPES[precision]) for precision in precisions}

    def product(precision: str) -> Task:
        return Task(lambda _: matrices[precision] @ matrices[precision])

    tasks = {"copy": Task(lambda _: destination.copy_(source))}
    tasks |= {precision: product(precision) for precision in precisions}
    onednn = [] if cuda or not torch.backends.mkldnn.is_available() else ["fp32"]
    if onednn:  # which has bf16 products of plain tensors anyway
        packed = random.to_mkldnn()
        tasks["onednn fp32"] = Task(lambda _: linear(packed, packed))
    timings = time_alternately(tasks, clock, rounds=(5, 20), seconds=1.0)
    return Ceilings(
        2 * source.nbytes / timings["copy"].median,
        {precision: 2 * n**3 / timings[precision].median for precision in precisions},
        {precision: 2 * n**3 / timings[f"onednn {precision}"].median for precision in onednn},
    )
