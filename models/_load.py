"""`load_model`: a ready model from the files that training leaves behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritoncaps._files import CheckpointError, read_sealed

# In a run directory: the best weights, and the last checkpoint.
_BEST, _LAST = "model_best.safetensors", "last.safetensors"
_SHOWN = 3  # the most names of weights in an error


def load_model(path: str | Path, *, device: torch.device | str | int = "cpu") -> nn.Module:
    """Load a trained model, in eval mode.

    Args:
        path: a run directory of ``examples/train_mnist.py``, one of its weight files, or any
            safetensors file with the state dict of a model. In a directory,
            ``model_best.safetensors`` is read, or ``last.safetensors`` if there is no such file.
            The file says which model to build, or else a ``config.json`` beside it. Its entries
            ``model`` and ``model_kwargs`` are the arguments of `create_model`.
        device: where to put the model.

    Raises:
        TypeError: `path` is neither a str nor a Path.
        CheckpointError: the path or the directory's file does not exist, the file is damaged,
            nothing says which model to build, or the weights do not fit that model.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from tritoncaps.models import create_model, load_model
        >>> directory = Path(tempfile.mkdtemp())
        >>> config = {"model": "capsnet", "model_kwargs": {"num_classes": 3}}
        >>> _ = (directory / "config.json").write_text(json.dumps(config))
        >>> model = create_model("capsnet", num_classes=3)
        >>> save_file(model.state_dict(), directory / "digits.safetensors")
        >>> load_model(directory / "digits.safetensors")(torch.rand(2, 1, 28, 28)).activations.shape
        torch.Size([2, 3])
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"load_model: path must be a str or a Path, got {type(path).__name__}")
    file = _weights_file(Path(path))
    try:
        weights, header = read_sealed(file, allow_unsealed=True)
    except CheckpointError as error:
        raise CheckpointError(f"load_model: {error}") from error
    config: Any = header
    if not weights:  # the state of a run
        model, config = header.get("model"), header.get("args")
        tensors = model.items() if isinstance(model, dict) else ()
        weights = {name: value for name, value in tensors if isinstance(value, Tensor)}
    name, kwargs = _recipe(file, config)
    return _build(file, name, kwargs, weights).to(device).eval()


def _weights_file(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(
            f"load_model: {path} does not exist; give a run directory or a .safetensors file"
        )
    if not path.is_dir():
        return path
    for name in (_BEST, _LAST):
        if (path / name).exists():
            return path / name
    raise CheckpointError(
        f"load_model: {path} holds neither {_BEST} nor {_LAST}; "
        "give a directory that train_mnist.py wrote, or a .safetensors file"
    )


def _recipe(file: Path, config: Any) -> tuple[Any, Any]:
    """Return the arguments of `create_model`."""
    source = file
    if not isinstance(config, dict) or "model" not in config:
        source = file.with_name("config.json")
        try:
            config = json.loads(source.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"load_model: {file} does not say which model it belongs to, and there is no "
                'config.json beside it; write one, such as {"model": "capsnet", "model_kwargs": {}}'
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"load_model: {source} cannot be read: {error}") from error
    if not isinstance(config, dict) or "model" not in config:
        raise CheckpointError(
            f"load_model: {source} has no entry 'model'; "
            'it should look like {"model": "capsnet", "model_kwargs": {}}'
        )
    return config["model"], config.get("model_kwargs", {})


def _build(file: Path, name: Any, kwargs: Any, weights: dict[str, Tensor]) -> nn.Module:
    """Create the model and give it its weights."""
    from tritoncaps.models import create_model  # imported late, because it imports this module

    try:
        # Build it first without memory, because a file may claim a model of any size.
        with torch.device("meta"):
            expected = create_model(name, **kwargs).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"load_model: {file} needs create_model({name!r}, **{kwargs!r}), which failed: {error}"
        ) from error
    if problems := _misfits(expected, weights):
        raise CheckpointError(f"load_model: {file} does not fit {name}: {'; '.join(problems)}")
    with torch.random.fork_rng(devices=[]):  # loading must not change the caller's random numbers
        model = create_model(name, **kwargs)
    model.load_state_dict(weights)
    return model


def _misfits(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Say which weights are missing, unexpected or have the wrong shape."""
    shapes = [
        f"{name} is {tuple(weights[name].shape)} and must be {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    return [
        *_listed("it lacks ", [name for name in expected if name not in weights]),
        *_listed("the model has no ", [name for name in weights if name not in expected]),
        *_listed("", shapes),
    ]


def _listed(title: str, items: list[str]) -> list[str]:
    rest = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return [title + ", ".join(items[:_SHOWN]) + rest] if items else []
