"""One small training run, in as many processes as torchrun starts. test_distributed.py runs it.

torchrun --nproc-per-node 2 tests/small_run.py DIRECTORY [--kill-at STEP]
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.distributed import World, join
from engine.runtime import Runtime
from engine.training import Schedule, Trainer
from tritoncaps.data import Batches, load_dataset
from tritoncaps.layers import ReconstructionDecoder
from tritoncaps.models import CapsNet

EPOCHS, BATCH_SIZE = 2, 16
# Six batches an epoch; the last one is a single image, so that another process has none of it.
IMAGES = 5 * BATCH_SIZE + 1


def small_model() -> CapsNet:
    torch.manual_seed(1)
    model = CapsNet(channels=8, capsule_types=2)
    model.decoder = ReconstructionDecoder(10, 16, (1, 28, 28), hidden=(16, 32))
    return model


class KilledAt(nn.Module):
    """A loss that kills its process when it is computed for a step of that number."""

    def __init__(self, loss: nn.Module, step: int) -> None:
        super().__init__()
        self.loss, self.steps_left = loss, step

    def forward(self, *args: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # not in an evaluation
            self.steps_left -= 1
            if self.steps_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        loss: Tensor = self.loss(*args)
        return loss


def train(directory: Path, world: World, kill_at: int | None = None) -> dict[str, Any]:
    """Train, from the last checkpoint if there is one; returns what there is to compare."""
    digits = load_dataset("digits").train
    batches = Batches(digits.subset(range(IMAGES)), BATCH_SIZE, seed=1, max_shift=2)
    held_out = digits.subset(range(200, 245))
    runtime = Runtime(torch.device("cpu"), "fp32", world)
    model = runtime.place(small_model())
    trainer = Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3, fused=True),
        Schedule(1e-3, 0.9, 4),
        runtime,
        directory,
        {"model": "capsnet", "model_kwargs": {}},
        test_batch_size=16,
        log_interval=1,
    )
    world.seed_apart(1)
    if (directory / "last.pt").exists():
        trainer.load_state(world.from_main(lambda: checkpoint.load_latest(directory)[0]))
    if kill_at is not None and not world.is_main:
        trainer.loss = KilledAt(trainer.loss, kill_at)
    losses: list[float] = []
    gradients: list[dict[str, Tensor]] = []

    def record(step: int, values: dict[str, float]) -> None:
        if "loss" in values:
            losses.append(values["loss"])
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})

    trainer.on_metrics = record
    assert trainer.fit(batches, held_out, None, EPOCHS)
    random = world.gather(torch.rand(()).item())
    evaluation = trainer.evaluate(held_out)
    return {
        "losses": losses,
        "gradients": gradients,
        "rows": trainer.rows,
        "loss": evaluation.loss,
        "predictions": evaluation.predictions,
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "random": random,
        "world": world.size,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kill-at", type=int)
    args = parser.parse_args()
    with join() as world:
        result = train(args.directory, world, args.kill_at)
        if world.is_main:
            torch.save(result, args.directory / "result.pt")


if __name__ == "__main__":
    main()
