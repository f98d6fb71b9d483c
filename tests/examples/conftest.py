"""The images that the small runs use."""

import pytest
from example_runs import few_digits

from tritoncaps.data import Dataset, ImageSet, load_dataset


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return few_digits()


@pytest.fixture(scope="session")
def digits() -> ImageSet:
    return load_dataset("digits").train
