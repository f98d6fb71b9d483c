"""The networks, by class or by name."""

from inspect import signature
from typing import Any

from torch import nn

from tritoncaps._files import CheckpointError
from tritoncaps.models._load import HUB, LOCAL, build, load_model, read_pretrained, read_source
from tritoncaps.models._mixin import PretrainedMixin
from tritoncaps.models._parts import CapsuleOutput
from tritoncaps.models._pretrained import PretrainedCfg, did_you_mean, find, registry
from tritoncaps.models.capsnet import CapsNet
from tritoncaps.models.deep_capsnet import DeepCapsNet
from tritoncaps.models.efficient_capsnet import EfficientCapsNet
from tritoncaps.models.inverted_capsnet import InvertedCapsNet

__all__ = [
    "CapsNet",
    "CapsuleOutput",
    "CheckpointError",
    "DeepCapsNet",
    "EfficientCapsNet",
    "InvertedCapsNet",
    "PretrainedCfg",
    "PretrainedMixin",
    "create_model",
    "list_models",
    "load_model",
]

_MODELS: dict[str, type[nn.Module]] = {
    "capsnet": CapsNet,
    "deep_capsnet": DeepCapsNet,
    "efficient_capsnet": EfficientCapsNet,
    "inverted_capsnet": InvertedCapsNet,
}


def list_models(pretrained: bool = False) -> list[str]:
    """Return the names that `create_model` knows.

    Args:
        pretrained: return those with trained weights instead, ``model.tag``. A model's default
            comes first.

    Example:
        >>> list_models()
        ['capsnet', 'deep_capsnet', 'efficient_capsnet', 'inverted_capsnet']
    """
    if pretrained:
        return [cfg.name for cfg in registry()]
    return sorted(_MODELS)


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
    saved = defaults = None
    if name.startswith((HUB, LOCAL)):
        if isinstance(pretrained, str):
            raise ValueError(f"create_model: {name} has no tags, got pretrained={pretrained!r}")
        saved = read_source("create_model", name, None)
        model, defaults = saved.config["model"], saved.config.get("model_kwargs", {})
        _check_model(model)
    else:
        model, _, tag = name.partition(".")
        _check_model(model)
        if isinstance(pretrained, str):
            if tag and tag != pretrained:
                raise ValueError(
                    f"create_model: the name asks for the weights {tag!r} and pretrained for "
                    f"{pretrained!r}; give one of them"
                )
            tag = pretrained
        if tag or pretrained:
            cfg = find("create_model", model, tag)
            defaults = cfg.model_kwargs
            saved = read_pretrained("create_model", cfg) if pretrained else None
    _check_known(model, kwargs)
    if pretrained and saved is not None:
        return build("create_model", saved, kwargs).eval()
    return _MODELS[model](**{**(defaults or {}), **kwargs})


def _check_model(model: Any) -> None:
    """Raise ValueError for a model that is not known."""
    if not isinstance(model, str) or model not in _MODELS:
        hint = did_you_mean(str(model), _MODELS)
        raise ValueError(
            f"create_model: no model is named {model!r}, there are {', '.join(list_models())}{hint}"
        )


def _check_known(model: str, kwargs: dict[str, Any]) -> None:
    """Raise TypeError for an argument that the class of the model does not have."""
    known = list(signature(_MODELS[model]).parameters)
    for name in kwargs:
        if name not in known:
            hint = did_you_mean(name, known) or f"; it has {', '.join(known)}"
            raise TypeError(f"create_model: {model} has no argument {name!r}{hint}")
