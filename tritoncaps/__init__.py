"""Capsule-network operators, layers and models, accelerated with Triton.

`ops` holds the functional operators, `reference` the same mathematics in einsum, `layers` and
`losses` the modules, `models` the networks, `data` the data sets. `testing` checks a routing of
your own as those here are checked.
"""

from tritoncaps import layers, losses, ops, reference
from tritoncaps._version import __version__
from tritoncaps.layers import (
    Capsules,
    PrimaryCapsules,
    ReconstructionDecoder,
    RoutedCapsules,
)
from tritoncaps.losses import CapsuleLoss, MarginLoss

__all__ = [
    "CapsuleLoss",
    "Capsules",
    "MarginLoss",
    "PrimaryCapsules",
    "ReconstructionDecoder",
    "RoutedCapsules",
    "__version__",
    "layers",
    "losses",
    "ops",
    "reference",
]
