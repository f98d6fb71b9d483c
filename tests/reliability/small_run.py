"""Small training runs, in as many processes as torchrun starts. test_distributed.py runs them.

    PYTHONPATH=examples torchrun --nproc-per-node 2 tests/small_run.py DIRECTORY

One is left alone, one is stopped by a signal to the last process and resumed, and one has a NaN in
the share of the last process; with --kill-at the last process is killed in the first of them.
"""

import argparse
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.distributed import World, join
from engine.runtime import Runtime
from engine.training import Schedule, Trainer, TrainingError
from tritoncaps.data import Batches, load_dataset
from tritoncaps.layers import ReconstructionDecoder
from tritoncaps.models import CapsNet

EPOCHS, BATCH_SIZE = 2, 16
# Six batches an epoch; the last one is a single image, so that another process has none of it.
IMAGES = 5 * BATCH_SIZE + 1
# And so are those to evaluate.
HELD_OUT = 2 * BATCH_SIZE + 1


def small_model() -> CapsNet:
    torch.manual_seed(1)
    model = CapsNet(channels=8, capsule_types=2)
    model.decoder = ReconstructionDecoder(10, 16, (1, 28, 28), hidden=(16, 32))
    return model


class SpoiltAt(nn.Module):
    """A loss with a fault at the step of that number."""

    def __init__(self, loss: nn.Module, step: int, fault: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.loss, self.steps_left, self.fault = loss, step, fault

    def forward(self, *args: Tensor) -> Tensor:
        loss: Tensor = self.loss(*args)
        if not torch.is_grad_enabled():  # in an evaluation
            return loss
        self.steps_left -= 1
        return self.fault(loss) if self.steps_left == 0 else loss


def kill(loss: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return loss


def ask_to_stop(loss: Tensor) -> Tensor:
    signal.raise_signal(signal.SIGTERM)
    return loss


def spoil(loss: Tensor) -> Tensor:
    return loss * math.nan


def train(
    directory: Path,
    world: World,
    fault: Callable[[Tensor], Tensor] | None = None,
    at_step: int = 0,
) -> dict[str, Any]:
    """Train, from the last checkpoint if there is one; returns what there is to compare.

    A fault befalls the last process.
    """
    directory.mkdir(exist_ok=True)
    digits = load_dataset("digits").train
    batches = Batches(digits.subset(range(IMAGES)), BATCH_SIZE, seed=1, max_shift=2)
    held_out = digits.subset(range(200, 200 + HELD_OUT))
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
        checkpoint_interval=4,
    )
    world.seed_apart(1)
    if (directory / "last.pt").exists():
        trainer.load_state(world.from_main(lambda: checkpoint.load_latest(directory)[0]))
    if fault is not None and world.rank == world.size - 1:
        trainer.loss = SpoiltAt(trainer.loss, at_step, fault)
    losses: list[float] = []
    gradients: list[dict[str, Tensor]] = []

    def record(step: int, values: dict[str, float]) -> None:
        if "loss" in values:
            losses.append(values["loss"])
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})

    trainer.on_metrics = record
    finished = trainer.fit(batches, held_out, None, EPOCHS)
    random = world.gather(torch.rand(()).item())
    evaluation = trainer.evaluate(held_out)
    return {
        "losses": losses,
        "gradients": gradients,
        "rows": trainer.rows,
        "finished": finished,
        "loss": evaluation.loss,
        "accuracy": evaluation.accuracy,
        "labels": held_out.labels,
        "predictions": evaluation.predictions,
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "random": random,
        "world": world.size,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--alone", action="store_true", help="the run that is left alone only")
    args = parser.parse_args()
    with join() as world:
        if args.kill_at is not None:
            train(args.directory, world, kill, args.kill_at)
        result: dict[str, Any] = {"whole": train(args.directory, world)}
        if not args.alone:
            result["stopped"] = train(args.directory / "stopped", world, ask_to_stop, 7)
            result["resumed"] = train(args.directory / "stopped", world)
            try:
                train(args.directory / "spoilt", world, spoil, 5)
            except TrainingError as error:
                result["spoilt"] = world.gather(str(error))
        if world.is_main:
            torch.save(result, args.directory / "result.pt")


if __name__ == "__main__":
    main()
