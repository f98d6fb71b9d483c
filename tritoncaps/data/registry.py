"""The data sets, one entry each. A new one needs an entry here and, for a new format, a reader."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tritoncaps.data.digits import read_digits
from tritoncaps.data.files import DataFile
from tritoncaps.data.idx import read_idx
from tritoncaps.data.norb import read_norb
from tritoncaps.data.sets import ImageSet
from tritoncaps.data.solids import SOLIDS, rendered_solids

# Takes the folder, its files, the number of classes and whether to verify; returns the training
# set and the test set.
Reader = Callable[[Path, Sequence[DataFile], int, bool], tuple[ImageSet, ImageSet]]


DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Entry:
    """Everything known about a data set before it is loaded.

    Args:
        title: its name as people read it.
        class_names: what each label stands for.
        epochs: passes over the training set that a training script makes by default.
        read: reads the files. See `Reader`.
        folder: where the files are below `data_dir`.
        files: the published files, or none if the data set comes with a package.
        mirrors: URLs of folders that serve all the files, or none if they cannot be downloaded.
        note: one line about a data set without files. For the others, a note says where the files
            were found.
    """

    title: str
    class_names: tuple[str, ...]
    epochs: int
    read: Reader
    folder: str = ""
    files: tuple[DataFile, ...] = ()
    mirrors: tuple[str, ...] = ()
    note: str = ""


def _idx_files(*checksums: tuple[str, str]) -> tuple[DataFile, ...]:
    """Describe the four files that all descendants of MNIST have, given SHA-256 and MD5 of each."""
    layout = {
        "train-images-idx3-ubyte": (60000, 28, 28),
        "train-labels-idx1-ubyte": (60000,),
        "t10k-images-idx3-ubyte": (10000, 28, 28),
        "t10k-labels-idx1-ubyte": (10000,),
    }
    return tuple(
        DataFile(name, shape, sha256, f"{name}.gz", f"md5:{md5}")
        for (name, shape), (sha256, md5) in zip(layout.items(), checksums, strict=True)
    )


def _norb_files() -> tuple[DataFile, ...]:
    """Describe the files of smallNORB. Their checksums are not known here."""
    shapes = {"dat": (24300, 2, 96, 96), "cat": (24300,), "info": (24300, 4)}
    return tuple(
        DataFile(f"smallnorb-{part}-{kind}.mat", shape)
        for part in ("5x46789x9x18x6x2x96x96-training", "5x01235x9x18x6x2x96x96-testing")
        for kind, shape in shapes.items()
    )


# SHA-256 sums are of the uncompressed content, because gzip files of the same content can differ.
# Those of MNIST were computed from its files. Those of Fashion-MNIST are published by several
# independent projects, which agree. They were not recomputed here. The MD5 sums are of the gzip
# files, and are the ones that torchvision checks. Folders and file names are torchvision's too, so
# one copy serves both.
REGISTRY = {
    "mnist": Entry(
        title="MNIST",
        class_names=DIGITS,
        epochs=30,
        read=read_idx,
        folder="MNIST/raw",
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "http://yann.lecun.com/exdb/mnist/",
        ),
        files=_idx_files(
            (
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            ),
            (
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "d53e105ee54ea40749a09fcbcd1e9432",
            ),
            (
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "9fb629c4189551a2d022fa330f9573f3",
            ),
            (
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
        ),
    ),
    "fashion-mnist": Entry(
        title="Fashion-MNIST",
        class_names=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        epochs=30,
        read=read_idx,
        folder="FashionMNIST/raw",
        mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        files=_idx_files(
            (
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            ),
            (
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                "25c81989df183df01b3e8a0aad5dffbe",
            ),
            (
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                "bef4ecab320f06d8554ea6380940ec79",
            ),
            (
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
                "bb300cfdad3c16e7a12a480ee83cd310",
            ),
        ),
    ),
    "digits": Entry(
        title="scikit-learn's digits",
        class_names=DIGITS,
        epochs=5,
        read=lambda *_: read_digits(),
        note="scikit-learn's 1,797 embedded 8x8 digits, enlarged to 28x28",
    ),
    "smallnorb": Entry(
        title="smallNORB",
        class_names=("animal", "human", "plane", "truck", "car"),
        epochs=30,
        read=read_norb,
        folder="smallnorb",
        files=_norb_files(),
    ),
    "rendered-solids": Entry(
        title="Rendered solids",
        class_names=tuple(SOLIDS),
        epochs=10,
        read=lambda *_: rendered_solids(),
        note="solid shapes, rendered from 162 viewpoints",
    ),
}
