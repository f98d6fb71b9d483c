"""The data sets, one entry each. A new one needs an entry here and, for a new format, a reader."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tritoncaps.data.affine import read_affine_digits, read_affine_mnist
from tritoncaps.data.affnist import read_affnist
from tritoncaps.data.cifar import RECORD, read_cifar
from tritoncaps.data.digits import read_digits
from tritoncaps.data.files import DataFile
from tritoncaps.data.idx import read_emnist, read_idx
from tritoncaps.data.norb import read_norb
from tritoncaps.data.sets import ImageSet
from tritoncaps.data.solids import SOLIDS, rendered_solids
from tritoncaps.data.svhn import read_svhn

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
        shape: channels, height and width of its images.
        max_shift: the pixels by which a training script moves its training images by default.
        crop: the side of the windows that a training script cuts out by default, or 0 for whole
            images.
        source: who published it, and where.
        licence: under which terms, as far as its publisher says.
        refused: files and folders, by their name in `data_dir`, that hold the same data in a form
            that is not read, and what to do about it.
    """

    title: str
    class_names: tuple[str, ...]
    epochs: int
    read: Reader
    folder: str = ""
    files: tuple[DataFile, ...] = ()
    mirrors: tuple[str, ...] = ()
    note: str = ""
    shape: tuple[int, int, int] = (1, 28, 28)
    max_shift: int = 2
    crop: int = 0
    source: str = ""
    licence: str = "not stated"
    refused: Mapping[str, str] = field(default_factory=dict)


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


def _emnist_files() -> tuple[DataFile, ...]:
    """Describe the four files of EMNIST's digits. Their checksums are not known here."""
    return tuple(
        DataFile(f"emnist-digits-{part}-{kind}-ubyte", (count, *axes))
        for part, count in (("train", 240000), ("test", 40000))
        for kind, axes in (("images-idx3", (28, 28)), ("labels-idx1", ()))
    )


def _cifar_files() -> tuple[DataFile, ...]:
    """Describe the batches of CIFAR-10. Their checksums are not known here."""
    names = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
    return tuple(DataFile(name, (10000, RECORD)) for name in names)


def _svhn_files() -> tuple[DataFile, ...]:
    """Describe the two files of SVHN's cropped digits. The third one, "extra", is not used."""
    files = {
        "train_32x32.mat": (73257, "e26dedcc434d2e4c54c9b2d4a06d8373"),
        "test_32x32.mat": (26032, "eb5a983be6a315427106f1b164d9cef3"),
    }
    return tuple(
        DataFile(name, (32, 32, 3, count), download=name, download_hash=f"md5:{md5}")
        for name, (count, md5) in files.items()
    )


def _norb_files() -> tuple[DataFile, ...]:
    """Describe the files of smallNORB. Their checksums are not known here."""
    shapes = {"dat": (24300, 2, 96, 96), "cat": (24300,), "info": (24300, 4)}
    return tuple(
        DataFile(f"smallnorb-{part}-{kind}.mat", shape)
        for part in ("5x46789x9x18x6x2x96x96-training", "5x01235x9x18x6x2x96x96-testing")
        for kind, shape in shapes.items()
    )


_MNIST = "LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/"
_PICKLES = (
    "is the python version of CIFAR-10. It consists of pickles, and reading a pickle can run any "
    "code. Get the binary version, cifar-10-binary.tar.gz, and unpack it in its place"
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
        source=_MNIST,
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
        source="Xiao, Rasul and Vollgraf 2017, https://github.com/zalandoresearch/fashion-mnist",
        licence="MIT",
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
        max_shift=0,  # they are centred
        source="UCI optical digits, in scikit-learn",
        licence="CC BY 4.0",
    ),
    "smallnorb": Entry(
        title="smallNORB",
        class_names=("animal", "human", "plane", "truck", "car"),
        epochs=30,
        read=read_norb,
        folder="smallnorb",
        files=_norb_files(),
        shape=(2, 48, 48),
        max_shift=8,
        crop=32,
        source="LeCun, Huang and Bottou 2004, https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/",
        licence="for research",
    ),
    "rendered-solids": Entry(
        title="Rendered solids",
        class_names=tuple(SOLIDS),
        epochs=10,
        read=lambda *_: rendered_solids(),
        note="solid shapes, rendered from 162 viewpoints",
        shape=(1, 32, 32),
        source="made here",
        licence="none needed",
    ),
    "kmnist": Entry(
        title="Kuzushiji-MNIST",
        class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        epochs=30,
        read=read_idx,
        folder="KMNIST/raw",
        mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        files=_idx_files(
            ("", "bdb82020997e1d708af4cf47b453dcf7"),
            ("", "e144d726b3acfaa3e44228e80efcd344"),
            ("", "5c965bf0a639b31b8f53240b1b52f4d7"),
            ("", "7320c461ea6c1c855c0b718fb2a4b134"),
        ),
        source="Clanuwat et al. 2018, http://codh.rois.ac.jp/kmnist/",
        licence="CC BY-SA 4.0",
    ),
    "emnist-digits": Entry(
        title="EMNIST digits",
        class_names=DIGITS,
        epochs=10,
        read=read_emnist,
        folder="EMNIST/raw",
        files=_emnist_files(),
        source="Cohen et al. 2017, https://www.nist.gov/itl/products-and-services/emnist-dataset, "
        "in gzip.zip",
    ),
    "cifar10": Entry(
        title="CIFAR-10",
        class_names=(
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
        epochs=50,
        read=read_cifar,
        folder="cifar-10-batches-bin",
        files=_cifar_files(),
        shape=(3, 32, 32),
        max_shift=4,
        source="Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html, in "
        "cifar-10-binary.tar.gz",
        refused={"cifar-10-batches-py": _PICKLES, "cifar-10-python.tar.gz": _PICKLES},
    ),
    "svhn": Entry(
        title="SVHN",
        class_names=DIGITS,
        epochs=30,
        read=read_svhn,
        folder="svhn",
        files=_svhn_files(),
        mirrors=("http://ufldl.stanford.edu/housenumbers/",),
        shape=(3, 32, 32),
        source="Netzer et al. 2011, http://ufldl.stanford.edu/housenumbers/, cropped digits",
        licence="for non-commercial use",
    ),
    "affnist": Entry(
        title="affNIST",
        class_names=DIGITS,
        epochs=30,
        read=read_affnist,
        folder="affnist",
        files=(
            DataFile("just_centered/training_and_validation.mat", (1600, 60000)),
            # The first of 32 batches. Each of them has every original once.
            DataFile("transformed/test_batches/1.mat", (1600, 10000)),
        ),
        shape=(1, 40, 40),
        max_shift=6,  # the test images are anywhere
        source="Tieleman 2013, https://www.cs.toronto.edu/~tijmen/affNIST/, in "
        "32x/just_centered/training_and_validation.mat.zip and 32x/transformed/test_batches.zip",
    ),
}
REGISTRY["affine-mnist"] = replace(
    REGISTRY["mnist"],
    title="Affine MNIST",
    read=read_affine_mnist,
    shape=(1, 40, 40),
    max_shift=6,
    source=f"made here from MNIST: {_MNIST}",
)
REGISTRY["affine-digits"] = replace(
    REGISTRY["digits"],
    title="Affine digits",
    read=lambda *_: read_affine_digits(),
    note="scikit-learn's digits on 40x40, those of the test set under random affine maps",
    shape=(1, 40, 40),
    max_shift=6,
    source="made here from the UCI optical digits, in scikit-learn",
)
