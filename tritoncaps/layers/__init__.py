"""Capsule layers, one file per family.

The layers support any image size, channel count and number of classes. Capsules travel between
layers as (B, capsules, dimension) tensors, or as `Capsules` if each pose has its own activation.
Those of a grid are (B, H, W, types, dimension).
"""

from tritoncaps.layers._poses import affine_pose
from tritoncaps.layers.attention import AttentionCapsules, InvertedAttentionCapsules
from tritoncaps.layers.calibrate import Calibrated, DeadLayer, calibrate, dead_layers
from tritoncaps.layers.capsules import Capsules, capsule_lengths
from tritoncaps.layers.convolutional import ConvRoutedCapsules
from tritoncaps.layers.decoder import ReconstructionDecoder
from tritoncaps.layers.head import CapsuleHead
from tritoncaps.layers.matrix import (
    ClassCapsules,
    ClassMatrixCapsules,
    ConvMatrixCapsules,
    PrimaryMatrixCapsules,
)
from tritoncaps.layers.objects import ObjectDecoder, ObjectVotes, SetTransformer
from tritoncaps.layers.parts import DrawnParts, PartEncoder, Parts, TemplateDecoder
from tritoncaps.layers.primary import PrimaryCapsules
from tritoncaps.layers.routed import RoutedCapsules

__all__ = [
    "AttentionCapsules",
    "Calibrated",
    "CapsuleHead",
    "Capsules",
    "ClassCapsules",
    "ClassMatrixCapsules",
    "ConvMatrixCapsules",
    "ConvRoutedCapsules",
    "DeadLayer",
    "DrawnParts",
    "InvertedAttentionCapsules",
    "ObjectDecoder",
    "ObjectVotes",
    "PartEncoder",
    "Parts",
    "PrimaryCapsules",
    "PrimaryMatrixCapsules",
    "ReconstructionDecoder",
    "RoutedCapsules",
    "SetTransformer",
    "TemplateDecoder",
    "affine_pose",
    "calibrate",
    "capsule_lengths",
    "dead_layers",
]
