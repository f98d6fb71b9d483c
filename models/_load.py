"""`load_model`: a ready model from what training leaves behind, from its name or from the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tritoncaps._files import CheckpointError, read_sealed
from tritoncaps.models._hub import BEST, CONFIG, LAST, OF_A_RUN, WEIGHTS, download
from tritoncaps.models._mixin import PretrainedMixin, name_of
from tritoncaps.models._pretrained import (
    FOLDER,
    PretrainedCfg,
    did_you_mean,
    find,
    registry,
    split_name,
)

_SHOWN = 3  # the most names of weights in an error

# What a name of `create_model` may begin with, as in timm.
HUB, LOCAL = "hf-hub:", "local-dir:"


class Saved(NamedTuple):
    """Weights, the file that they were read from, and what describes their model.

    `config` always has the entries ``model`` and ``model_kwargs``, the arguments of `create_model`.
    """

    file: Path
    config: Mapping[str, Any]
    weights: dict[str, Tensor]


def load_model(path: str | Path, *, device: torch.device | str | int = "cpu") -> nn.Module:
    """Load a trained model, in eval mode and in torch's default dtype.

    Args:
        path: a run directory of ``examples/train_mnist.py``, one of its weight files, a directory
            of `save_pretrained`, or any safetensors file with the state dict of a model. In a run
            directory, ``model_best.safetensors`` is read, or ``last.safetensors`` if there is no
            such file. The file says which model to build, or else a ``config.json`` beside it. Its
            entries ``model`` and ``model_kwargs`` are the arguments of `create_model`.
            Or a name of ``list_models(pretrained=True)``, or ``hf-hub:owner/name``.
        device: where to put the model.

    Raises:
        TypeError: `path` is neither a str nor a Path.
        CheckpointError: the path or the directory's file does not exist, the file is damaged,
            nothing says which model to build, or the weights do not fit that model.
        ValueError: the name is empty, or that of a model without trained weights, or without this
            tag.
        ModuleNotFoundError: the Hub is asked and huggingface_hub is not installed.

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
    saved = read_source("load_model", path, None)
    return build("load_model", saved, {}).to(device).eval()


def read_source(function: str, source: str | Path, hub_options: Mapping[str, Any] | None) -> Saved:
    """Read the weights that a path, a name or a repository of the Hub stands for.

    Without `hub_options`, a repository needs the prefix ``hf-hub:``.
    """
    from tritoncaps.models import list_models  # imported late, because it imports this module

    name = str(source)
    if not name.removeprefix(LOCAL):
        raise ValueError(f"{function}: the path is empty; give a directory, a file or a name")
    if name.startswith(HUB):
        return read(function, download(function, name.removeprefix(HUB), **(hub_options or {})))
    path = Path(name.removeprefix(LOCAL)).expanduser()
    if name.startswith(LOCAL) or isinstance(source, Path):
        return read(function, path)
    model, tag = split_name(name)
    is_ours = model in list_models() and path.suffix != ".safetensors"
    is_another_folder = is_ours and path.is_dir() and _weights_in(path) is None
    if path.exists() and not is_another_folder:
        return read(function, path)
    if is_ours:
        return read_pretrained(function, find(function, model, tag))
    if hub_options is None:
        return read(function, path)
    try:
        path = download(function, name, **hub_options)
    except (CheckpointError, ModuleNotFoundError) as error:
        hint = did_you_mean(name, _known_names())
        raise type(error)(f"{error}; there is no directory {name!r} either{hint}") from error
    return read(function, path)


def read_pretrained(function: str, cfg: PretrainedCfg) -> Saved:
    """Read weights of the registry, from the package or from the Hub."""
    directory = FOLDER if cfg.file else download(function, cfg.hf_hub_id)
    saved = read(function, directory / (cfg.file or WEIGHTS))
    return saved._replace(config={"model_kwargs": {}, **cfg.to_config()})


def read(function: str, path: Path) -> Saved:
    """Read a weight file, or that of a directory, and what says which model to build."""
    file = _weights_file(function, path)
    try:
        weights, header = read_sealed(file, allow_unsealed=True)
    except CheckpointError as error:
        raise CheckpointError(f"{function}: {error}") from error
    config: Any = header
    if not weights:  # the state of a run
        model, config = header.get("model"), header.get("args")
        tensors = model.items() if isinstance(model, dict) else ()
        weights = {name: value for name, value in tensors if isinstance(value, Tensor)}
    return Saved(file, _config(function, file, config), weights)


def _weights_file(function: str, path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(
            f"{function}: {path} does not exist; give a run directory or a .safetensors file"
            + did_you_mean(str(path), _known_names())
        )
    if not path.is_dir():
        return path
    if (file := _weights_in(path)) is not None:
        return file
    raise CheckpointError(
        f"{function}: {path} holds neither {BEST} nor {LAST} nor {WEIGHTS}; give a directory "
        "that train_mnist.py or save_pretrained wrote, or a .safetensors file"
    )


def _weights_in(directory: Path) -> Path | None:
    """Return the file that is read in a directory, if it holds one."""
    files = (directory / name for name in (*OF_A_RUN, WEIGHTS))
    return next((file for file in files if file.exists()), None)


def _known_names() -> list[str]:
    """The names of pretrained weights, and of models that have some."""
    return [name for cfg in registry() for name in (cfg.model, cfg.name)]


def _config(function: str, file: Path, config: Any) -> Mapping[str, Any]:
    """Return what describes the model: `config`, or what lies beside the file."""
    source = file
    if not isinstance(config, dict) or "model" not in config:
        source = file.with_name(CONFIG)
        try:
            config = json.loads(source.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{function}: {file} does not say which model it belongs to, and there is no "
                'config.json beside it; write one, such as {"model": "capsnet", "model_kwargs": {}}'
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{function}: {source} cannot be read: {error}") from error
    if not isinstance(config, dict) or "model" not in config:
        raise CheckpointError(
            f"{function}: {source} has no entry 'model'; "
            'it should look like {"model": "capsnet", "model_kwargs": {}}'
        )
    kwargs = config.get("model_kwargs", {})
    if not isinstance(kwargs, dict):
        raise CheckpointError(
            f"{function}: {source} has an entry 'model_kwargs' of type {type(kwargs).__name__}; it "
            'should be the arguments of the model by name, as {"num_classes": 10}'
        )
    return {**config, "model_kwargs": kwargs}


def build(
    function: str, saved: Saved, changes: Mapping[str, Any], cls: type[Any] | None = None
) -> nn.Module:
    """Create the model and give it its weights.

    Args:
        function: the function to name in errors.
        saved: the weights.
        changes: arguments of the model that differ from those it was trained with. With another
            `num_classes`, the weights whose shape depends on it start anew.
        cls: the class of the model, or None for that which `create_model` knows by its name.

    Raises:
        CheckpointError: the file does not fit the model that it names.
        TypeError, ValueError: the changes are wrong, or the weights do not fit them.
    """
    create, trained = fitted(function, saved, cls)
    _, config, weights = saved
    kwargs = config["model_kwargs"]
    known = getattr(trained, "init_arguments", None) or dict(kwargs)
    changes = {
        key: value
        for key, value in changes.items()
        # The class has to refuse 10.0 and True, which are equal to 10 and 1.
        if key not in known or type(value) is not type(known[key]) or value != known[key]
    }
    renewed: set[str] = set()
    if changes:
        weights, renewed = _kept(function, saved, create, known, changes)
    # Without new weights, loading does not change the caller's random numbers.
    with nullcontext() if renewed else torch.random.fork_rng(devices=[]):
        model = create(**{**kwargs, **changes})
    model.load_state_dict(weights, strict=not renewed)
    if isinstance(model, PretrainedMixin):
        described = {**config, "model_kwargs": {**known, **changes}}
        if renewed:  # the rest tells of the weights that were left out
            described |= {"class_names": (), "dataset": "", "description": ""}
        model.pretrained_cfg = PretrainedCfg.from_config(described)
    return model


def fitted(
    function: str, saved: Saved, cls: type[Any] | None = None
) -> tuple[Callable[..., nn.Module], nn.Module]:
    """Return what builds the model of a file, and the model itself on the device "meta".

    A file may claim a model of any size. Here no memory is taken for it.

    Raises:
        CheckpointError: the file does not fit the model that it names.
    """
    # Imported late, because it imports this module.
    from tritoncaps.models import list_models, new_model

    file, config, weights = saved
    name, kwargs = config["model"], config["model_kwargs"]
    is_ours = name in list_models()
    if cls is not None and name != name_of(cls):
        right = "load_model" if is_ours else f"from_pretrained of {name}"
        raise CheckpointError(
            f"{function}: {file} holds a model {name!r}, and {cls.__name__} is {name_of(cls)!r}; "
            f"{right} builds it"
        )
    create: Callable[..., nn.Module] = partial(new_model, name) if cls is None or is_ours else cls
    try:
        model = _outline(create, kwargs)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        needed = f"{name}(" if create is cls else f"create_model({name!r}, "
        is_lost = cls is None and not is_ours
        hint = "; if it is a class of your own, call its from_pretrained" if is_lost else ""
        raise CheckpointError(
            f"{function}: {file} needs {needed}**{kwargs!r}), which failed: {error}{hint}"
        ) from error
    if problems := _misfits(model.state_dict(), weights):
        raise CheckpointError(f"{function}: {file} does not fit {name}: {'; '.join(problems)}")
    return create, model


def _outline(create: Callable[..., nn.Module], kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a model on the device "meta", where it takes no memory.

    A class of the caller's may read the value of a tensor there, which fails. Then it is built on
    the CPU.
    """
    try:
        with torch.device("meta"):
            return create(**kwargs)
    except RuntimeError:
        if not isinstance(create, type):
            raise
        with torch.random.fork_rng(devices=[]):
            return create(**kwargs)


def _kept(
    function: str,
    saved: Saved,
    create: Callable[..., nn.Module],
    known: Mapping[str, Any],
    changes: Mapping[str, Any],
) -> tuple[dict[str, Tensor], set[str]]:
    """Return the weights that a changed model keeps, and the names of those that start anew."""
    name = saved.config["model"]
    wanted = {**known, **changes}
    changed = _outline(create, wanted).state_dict()
    renewed: set[str] = set()
    if "num_classes" in changes and "num_classes" in known:
        same = _outline(create, {**wanted, "num_classes": known["num_classes"]}).state_dict()
        renewed = {key for key in changed if changed[key].shape != same[key].shape}
    if "in_channels" in changes:
        raise ValueError(
            f"{function}: {name} was trained with in_channels={known.get('in_channels')}, and "
            f"in_channels={changes['in_channels']!r} was asked for; convert the images, or train "
            "a new model"
        )
    weights = {
        key: value
        for key, value in saved.weights.items()
        if key not in renewed and (key in changed or not key.startswith("decoder."))
    }
    expected = {key: value for key, value in changed.items() if key not in renewed}
    if problems := _misfits(expected, weights):
        given = ", ".join(f"{key}={value!r}" for key, value in changes.items())
        raise ValueError(
            f"{function}: the weights of {name} do not fit {given}: {'; '.join(problems)}; leave "
            "the argument out, or train a new model"
        )
    return weights, renewed


def _misfits(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Say which weights are missing, unexpected or have the wrong shape or kind of number."""
    shapes = [
        f"{name} is {tuple(weights[name].shape)} and must be {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    kinds = [
        f"{name} is {weights[name].dtype} and must be floating-point"
        for name in expected
        if name in weights
        and expected[name].is_floating_point()
        and not weights[name].is_floating_point()
    ]
    return [
        *_listed("it lacks ", [name for name in expected if name not in weights]),
        *_listed("the model has no ", [name for name in weights if name not in expected]),
        *_listed("", shapes),
        *_listed("", kinds),
    ]


def _listed(title: str, items: list[str]) -> list[str]:
    rest = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return [title + ", ".join(items[:_SHOWN]) + rest] if items else []
