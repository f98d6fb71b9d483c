"""Small image sets for tests, and the bytes of IDX and of smallNORB's files."""

import os
import struct
from pathlib import Path

import pytest
import torch

from tritoncaps.data import ImageSet, ViewSet, rendered_solids

# A file that opens, but cannot be read at its start, whoever asks.
UNREADABLE = Path("/proc/self/mem")
needs_unreadable = pytest.mark.skipif(
    not UNREADABLE.exists(), reason=f"{UNREADABLE}, which opens but cannot be read, is not there"
)
needs_mnist = pytest.mark.skipif(
    "TRITONCAPS_MNIST" not in os.environ,
    reason="TRITONCAPS_MNIST does not name a folder that holds MNIST/raw",
)


def make_set(count, *, height=6, width=5, seed=0):
    """Make random images with labels 0, 1, … 9, 0, 1, …"""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 1, height, width), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 10)


def assert_same_set(actual, expected):
    assert torch.equal(actual.images, expected.images)
    assert torch.equal(actual.labels, expected.labels)


def pixels_of(images):
    """Return the images as a set of byte strings."""
    return {bytes(image.flatten().tolist()) for image in images}


def idx_bytes(content):
    """Encode a uint8 tensor as an IDX file."""
    header = struct.pack(f">{1 + content.ndim}I", 0x0800 + content.ndim, *content.shape)
    return header + bytes(content.flatten().tolist())


def norb_bytes(content):
    """Encode a uint8 or int32 tensor as smallNORB does: at least three sizes are written."""
    magic = {torch.uint8: 0x1E3D4C55, torch.int32: 0x1E3D4C54}[content.dtype]
    sizes = (*content.shape, *[1] * (3 - content.ndim))
    header = struct.pack(f"<{2 + len(sizes)}i", magic, content.ndim, *sizes)
    return header + content.numpy().tobytes()


def few_solids(**options):
    """Render a solid of each class from a few viewpoints."""
    return rendered_solids(
        **{"size": 20, "instances": 1, "elevations": [0, 40], "azimuths": [0, 90, 180, 330],
           "lightings": 2, **options}
    )  # fmt: skip


def taken(images: ViewSet, **view):
    """Return the images of a view, such as azimuth=90."""
    chosen = torch.ones(len(images), dtype=torch.bool)
    for name, value in view.items():
        chosen &= images.view(name) == value
    return images.subset(chosen)
