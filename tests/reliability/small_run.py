"""Small training runs, in as many processes as torchrun starts. test_distributed.py runs them.

    PYTHONPATH=examples:tests/examples torchrun --nproc-per-node 2 \\
        tests/reliability/small_run.py DIRECTORY

The first run is left alone. The second is stopped by a signal to the last process and resumed. The
third has a NaN in the share of the last process. With --kill-at, the last process of the first run
is killed.
"""

import argparse
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from example_runs import small_model
from torch import Tensor

from engine.distributed import join
from engine.runtime import Runtime
from engine.tasks import Task
from engine.training import Schedule, Trainer, TrainingError
from tritoncaps.data import Batches, load_dataset
from tritoncaps.models import CapsuleOutput

EPOCHS, BATCH_SIZE = 2, 16
# Six batches per epoch. The last one is a single image, so another process has none of it.
IMAGES = 5 * BATCH_SIZE + 1
# The same applies to the images to evaluate.
HELD_OUT = 2 * BATCH_SIZE + 1


class SpoiltAt(Task):
    """A task with a fault at the step with this number."""

    def __init__(self, step: int, fault: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.steps_left, self.fault = step, fault

    def loss(self, output: CapsuleOutput, target: Any, images: Tensor) -> Tensor:
        loss = super().loss(output, target, images)
        if not torch.is_grad_enabled():  # in an evaluation
            return loss
        self.steps_left -= 1
        return self.fault(loss) if self.steps_left == 0 else loss


def kill(loss):
    os.kill(os.getpid(), signal.SIGKILL)
    return loss


def ask_to_stop(loss):
    signal.raise_signal(signal.SIGTERM)
    return loss


def spoil(loss):
    return loss * math.nan


def train(directory, world, fault: Callable[[Tensor], Tensor] | None = None, at_step=0):
    """Train, from the last checkpoint if there is one. Return everything to compare.

    A fault happens in the last process.
    """
    digits = load_dataset("digits").train
    batches = Batches(digits.subset(range(IMAGES)), BATCH_SIZE, seed=1, max_shift=2)
    held_out = digits.subset(range(200, 200 + HELD_OUT))
    runtime = Runtime(torch.device("cpu"), "fp32", world)
    is_faulty = fault is not None and world.rank == world.size - 1
    model = small_model()
    trainer = Trainer(
        model,
        directory,
        task=SpoiltAt(at_step, fault) if is_faulty else None,
        schedule=Schedule(1e-3, 0.9, 4),
        runtime=runtime,
        test_batch_size=16,
        log_interval=1,
        checkpoint_interval=4,
    )
    world.seed_apart(1)
    trainer.resume()
    losses: list[float] = []
    gradients: list[dict[str, Tensor]] = []

    def record(step, values: dict[str, float]):
        if "loss" in values:
            losses.append(values["loss"])
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})

    trainer.on_metrics = record
    finished = trainer.fit(batches, held_out, epochs=EPOCHS)
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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--alone", action="store_true", help="only do the run that is left alone")
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
