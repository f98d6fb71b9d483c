"""Capsule-network operators, layers and models, accelerated with Triton.

`ops` holds the functional operators, `reference` the same mathematics in einsum, `layers` and
`losses` the modules, `models` the networks and `data` the data sets. `export` writes models for
programs without this package. `testing` runs this package's own checks on a routing that you wrote.
`backend_info` says what computes the operators here.
"""

from importlib import import_module
from typing import Any

from tritoncaps import layers, losses, ops, reference
from tritoncaps._backends import backend_info
from tritoncaps._version import __version__
from tritoncaps.layers import (
    CapsuleHead,
    Capsules,
    PrimaryCapsules,
    ReconstructionDecoder,
    RoutedCapsules,
)
from tritoncaps.losses import CapsuleLoss, MarginLoss, SpreadLoss

__all__ = [
    "CapsuleHead",
    "CapsuleLoss",
    "Capsules",
    "MarginLoss",
    "PrimaryCapsules",
    "ReconstructionDecoder",
    "RoutedCapsules",
    "SpreadLoss",
    "__version__",
    "backend_info",
    "layers",
    "losses",
    "ops",
    "reference",
]

# Imported when they are first used: not every program needs them.
_LATER = ("data", "export", "models", "testing")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
