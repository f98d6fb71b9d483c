"""Capsule-network operators, layers and models, accelerated with Triton.

`ops` holds the functional operators, `reference` the same mathematics in einsum, `layers` and
`losses` the modules, `models` the networks and `data` the data sets. `testing` runs this package's
own checks on a routing that you wrote.
"""

from tritoncaps import layers, losses, ops, reference
from tritoncaps._version import __version__
from tritoncaps.layers import (
    CapsuleHead,
    Capsules,
    PrimaryCapsules,
    ReconstructionDecoder,
    RoutedCapsules,
)
from tritoncaps.losses import CapsuleLoss, MarginLoss

__all__ = [
    "CapsuleHead",
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
