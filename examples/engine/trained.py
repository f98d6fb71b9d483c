"""Networks that were trained before, read back from their run directories."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from engine import baseline, checkpoint
from engine.run_directory import BEST, RunDirectoryError, has_checkpoint, latest
from engine.runtime import Runtime
from tritoncaps.data import Dataset


@dataclass
class Trained:
    """A trained network, ready to be tested.

    `config` describes the images that the network takes, and `epoch` is the one that the validation
    set chose. `digest` identifies the weights.
    """

    directory: Path
    network: str
    model: nn.Module
    dataset: str
    config: dict[str, Any]
    epoch: int
    digest: str

    @property
    def title(self) -> str:
        """What the network is called in pictures."""
        return baseline.TITLES.get(self.network, self.network)

    @property
    def trains_logits(self) -> bool:
        """Whether its default loss is the cross entropy of its logits."""
        return self.network in baseline.WITH_LOGITS


def check_trained(directory: str | Path) -> Path:
    """Return the path of a run directory, and refuse one that holds no trained network."""
    path = Path(directory)
    if not path.is_dir():
        raise RunDirectoryError(f"{path} is not a directory: give the directory of a run")
    if not has_checkpoint(path, BEST):
        if has_checkpoint(path):
            raise RunDirectoryError(f"the run in {path} has not finished an epoch: go on with it")
        inside = sorted(entry.parent.name for entry in path.glob(f"*/{BEST}"))
        hint = f"; did you mean one of those in it: {', '.join(inside)}?" if inside else ""
        raise RunDirectoryError(
            f"{path} holds no {BEST}: give a directory that train_mnist.py wrote, or a run of "
            f"compare_models.py{hint}"
        )
    return path


def load_trained(directory: str | Path, runtime: Runtime) -> Trained:
    """Load the best model of a run of train_mnist.py or of an experiment.

    Raises:
        RunDirectoryError: the directory holds no trained network.
        CheckpointError: its weights are damaged.
    """
    path = check_trained(directory)
    weights, header = latest(checkpoint.load_latest_weights(path))
    model = baseline.create_network(header["model"], **header["model_kwargs"])
    model.load_state_dict(weights)
    model = runtime.place(model).eval().requires_grad_(False)
    hashed = hashlib.sha256()
    for name in sorted(weights):  # a file has them in any order
        hashed.update(weights[name].contiguous().numpy().tobytes())
    digest = hashed.hexdigest()[:16]
    return Trained(path, header["model"], model, header["dataset"], header, header["epoch"], digest)


def check_data(trained: Trained, dataset: Dataset) -> None:
    """Refuse to test a network on another data set than it was trained on."""
    if trained.dataset != dataset.name:
        raise ValueError(
            f"{trained.directory} was trained on {trained.dataset}, but the test images are "
            f"{dataset.name}: add --dataset {trained.dataset}"
        )
    check_images(trained.directory, trained.config, dataset)


def check_images(run: Path, config: Mapping[str, Any], dataset: Dataset) -> None:
    """Refuse images that differ from those of a run in their classes, channels or size.

    `config` holds the run's `class_names` and `model_kwargs`. What it lacks is not checked.
    """
    known, names = config.get("class_names"), list(dataset.class_names)
    if known is not None and list(known) != names:
        raise ValueError(
            f"{run} was trained on the classes {_shortened(known)}, but --data-dir holds "
            f"{_shortened(names)}: give a folder with the same subfolders"
        )
    kwargs = config.get("model_kwargs", {})
    channels, *size = dataset.test.images.shape[1:]
    if (known_channels := kwargs.get("in_channels", channels)) != channels:
        found, remedy = "RGB", "convert them to grey"
        if channels == 1:
            found, remedy = "grey", "with one coloured image among them, all are read as RGB"
        raise ValueError(
            f"{run} was trained on images of {known_channels} channels, but those of "
            f"--data-dir are {found}: {remedy}"
        )
    known_size = kwargs.get("image_size", size)
    known_size = [known_size] * 2 if isinstance(known_size, int) else list(known_size)
    if known_size != size:
        height, width = known_size
        remedy = ""
        if dataset.name == "folder":
            remedy = f": give --image-size {height} {width}"
        elif height == width < min(dataset.train.images.shape[2:]):
            remedy = f": give --crop {height}"
        raise ValueError(
            f"{run} was trained on images of {height}x{width} pixels, not {size[0]}x{size[1]}"
            f"{remedy}"
        )


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" … ({len(names)})" if len(names) > 12 else "")
