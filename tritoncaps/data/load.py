"""Find a data set by its name."""

from pathlib import Path

from tritoncaps._checks import check_choice
from tritoncaps.data.digits import load_digits
from tritoncaps.data.download import DownloadError, fetch
from tritoncaps.data.idx import IDX_SETS, IdxSet, find_file, read_image_set
from tritoncaps.data.sets import Dataset, DatasetError


def list_datasets() -> list[str]:
    """Return the names of the data sets; `load_dataset` also takes "auto"."""
    return [*IDX_SETS, "digits"]


def load_dataset(
    name: str = "auto",
    data_dir: str | Path = "data",
    *,
    download: bool = True,
    verify: bool = True,
) -> Dataset:
    """Load a data set, whole, on the CPU.

    "mnist" and "fashion-mnist" are read from torchvision's layout: the four IDX files, plain or as
    .gz, lie in `data_dir`/MNIST/raw or `data_dir`/FashionMNIST/raw. "digits" are the 1,797
    handwritten digits that scikit-learn brings along. "auto" is MNIST where it lies in `data_dir`
    or can be downloaded (an attempt without an answer ends within 10 s), else the digits; the note
    of the data set says which, and why. It never passes over files that are there: an MNIST that is
    damaged or incomplete is an error.

    Args:
        name: "auto" or one of `list_datasets()`.
        data_dir: where data sets lie, and where they are downloaded to.
        download: fetch what is missing. It needs torchvision.
        verify: take the published files alone, by shape and SHA-256 (0.1 s for MNIST). Without it
            any well-formed files of that name will do.

    Raises:
        DatasetError: the data set is missing, incomplete, damaged or foreign.
        ValueError: there is no data set of that name.

    Example:
        >>> dataset = load_dataset("digits")
        >>> dataset.train.images.shape, len(dataset.test)
        (torch.Size([1437, 1, 28, 28]), 360)
    """
    check_choice("load_dataset", "name", name, ["auto", *list_datasets()])
    if name == "digits":
        return load_digits()
    spec = IDX_SETS["mnist" if name == "auto" else name]
    folder = Path(data_dir).expanduser() / spec.folder / "raw"
    try:
        source = _provide(spec, folder, allowed=download)
    except DownloadError as error:
        is_untouched = not any(find_file(folder, file) for file in spec.files)
        if name == "auto" and is_untouched:
            return _digits_instead(spec, folder, str(error))
        raise _missing(spec, folder, str(error)) from error
    return _read(spec, folder, f"{spec.title}, {source}", verify=verify)


def _provide(spec: IdxSet, folder: Path, *, allowed: bool) -> str:
    """Have all files of a data set in its folder; return how they came to be there."""
    missing = [file for file in spec.files if find_file(folder, file) is None]
    if not missing:
        return f"found in {folder}"
    if not allowed:
        raise DownloadError("downloading is switched off")
    fetch(spec, missing, folder)
    return f"downloaded to {folder}"


def _read(spec: IdxSet, folder: Path, note: str, *, verify: bool) -> Dataset:
    classes = len(spec.class_names)
    train = read_image_set(folder, spec.train_images, spec.train_labels, classes, verify=verify)
    test = read_image_set(folder, spec.test_images, spec.test_labels, classes, verify=verify)
    return Dataset(spec.name, spec.title, train, test, spec.class_names, note)


def _digits_instead(spec: IdxSet, folder: Path, reason: str) -> Dataset:
    why = f"{spec.title} is not in {folder} and was not downloaded ({reason})"
    try:
        return load_digits(f"{why}: using scikit-learn's 1,797 embedded 8x8 digits instead")
    except DatasetError as error:
        raise DatasetError(f"{why}, and {error}") from error


def _missing(spec: IdxSet, folder: Path, reason: str) -> DatasetError:
    names = ", ".join(file.name for file in spec.files if find_file(folder, file) is None)
    return DatasetError(
        f"{spec.title} is not complete in {folder}: it lacks {names}, and was not downloaded "
        f"({reason}). Put the files there, plain or as .gz, or run on a machine with a network "
        f"with downloading allowed (download=True, --download)."
    )
