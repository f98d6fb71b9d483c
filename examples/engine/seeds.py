"""The runs of a program that trains a network of its own: a directory for each seed, in one."""

from typing import Any

from engine.flags import Output
from engine.run_directory import finish, locked
from engine.runner import Stopped, count_parameters
from engine.runtime import describe_environment
from engine.tasks import Source
from engine.training import Trainer
from tritoncaps.data import ImageSet


def train_seed(
    trainer: Trainer, train: Source, test: ImageSet | Source, epochs: int, output: Output
) -> dict[str, Any]:
    """Train a seed, or go on where it was stopped; returns its last loss, and time and machine.

    The config of the trainer names the seed, and which start of it this is if there are several.

    Raises:
        Stopped: a signal stopped the training.
    """
    name = f"seed {trainer.config['seed']}"
    if "start" in trainer.config:
        name += f", start {trainer.config['start']}"
    with locked(trainer.directory):
        if trainer.resume():
            if trainer.progress.epoch >= epochs:
                print(f"finished    {name}")
            else:
                print(f"resuming    {name} after {trainer.progress}")
        else:
            print(f"training    {name}, {count_parameters(trainer.model):,} parameters")
        if not trainer.fit(train, test=test, epochs=epochs):
            print("stopped" if output.dry_run else "stopped and saved; repeat the command to go on")
            raise Stopped
        finish(trainer.directory)
    environment = describe_environment(trainer.runtime)
    return {
        "loss": trainer.rows[-1]["test_loss"],
        "seconds": sum(row["seconds"] for row in trainer.rows),
        "device": environment["gpu"] or environment["processor"],
        **{name: environment[name] for name in ("threads", "precision", "commit")},
    }
