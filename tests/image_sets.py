"""Small image sets for tests, and the bytes of IDX files."""

import os
import struct

import pytest
import torch

from tritoncaps.data import ImageSet

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
