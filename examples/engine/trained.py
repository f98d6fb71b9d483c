"""Networks that were trained before, read back from their run directories."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine import baseline, checkpoint
from engine.run_directory import RunDirectoryError, has_checkpoint
from engine.runtime import Runtime


@dataclass
class Trained:
    """A trained network, ready to be tested.

    `args` are the flags of its run, `epoch` the one that the validation set chose, and `digest`
    tells its weights from those of any other.
    """

    directory: Path
    network: str
    model: nn.Module
    args: dict[str, Any]
    epoch: int
    digest: str

    @property
    def title(self) -> str:
        """What the network is called in pictures."""
        return baseline.TITLES.get(self.network, self.network)


def check_trained(directory: str | Path) -> Path:
    """Return the path of a run directory that holds a trained network.

    Raises:
        RunDirectoryError: it is not that of a run, or the run has not come so far.
    """
    path = Path(directory)
    if not path.is_dir():
        raise RunDirectoryError(f"{path} is not a directory: give the directory of a run")
    names = ("model_best.pt", "model_best.previous.pt")
    if not any((path / name).is_file() for name in names):
        if has_checkpoint(path):
            raise RunDirectoryError(f"the run in {path} has not finished an epoch: go on with it")
        inside = sorted(entry.parent.name for entry in path.glob("*/model_best.pt"))
        hint = f"; did you mean one of those in it: {', '.join(inside)}?" if inside else ""
        raise RunDirectoryError(
            f"{path} holds no model_best.pt: give a directory that train_mnist.py wrote, or a "
            f"cell of compare_models.py{hint}"
        )
    return path


def load_trained(directory: str | Path, runtime: Runtime) -> Trained:
    """Load the best model of a run of train_mnist.py or of one cell of an experiment.

    Raises:
        RunDirectoryError: the directory is not that of a run, or the run has not come so far.
        CheckpointError: its checkpoint is damaged.
    """
    path = check_trained(directory)
    state, _, _ = checkpoint.load_latest(path, "model_best.pt")
    args = state["args"]
    model = baseline.create_network(args["model"], **args["model_kwargs"])
    model.load_state_dict(state["model"])
    model = runtime.place(model).eval().requires_grad_(False)
    epoch = state["progress"]["best_epoch"]
    return Trained(path, args["model"], model, args, epoch, _digest(state["model"]))


def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in weights.values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
