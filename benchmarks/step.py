"""Whole training steps: forward, loss, backward, Adam.

On CUDA each step is timed twice: as Python launches it, and as the replay of a CUDA graph, which
shows the time of the device alone.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import train_images
from benchmarks.networks import EinsumCapsNet, check_networks, einsum_loss, tritoncaps_loss
from benchmarks.oracle import WrongResultError
from benchmarks.report import NO_BF16, NO_TIME, Row
from benchmarks.session import Session, reason, timed
from benchmarks.timing import Task, replayed
from tritoncaps.models import CapsNet, DeepCapsNet


class Trainer:
    """A model, its loss and Adam, the same for all rivals."""

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
        precision: str,
        batch: tuple[Tensor, Tensor],
        compiled: bool = False,
    ) -> None:
        self.device, self.precision = batch[0].device, precision
        self.model = model.to(self.device)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
        self.images = batch[0].contiguous(memory_format=torch.channels_last)
        self.target = batch[1]
        self.loss_of = loss_of
        on_gpu = self.device.type == "cuda"  # where a graph may capture a step
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=1e-3, fused=True, capturable=on_gpu
        )
        exact = copy.deepcopy(model).to("cpu", torch.float64)
        self._exact = loss_of(exact, batch[0].cpu().double(), batch[1].cpu()).item()
        if compiled:
            model.compile(dynamic=False)

    def loss(self) -> Tensor:
        """Run forward."""
        is_bf16 = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16):
            return self.loss_of(self.model, self.images, self.target)

    def step(self, _: Any = None) -> None:
        """Run forward, backward and the update."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self.loss())
        self.optimizer.step()

    def check(self) -> None:
        """Compare the loss with the loss of the same network in float64 on the CPU.

        Raises:
            WrongResultError: they differ by more than rounding explains.
        """
        error = abs(self.loss().item() / self._exact - 1)
        # Convolutions on a GPU may use TF32 in fp32, and have 8 bits in bf16.
        if not error <= {"fp32": 1e-3, "bf16": 3e-2}[self.precision]:
            raise WrongResultError(f"the loss is off by {100 * error:.2f} % of its float64 value")


def run_step(session: Session) -> None:
    """Time whole training steps: forward, loss, backward, Adam."""
    on_gpu = session.device.type == "cuda"
    B = 4 if session.quick else 128 if on_gpu else 64
    check_networks()
    tasks: dict[str, Task] = {}
    facts: dict[str, Row] = {}
    for model, rival, precision in _STEPS:
        if session.quick and rival == "compiled port":
            continue
        common: Row = {"model": model, "rival": rival, "precision": precision, "B": B}
        if session.is_over():
            session.report.add([common | NO_TIME], *_COLUMNS)
            continue
        if precision == "bf16" and not session.has_bf16():
            # There it is emulated, and a convolution takes some 30 times as long as in float32.
            session.report.add([common | NO_BF16], *_COLUMNS)
            continue
        for method in ("calls", "graph") if on_gpu else ("calls",):
            name = " ".join((model, rival, precision, method))
            facts[name] = common | {"method": method}
            try:
                if method == "calls":
                    trainer = make_trainer(model, rival, precision, train_images(B, session.device))
                    trainer.check()
                    trainer.step()
                    tasks[name] = Task(trainer.step)
                else:
                    tasks[name] = replayed(Task(trainer.step))
            except Exception as error:  # the other trainers continue
                session.report.add([facts[name] | {"left_out": reason(error)}], *_COLUMNS)
                break
    timings = session.time(tasks, seconds=100.0)
    for name, timing in timings.items():
        figures: Row = {"images_per_second": B / timing.median}
        port = timings.get(f"CapsNet einsum port fp32 {facts[name]['method']}")
        if port is not None:
            figures["speedup"] = port.median / timing.median
        session.report.add([facts[name] | timed(timing) | figures], *_COLUMNS)


_COLUMNS = ("model", "rival", "precision", "method")
_STEPS = (
    ("CapsNet", "einsum port", "fp32"),
    ("CapsNet", "tritoncaps", "fp32"),
    ("CapsNet", "einsum port", "bf16"),
    ("CapsNet", "tritoncaps", "bf16"),
    ("DeepCapsNet", "tritoncaps", "fp32"),
    ("DeepCapsNet", "tritoncaps", "bf16"),
    ("CapsNet", "compiled port", "fp32"),  # last, because they take the longest to compile
    ("CapsNet", "compiled port", "bf16"),
)


def make_trainer(model: str, rival: str, precision: str, batch: tuple[Tensor, Tensor]) -> Trainer:
    """Build a trainer. The port starts from the weights of `CapsNet`."""
    torch.manual_seed(0)
    if rival == "tritoncaps":
        network = CapsNet() if model == "CapsNet" else DeepCapsNet()
        return Trainer(network, tritoncaps_loss, precision, batch)
    port = EinsumCapsNet()
    port.copy_weights(CapsNet())
    return Trainer(port, einsum_loss, precision, batch, compiled=rival == "compiled port")
