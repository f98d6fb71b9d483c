"""Data sets that stay on the device as uint8, and batches of them.

    dataset = load_dataset("auto", data_dir="data")
    train, validation = split_validation(dataset.train, 0.1, seed=1)
    batches = Batches(train.to("cuda"), batch_size=128, seed=1, max_shift=2)
    for images, labels in batches.epoch(0):
        ...

MNIST is 47 MB as uint8, so it can stay on the device. There are no workers, no pinned memory and no
copy per step: a batch is one indexing operation. `load_dataset("folder", data_dir)` reads a folder
of your own images the same way. Importing this package needs no pooch, scikit-learn or Pillow. Each
is imported by the one function that uses it.
"""

from tritoncaps.data.affine import affine_images
from tritoncaps.data.batches import Batches, random_shift, to_float
from tritoncaps.data.crops import centre_crop, crops
from tritoncaps.data.handwriting import prepare_digit, read_digit
from tritoncaps.data.load import list_datasets, load_dataset
from tritoncaps.data.overlays import Originals, Overlays
from tritoncaps.data.sets import Dataset, DatasetError, ImageSet, split_validation
from tritoncaps.data.solids import rendered_solids
from tritoncaps.data.subsets import stratified_subset
from tritoncaps.data.views import View, ViewSet, familiar_and_novel

__all__ = [
    "Batches",
    "Dataset",
    "DatasetError",
    "ImageSet",
    "Originals",
    "Overlays",
    "View",
    "ViewSet",
    "affine_images",
    "centre_crop",
    "crops",
    "familiar_and_novel",
    "list_datasets",
    "load_dataset",
    "prepare_digit",
    "random_shift",
    "read_digit",
    "rendered_solids",
    "split_validation",
    "stratified_subset",
    "to_float",
]
