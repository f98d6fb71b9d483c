"""Load a data set by name."""

from pathlib import Path

from tritoncaps._checks import check_choice
from tritoncaps.data.download import DownloadError, fetch
from tritoncaps.data.files import DataFile, find_file
from tritoncaps.data.registry import REGISTRY, Entry
from tritoncaps.data.sets import Dataset, DatasetError


def list_datasets() -> list[str]:
    """Return the names of the data sets. `load_dataset` also takes "auto"."""
    return list(REGISTRY)


def load_dataset(
    name: str = "auto",
    data_dir: str | Path = "data",
    *,
    download: bool = True,
    verify: bool = True,
) -> Dataset:
    """Load a whole data set onto the CPU.

    "mnist" and "fashion-mnist" have torchvision's layout: four IDX files, plain or as .gz, in
    `data_dir`/MNIST/raw or `data_dir`/FashionMNIST/raw. "digits" are the 1,797 handwritten digits
    that scikit-learn contains.

    "auto" is MNIST if it is in `data_dir` or can be downloaded, and the digits otherwise. An
    attempt that gets no answer ends within 10 s. The `note` of the data set says which one it is
    and why. Existing files are never ignored: a damaged or incomplete MNIST is an error.

    Args:
        name: "auto" or one of `list_datasets()`.
        data_dir: where data sets are, and where they are downloaded to.
        download: download missing files. This needs pooch.
        verify: accept only the published files, by shape and SHA-256 (0.1 s for MNIST). Without
            it, accept any well-formed files of that name.

    Raises:
        DatasetError: the data set is missing, incomplete, damaged or foreign.
        ValueError: no data set has this name.

    Example:
        >>> dataset = load_dataset("digits")
        >>> dataset.train.images.shape, len(dataset.test), dataset.epochs
        (torch.Size([1437, 1, 28, 28]), 360, 15)
    """
    check_choice("load_dataset", "name", name, ["auto", *list_datasets()])
    wanted = "mnist" if name == "auto" else name
    entry = REGISTRY[wanted]
    folder = Path(data_dir).expanduser() / entry.folder
    missing = _missing(entry, folder)
    how = f"downloaded to {folder}" if missing else f"found in {folder}"
    try:
        if missing and not download:
            raise DownloadError("downloading is switched off")
        if missing:
            fetch(entry.mirrors, missing, folder)
    except DownloadError as error:
        # Another process may have downloaded the files in the meantime.
        missing = _missing(entry, folder)
        if missing == list(entry.files) and name == "auto":
            return _digits_instead(entry, folder, str(error))
        if missing:
            raise _incomplete(entry, folder, missing, str(error)) from error
        how = f"found in {folder}"
    return _read(wanted, folder, entry.note or f"{entry.title}, {how}", verify)


def _read(name: str, folder: Path, note: str, verify: bool) -> Dataset:
    entry = REGISTRY[name]
    train, test = entry.read(folder, entry.files, len(entry.class_names), verify)
    return Dataset(name, entry.title, train, test, entry.class_names, note, entry.epochs)


def _digits_instead(entry: Entry, folder: Path, reason: str) -> Dataset:
    why = f"{entry.title} is not in {folder} and was not downloaded ({reason})"
    note = f"{why}: using scikit-learn's 1,797 embedded 8x8 digits instead"
    try:
        return _read("digits", folder, note, verify=True)
    except DatasetError as error:
        raise DatasetError(f"{why}, and {error}") from error


def _missing(entry: Entry, folder: Path) -> list[DataFile]:
    return [file for file in entry.files if find_file(folder, file) is None]


def _incomplete(entry: Entry, folder: Path, missing: list[DataFile], reason: str) -> DatasetError:
    names = ", ".join(file.name for file in missing)
    return DatasetError(
        f"{entry.title} is not complete in {folder}: it lacks {names} and was not downloaded "
        f"({reason}). Put the files there, plain or as .gz, or run on a machine with a network "
        f"with downloading allowed (download=True, --download)."
    )
