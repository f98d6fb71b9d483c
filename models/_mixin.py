"""`PretrainedMixin`: save a model to a directory or the Hugging Face Hub, and load it again."""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from tritoncaps._files import atomic_write, write_sealed
from tritoncaps.models._hub import CARD, CONFIG, OF_A_RUN, WEIGHTS, upload
from tritoncaps.models._pretrained import PretrainedCfg

M = TypeVar("M", bound="PretrainedMixin")


class PretrainedMixin:
    """Adds `save_pretrained`, `from_pretrained` and `push_to_hub` to a model.

    All our models have them. A model of your own inherits them:

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> class Scores(PretrainedMixin, nn.Module):
        ...     def __init__(self, num_classes=10):
        ...         super().__init__()
        ...         self.linear = nn.Linear(4, num_classes)
        >>> directory = tempfile.mkdtemp()
        >>> Scores(num_classes=3).save_pretrained(directory)
        >>> Scores.from_pretrained(directory).linear.out_features
        3
    """

    pretrained_cfg: PretrainedCfg | None = None
    # The arguments that built the model, defaults included, or None where they have no names.
    init_arguments: dict[str, Any] | None = None

    # Here, so that a model need not list its arguments a second time.
    def __new__(cls: type[M], /, *args: Any, **kwargs: Any) -> M:
        """Keep the arguments that build the model."""
        model = super().__new__(cls)
        model.init_arguments = _bound(cls, args, kwargs)
        return model

    def save_pretrained(
        self, save_directory: str | Path, *, class_names: Sequence[str] | None = None
    ) -> None:
        """Write config.json, model.safetensors and a model card, README.md.

        A card that is there stays. The weights carry a SHA-256, and any reader of safetensors opens
        them. Of the arguments that built the model, tuples come back as lists.

        Args:
            save_directory: made if it does not exist.
            class_names: what each class stands for. By default, what the model was loaded with.

        Raises:
            TypeError: JSON cannot hold an argument that built the model, or an argument of this
                function has the wrong type.
            ValueError: there are not as many class names as classes, the model is on the meta
                device, or the directory is that of a run, whose own weights would be read instead.
            OSError: a file cannot be written.
        """
        if not isinstance(save_directory, (str, Path)):
            raise TypeError(
                "save_pretrained: save_directory must be a str or a Path, got "
                f"{type(save_directory).__name__}"
            )
        directory = Path(save_directory).expanduser()
        if directory.exists() and not directory.is_dir():
            raise FileExistsError(f"save_pretrained: {directory} is a file; give a directory")
        for name in OF_A_RUN:
            if (directory / name).exists():
                raise ValueError(
                    f"save_pretrained: {directory} is the directory of a run, and load_model would "
                    f"read its {name} instead; give another one"
                )
        self._save("save_pretrained", directory, class_names, None)

    @classmethod
    def from_pretrained(
        cls: type[M],
        /,
        pretrained_model_name_or_path: str | Path,
        *,
        device: torch.device | str | int = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **model_kwargs: Any,
    ) -> M:
        """Load a model of this class, in eval mode.

        Args:
            pretrained_model_name_or_path: a directory of `save_pretrained` or of a run, a weight
                file, a name of ``list_models(pretrained=True)``, or ``owner/name`` on the Hub.
            device: where to put the model.
            revision, cache_dir, token, force_download, local_files_only: for the Hub, see
                ``huggingface_hub.snapshot_download``.
            model_kwargs: change arguments of the model, as `create_model` does. An argument of the
                model that is called like one above cannot be changed here.

        Raises:
            CheckpointError: there is nothing usable, or it is a model of another class.
            TypeError, ValueError: an argument is wrong, or the weights do not fit it.
            ModuleNotFoundError: the Hub is asked and huggingface_hub is not installed.
        """
        from tritoncaps.models._load import build, read_source  # it imports this module

        if not isinstance(pretrained_model_name_or_path, (str, Path)):
            raise TypeError(
                "from_pretrained: pretrained_model_name_or_path must be a str or a Path, got "
                f"{type(pretrained_model_name_or_path).__name__}"
            )
        options = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        saved = read_source("from_pretrained", pretrained_model_name_or_path, options)
        model = build("from_pretrained", saved, model_kwargs, cls)
        assert isinstance(model, cls) and isinstance(model, nn.Module)
        model.to(device).eval()
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        class_names: Sequence[str] | None = None,
        commit_message: str = "Push model using tritoncaps",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub; returns the commit's URL.

        Args:
            repo_id: ``owner/name``, created if it does not exist.
            class_names: see `save_pretrained`.
            commit_message, private, token, branch, create_pr: as in huggingface_hub.

        Raises:
            TypeError, ValueError: as for `save_pretrained`.
            ModuleNotFoundError: huggingface_hub is not installed.
            CheckpointError: the Hub cannot be reached, or refuses.
        """
        if not isinstance(repo_id, str):
            raise TypeError(f"push_to_hub: repo_id must be a str, got {type(repo_id).__name__}")
        with tempfile.TemporaryDirectory() as directory:
            self._save("push_to_hub", Path(directory), class_names, repo_id)
            return upload(
                "push_to_hub",
                repo_id,
                Path(directory),
                private=private,
                token=token,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )

    def _save(
        self, function: str, directory: Path, class_names: Sequence[str] | None, repo_id: str | None
    ) -> None:
        assert isinstance(self, nn.Module)
        cfg = describe(function, self)
        if class_names is not None:
            cfg = replace(cfg, class_names=_texts(function, class_names))
            if cfg.num_classes not in (None, len(cfg.class_names)):
                raise ValueError(
                    f"{function}: class_names has {len(cfg.class_names)} names, and the model has "
                    f"{cfg.num_classes} classes; give one for each"
                )
        text = json.dumps(cfg.to_config(), indent=2, ensure_ascii=False) + "\n"
        for name, tensor in self.state_dict().items():
            if tensor.is_meta:
                raise ValueError(
                    f"{function}: {name} is on the meta device, where tensors have no values; "
                    "build the model on another device"
                )
        directory.mkdir(parents=True, exist_ok=True)
        write_sealed(directory / WEIGHTS, self.state_dict(), {}, function=function)
        with atomic_write(directory / CONFIG) as file:
            file.write(text.encode())
        if not (directory / CARD).exists():
            with atomic_write(directory / CARD) as file:
                file.write(_card(self, cfg, repo_id).encode())


def describe(function: str, model: nn.Module) -> PretrainedCfg:
    """Return the name and arguments of a model, and what it was loaded with.

    Raises:
        TypeError: JSON cannot hold an argument.
    """
    arguments = getattr(model, "init_arguments", None)
    if arguments is None:
        raise TypeError(
            f"{function}: the arguments of {type(model).__name__} have no names to write down; "
            "give them by name"
        )
    for name, value in arguments.items():
        try:
            read = json.loads(json.dumps(value, allow_nan=False))
            if read != _with_lists(value):
                raise ValueError(f"{value!r} would come back as {read!r}")
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{function}: config.json cannot hold the argument {name} of "
                f"{type(model).__name__}: {error}"
            ) from error
    known = getattr(model, "pretrained_cfg", None) or PretrainedCfg("")
    about = known.description
    if known.tag:  # what was loaded may have been trained further since
        about = f"Started from {known.name}" + (f": {about}" if about else "")
    # The tag and the file belong to the weights that were loaded, not to these.
    return replace(
        known,
        model=name_of(type(model)),
        model_kwargs=arguments,
        description=about,
        tag="",
        file="",
        hf_hub_id="",
    )


def _with_lists(value: Any) -> Any:
    """A value with lists in place of tuples, as JSON gives it back."""
    if isinstance(value, (list, tuple)):
        return [_with_lists(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    return value


def _texts(function: str, class_names: Any) -> tuple[str, ...]:
    names = tuple(class_names) if isinstance(class_names, Iterable) else (class_names,)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"{function}: class_names must be texts, got {type(name).__name__} {name!r}"
            )
    return names


def name_of(cls: type[object]) -> str:
    """Return the name of a class for `create_model`, or that of the class itself."""
    from tritoncaps.models import _MODELS  # imported late, because it imports this module

    names: dict[type[object], str] = {known: name for name, known in _MODELS.items()}
    return names.get(cls, cls.__qualname__)


def _bound(cls: type[object], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    try:
        bound = inspect.signature(cls.__init__).bind(None, *args, **kwargs)
    except TypeError:  # `__init__` says it better, and a copy needs no arguments
        return None
    bound.apply_defaults()
    _, *parameters = bound.signature.parameters.values()
    arguments: dict[str, Any] = {}
    for parameter in parameters:
        value = bound.arguments[parameter.name]
        if type(value) in (list, dict):
            value = copy.copy(value)  # the caller may change it later
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= value
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            arguments[parameter.name] = value
        elif value:
            return None
    return arguments


def _card(model: nn.Module, cfg: PretrainedCfg, repo_id: str | None) -> str:
    """Write a model card of what is known."""
    head = [
        "---",
        "library_name: tritoncaps",
        f"pipeline_tag: image-{'classification' if cfg.num_classes else 'feature-extraction'}",
        *([f"license: {cfg.license}"] if cfg.license else []),
        "tags:",
        "- capsule-network",
        "---",
    ]
    kind = type(model).__name__
    count = sum(parameter.numel() for parameter in model.parameters())
    source = f"hf-hub:{repo_id}" if repo_id else "local-dir:PATH"
    load = f'create_model("{source}", pretrained=True)'
    imported = "from tritoncaps.models import create_model"
    if cfg.model == type(model).__qualname__:  # a class that `create_model` does not know
        load, imported = f'{kind}.from_pretrained("{repo_id or "PATH"}")', f"# import {kind} here"
    about = [f"`{kind}`, a capsule network of tritoncaps with {count:,} parameters."]
    if cfg.description or cfg.dataset:
        about.append((cfg.description or f"Trained on {cfg.dataset}").removesuffix(".") + ".")
    if cfg.input_size:
        sizes = ", ".join(map(str, cfg.input_size))
        about.append(f"It takes images (B, {sizes}): {cfg.scaling}.")
    if cfg.class_names:
        about.append(f"Its classes are {', '.join(cfg.class_names)}.")
    return "\n".join(
        [
            *head,
            "",
            f"# {cfg.name}",
            "",
            " ".join(about),
            "",
            "```python",
            imported,
            "",
            f"model = {load}",
            "```",
            "",
        ]
    )
