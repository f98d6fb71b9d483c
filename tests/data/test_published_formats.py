"""CIFAR-10, SVHN, affNIST and EMNIST: their files are read as published, or refused."""

import dataclasses
import gzip
import hashlib
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from image_sets import idx_bytes
from reliability.fuzzing import Edit, assert_nothing_was_claimed, edited, edits, little_memory

from tritoncaps.data import DatasetError, load_dataset
from tritoncaps.data.affnist import read_affnist
from tritoncaps.data.cifar import RECORD, read_cifar
from tritoncaps.data.files import DataFile
from tritoncaps.data.registry import REGISTRY
from tritoncaps.data.svhn import read_svhn

io = pytest.importorskip("scipy.io", reason="scipy writes the Matlab files of these tests")


def drawn(*shape):
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


# CIFAR-10 -----------------------------------------------------------------------------------------

FEW = 4  # images in a batch of the tests


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A "CIFAR-10" whose six batches have four images each: its folder, pixels and labels."""
    entry = REGISTRY["cifar10"]
    files = tuple(DataFile(file.name, (FEW, RECORD)) for file in entry.files)
    monkeypatch.setitem(REGISTRY, "cifar10", dataclasses.replace(entry, files=files))
    folder = tmp_path / entry.folder
    folder.mkdir()
    pixels, labels = drawn(6 * FEW, 3, 32, 32), torch.arange(6 * FEW, dtype=torch.uint8) % 10
    for number, file in enumerate(files):
        part = slice(number * FEW, (number + 1) * FEW)
        records = torch.cat([labels[part, None], pixels[part].flatten(1)], dim=1)
        (folder / file.name).write_bytes(records.numpy().tobytes())
    return folder, pixels, labels.long()


def test_records_of_cifar_are_a_label_and_three_planes(cifar):
    folder, pixels, labels = cifar
    dataset = load_dataset("cifar10", folder.parent)
    assert torch.equal(torch.cat([dataset.train.images, dataset.test.images]), pixels)
    assert torch.equal(torch.cat([dataset.train.labels, dataset.test.labels]), labels)
    assert len(dataset.test) == FEW and dataset.class_names[9] == "truck"
    assert dataset.note == f"CIFAR-10, found in {folder}, only the shapes of its files verified"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], f"expected records of {RECORD} bytes, it has 12291 bytes"),
        (lambda content: b"", f"expected records of {RECORD} bytes, it has 0 bytes"),
        (lambda content: content + content, r"expected the shape \(4, 3073\), it has \(8, 3073\)"),
        (lambda content: b"\x0a" + content[1:], r"expected labels in 0 \.\. 9, it has 10"),
    ],
)
def test_a_damaged_batch_of_cifar_is_refused(cifar, change, message):
    path = cifar[0] / "data_batch_3.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DatasetError, match=rf"^{path} .*{message}"):
        load_dataset("cifar10", cifar[0].parent)


def test_unverified_batches_of_cifar_may_have_any_size(cifar):
    path = cifar[0] / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:RECORD])
    assert len(load_dataset("cifar10", cifar[0].parent, verify=False).train) == 4 * FEW + 1


@pytest.mark.parametrize("name", ["cifar-10-batches-py", "cifar-10-python.tar.gz"])
def test_pickles_of_cifar_are_refused_with_the_reason(tmp_path, name):
    (tmp_path / name).mkdir()
    message = rf"^{tmp_path}/{name} is the python version .* can run any code\. Get the binary"
    with pytest.raises(DatasetError, match=message):
        load_dataset("cifar10", tmp_path)


# SVHN ---------------------------------------------------------------------------------------------


def matlab_bytes(folder, compressed=True, **variables):
    """Encode variables as a Matlab file, version 5."""
    io.savemat(folder / "made", variables, do_compression=compressed, appendmat=False)
    content = (folder / "made").read_bytes()
    (folder / "made").unlink()
    return content


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """An "SVHN" of eleven and five images: its folder, and X and y of the training set."""
    folder = tmp_path / "svhn"
    folder.mkdir()
    files = []
    for name, count in (("train_32x32.mat", 11), ("test_32x32.mat", 5)):
        X, y = drawn(32, 32, 3, count), torch.arange(count, dtype=torch.uint8)[:, None] % 10 + 1
        content = matlab_bytes(folder, X=X.numpy(), y=y.numpy())
        (folder / name).write_bytes(content)
        md5 = f"md5:{hashlib.md5(content).hexdigest()}"
        files.append(DataFile(name, tuple(X.shape), download=name, download_hash=md5))
        if count == 11:
            train = X, y
    entry = dataclasses.replace(REGISTRY["svhn"], files=tuple(files))
    monkeypatch.setitem(REGISTRY, "svhn", entry)
    return folder, *train


def test_images_of_svhn_come_first_and_its_tens_are_zeros(svhn):
    folder, X, _ = svhn
    dataset = load_dataset("svhn", folder.parent)
    assert dataset.note == f"SVHN, found in {folder}"
    assert torch.equal(dataset.train.images, X.permute(3, 2, 0, 1))
    assert dataset.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert len(dataset.test) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(11, 1, dtype=torch.uint8)}, r"labels in 1 \.\. 10, it has 0"),
        ({"y": torch.full((11, 1), 11, dtype=torch.uint8)}, r"labels in 1 \.\. 10, it has 11"),
        ({"y": torch.full((11, 1), 1.5)}, r"labels in 1 \.\. 10, it has 1\.5"),
        ({"y": torch.ones(10, 1, dtype=torch.uint8)}, r"y \(N, 1\), it has .* y \(10, 1\)"),
        ({"X": drawn(32, 32, 11)}, r"X \(H, W, 3, N\) .*, it has X \(32, 32, 11\), torch\.uint8"),
        ({"X": drawn(32, 32, 2, 11)}, r"it has X \(32, 32, 2, 11\), torch\.uint8, and y"),
        ({"X": drawn(32, 32, 3, 11).double()}, r"it has X \(32, 32, 3, 11\), torch\.float64"),
        ({"X": None}, "expected the arrays X and y, it has y"),
    ],
)
def test_another_content_of_svhn_is_refused(svhn, change, message):
    folder, X, y = svhn
    variables = {"X": X, "y": y} | change
    given = {name: array.numpy() for name, array in variables.items() if array is not None}
    (folder / "train_32x32.mat").write_bytes(matlab_bytes(folder, **given))
    with pytest.raises(DatasetError, match=message):
        load_dataset("svhn", folder.parent, verify=False)
    with pytest.raises(DatasetError, match=r"the published content \(MD5 .*\), it has another"):
        load_dataset("svhn", folder.parent)


def test_svhn_is_read_from_gz_too(svhn):
    folder, X, _ = svhn
    path = folder / "train_32x32.mat"
    (folder / "train_32x32.mat.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert torch.equal(load_dataset("svhn", folder.parent).train.images, X.permute(3, 2, 0, 1))


def test_a_matlab_file_of_another_version_is_refused(svhn):
    path = svhn[0] / "test_32x32.mat"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600))
    with pytest.raises(DatasetError, match=r"a Matlab file of version 5, it has the header"):
        load_dataset("svhn", svhn[0].parent, verify=False)


# affNIST ------------------------------------------------------------------------------------------


@pytest.fixture
def affnist(tmp_path, monkeypatch):
    """An "affNIST" of three and two images: its folder, pixels (N, H, W) and labels."""
    entry = REGISTRY["affnist"]
    folder = tmp_path / entry.folder
    pixels, labels, files = drawn(5, 40, 40), torch.tensor([7, 0, 9, 4, 5]), []
    for file, part in zip(entry.files, (slice(0, 3), slice(3, 5)), strict=True):
        columns = pixels[part].reshape(-1, 1600).T  # a column is an image, row by row
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = affnist_data(columns, labels[None, part])
        path.write_bytes(matlab_bytes(path.parent, **data))
        files.append(DataFile(file.name, tuple(columns.shape)))
    monkeypatch.setitem(REGISTRY, "affnist", dataclasses.replace(entry, files=tuple(files)))
    return folder, pixels, labels


def affnist_data(image, label):
    label = label.numpy().astype("uint8")
    return {"affNISTdata": {"image": image.numpy(), "label_int": label, "name": "1"}}


def test_images_of_affnist_are_upright(affnist):
    folder, pixels, labels = affnist
    dataset = load_dataset("affnist", folder.parent)
    assert torch.equal(torch.cat([dataset.train.images, dataset.test.images])[:, 0], pixels)
    assert torch.equal(torch.cat([dataset.train.labels, dataset.test.labels]), labels)
    assert dataset.note.endswith("only the shapes of its files verified")
    # The names inside of training_and_validation.mat.zip and test_batches.zip.
    published = {"just_centered/training_and_validation.mat", "transformed/test_batches/1.mat"}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.mat")} == published


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (drawn(1600, 4), torch.zeros(1, 4), r"the shape \(1600, 2\), it has \(1600, 4\)"),
        (drawn(1600, 2), torch.zeros(1, 3), r"labels \(1, 2\), it has .*label_int \(1, 3\)"),
        (drawn(1600, 2), torch.full((1, 2), 10), r"labels in 0 \.\. 9, it has 10"),
        (drawn(1600, 2).double(), torch.zeros(1, 2), r"of bytes, it has .*torch\.float64"),
    ],
)
def test_another_content_of_affnist_is_refused(affnist, image, label, message):
    path = affnist[0] / "transformed/test_batches/1.mat"
    path.write_bytes(matlab_bytes(path.parent, **affnist_data(image, label)))
    with pytest.raises(DatasetError, match=message):
        load_dataset("affnist", affnist[0].parent)
    path.write_bytes(matlab_bytes(path.parent, image=image.numpy()))
    with pytest.raises(DatasetError, match=r"affNISTdata\.label_int, it has none of them"):
        load_dataset("affnist", affnist[0].parent)


# EMNIST -------------------------------------------------------------------------------------------


def test_images_of_emnist_are_turned_upright(tmp_path, monkeypatch):
    entry = REGISTRY["emnist-digits"]
    folder = tmp_path / entry.folder
    folder.mkdir(parents=True)
    pixels, labels = drawn(5, 28, 28), torch.tensor([3, 1, 4, 1, 5], dtype=torch.uint8)
    files = []
    for number, file in enumerate(entry.files):
        content = labels if number % 2 else pixels
        (folder / file.name).write_bytes(idx_bytes(content))
        files.append(dataclasses.replace(file, shape=tuple(content.shape)))
    changed = dataclasses.replace(entry, files=tuple(files))
    monkeypatch.setitem(REGISTRY, "emnist-digits", changed)
    dataset = load_dataset("emnist-digits", tmp_path)
    assert torch.equal(dataset.train.images[:, 0], pixels.transpose(1, 2))
    assert dataset.test.labels.tolist() == labels.tolist()


# Damage -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """Changes to a file, and how it is stored and read."""

    edits: list[Edit]
    compressed: bool
    verify: bool


damages = st.builds(
    Damage, edits=st.lists(edits, max_size=2), compressed=st.booleans(), verify=st.booleans()
)


def test_cifar_files(fuzz, tmp_path):
    """Damaged files are read as what they now say, or refused with the documented error."""
    content = drawn(2, RECORD).remainder(10).numpy().tobytes()
    file = DataFile("batch.bin", (2, RECORD))

    def check(case):
        (tmp_path / "batch.bin").unlink(missing_ok=True)
        (tmp_path / "batch.bin.gz").unlink(missing_ok=True)
        if case.compressed:
            packed = edited(gzip.compress(content, mtime=0), case.edits)
            (tmp_path / "batch.bin.gz").write_bytes(packed)
        else:
            (tmp_path / "batch.bin").write_bytes(edited(content, case.edits))
        problem = read_or_refused(lambda: read_cifar(tmp_path, [file, file], 10, case.verify))
        assert_nothing_was_claimed(problem)

    fuzz(damages, check)


def svhn_variables():
    X, y = drawn(3, 2, 3, 4), torch.tensor([[1], [5], [9], [10]], dtype=torch.uint8)
    return X.shape, {"X": X.numpy(), "y": y.numpy()}


def affnist_variables():
    image = drawn(1600, 2)
    return image.shape, affnist_data(image, torch.tensor([[3, 8]]))


@pytest.mark.parametrize(
    ("read", "variables"), [(read_svhn, svhn_variables), (read_affnist, affnist_variables)]
)
def test_matlab_files(fuzz, tmp_path, read, variables):
    """Damaged files are read as what they now say, or refused with the documented error."""
    shape, named = variables()
    contents = [matlab_bytes(tmp_path, packed, **named) for packed in (False, True)]
    file = DataFile("1.mat", tuple(shape))

    def check(case):
        (tmp_path / "1.mat").write_bytes(edited(contents[case.compressed], case.edits))
        problem = read_or_refused(lambda: read(tmp_path, [file, file], 10, case.verify))
        assert_nothing_was_claimed(problem)

    fuzz(damages, check)


@pytest.mark.parametrize("packed", [False, True], ids=["array", "gz"])
def test_a_verified_matlab_file_unpacks_to_little(tmp_path, packed):
    """A file of a megabyte that unpacks to a gigabyte is refused before it fills the memory."""
    file = DataFile("1.mat", (1600, 2))
    zeros = torch.zeros(1600, 50_000, dtype=torch.uint8)
    content = matlab_bytes(tmp_path, not packed, zeros=zeros.numpy())
    path = tmp_path / ("1.mat.gz" if packed else "1.mat")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DatasetError, match=r"at most 91136 bytes, it has more"):
        read_affnist(tmp_path, [file, file], 10, verify=True)


def read_or_refused(read):
    """Check what was read. Returns the error if it was refused."""
    with little_memory():
        try:
            found, _ = read()
        except DatasetError as error:
            assert "is damaged or not what its name says" in str(error)
            return error
    assert 0 <= int(found.labels.min()) <= int(found.labels.max()) < 10
    assert len(found.images) == len(found.labels) > 0
    return None
