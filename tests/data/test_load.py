"""Which files are read, which are refused and how, and what is downloaded.

No test here uses the network: the mirrors are servers on 127.0.0.1.
"""

import concurrent.futures
import dataclasses
import errno
import gzip
import hashlib
import http.server
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from image_sets import (
    UNREADABLE,
    assert_same_set,
    idx_bytes,
    make_set,
    needs_mnist,
    needs_unreadable,
)

from tritoncaps.data import (
    DatasetError,
    ImageSet,
    download,
    list_datasets,
    load,
    load_dataset,
    to_float,
)
from tritoncaps.data.files import DataFile
from tritoncaps.data.registry import REGISTRY

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"
NAMES = [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS]


@dataclasses.dataclass
class TinyMnist:
    """A published "MNIST" with 30 and 10 images of 6x5 pixels, not yet in its folder."""

    data_dir: Path
    train: ImageSet
    test: ImageSet

    def __post_init__(self):
        self.folder = self.data_dir / "MNIST" / "raw"
        arrays = [self.train.images.squeeze(1), self.train.labels.byte()]
        arrays += [self.test.images.squeeze(1), self.test.labels.byte()]
        self.contents = {n: idx_bytes(a) for n, a in zip(NAMES, arrays, strict=True)}
        # What the mirrors serve.
        self.packed = {f"{n}.gz": gzip.compress(c) for n, c in self.contents.items()}
        self.files = tuple(
            DataFile(
                name,
                tuple(array.shape),
                hashlib.sha256(self.contents[name]).hexdigest(),
                f"{name}.gz",
                f"md5:{hashlib.md5(self.packed[f'{name}.gz']).hexdigest()}",
            )
            for name, array in zip(NAMES, arrays, strict=True)
        )

    def write(self):
        self.folder.mkdir(parents=True)
        for name, content in self.contents.items():
            (self.folder / name).write_bytes(content)

    def edit(self, name, change):
        path = self.folder / name
        path.write_bytes(change(path.read_bytes()))

    def load(self, name="auto", **options):
        return load_dataset(name, self.data_dir, **options)

    def assert_loaded(self, dataset):
        assert dataset.name == "mnist"
        assert_same_set(dataset.train, self.train)
        assert_same_set(dataset.test, self.test)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The tiny MNIST in place of the real one, where a download must not be attempted."""
    tiny = TinyMnist(tmp_path / "data", make_set(30, seed=1), make_set(10, seed=2))
    entry = dataclasses.replace(REGISTRY["mnist"], files=tiny.files)
    monkeypatch.setitem(REGISTRY, "mnist", entry)

    def fetch(*_):
        raise AssertionError("a download was attempted")

    monkeypatch.setattr(load, "fetch", fetch)
    return tiny


@pytest.fixture
def offline(tiny, monkeypatch):
    """A machine without a network."""

    def fetch(*_):
        raise download.DownloadError("no route to host")

    monkeypatch.setattr(load, "fetch", fetch)


def assert_refused(tiny, *fragments, name="mnist", **options):
    """Loading raises an error, and its message contains the fragments."""
    with pytest.raises(DatasetError) as caught:
        tiny.load(name, **options)
    for fragment in fragments:
        assert fragment in str(caught.value)
    return str(caught.value)


# files that are there ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_files_in_the_folder_are_read(tiny, name):
    tiny.write()
    dataset = tiny.load(name)
    tiny.assert_loaded(dataset)
    assert dataset.title == "MNIST"
    assert dataset.class_names == tuple("0123456789")
    assert dataset.epochs == 30
    assert dataset.note == f"MNIST, found in {tiny.folder}"


def test_gz_files_are_read_and_nothing_is_written(tiny):
    tiny.folder.mkdir(parents=True)
    for name, content in tiny.packed.items():
        (tiny.folder / name).write_bytes(content)
    before = sorted(tiny.folder.iterdir())
    tiny.assert_loaded(load_dataset("mnist", str(tiny.data_dir)))
    assert sorted(tiny.folder.iterdir()) == before


def flip_a_bit(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def one_label_less(content):
    """Shorten a file of 30 labels to a well-formed one of 29."""
    return content[:4] + struct.pack(">I", 29) + content[8:-1]


DAMAGES = {
    # name of the damage: file, change, what the message contains
    "truncated": (TRAIN_IMAGES, lambda c: c[:500], ["expected 916 bytes", "has 500"]),
    "truncated header": (TRAIN_IMAGES, lambda c: c[:7], ["expected at least 16 bytes", "has 7"]),
    "empty": (TEST_LABELS, lambda c: b"", ["expected at least 8 bytes", "has 0"]),
    "too long": (TEST_LABELS, lambda c: c + b"more", ["expected 18 bytes", "has 19 or more"]),
    "foreign": (TEST_IMAGES, lambda c: b"<html>" + c, ["0x00000803", "0x3c68746d"]),
    "other shape": (TRAIN_LABELS, one_label_less, ["(30,)", "(29,)"]),
    "bit flip": (TRAIN_IMAGES, flip_a_bit, ["SHA-256"]),
    "bit flip in a label": (TEST_LABELS, flip_a_bit, ["SHA-256"]),
}


@pytest.mark.parametrize("name", ["auto", "mnist"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_never_passed_over(tiny, damage, name):
    file, change, fragments = DAMAGES[damage]
    tiny.write()
    tiny.edit(file, change)
    assert_refused(tiny, str(tiny.folder / file), "Delete it", *fragments, name=name)


def test_a_wrong_checksum_is_shown_beside_the_right_one(tiny):
    tiny.write()
    tiny.edit(TRAIN_IMAGES, flip_a_bit)
    found = hashlib.sha256((tiny.folder / TRAIN_IMAGES).read_bytes()).hexdigest()
    with pytest.raises(DatasetError, match=f"{tiny.files[0].sha256}.*{found}"):
        tiny.load("mnist")


@pytest.mark.parametrize("verify", [True, False])
def test_swapped_images_and_labels_are_refused(tiny, verify):
    tiny.write()
    (tiny.folder / TRAIN_IMAGES).write_bytes(tiny.contents[TRAIN_LABELS])
    (tiny.folder / TRAIN_LABELS).write_bytes(tiny.contents[TRAIN_IMAGES])
    with pytest.raises(DatasetError, match=rf"{TRAIN_IMAGES} .*0x00000803 .*0x00000801"):
        tiny.load("mnist", verify=verify)


GZ_DAMAGES = {
    # name of the damage: change, what the message contains
    "no trailer": (lambda c: c[:-9], ["complete gzip file"]),
    "truncated": (lambda c: c[:100], ["complete gzip file"]),
    "overwritten": (lambda c: c[:10] + b"\xff" * 20 + c[30:], ["complete gzip file"]),
    "wrong CRC": (lambda c: c[:-8] + bytes(4) + c[-4:], ["complete gzip file", "CRC"]),
    "not gzip": (lambda c: b"<html>" + c, ["complete gzip file", "<h"]),
    "empty": (lambda c: b"", ["expected at least 16 bytes", "has 0"]),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("damage", GZ_DAMAGES)
def test_a_damaged_gz_is_named(tiny, damage, verify):
    change, fragments = GZ_DAMAGES[damage]
    tiny.write()
    (tiny.folder / TRAIN_IMAGES).unlink()
    archive = tiny.folder / f"{TRAIN_IMAGES}.gz"
    archive.write_bytes(change(tiny.packed[archive.name]))
    assert_refused(tiny, str(archive), "Delete it", *fragments, verify=verify)


def test_the_rest_of_an_interrupted_unpacking_is_an_error_until_it_is_deleted(tiny):
    tiny.write()
    (tiny.folder / f"{TRAIN_IMAGES}.gz").write_bytes(tiny.packed[f"{TRAIN_IMAGES}.gz"])
    tiny.edit(TRAIN_IMAGES, lambda content: content[:300])
    with pytest.raises(DatasetError, match=f"{TRAIN_IMAGES} .*expected 916 bytes, it has 300"):
        tiny.load()
    (tiny.folder / TRAIN_IMAGES).unlink()
    tiny.assert_loaded(tiny.load())


def test_without_verify_any_well_formed_files_will_do(tiny):
    other = make_set(7)
    tiny.write()
    (tiny.folder / TEST_IMAGES).write_bytes(idx_bytes(other.images.squeeze(1)))
    (tiny.folder / TEST_LABELS).write_bytes(idx_bytes(other.labels.byte()))
    tiny.edit(TRAIN_IMAGES, flip_a_bit)
    dataset = tiny.load("mnist", verify=False)
    assert dataset.note == f"MNIST, found in {tiny.folder}, not verified"
    assert_same_set(dataset.test, other)
    assert int((dataset.train.images != tiny.train.images).sum()) == 1


MALFORMED = {
    # name of the fault: file, change, what the message contains
    "count": (TRAIN_LABELS, one_label_less, [TRAIN_IMAGES, "30 images", "29 labels"]),
    "label range": (TRAIN_LABELS, lambda c: c[:-1] + b"\x0a", ["labels in 0 .. 9", "has 10"]),
    "truncated": (TRAIN_IMAGES, lambda c: c[:500], ["916 bytes", "has 500."]),
    "too long": (TRAIN_IMAGES, lambda c: c + b"more", ["916 bytes", "has 920."]),
    "no images": (TRAIN_IMAGES, lambda c: c[:4] + bytes(4) + c[8:16], ["(0, 6, 5)"]),
    "absurd header": (
        TRAIN_IMAGES,
        lambda c: c[:4] + b"\xff" * 12,
        [f"{(2**32 - 1) ** 3 + 16}"],
    ),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_without_verify_malformed_files_are_still_refused(tiny, fault):
    file, change, fragments = MALFORMED[fault]
    tiny.write()
    tiny.edit(file, change)
    assert_refused(tiny, file, "Delete", *fragments, verify=False)


def test_sets_of_two_shapes_are_refused(tiny):
    tiny.write()
    other = make_set(40, height=9, width=8)
    (tiny.folder / TEST_IMAGES).write_bytes(idx_bytes(other.images.squeeze(1)))
    (tiny.folder / TEST_LABELS).write_bytes(idx_bytes(other.labels.byte()))
    shapes = ("training images have the shape (1, 6, 5)", "test images have (1, 9, 8)")
    assert_refused(tiny, str(tiny.folder), *shapes, "Put files of one shape there", verify=False)


@needs_unreadable
@pytest.mark.parametrize("name", ["mnist", "auto"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_the_system_refuses_to_read_is_named(tiny, packed, name):
    tiny.write()
    path = tiny.folder / TRAIN_LABELS
    path.unlink()
    path = path.with_name(f"{path.name}.gz") if packed else path
    path.symlink_to(UNREADABLE)
    expected = [f"{path} cannot be read: Input/output error. Correct that, or give another"]
    assert_refused(tiny, *expected, name=name)


def test_a_folder_that_may_not_be_searched_is_named(tiny, monkeypatch):
    tiny.write()

    def refused(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.is_file", refused)
    assert_refused(tiny, f"{tiny.folder / TRAIN_IMAGES} cannot be read: Permission denied")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_dir": 5}, "data_dir must be a str or a Path, got int"),
        ({"data_dir": b"data"}, "data_dir must be a str or a Path, got bytes"),
        ({"download": "no"}, "download must be a bool, got str"),
        ({"verify": 0}, "verify must be a bool, got int"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments, message):
    with pytest.raises(TypeError, match=f"^load_dataset: {message}$"):
        load_dataset("mnist", **arguments)


@needs_mnist
def test_the_real_mnist_is_accepted():
    dataset = load_dataset("auto", os.environ["TRITONCAPS_MNIST"], download=False)
    assert dataset.name == "mnist"
    assert dataset.train.images.shape == (60000, 1, 28, 28)
    assert dataset.test.images.shape == (10000, 1, 28, 28)
    assert dataset.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert dataset.test.labels.bincount().tolist() == counts
    # The mean that every MNIST example normalises by.
    assert to_float(dataset.train.images).mean().item() == pytest.approx(0.1307, abs=5e-5)


# files that are not there ------------------------------------------------------------------------


@pytest.mark.usefixtures("offline")
def test_auto_falls_back_to_the_digits_and_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = load_dataset()
    assert dataset.name == "digits"
    assert dataset.title == "scikit-learn's digits"
    assert dataset.epochs == 5
    assert dataset.note == (
        "MNIST is not in data/MNIST/raw and was not downloaded (no route to host): "
        "using scikit-learn's 1,797 embedded 8x8 digits instead"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("offline")
def test_auto_does_not_pass_over_a_folder_that_was_given(tiny):
    advice = ["no route to host", "leave it out to use scikit-learn's digits"]
    assert_refused(tiny, f"{tiny.data_dir} does not exist, so it holds no", *advice, name="auto")
    (tiny.data_dir / "cat").mkdir(parents=True)
    assert_refused(tiny, f"{tiny.data_dir} holds no MNIST/raw", "by the name 'folder'", name="auto")


@pytest.mark.usefixtures("tiny")
def test_without_download_nothing_is_attempted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = load_dataset(download=False)
    assert dataset.name == "digits"
    assert "downloading is switched off" in dataset.note


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
@pytest.mark.usefixtures("offline")
def test_a_named_data_set_is_insisted_on(tiny, name, folder):
    where = str(tiny.data_dir / folder / "raw")
    advice = ["no route to host", "download=True"]
    assert_refused(tiny, where, *NAMES, *advice, name=name)


@pytest.mark.parametrize("name", ["auto", "mnist"])
@pytest.mark.parametrize("missing", [TRAIN_LABELS, TEST_IMAGES])
@pytest.mark.usefixtures("offline")
def test_an_incomplete_set_is_an_error_that_names_what_is_missing(tiny, name, missing):
    tiny.write()
    (tiny.folder / missing).unlink()
    assert_refused(tiny, f"it lacks {missing} and was not downloaded", name=name)


def test_files_that_another_process_downloads_meanwhile_are_read(tiny, monkeypatch):
    def fetch(*_):
        tiny.write()
        raise download.DownloadError("too late")

    monkeypatch.setattr(load, "fetch", fetch)
    dataset = tiny.load()
    tiny.assert_loaded(dataset)
    assert dataset.note == f"MNIST, found in {tiny.folder}"


def test_names_are_listed_and_unknown_ones_refused(tmp_path):
    assert list_datasets() == [
        "mnist", "fashion-mnist", "digits", "smallnorb", "rendered-solids", "kmnist",
        "emnist-digits", "cifar10", "svhn", "affnist", "affine-mnist", "affine-digits",
        "folder",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r'"auto" or "mnist" or .*cifar'):
        load_dataset("cifar", tmp_path)


def test_the_published_sets_are_pinned():
    published = [REGISTRY[name] for name in ("mnist", "fashion-mnist")]
    files = [file for entry in published for file in entry.files]
    assert len({file.sha256 for file in files}) == len({file.download_hash for file in files}) == 8
    for file in files:
        assert len(bytes.fromhex(file.sha256)) == 32
        assert len(bytes.fromhex(file.download_hash.removeprefix("md5:"))) == 16
    for entry in published:
        assert [file.shape[0] for file in entry.files] == [60000, 60000, 10000, 10000]
        assert len(entry.class_names) == 10


def test_whatever_is_downloaded_is_pinned():
    downloaded = {
        name: [file.download_hash for file in entry.files]
        for name, entry in REGISTRY.items()
        if entry.mirrors
    }
    assert set(downloaded) == {"mnist", "fashion-mnist", "kmnist", "svhn", "affine-mnist"}
    for hashes in downloaded.values():
        assert len(set(hashes)) == len(hashes)
        assert all(len(bytes.fromhex(h.removeprefix("md5:"))) == 16 for h in hashes)


@pytest.mark.parametrize("name", ["digits", "auto"])
@pytest.mark.usefixtures("offline")
def test_without_scikit_learn_the_error_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DatasetError) as caught:
        load_dataset(name)
    assert 'pip install "tritoncaps[train]"' in str(caught.value)
    assert ("no route to host" in str(caught.value)) == (name == "auto")


def test_importing_the_package_imports_no_optional_package():
    code = (
        "import sys, tritoncaps.data; "
        "print({m.partition('.')[0] for m in sys.modules} "
        "& {'pooch', 'torchvision', 'sklearn', 'PIL'})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# downloads ---------------------------------------------------------------------------------------


class Mirror(http.server.ThreadingHTTPServer):
    """A local mirror that serves `contents` and records the requests."""

    def __init__(self, contents):
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/mnist/"
        self.contents = dict(contents)
        self.asked = []
        self.falls_silent = False
        self.released = threading.Event()


class MirrorHandler(http.server.BaseHTTPRequestHandler):
    """Serve a file. If the mirror falls silent, serve its first half and then nothing."""

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        content = self.server.contents.get(name)
        is_probe = "Range" in self.headers
        if not is_probe:
            self.server.asked.append(name)
        if content is None:
            self.send_error(404)
            return
        # A probe gets the whole file, as from a server that does not support ranges.
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.server.falls_silent and not is_probe:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.server.released.wait(20)
        else:
            self.wfile.write(content)

    def log_message(self, *_):
        """Stay silent."""


@pytest.fixture
def use_mirrors(tiny, monkeypatch):
    """Download for real, from the given URLs."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    pooch = pytest.importorskip("pooch")
    monkeypatch.setattr(pooch.get_logger(), "level", logging.WARNING)

    def use(*urls):
        monkeypatch.setattr(load, "fetch", download.fetch)
        entry = dataclasses.replace(REGISTRY["mnist"], mirrors=urls)
        monkeypatch.setitem(REGISTRY, "mnist", entry)

    return use


@pytest.fixture
def mirror(tiny, use_mirrors):
    """A mirror of the tiny MNIST, the only one."""
    server = Mirror(tiny.packed)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    use_mirrors(server.url)
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def silent_url():
    """The URL of a mirror that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"


def assert_gave_up(tiny, reason, within):
    """It is refused in time, in one line with the reason given, and no file is left behind."""
    started = time.monotonic()
    assert "\n" not in assert_refused(tiny, reason, name="auto")
    assert time.monotonic() - started < within
    assert not tiny.folder.exists() or list(tiny.folder.iterdir()) == []


def test_a_data_set_is_downloaded_unpacked_and_found_again(tiny, mirror):
    dataset = tiny.load()
    tiny.assert_loaded(dataset)
    assert dataset.note == f"MNIST, downloaded to {tiny.folder}"
    assert {path.name: path.read_bytes() for path in tiny.folder.iterdir()} == tiny.contents
    assert tiny.load().note == f"MNIST, found in {tiny.folder}"
    assert mirror.asked == list(tiny.packed)


@pytest.fixture
def torchvision_datasets():
    """torchvision is optional, and one built for another torch raises a RuntimeError."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    return datasets


def test_torchvision_reads_what_was_downloaded(tiny, mirror, torchvision_datasets):
    tiny.load()
    assert torch.equal(torchvision_datasets.MNIST(tiny.data_dir).data, tiny.train.images.squeeze(1))


def test_only_what_is_missing_is_downloaded(tiny, mirror):
    tiny.write()
    (tiny.folder / TEST_LABELS).unlink()
    dataset = tiny.load()
    tiny.assert_loaded(dataset)
    assert mirror.asked == [f"{TEST_LABELS}.gz"]
    assert dataset.note == f"MNIST, downloaded to {tiny.folder}"


def test_the_published_checksums_of_the_downloads_are_torchvisions(torchvision_datasets):
    classes = {
        "mnist": torchvision_datasets.MNIST,
        "fashion-mnist": torchvision_datasets.FashionMNIST,
    }
    for name, theirs in classes.items():
        files = REGISTRY[name].files
        ours = [(file.download, file.download_hash.removeprefix("md5:")) for file in files]
        assert ours == theirs.resources


def test_several_downloads_at_once_do_not_disturb_each_other(tiny, mirror):
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for loaded in [threads.submit(tiny.load) for _ in range(4)]:
            tiny.assert_loaded(loaded.result(timeout=60))
    assert {path.name for path in tiny.folder.iterdir()} == set(tiny.contents)


def test_a_download_goes_through_the_proxy(tiny, mirror, use_mirrors, monkeypatch):
    use_mirrors("http://mirror.invalid/mnist/")
    monkeypatch.setenv("http_proxy", mirror.url)
    tiny.assert_loaded(tiny.load())


def test_the_progress_is_shown(tiny, mirror, capfd):
    pytest.importorskip("tqdm")
    tiny.load()
    assert capfd.readouterr().err.count("100%") >= 4


def test_a_download_with_a_wrong_checksum_is_not_kept(tiny, mirror):
    mirror.contents[f"{TEST_IMAGES}.gz"] = gzip.compress(b"something else")
    reason = f"127.0.0.1: MD5 hash of downloaded file ({TEST_IMAGES}.gz) does not match"
    assert_gave_up(tiny, reason, within=5)


def test_a_mirror_that_falls_silent_halfway_is_given_up(tiny, mirror, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPT_SECONDS", 0.5)
    mirror.falls_silent = True
    assert_gave_up(tiny, "127.0.0.1: no answer within 0.5 s", within=5)


def test_an_interrupted_download_leaves_nothing(tiny, mirror, monkeypatch):
    import pooch

    retrieve = pooch.retrieve

    def interrupted(url, **options):
        retrieve(url, **options)
        if TEST_IMAGES in url:
            raise KeyboardInterrupt

    monkeypatch.setattr(pooch, "retrieve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.load("mnist")
    assert f"{TEST_IMAGES}.gz" in mirror.asked
    assert list(tiny.folder.iterdir()) == []


def test_silent_mirrors_are_given_up_within_ten_seconds(tiny, use_mirrors, silent_url):
    use_mirrors(silent_url, silent_url)
    reason = f"127.0.0.1: no answer within {download.ATTEMPT_SECONDS:g} s"
    assert_gave_up(tiny, reason, within=10)
    assert not tiny.data_dir.exists()


def test_a_host_name_that_is_never_resolved_is_given_up(tiny, use_mirrors, monkeypatch):
    released = threading.Event()

    def never_resolve(*_, **__):
        released.wait(20)
        raise socket.gaierror("too late")

    monkeypatch.setattr(socket, "getaddrinfo", never_resolve)
    monkeypatch.setattr(download, "ATTEMPT_SECONDS", 0.3)
    use_mirrors("http://mirror.invalid/")
    try:
        assert_gave_up(tiny, "mirror.invalid: no answer within 0.3 s", within=5)
    finally:
        released.set()


def test_one_mirror_that_answers_is_enough(tiny, mirror, use_mirrors, silent_url):
    use_mirrors(silent_url, mirror.url)
    started = time.monotonic()
    tiny.assert_loaded(tiny.load())
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ({}, "HTTP Error 404: Not Found"),
        ({f"{TRAIN_IMAGES}.gz": b"<html>Please log in</html>"}, "the answer is not a gzip file"),
    ],
    ids=["not found", "captive portal"],
)
def test_a_mirror_without_the_file_is_reported_as_such(tiny, mirror, contents, reason):
    mirror.contents = contents
    assert_refused(tiny, f"127.0.0.1: {reason}")


def test_a_refused_connection_is_reported_in_plain_words(tiny, use_mirrors):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    use_mirrors(f"http://127.0.0.1:{port}/")
    assert_gave_up(tiny, f"(127.0.0.1: {os.strerror(errno.ECONNREFUSED)})", within=5)


def test_a_folder_that_cannot_be_made_is_a_reason_too(tiny, mirror):
    tiny.data_dir.write_text("a file where the folder should be")
    assert_refused(tiny, "Not a directory")


def test_pooch_is_needed_only_for_a_download(tiny, use_mirrors, monkeypatch):
    use_mirrors("http://mirror.invalid/")
    monkeypatch.setitem(sys.modules, "pooch", None)
    advice = ["pooch cannot be imported", 'pip install "tritoncaps[train]"']
    assert_refused(tiny, *advice, name="auto")
    tiny.write()
    tiny.assert_loaded(tiny.load())
