"""Damaged IDX files are read as documented, or refused with a documented error."""

import gzip
import hashlib
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from image_sets import assert_same_set, idx_bytes, make_set
from reliability.fuzzing import Edit, assert_nothing_was_claimed, edited, edits, little_memory

from tritoncaps.data import DatasetError
from tritoncaps.data.files import DataFile
from tritoncaps.data.idx import read_image_set


@dataclass(frozen=True)
class Damage:
    """Changes to a file of images, to its labels, and to the .gz around them."""

    images: list[Edit]
    labels: list[Edit]
    packed: bool
    packing: list[Edit]
    verify: bool


a_few = st.lists(edits, max_size=2)
damages = st.builds(
    Damage, images=a_few, labels=a_few, packed=st.booleans(), packing=a_few, verify=st.booleans()
)


def test_idx_files(fuzz, tmp_path):
    """With verify, only the published content passes. Without it, any well-formed file does."""
    expected = make_set(6, height=4, width=3)
    images = idx_bytes(expected.images.squeeze(1))
    labels = idx_bytes(expected.labels.to(torch.uint8))
    files = [
        DataFile("images", (6, 4, 3), hashlib.sha256(images).hexdigest(), "", ""),
        DataFile("labels", (6,), hashlib.sha256(labels).hexdigest(), "", ""),
    ]

    def write(name, content, case):
        plain, packed = tmp_path / name, tmp_path / f"{name}.gz"
        plain.unlink(missing_ok=True)
        packed.unlink(missing_ok=True)
        if case.packed:
            packed.write_bytes(edited(gzip.compress(content, mtime=0), case.packing))
        else:
            plain.write_bytes(content)

    def check(case):
        write("images", edited(images, case.images), case)
        write("labels", edited(labels, case.labels), case)
        problem = None
        with little_memory():
            try:
                found = read_image_set(tmp_path, *files, num_classes=10, verify=case.verify)
            except DatasetError as error:
                problem = error
        if problem is not None:
            assert str(problem).startswith(str(tmp_path))
            assert_nothing_was_claimed(problem)
        elif case.verify:
            assert_same_set(found, expected)
        else:
            assert found.images.dtype == torch.uint8
            assert found.images.ndim == 4
            assert len(found.images) == len(found.labels) > 0
            assert int(found.labels.max()) < 10

    fuzz(damages, check)
