"""Trained weights by name, in the way of timm: ``efficient_capsnet.mnist`` is a model and a tag.

The folder weights/ holds those that come with the package. Each has a safetensors file, a model
card and an entry in registry.json, all written by ``tools/ship_weights.py``. A model's first entry
is its default.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "weights"
REGISTRY = "registry.json"

_TEXTS = ("tag", "file", "hf_hub_id", "dataset", "scaling", "license", "description", "origin_url")
_LISTS = ("class_names", "paper_ids")


@dataclass(frozen=True)
class PretrainedCfg:
    """What is known about trained weights, as the attribute `pretrained_cfg` of a loaded model.

    Args:
        model: the name of the model for `create_model`.
        model_kwargs: the arguments of its class.
        tag: tells weights of one model apart.
        file: the weights among those that come with the package.
        hf_hub_id: the repository ``owner/name`` on the Hugging Face Hub, where there is no file.
        dataset: what it was trained on.
        class_names: what each class stands for.
        scaling: how pixels in 0 .. 255 become the model's input. No mean is subtracted.
        license: of the weights.
        description: one line.
        origin_url: where the weights were first published.
        paper_ids: papers, such as ``arXiv:2101.12491``.
    """

    model: str
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tag: str = ""
    file: str = ""
    hf_hub_id: str = ""
    dataset: str = ""
    class_names: tuple[str, ...] = ()
    scaling: str = "pixels / 255"
    license: str = ""
    description: str = ""
    origin_url: str = ""
    paper_ids: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PretrainedCfg:
        """Read the header of a run's weights, a config.json or an entry of the registry.

        Other entries are left out, and so are those of a wrong type, or class names of another
        number than that of the classes: they only describe.
        """
        known: dict[str, Any] = {
            name: config[name] for name in _TEXTS if isinstance(config.get(name), str)
        }
        for name in _LISTS:
            if isinstance(items := config.get(name), (list, tuple)):
                known[name] = tuple(map(str, items))
        cfg = cls(config["model"], config.get("model_kwargs", {}), **known)
        is_named = cfg.num_classes in (None, len(cfg.class_names))
        return cfg if is_named else replace(cfg, class_names=())

    def to_config(self) -> dict[str, Any]:
        """Return what is known, as plain values for JSON."""
        return {name: value for name, value in asdict(self).items() if value}

    @property
    def name(self) -> str:
        """The name for `create_model`."""
        return f"{self.model}.{self.tag}" if self.tag else self.model

    @property
    def num_classes(self) -> int | None:
        """The number of classes, K."""
        return self.model_kwargs.get("num_classes")

    @property
    def input_size(self) -> tuple[int, int, int] | None:
        """(channels, height, width) of the images, or None if the arguments do not say it."""
        channels, size = map(self.model_kwargs.get, ("in_channels", "image_size"))
        sides = size if isinstance(size, (tuple, list)) else (size, size)
        shape: tuple[Any, ...] = (channels, *sides)
        if len(shape) != 3 or not all(isinstance(side, int) for side in shape):
            return None
        return (shape[0], shape[1], shape[2])


def registry() -> list[PretrainedCfg]:
    """Return what is known about all pretrained weights. A model's default comes first."""
    entries = json.loads((FOLDER / REGISTRY).read_text(encoding="utf-8"))
    return [PretrainedCfg.from_config(entry) for entry in entries]


def split_name(name: str) -> tuple[str, str | None]:
    """Return the model and the tag of ``model.tag``. The tag is None if there is no dot."""
    model, dot, tag = name.partition(".")
    return model, tag if dot else None


def find(function: str, model: str, tag: str | None) -> PretrainedCfg:
    """Return the pretrained weights of a model, the default ones where the tag is None.

    Raises:
        ValueError: there are none, or none with this tag.
    """
    known = registry()
    own = {cfg.tag: cfg for cfg in known if cfg.model == model}
    if not own:
        others = ", ".join(cfg.name for cfg in known)
        remedy = f"use {others}, or " if others else ""
        raise ValueError(
            f"{function}: there are no pretrained weights of {model}; {remedy}train it and read "
            "the run with load_model"
        )
    if tag is None:
        return next(iter(own.values()))
    if tag not in own:
        raise ValueError(
            f"{function}: {model} has no pretrained weights with the tag {tag!r}, the tags are "
            f"{', '.join(own)}{did_you_mean(tag, own)}"
        )
    return own[tag]


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return the end of an error that names the most similar of these lowercase names, if any."""
    close = get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
