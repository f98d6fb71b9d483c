"""Load a data set by name."""

from pathlib import Path

from tritoncaps._checks import check_choice, check_flag, check_pair
from tritoncaps.data.download import DownloadError, fetch
from tritoncaps.data.files import DataFile, find_file
from tritoncaps.data.image_folder import read_folder
from tritoncaps.data.registry import REGISTRY, Entry
from tritoncaps.data.sets import Dataset, DatasetError


def list_datasets() -> list[str]:
    """Return the names of the data sets. `load_dataset` also takes "auto"."""
    return [*REGISTRY, "folder"]


def load_dataset(
    name: str = "auto",
    data_dir: str | Path | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    download: bool = True,
    verify: bool = True,
) -> Dataset:
    """Load a whole data set onto the CPU.

    "mnist" and "fashion-mnist" have torchvision's layout: four IDX files, plain or as .gz, in
    `data_dir`/MNIST/raw or `data_dir`/FashionMNIST/raw. "digits" are the 1,797 handwritten digits
    that scikit-learn contains.

    "kmnist" and "emnist-digits" are like it, in `data_dir`/KMNIST/raw and `data_dir`/EMNIST/raw.
    EMNIST is not downloaded.

    "cifar10" and "svhn" have 32×32 pixels in colour. CIFAR-10 is read in its binary form, the six
    .bin files in `data_dir`/cifar-10-batches-bin, and is not downloaded. SVHN is train_32x32.mat
    and test_32x32.mat in `data_dir`/svhn.

    "affnist" is read from two files of the 32x version in `data_dir`/affnist, and is not
    downloaded: just_centered/training_and_validation.mat to train on, and
    transformed/test_batches/1.mat to test.

    "affine-mnist" and "affine-digits" are MNIST and "digits" on 40×40 pixels. The test images are
    under random affine maps (`affine_images`), the training images are not.

    "smallnorb" are photographs of toys, 48×48 and stereo, each with its viewpoint (see `ViewSet`).
    Its six files, plain or as .gz, must be put into `data_dir`/smallnorb. They are not downloaded.
    "rendered-solids" are images of solid shapes with their viewpoints, made by `rendered_solids`.

    "auto" is MNIST if it is in `data_dir` or can be downloaded. Otherwise it is the digits, unless
    a `data_dir` was given. An attempt that gets no answer ends within 10 s. The `note` of the data
    set says which one it is and why. Existing files are never ignored: a damaged or incomplete
    MNIST is an error.

    "folder" are your own images. `data_dir` has a subfolder for each class, or the folders train/
    and val/ or test/, each with the same subfolders. Other usual names of these three are
    recognized. Labels follow the sorted names of the classes.

    - Test set: test/, or val/ if there is no test/, or a fifth of each class, the same every time.
      With both, val/ is `validation`.
    - Channels: 1 if all images are grey, else 3 (RGB). Pixels of 16 bits become 8, with 65535 as
      white: stretch a PNG that holds values of 12 bits. Transparent pixels become white. The
      orientation in EXIF data is applied.
    - Size: `image_size`. Without it, images of one size up to 64 pixels a side keep it, and others
      become 32×32. The resizing is bilinear and antialiased. It does not keep the aspect ratio, so
      nothing is cut off.
    - Files: .jpg, .png, .bmp, .tif, .webp, .ppm and .pgm, at any depth. Hidden files and folders
      are left out.

    Args:
        name: "auto" or one of `list_datasets()`.
        data_dir: where data sets are, and where they are downloaded to, by default "data". "folder"
            has no default.
        image_size: side of square images, or (height, width), for "folder" alone.
        download: download missing files. This needs pooch.
        verify: accept only the published files, by shape and checksum. Of some sets only the shapes
            are known, and their notes say so. Without `verify`, accept any well-formed files of
            that name; the note then says that they were not verified. Sets without published files,
            such as "digits" and "folder", are not affected.

    Raises:
        DatasetError: the data set is missing, incomplete, damaged or foreign.
        TypeError: `image_size` is neither an int nor a pair of them, `data_dir` is no path, or
            `download` or `verify` is no bool.
        ValueError: no data set has this name, or the arguments contradict each other.

    Example:
        >>> dataset = load_dataset("digits")
        >>> dataset.train.images.shape, len(dataset.test), dataset.epochs
        (torch.Size([1437, 1, 28, 28]), 360, 5)
    """
    check_choice("load_dataset", "name", name, ["auto", *list_datasets()])
    if data_dir is not None and not isinstance(data_dir, (str, Path)):
        raise TypeError(
            f"load_dataset: data_dir must be a str or a Path, got {type(data_dir).__name__}"
        )
    check_flag("load_dataset", "download", download)
    check_flag("load_dataset", "verify", verify)
    if name == "folder":
        return _read_folder(data_dir, image_size)
    if image_size is not None:
        raise ValueError(
            f"load_dataset: image_size={image_size} is for name='folder' alone, the images of "
            f"{name!r} keep their size"
        )
    wanted = "mnist" if name == "auto" else name
    entry, folder = REGISTRY[wanted], folder_of(wanted, data_dir)
    missing = _missing(entry, folder)
    how = f"downloaded to {folder}" if missing else f"found in {folder}"
    try:
        if missing and not entry.mirrors:
            raise DownloadError("no server is known")
        if missing and not download:
            raise DownloadError("downloading is switched off")
        if missing:
            fetch(entry.mirrors, missing, folder)
    except DownloadError as error:
        # Another process may have downloaded the files in the meantime.
        missing = _missing(entry, folder)
        if missing == list(entry.files) and name == "auto":
            if data_dir is not None:
                raise _nothing_there(entry, Path(data_dir), str(error)) from error
            return _digits_instead(entry, folder, str(error))
        if missing:
            raise _incomplete(wanted, data_dir, missing, str(error)) from error
        how = f"found in {folder}"
    if not verify:
        how += ", not verified"
    elif not all(file.checksum for file in entry.files):
        how += ", only the shapes of its files verified"
    return _read(wanted, folder, entry.note or f"{entry.title}, {how}", verify)


def has_files(name: str, data_dir: str | Path | None = None) -> bool:
    """Return whether `data_dir` holds files of a data set, complete or not."""
    folder = folder_of(name, data_dir)
    return any(find_file(folder, file) for file in REGISTRY[name].files)


def folder_of(name: str, data_dir: str | Path | None) -> Path:
    """Return where the files of a data set are."""
    return _data_dir(data_dir) / REGISTRY[name].folder


def _data_dir(data_dir: str | Path | None) -> Path:
    return Path("data" if data_dir is None else data_dir).expanduser()


def _read(name: str, folder: Path, note: str, verify: bool) -> Dataset:
    entry = REGISTRY[name]
    train, test = entry.read(folder, entry.files, len(entry.class_names), verify)
    shapes = [tuple(part.images.shape[1:]) for part in (train, test)]
    if shapes[0] != shapes[1]:
        raise DatasetError(
            f"{folder}: the training images have the shape {shapes[0]}, but the test images have "
            f"{shapes[1]}. Put files of one shape there."
        )
    return Dataset(
        *(name, entry.title, train, test, entry.class_names, note, entry.epochs),
        max_shift=entry.max_shift,
        crop=entry.crop,
    )


def _read_folder(data_dir: str | Path | None, image_size: int | tuple[int, int] | None) -> Dataset:
    if data_dir is None:
        raise ValueError(
            "load_dataset: name='folder' needs data_dir, the folder that has a subfolder for each "
            "class"
        )
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if sides is not None:
        check_pair("load_dataset", "image_size", sides, "an int or (height, width)")
    return read_folder(Path(data_dir).expanduser(), sides)


def _nothing_there(entry: Entry, data_dir: Path, reason: str) -> DatasetError:
    found = "holds no" if data_dir.expanduser().is_dir() else "does not exist, so it holds no"
    return DatasetError(
        f"data_dir {data_dir} {found} {entry.folder}, and {entry.title} was not downloaded "
        f"({reason}). Correct it, or leave it out to use scikit-learn's digits. If it has a "
        "subfolder of images for each class, load it by the name 'folder'"
    )


def _digits_instead(entry: Entry, folder: Path, reason: str) -> Dataset:
    why = f"{entry.title} is not in {folder} and was not downloaded ({reason})"
    note = f"{why}: using scikit-learn's 1,797 embedded 8x8 digits instead"
    try:
        return _read("digits", folder, note, verify=True)
    except DatasetError as error:
        raise DatasetError(f"{why}, and {error}") from error


def _missing(entry: Entry, folder: Path) -> list[DataFile]:
    return [file for file in entry.files if find_file(folder, file) is None]


def _incomplete(
    name: str, data_dir: str | Path | None, missing: list[DataFile], reason: str
) -> DatasetError:
    entry, folder = REGISTRY[name], folder_of(name, data_dir)
    for other, why in entry.refused.items():
        if (path := _data_dir(data_dir) / other).exists():
            return DatasetError(f"{path} {why}.")
    names = ", ".join(file.name for file in missing)
    remedy = "Put the files there, plain or as .gz"
    if entry.mirrors:
        remedy += ", or run on a machine with a network with downloading allowed (download=True)"
    return DatasetError(
        f"{entry.title} is not complete in {folder}: it lacks {names} and was not downloaded "
        f"({reason}). {remedy}."
    )
