"""Capsule layers, one file a family.

Each takes any image size, channel count and number of classes. Capsules travel between layers as
(B, capsules, dimension) tensors, or as `Capsules` where an activation goes with each pose.
"""

from tritoncaps.layers.capsules import Capsules, capsule_lengths
from tritoncaps.layers.decoder import ReconstructionDecoder
from tritoncaps.layers.primary import PrimaryCapsules
from tritoncaps.layers.routed import RoutedCapsules

__all__ = [
    "Capsules",
    "PrimaryCapsules",
    "ReconstructionDecoder",
    "RoutedCapsules",
    "capsule_lengths",
]
