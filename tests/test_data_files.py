"""Data: which files are read, which are refused and how, and what happens where there are none.

No test here reaches the network: the mirrors are servers on this machine.
"""

import dataclasses
import errno
import gzip
import hashlib
import http.server
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tritoncaps.data import (
    Dataset,
    DatasetError,
    ImageSet,
    download,
    list_datasets,
    load,
    load_dataset,
    to_float,
)
from tritoncaps.data.idx import IDX_SETS, IdxFile, IdxSet

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"


def idx_bytes(content: Tensor) -> bytes:
    """Write a uint8 tensor the way that IDX files hold it."""
    header = struct.pack(f">{1 + content.ndim}I", 0x0800 + content.ndim, *content.shape)
    return header + bytes(content.flatten().tolist())


def make_set(count: int, *, height: int = 6, width: int = 5, seed: int = 0) -> ImageSet:
    """Make random images, whose labels run through 0 .. 9."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 1, height, width), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 10)


@dataclasses.dataclass
class TinyMnist:
    """A published "MNIST" of 30 and 10 images of 6x5 pixels."""

    data_dir: Path
    contents: dict[str, bytes]
    train: ImageSet
    test: ImageSet

    @property
    def folder(self) -> Path:
        return self.data_dir / "MNIST" / "raw"

    def write(self) -> None:
        self.folder.mkdir(parents=True)
        for name, content in self.contents.items():
            (self.folder / name).write_bytes(content)

    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        path = self.folder / name
        path.write_bytes(change(path.read_bytes()))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyMnist:
    """The tiny MNIST in place of the real one, not yet written to its folder."""
    train, test = make_set(30, seed=1), make_set(10, seed=2)
    contents = {
        TRAIN_IMAGES: idx_bytes(train.images.squeeze(1)),
        TRAIN_LABELS: idx_bytes(train.labels.to(torch.uint8)),
        TEST_IMAGES: idx_bytes(test.images.squeeze(1)),
        TEST_LABELS: idx_bytes(test.labels.to(torch.uint8)),
    }
    shapes = {
        TRAIN_IMAGES: (30, 6, 5),
        TRAIN_LABELS: (30,),
        TEST_IMAGES: (10, 6, 5),
        TEST_LABELS: (10,),
    }
    files = [
        IdxFile(name, shapes[name], hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    ]
    spec = IdxSet("mnist", "MNIST", "MNIST", tuple("0123456789"), *files)
    monkeypatch.setitem(IDX_SETS, "mnist", spec)
    return TinyMnist(tmp_path / "data", contents, train, test)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a network."""

    def fetch(*_: object) -> None:
        raise download.DownloadError("no route to host")

    monkeypatch.setattr(load, "fetch", fetch)


@pytest.fixture
def no_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """No download is even tried."""

    def fetch(*_: object) -> None:
        raise AssertionError("a download was attempted")

    monkeypatch.setattr(load, "fetch", fetch)


def assert_same_set(actual: ImageSet, expected: ImageSet) -> None:
    assert torch.equal(actual.images, expected.images)
    assert torch.equal(actual.labels, expected.labels)


def assert_is_tiny(dataset: Dataset, tiny: TinyMnist) -> None:
    assert dataset.name == "mnist"
    assert_same_set(dataset.train, tiny.train)
    assert_same_set(dataset.test, tiny.test)


@pytest.mark.parametrize("name", ["auto", "mnist"])
@pytest.mark.usefixtures("no_attempt")
def test_files_in_the_folder_are_read(tiny: TinyMnist, name: str) -> None:
    tiny.write()
    dataset = load_dataset(name, tiny.data_dir)
    assert_is_tiny(dataset, tiny)
    assert dataset.class_names == tuple("0123456789")
    assert dataset.note == f"MNIST, found in {tiny.folder}"


@pytest.mark.usefixtures("no_attempt")
def test_gz_files_are_read_and_nothing_is_written(tiny: TinyMnist) -> None:
    tiny.write()
    for name, content in tiny.contents.items():
        (tiny.folder / name).unlink()
        (tiny.folder / f"{name}.gz").write_bytes(gzip.compress(content))
    before = sorted(tiny.folder.iterdir())
    assert_is_tiny(load_dataset("mnist", str(tiny.data_dir)), tiny)
    assert sorted(tiny.folder.iterdir()) == before


def flip_a_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def fewer_entries(content: bytes) -> bytes:
    """Shorten a file of 30 labels to a well-formed one of 29."""
    return content[:4] + struct.pack(">I", 29) + content[8:-1]


DAMAGES = {
    # name of the damage: file, change, what the message must contain
    "truncated": (TRAIN_IMAGES, lambda c: c[:500], ["expected 916 bytes", "has 500"]),
    "truncated-header": (TRAIN_IMAGES, lambda c: c[:7], ["expected 916 bytes", "has 7"]),
    "empty": (TEST_LABELS, lambda c: b"", ["expected 18 bytes", "has 0"]),
    "too-long": (TEST_LABELS, lambda c: c + b"more", ["expected 18 bytes", "has 19 or more"]),
    "foreign": (TEST_IMAGES, lambda c: b"<html>" + c, ["0x00000803", "0x3c68746d"]),
    "other-shape": (TRAIN_LABELS, fewer_entries, ["(30,)", "(29,)"]),
    "bit-flip": (TRAIN_IMAGES, flip_a_bit, ["SHA-256"]),
    "bit-flip-in-a-label": (TEST_LABELS, flip_a_bit, ["SHA-256"]),
}


@pytest.mark.parametrize("dataset", ["auto", "mnist"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.usefixtures("no_attempt")
def test_a_damaged_file_is_named_and_never_passed_over(
    tiny: TinyMnist, damage: str, dataset: str
) -> None:
    name, change, fragments = DAMAGES[damage]
    tiny.write()
    tiny.edit(name, change)
    with pytest.raises(DatasetError) as caught:
        load_dataset(dataset, tiny.data_dir)
    message = str(caught.value)
    for fragment in [str(tiny.folder / name), "Delete it", *fragments]:
        assert fragment in message


@pytest.mark.usefixtures("no_attempt")
def test_a_wrong_sum_shows_both(tiny: TinyMnist) -> None:
    tiny.write()
    tiny.edit(TRAIN_IMAGES, flip_a_bit)
    found = hashlib.sha256((tiny.folder / TRAIN_IMAGES).read_bytes()).hexdigest()
    with pytest.raises(DatasetError, match=f"{IDX_SETS['mnist'].train_images.sha256}.*{found}"):
        load_dataset("mnist", tiny.data_dir)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.usefixtures("no_attempt")
def test_swapped_images_and_labels_are_refused(tiny: TinyMnist, verify: bool) -> None:
    tiny.write()
    (tiny.folder / TRAIN_IMAGES).write_bytes(tiny.contents[TRAIN_LABELS])
    (tiny.folder / TRAIN_LABELS).write_bytes(tiny.contents[TRAIN_IMAGES])
    with pytest.raises(DatasetError, match=rf"{TRAIN_IMAGES} .*0x00000803 .*0x00000801"):
        load_dataset("mnist", tiny.data_dir, verify=verify)


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (lambda packed: packed[:-9], ["complete gzip file"]),
        (lambda packed: packed[:100], ["complete gzip file"]),
        (lambda packed: packed[:10] + b"\xff" * 20 + packed[30:], ["complete gzip file"]),
        (lambda packed: packed[:-8] + b"\0\0\0\0" + packed[-4:], ["complete gzip file", "CRC"]),
        (lambda packed: b"<html>" + packed, ["complete gzip file", "<h"]),
        (lambda packed: b"", ["expected 916 bytes", "has 0"]),
    ],
    ids=["no-trailer", "truncated", "bytes-overwritten", "wrong-crc", "no-gzip-file", "empty"],
)
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.usefixtures("no_attempt")
def test_a_damaged_gz_is_named(
    tiny: TinyMnist, damage: Callable[[bytes], bytes], fragments: list[str], verify: bool
) -> None:
    tiny.write()
    (tiny.folder / TRAIN_IMAGES).unlink()
    archive = tiny.folder / f"{TRAIN_IMAGES}.gz"
    archive.write_bytes(damage(gzip.compress(tiny.contents[TRAIN_IMAGES])))
    with pytest.raises(DatasetError) as caught:
        load_dataset("mnist", tiny.data_dir, verify=verify)
    for fragment in [str(archive), "Delete it", *fragments]:
        assert fragment in str(caught.value)


@pytest.mark.usefixtures("no_attempt")
def test_what_an_interrupted_unpacking_left_is_an_error_until_it_is_deleted(
    tiny: TinyMnist,
) -> None:
    tiny.write()
    archive = tiny.folder / f"{TRAIN_IMAGES}.gz"
    archive.write_bytes(gzip.compress(tiny.contents[TRAIN_IMAGES]))
    tiny.edit(TRAIN_IMAGES, lambda content: content[:300])
    with pytest.raises(DatasetError, match=f"{TRAIN_IMAGES} .*expected 916 bytes, it has 300"):
        load_dataset("auto", tiny.data_dir)
    (tiny.folder / TRAIN_IMAGES).unlink()
    assert_is_tiny(load_dataset("auto", tiny.data_dir), tiny)


@pytest.mark.usefixtures("no_attempt")
def test_without_verify_any_well_formed_files_will_do(tiny: TinyMnist) -> None:
    other = make_set(7, height=9, width=9)
    tiny.write()
    (tiny.folder / TEST_IMAGES).write_bytes(idx_bytes(other.images.squeeze(1)))
    (tiny.folder / TEST_LABELS).write_bytes(idx_bytes(other.labels.to(torch.uint8)))
    tiny.edit(TRAIN_IMAGES, flip_a_bit)
    dataset = load_dataset("mnist", tiny.data_dir, verify=False)
    assert_same_set(dataset.test, other)
    assert int((dataset.train.images != tiny.train.images).sum()) == 1


@pytest.mark.parametrize(
    ("name", "change", "fragments"),
    [
        (TRAIN_LABELS, fewer_entries, [TRAIN_IMAGES, "30 images", "29 labels"]),
        (TRAIN_LABELS, lambda c: c[:-1] + b"\x0a", [TRAIN_LABELS, "labels in 0 .. 9", "has 10"]),
        (TRAIN_IMAGES, lambda c: c[:500], [TRAIN_IMAGES, "916 bytes", "has 500."]),
        (TRAIN_IMAGES, lambda c: c + b"more", [TRAIN_IMAGES, "916 bytes", "has 920."]),
        (TRAIN_IMAGES, lambda c: c[:4] + bytes(4) + c[8:16], [TRAIN_IMAGES, "(0, 6, 5)"]),
        (TRAIN_IMAGES, lambda c: c[:4] + b"\xff" * 12, [TRAIN_IMAGES, f"{(2**32 - 1) ** 3 + 16}"]),
    ],
    ids=["count", "label-range", "truncated", "too-long", "no-images", "absurd-header"],
)
@pytest.mark.usefixtures("no_attempt")
def test_without_verify_malformed_files_are_still_refused(
    tiny: TinyMnist, name: str, change: Callable[[bytes], bytes], fragments: list[str]
) -> None:
    tiny.write()
    tiny.edit(name, change)
    with pytest.raises(DatasetError) as caught:
        load_dataset("mnist", tiny.data_dir, verify=False)
    for fragment in ["Delete", *fragments]:
        assert fragment in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_auto_falls_back_to_the_digits_and_says_why(tiny: TinyMnist) -> None:
    dataset = load_dataset("auto", tiny.data_dir)
    assert dataset.name == "digits"
    assert dataset.note == (
        f"MNIST is not in {tiny.folder} and was not downloaded (no route to host): "
        "using scikit-learn's 1,797 embedded 8x8 digits instead"
    )
    assert not tiny.data_dir.exists()


@pytest.mark.usefixtures("no_attempt")
def test_without_download_nothing_is_attempted(tiny: TinyMnist) -> None:
    dataset = load_dataset("auto", tiny.data_dir, download=False)
    assert dataset.name == "digits"
    assert "downloading is switched off" in dataset.note


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.usefixtures("offline")
def test_a_named_data_set_is_insisted_on(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError) as caught:
        load_dataset(name, tmp_path)
    folder = tmp_path / {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name] / "raw"
    names = [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS]
    for fragment in [str(folder), *names, "no route to host", "download=True", "--download"]:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("name", ["auto", "mnist"])
@pytest.mark.parametrize("missing", [TRAIN_LABELS, TEST_IMAGES])
@pytest.mark.usefixtures("offline")
def test_an_incomplete_set_is_an_error_that_names_what_is_missing(
    tiny: TinyMnist, name: str, missing: str
) -> None:
    tiny.write()
    (tiny.folder / missing).unlink()
    with pytest.raises(DatasetError, match=f"it lacks {missing}, and was not downloaded"):
        load_dataset(name, tiny.data_dir)


def test_only_what_is_missing_is_downloaded(
    tiny: TinyMnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write()
    (tiny.folder / TEST_LABELS).unlink()
    asked: list[str] = []

    def fetch(spec: IdxSet, files: list[IdxFile], folder: Path) -> None:
        asked.extend(file.name for file in files)
        (folder / TEST_LABELS).write_bytes(tiny.contents[TEST_LABELS])

    monkeypatch.setattr(load, "fetch", fetch)
    dataset = load_dataset("auto", tiny.data_dir)
    assert_is_tiny(dataset, tiny)
    assert asked == [TEST_LABELS]
    assert dataset.note == f"MNIST, downloaded to {tiny.folder}"


def test_names_are_listed_and_others_refused(tmp_path: Path) -> None:
    assert list_datasets() == ["mnist", "fashion-mnist", "digits"]
    with pytest.raises(ValueError, match=r'"auto" or "mnist" or .*cifar'):
        load_dataset("cifar", tmp_path)


def test_the_published_sets_are_pinned() -> None:
    sums = [file.sha256 for spec in IDX_SETS.values() for file in spec.files]
    assert len(set(sums)) == 8
    assert all(len(bytes.fromhex(value)) == 32 for value in sums)
    for spec in IDX_SETS.values():
        assert [file.shape[0] for file in spec.files] == [60000, 60000, 10000, 10000]
        assert len(spec.class_names) == 10


@pytest.mark.skipif(
    "TRITONCAPS_MNIST" not in os.environ,
    reason="TRITONCAPS_MNIST does not name a folder that holds MNIST/raw",
)
@pytest.mark.usefixtures("no_attempt")
def test_the_real_mnist_is_accepted() -> None:
    dataset = load_dataset("auto", os.environ["TRITONCAPS_MNIST"])
    assert dataset.name == "mnist"
    assert dataset.train.images.shape == (60000, 1, 28, 28)
    assert dataset.test.images.shape == (10000, 1, 28, 28)
    assert dataset.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert dataset.test.labels.bincount().tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    # The mean that every MNIST example normalises by.
    assert to_float(dataset.train.images).mean().item() == pytest.approx(0.1307, abs=5e-5)


class Mirror(http.server.ThreadingHTTPServer):
    """A mirror on this machine, of the .gz files in `contents`."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/mnist/"
        self.contents = contents
        self.falls_silent = False
        self.released = threading.Event()


class MirrorHandler(http.server.BaseHTTPRequestHandler):
    """Serve a file, or its first half and then nothing where the mirror falls silent."""

    def do_GET(self) -> None:
        mirror = self.server
        assert isinstance(mirror, Mirror)
        content = mirror.contents.get(self.path.rpartition("/")[2])
        if content is None:
            self.send_error(404)
            return
        # The request for the beginning is answered in full, as by a mirror that knows no ranges.
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if mirror.falls_silent and "Range" not in self.headers:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            mirror.released.wait(20)
            return
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


@pytest.fixture
def mirror(tiny: TinyMnist, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """A mirror of the tiny MNIST on this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Mirror({f"{name}.gz": gzip.compress(c) for name, c in tiny.contents.items()})
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def silent_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A mirror that accepts a connection and never says a word."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"


def pretend_torchvision(
    monkeypatch: pytest.MonkeyPatch,
    mirrors: list[str],
    download_and_extract_archive: Callable[..., None] | None = None,
) -> None:
    """Put a torchvision with these mirrors, and perhaps a way to download, in its place."""
    names = [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS]
    resources = [(f"{name}.gz", f"sum of {name}") for name in names]
    mnist = types.SimpleNamespace(mirrors=mirrors, resources=resources)
    utils = types.SimpleNamespace(download_and_extract_archive=download_and_extract_archive)
    datasets = types.SimpleNamespace(MNIST=mnist, utils=utils)
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=datasets))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    monkeypatch.setitem(sys.modules, "torchvision.datasets.utils", utils)


@pytest.fixture
def real_torchvision(tiny: TinyMnist, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real torchvision, pointed at the mirror on this machine."""
    try:
        from torchvision.datasets import MNIST
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    sums = [(name, hashlib.md5(c).hexdigest()) for name, c in mirror.contents.items()]
    monkeypatch.setattr(MNIST, "mirrors", [mirror.url])
    monkeypatch.setattr(MNIST, "resources", sums)


@pytest.mark.usefixtures("real_torchvision")
def test_torchvision_downloads_and_finds_the_files_again(tiny: TinyMnist) -> None:
    from torchvision.datasets import MNIST

    dataset = load_dataset("auto", tiny.data_dir)
    assert_is_tiny(dataset, tiny)
    assert dataset.note == f"MNIST, downloaded to {tiny.folder}"
    assert {path.name for path in tiny.folder.iterdir()} == set(tiny.contents)
    assert torch.equal(MNIST(tiny.data_dir).data, tiny.train.images.squeeze(1))


@pytest.mark.usefixtures("real_torchvision")
def test_a_download_with_a_wrong_sum_is_not_kept(tiny: TinyMnist, mirror: Mirror) -> None:
    mirror.contents[f"{TEST_IMAGES}.gz"] = gzip.compress(b"something else")
    dataset = load_dataset("auto", tiny.data_dir)
    assert dataset.name == "digits"
    assert "127.0.0.1: File not found or corrupted" in dataset.note
    assert list(tiny.folder.iterdir()) == []


@pytest.mark.usefixtures("real_torchvision")
def test_a_mirror_that_falls_silent_halfway_is_given_up(
    tiny: TinyMnist, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "ATTEMPT_SECONDS", 0.5)
    mirror.falls_silent = True
    started = time.monotonic()
    dataset = load_dataset("auto", tiny.data_dir)
    assert time.monotonic() - started < 5
    assert dataset.name == "digits"
    assert "127.0.0.1: no answer within 0.5 s" in dataset.note
    assert list(tiny.folder.iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_an_interrupted_download_leaves_nothing(
    tiny: TinyMnist, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(url: str, root: str, *, filename: str, md5: str) -> None:
        name = filename.removesuffix(".gz")
        assert (url, md5) == (f"{mirror.url}{filename}", f"sum of {name}")
        Path(root, name).write_bytes(tiny.contents[name])
        if name == TEST_IMAGES:
            raise KeyboardInterrupt

    pretend_torchvision(monkeypatch, [mirror.url], interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("mnist", tiny.data_dir)
    assert list(tiny.folder.iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_auto_gives_up_within_ten_seconds_on_a_mirror_that_stays_silent(
    tiny: TinyMnist, silent_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_torchvision(monkeypatch, [silent_url, silent_url])
    started = time.monotonic()
    dataset = load_dataset("auto", tiny.data_dir)
    assert time.monotonic() - started < 10
    assert dataset.name == "digits"
    assert f"127.0.0.1: no answer within {download.ATTEMPT_SECONDS:g} s" in dataset.note
    assert not tiny.data_dir.exists()


def test_a_host_name_that_is_never_resolved_is_given_up(
    tiny: TinyMnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def never_resolve(*_: object, **__: object) -> None:
        released.wait(20)
        raise socket.gaierror("too late")

    monkeypatch.setattr(socket, "getaddrinfo", never_resolve)
    monkeypatch.setattr(download, "ATTEMPT_SECONDS", 0.3)
    pretend_torchvision(monkeypatch, ["http://mirror.invalid/"])
    started = time.monotonic()
    dataset = load_dataset("auto", tiny.data_dir)
    elapsed = time.monotonic() - started
    released.set()
    assert elapsed < 5
    assert "mirror.invalid: no answer within 0.3 s" in dataset.note


def test_one_mirror_that_answers_is_enough(
    tiny: TinyMnist,
    silent_url: str,
    mirror: Mirror,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def from_the_mirror(url: str, root: str, *, filename: str, md5: str) -> None:
        assert url == f"{mirror.url}{filename}"
        name = filename.removesuffix(".gz")
        Path(root, name).write_bytes(tiny.contents[name])

    pretend_torchvision(monkeypatch, [silent_url, mirror.url], from_the_mirror)
    started = time.monotonic()
    assert_is_tiny(load_dataset("auto", tiny.data_dir), tiny)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "HTTP Error 404: Not Found"),
        (b"<html>Please log in</html>", "the answer is not a gzip file"),
    ],
    ids=["not-found", "captive-portal"],
)
def test_a_mirror_without_the_file_is_said_to_be_that(
    tiny: TinyMnist,
    mirror: Mirror,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
    reason: str,
) -> None:
    mirror.contents = {} if content is None else {f"{TRAIN_IMAGES}.gz": content}
    pretend_torchvision(monkeypatch, [mirror.url])
    with pytest.raises(DatasetError, match=f"127.0.0.1: {reason}"):
        load_dataset("mnist", tiny.data_dir)


def test_a_refused_connection_is_reported_in_plain_words(
    tiny: TinyMnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    pretend_torchvision(monkeypatch, [f"http://127.0.0.1:{port}/"])
    note = load_dataset("auto", tiny.data_dir).note
    assert f"(127.0.0.1: {os.strerror(errno.ECONNREFUSED)})" in note
    assert "\n" not in note


def test_a_folder_that_cannot_be_made_is_a_reason_too(
    tiny: TinyMnist, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.data_dir.write_text("a file where the folder should be")
    pretend_torchvision(monkeypatch, [mirror.url])
    with pytest.raises(DatasetError, match="Not a directory"):
        load_dataset("mnist", tiny.data_dir)


@pytest.mark.parametrize("kind", ["missing", "mismatched"])
def test_a_torchvision_that_cannot_be_imported_is_not_needed_for_what_is_there(
    tiny: TinyMnist, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "missing":
        monkeypatch.setitem(sys.modules, "torchvision", None)
        reason = "ModuleNotFoundError"
    else:
        # A build for another torch fails in this way, and not with ImportError.
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            monkeypatch.delitem(sys.modules, module)
        broken = tiny.data_dir.parent / "torchvision.py"
        broken.write_text('raise RuntimeError("operator torchvision::nms does not exist")')
        monkeypatch.syspath_prepend(broken.parent)
        reason = "RuntimeError: operator torchvision::nms does not exist"
    dataset = load_dataset("auto", tiny.data_dir)
    assert dataset.name == "digits"
    assert f"torchvision cannot be imported: {reason}" in dataset.note
    tiny.write()
    assert_is_tiny(load_dataset("auto", tiny.data_dir), tiny)


@pytest.mark.parametrize("name", ["digits", "auto"])
@pytest.mark.usefixtures("offline")
def test_without_scikit_learn_the_error_says_what_to_install(
    tiny: TinyMnist, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DatasetError) as caught:
        load_dataset(name, tiny.data_dir)
    assert 'pip install "tritoncaps[train]"' in str(caught.value)
    assert ("no route to host" in str(caught.value)) == (name == "auto")


def test_importing_the_package_imports_neither_torchvision_nor_scikit_learn() -> None:
    code = (
        "import sys, tritoncaps.data; "
        "print({m.partition('.')[0] for m in sys.modules} & {'torchvision', 'sklearn'})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
