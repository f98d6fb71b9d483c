"""The networks, by class or by name."""

from difflib import get_close_matches
from typing import Any

from torch import nn

from tritoncaps._files import CheckpointError
from tritoncaps.models._load import load_model
from tritoncaps.models._parts import CapsuleOutput
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


def list_models() -> list[str]:
    """Return the names that `create_model` knows.

    Example:
        >>> list_models()
        ['capsnet', 'deep_capsnet', 'efficient_capsnet', 'inverted_capsnet']
    """
    return sorted(_MODELS)


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """Build a model by name. The `kwargs` are arguments of its class.

    Raises:
        TypeError: the name is not a str.
        ValueError: no model has this name.
        TypeError, ValueError: an argument that the class refuses.

    Example:
        >>> model = create_model("deep_capsnet", num_classes=10)
        >>> sum(p.numel() for p in model.parameters())
        7869200
    """
    if not isinstance(name, str):
        raise TypeError(f"create_model: name must be a str, got {type(name).__name__}")
    if name not in _MODELS:
        close = get_close_matches(name, _MODELS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"create_model: no model is named {name!r}, there are {', '.join(list_models())}{hint}"
        )
    return _MODELS[name](**kwargs)
