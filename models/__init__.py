"""The networks, by class or by name."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import nn

from tritoncaps._checks import check_flag
from tritoncaps._files import CheckpointError
from tritoncaps.models._load import (
    HUB,
    LOCAL,
    build,
    fitted,
    load_model,
    read_pretrained,
    read_source,
)
from tritoncaps.models._mixin import PretrainedMixin
from tritoncaps.models._parts import CapsuleOutput
from tritoncaps.models._pretrained import PretrainedCfg, did_you_mean, find, registry, split_name
from tritoncaps.models.capsnet import CapsNet
from tritoncaps.models.conv_capsnet import ConvCapsNet
from tritoncaps.models.deep_capsnet import DeepCapsNet
from tritoncaps.models.efficient_capsnet import EfficientCapsNet
from tritoncaps.models.inverted_capsnet import InvertedCapsNet
from tritoncaps.models.matrix_capsnet import MatrixCapsNet
from tritoncaps.models.scae import SCAE, SCAEOutput

__all__ = [
    "SCAE",
    "CapsNet",
    "CapsuleOutput",
    "CheckpointError",
    "ConvCapsNet",
    "DeepCapsNet",
    "EfficientCapsNet",
    "InvertedCapsNet",
    "MatrixCapsNet",
    "PretrainedCfg",
    "PretrainedMixin",
    "SCAEOutput",
    "create_model",
    "list_models",
    "load_model",
]

_MODELS: dict[str, type[nn.Module]] = {
    "capsnet": CapsNet,
    "conv_capsnet": ConvCapsNet,
    "deep_capsnet": DeepCapsNet,
    "efficient_capsnet": EfficientCapsNet,
    "inverted_capsnet": InvertedCapsNet,
    "matrix_capsnet": MatrixCapsNet,
    "scae": SCAE,
}


# They find objects without labels, so they have no classes.
_WITHOUT_CLASSES = {"scae"}


def list_models(pretrained: bool = False, *, classifiers: bool = False) -> list[str]:
    """Return the names that `create_model` knows.

    Args:
        pretrained: return those with trained weights instead, ``model.tag``. A model's default
            comes first.
        classifiers: leave out the networks that are trained without labels, such as "scae".

    Raises:
        TypeError: an argument is not a bool.

    Example:
        >>> list_models()  # doctest: +ELLIPSIS
        ['capsnet', 'conv_capsnet', 'deep_capsnet', 'efficient_capsnet', ..., 'scae']
    """
    check_flag("list_models", "pretrained", pretrained)
    check_flag("list_models", "classifiers", classifiers)
    if pretrained:
        return [cfg.name for cfg in registry()]
    return sorted(_MODELS.keys() - (_WITHOUT_CLASSES if classifiers else set()))


def create_model(name: str, pretrained: bool | str = False, **kwargs: Any) -> nn.Module:
    """Build a model by name. The `kwargs` are arguments of its class.

    Args:
        name: the model, such as "capsnet"; with a tag the weights as well, such as
            "efficient_capsnet.mnist"; "hf-hub:owner/name" or "local-dir:PATH".
        pretrained: load trained weights, and return the model in eval mode. A str is their tag.
            Without it, a tag, repository or directory only gives the arguments of the model.
        kwargs: may differ from those that the weights were trained with. With another
            `num_classes`, the weights whose shape depends on it start anew: the matrices, the prior
            and the biases of the routing to the class capsules, and the first layer of the decoder.
            All others must fit. ``reconstruction=False`` leaves the decoder out.

    Raises:
        TypeError: the name is not a str.
        ValueError: no model has this name, it has no such weights, or the weights do not fit
            the `kwargs`.
        TypeError, ValueError: an argument that the class refuses.
        CheckpointError: the weights are missing or damaged, or the Hub cannot be reached.
        ModuleNotFoundError: the Hub is asked and huggingface_hub is not installed.

    Example:
        >>> model = create_model("deep_capsnet", num_classes=10)
        >>> sum(p.numel() for p in model.parameters())
        7869200
    """
    if not isinstance(name, str):
        raise TypeError(f"create_model: name must be a str, got {type(name).__name__}")
    if not isinstance(pretrained, (bool, str)):
        raise TypeError(
            f"create_model: pretrained must be a bool or a tag, got {type(pretrained).__name__}"
        )
    saved = None
    defaults: Mapping[str, Any] = {}
    if name.startswith((HUB, LOCAL)):
        if isinstance(pretrained, str):
            raise ValueError(f"create_model: {name} has no tags, got pretrained={pretrained!r}")
        saved = read_source("create_model", name, None)
        model, defaults = saved.config["model"], saved.config["model_kwargs"]
        if not pretrained:
            fitted("create_model", saved)
    else:
        model, tag = split_name(name)
        _check_name(model or name)
        if isinstance(pretrained, str):
            if tag not in (None, pretrained):
                raise ValueError(
                    f"create_model: the name asks for the weights {tag!r} and pretrained for "
                    f"{pretrained!r}; give one of them"
                )
            tag = pretrained
        if tag is not None or pretrained:
            cfg = find("create_model", model, tag)
            defaults = cfg.model_kwargs
            saved = read_pretrained("create_model", cfg) if pretrained else None
    if pretrained and saved is not None:
        return build("create_model", saved, kwargs).eval()
    return new_model(model, **{**defaults, **kwargs})


# Positional only, because a file may claim an argument called `name`.
def new_model(name: Any, /, **kwargs: Any) -> nn.Module:
    """Build a model without trained weights.

    Raises:
        TypeError, ValueError: there is no such model, or it has no such arguments.
    """
    _check_name(name)
    known = list(signature(_MODELS[name]).parameters)
    for argument in kwargs:
        if argument not in known:
            hint = did_you_mean(argument, known) or f"; it has {', '.join(known)}"
            raise TypeError(f"create_model: {name} has no argument {argument!r}{hint}")
    return _MODELS[name](**kwargs)


def _check_name(name: Any) -> None:
    """Raise ValueError for a model that is not known."""
    if not isinstance(name, str) or name not in _MODELS:
        hint = did_you_mean(str(name), _MODELS)
        raise ValueError(
            f"create_model: no model is named {name!r}, there are {', '.join(list_models())}{hint}"
        )
