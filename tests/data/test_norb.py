"""smallNORB: its files are read as their authors describe them, or refused."""

import dataclasses
import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from image_sets import norb_bytes
from reliability.fuzzing import Edit, assert_nothing_was_claimed, edited, edits, little_memory

from tritoncaps.data import DatasetError, ViewSet, load, load_dataset
from tritoncaps.data.files import DataFile
from tritoncaps.data.norb import read_norb
from tritoncaps.data.registry import REGISTRY

KINDS = ("dat", "cat", "info")


@dataclass
class TinyNorb:
    """A "smallNORB" of 6 and 4 stereo pairs of 6x8 pixels."""

    data_dir: Path

    def __post_init__(self):
        generator = torch.Generator().manual_seed(1)
        self.folder = self.data_dir / "smallnorb"
        self.arrays = {}
        for part, instances in (("training", [4, 6, 7, 8, 9, 4]), ("testing", [5, 0, 3, 2])):
            count = len(instances)
            pixels = torch.randint(256, (count, 2, 6, 8), generator=generator, dtype=torch.uint8)
            number = torch.arange(count, dtype=torch.int32)
            instance = torch.tensor(instances, dtype=torch.int32)
            info = torch.stack([instance, number, 34 - 2 * number, number % 6], dim=1)
            for kind, array in zip(KINDS, (pixels, number % 5, info), strict=True):
                self.arrays[f"{part}-{kind}.mat"] = array
        self.files = tuple(
            DataFile(name, tuple(array.shape)) for name, array in self.arrays.items()
        )

    def write(self):
        self.folder.mkdir(parents=True)
        for name, array in self.arrays.items():
            (self.folder / name).write_bytes(norb_bytes(array))

    def edit(self, name, change):
        path = self.folder / name
        path.write_bytes(change(path.read_bytes()))

    def load(self, **options):
        return load_dataset("smallnorb", self.data_dir, **options)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    tiny = TinyNorb(tmp_path / "data")
    entry = dataclasses.replace(REGISTRY["smallnorb"], files=tiny.files)
    monkeypatch.setitem(REGISTRY, "smallnorb", entry)
    return tiny


def test_images_categories_and_views_are_read(tiny):
    tiny.write()
    dataset = tiny.load()
    assert dataset.class_names == ("animal", "human", "plane", "truck", "car")
    assert dataset.note.endswith("data/smallnorb, only the shapes of its files verified")
    assert isinstance(dataset.train, ViewSet) and isinstance(dataset.test, ViewSet)
    assert dataset.train.labels.tolist() == [0, 1, 2, 3, 4, 0]
    assert dataset.test.view("instance").tolist() == [5, 0, 3, 2]
    assert dataset.train.view("elevation").tolist() == [30, 35, 40, 45, 50, 55]
    assert dataset.train.view("azimuth").tolist() == [340, 320, 300, 280, 260, 240]
    assert dataset.train.view("lighting").tolist() == [0, 1, 2, 3, 4, 5]
    # The mean of 2×2 pixels.
    pixels = tiny.arrays["testing-dat.mat"].double().reshape(4, 2, 3, 2, 4, 2).mean(dim=(3, 5))
    assert torch.equal(dataset.test.images, pixels.round().to(torch.uint8))


def test_gz_files_are_read_and_nothing_is_written(tiny):
    tiny.write()
    for name in tiny.arrays:
        plain = tiny.folder / name
        plain.with_name(f"{name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    assert len(tiny.load().train) == 6
    assert {path.suffix for path in tiny.folder.iterdir()} == {".gz"}


def test_the_published_files_have_their_sizes():
    """Of the format: 24 bytes before the images, 20 before categories and views."""
    entry = REGISTRY["smallnorb"]
    assert [file.shape for file in entry.files[:3]] == [(24300, 2, 96, 96), (24300,), (24300, 4)]
    assert [file.shape for file in entry.files[3:]] == [file.shape for file in entry.files[:3]]
    assert len({file.name for file in entry.files}) == 6
    names = {"dat": 24, "cat": 20, "info": 20}
    for file, kind in zip(entry.files[:3], KINDS, strict=True):
        one = torch.zeros((1, *file.shape[1:]), dtype=torch.uint8)
        assert file.name.endswith(f"-training-{kind}.mat")
        assert len(norb_bytes(one)) - one.numel() == names[kind]


def damaged(name, at, value):
    """Write an int32 over another one of a file."""
    return name, lambda c: c[:at] + value.to_bytes(4, "little", signed=True) + c[at + 4 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (("training-dat.mat", lambda c: c[:-1]), "expected 600 bytes, it has 599"),
        (("training-dat.mat", lambda c: c + b"0"), "expected 600 bytes, it has 601 or more"),
        (("testing-cat.mat", lambda c: c[:19]), "expected at least 20 bytes, it has 19"),
        (("training-cat.mat", lambda c: b"MATLAB" + c), "magic number 0x1e3d4c55 or 0x1e3d4c54"),
        (damaged("training-dat.mat", 4, 3), "expected 4 axes, it has 3"),
        (damaged("training-dat.mat", 8, 5), r"the shape \(6, 2, 6, 8\), it has \(5, 2, 6, 8\)"),
        (
            ("training-dat.mat", lambda c: norb_bytes(torch.zeros(6, 2, 6, 8, dtype=torch.int32))),
            "expected pixels of one byte, it has int32",
        ),
        (damaged("training-dat.mat", 12, -1), r"at least one entry, it has the shape"),
        (damaged("training-cat.mat", 20, 5), r"categories in 0 \.\. 4, it has 5"),
        (damaged("training-cat.mat", 20, -1), r"categories in 0 \.\. 4, it has -1"),
        (damaged("testing-info.mat", 24, 9), r"elevations in 0 \.\. 8, it has 9"),
        (damaged("testing-info.mat", 28, 36), r"azimuths in 0 \.\. 35, it has 36"),
    ],
)
def test_a_damaged_file_is_named(tiny, damage, message):
    name, change = damage
    tiny.write()
    tiny.edit(name, change)
    with pytest.raises(DatasetError, match=message) as caught:
        tiny.load()
    assert str(caught.value).startswith(f"{tiny.folder / name} is damaged")
    # No server has it.
    assert str(caught.value).endswith("Delete it, then put the published file there.")


def test_swapped_sets_are_refused(tiny):
    """Their files have the same shapes, but the instances are in their names."""
    tiny.write()
    for kind in KINDS:
        one, other = (tiny.folder / f"{part}-{kind}.mat" for part in ("training", "testing"))
        spare = other.read_bytes()
        other.write_bytes(one.read_bytes())
        one.write_bytes(spare)
    shapes = (tiny.files[3:], tiny.files[:3])
    files = [
        dataclasses.replace(file, shape=of.shape)
        for part, others in zip((tiny.files[:3], tiny.files[3:]), shapes, strict=True)
        for file, of in zip(part, others, strict=True)
    ]
    message = r"training-info.mat .* instances \(4, 6, 7, 8, 9\), it has \(0, 2, 3, 5\)\. Delete"
    with pytest.raises(DatasetError, match=message):
        read_norb(tiny.folder, files, 5, verify=True)
    assert len(read_norb(tiny.folder, files, 5, verify=False)[0]) == 4


def test_a_known_checksum_is_verified(tiny, monkeypatch):
    tiny.write()
    first = dataclasses.replace(tiny.files[0], sha256=hashlib.sha256(b"another").hexdigest())
    entry = dataclasses.replace(REGISTRY["smallnorb"], files=(first, *tiny.files[1:]))
    monkeypatch.setitem(REGISTRY, "smallnorb", entry)
    with pytest.raises(DatasetError, match="the published content"):
        tiny.load()


def test_without_verify_the_files_must_still_fit(tiny):
    tiny.write()
    images = torch.zeros(7, 2, 4, 4, dtype=torch.uint8)
    tiny.edit("training-dat.mat", lambda _: norb_bytes(images))
    with pytest.raises(DatasetError, match=r"has 7 images but training-cat\.mat .* has 6 entries"):
        tiny.load(verify=False)
    tiny.edit("training-dat.mat", lambda _: norb_bytes(images[:6]))
    tiny.edit("testing-dat.mat", lambda _: norb_bytes(images[:4]))
    unverified = tiny.load(verify=False)
    assert unverified.train.images.shape == (6, 2, 2, 2)
    assert unverified.note == f"smallNORB, found in {tiny.folder}, not verified"
    tiny.edit("training-dat.mat", lambda _: norb_bytes(images[:6, :, :1]))
    with pytest.raises(DatasetError, match="images of 2x2 pixels or more"):
        tiny.load(verify=False)
    tiny.edit("training-dat.mat", lambda _: norb_bytes(images[:6]))
    tiny.edit("training-info.mat", lambda _: norb_bytes(torch.zeros(6, 3, dtype=torch.int32)))
    with pytest.raises(DatasetError, match="4 columns"):
        tiny.load(verify=False)


def test_files_that_are_missing_are_asked_for(tiny):
    assert not load.has_files("smallnorb", tiny.data_dir)
    message = (
        r"it lacks training-dat\.mat, .* \(no server is known\)\. Put the files there, .*gz\.$"
    )
    with pytest.raises(DatasetError, match=message):
        tiny.load()
    tiny.write()
    (tiny.folder / "testing-cat.mat").unlink()
    assert load.has_files("smallnorb", tiny.data_dir)
    with pytest.raises(DatasetError, match=r"it lacks testing-cat\.mat and was not downloaded"):
        tiny.load()


@dataclass(frozen=True)
class Damage:
    """Changes to the three files of a set."""

    edits: list[list[Edit]]
    packed: bool
    verify: bool


damages = st.builds(
    Damage,
    edits=st.lists(st.lists(edits, max_size=2), min_size=3, max_size=3),
    packed=st.booleans(),
    verify=st.booleans(),
)


def test_norb_files(fuzz, tiny):
    """Damaged files are read as what they now say, or refused with the documented error."""
    tiny.write()

    def check(case):
        for kind, changes in zip(KINDS, case.edits, strict=True):
            path = tiny.folder / f"training-{kind}.mat"
            content = norb_bytes(tiny.arrays[path.name])
            packed = path.with_name(f"{path.name}.gz")
            path.unlink(missing_ok=True)
            packed.unlink(missing_ok=True)
            if case.packed:
                packed.write_bytes(edited(gzip.compress(content, mtime=0), changes))
            else:
                path.write_bytes(edited(content, changes))
        problem = None
        with little_memory():
            try:
                found, _ = read_norb(tiny.folder, tiny.files, 5, verify=case.verify)
            except DatasetError as error:
                problem = error
        if problem is not None:
            assert str(problem).startswith(str(tiny.folder))
            assert_nothing_was_claimed(problem)
        else:
            assert 0 <= int(found.labels.min()) <= int(found.labels.max()) < 5
            assert int(found.view("azimuth").max()) < 360
            assert len(found.images) == len(found.labels) > 0

    fuzz(damages, check)
