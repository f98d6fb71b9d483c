"""`python -m tritoncaps.data`: what there is, and what is in a folder."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from image_sets import UNREADABLE, idx_bytes, needs_unreadable
from PIL import Image

from tritoncaps.data import ImageSet, list_datasets, load_dataset
from tritoncaps.data.__main__ import main
from tritoncaps.data.registry import REGISTRY


def test_list_describes_every_set(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in list_datasets():
        if name != "folder":
            assert f"{name}: {REGISTRY[name].title}" in printed
    assert "svhn: SVHN, 10 classes, 3 x 32 x 32" in printed
    assert printed.count("source   ") == printed.count("licence  ") == len(REGISTRY)


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.items() if not entry.files])
def test_a_set_without_files_has_the_shape_and_the_classes_of_its_entry(name):
    dataset = load_dataset(name)
    assert tuple(dataset.train.images.shape[1:]) == REGISTRY[name].shape
    assert dataset.test.labels.unique().tolist() == list(range(len(dataset.class_names)))


def test_the_shape_of_an_entry_is_that_of_its_files():
    for name in ("mnist", "fashion-mnist", "kmnist", "emnist-digits"):
        entry = REGISTRY[name]
        assert {file.shape[1:] for file in entry.files} == {entry.shape[1:], ()}
    assert REGISTRY["svhn"].files[0].shape[:3] == (32, 32, 3)


def test_check_says_what_is_missing_and_where_it_comes_from(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == sum(bool(entry.files) for entry in REGISTRY.values())
    put = f"Put train_32x32.mat, test_32x32.mat into {tmp_path}/svhn, plain or as .gz, or let an"
    assert any(line.startswith(f"svhn: not there. {put} example download") for line in printed)
    (cifar,) = [line for line in printed if line.startswith("cifar10")]
    assert "download" not in cifar and cifar.endswith("kriz/cifar.html, in cifar-10-binary.tar.gz")


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["check", str(tmp_path / "typo"), "svhn"]) == 0
    assert capsys.readouterr().err == f"There is no folder {tmp_path / 'typo'}.\n"


@needs_unreadable
def test_an_unreadable_file_is_damage(tmp_path, capsys):
    folder = tmp_path / "svhn"
    folder.mkdir()
    for name in ("train_32x32.mat", "test_32x32.mat"):
        (folder / name).symlink_to(UNREADABLE)
    assert main(["check", str(tmp_path), "svhn"]) == 1
    assert f"{folder / 'train_32x32.mat'} cannot be read" in capsys.readouterr().out


def test_pickles_in_the_home_folder_are_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert main(["check", "~", "cifar10"]) == 1
    assert f"{tmp_path}/cifar-10-batches-py is the python version" in capsys.readouterr().out


def test_check_fails_for_a_damaged_set(tmp_path, capsys):
    folder = tmp_path / "KMNIST/raw"
    folder.mkdir(parents=True)
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    assert main(["check", str(tmp_path), "kmnist", "svhn"]) == 1
    kmnist, svhn = capsys.readouterr().out.splitlines()
    assert kmnist.startswith("kmnist: Kuzushiji-MNIST is not complete") and "svhn: not" in svhn


def test_check_warns_of_pickles(tmp_path, capsys):
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert main(["check", str(tmp_path), "cifar10"]) == 1
    assert "is the python version of CIFAR-10" in capsys.readouterr().out


def test_check_says_what_is_there(capsys):
    assert main(["check", "nowhere", "digits"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("digits: there, 1,437 + 360 images. scikit-learn's 1,797 embedded")


def test_show_draws_both_parts(tmp_path, capsys):
    path = tmp_path / "digits.png"
    assert main(["show", "affine-digits", "--output", str(path)]) == 0
    assert f"{path}: 16 training images" in capsys.readouterr().out
    dataset = load_dataset("affine-digits")
    drawn = torch.from_numpy(np.array(Image.open(path)))
    assert drawn.shape == (2 * 42, 16 * 42, 3)
    assert torch.equal(drawn[1:41, 1:41, 0], dataset.train.images[0, 0])
    assert torch.equal(drawn[43:83, 43:83, 2], dataset.test.images[360 // 16, 0])


def test_show_draws_images_from_all_over_a_set(tmp_path, monkeypatch):
    labels = torch.arange(5).repeat_interleave(30)  # sorted, as in the rendered solids
    images = (50 * labels).byte().reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    found = ImageSet(images, labels)
    entry = dataclasses.replace(REGISTRY["rendered-solids"], read=lambda *_: (found, found))
    monkeypatch.setitem(REGISTRY, "rendered-solids", entry)
    path = tmp_path / "solids.png"
    assert main(["show", "rendered-solids", "--output", str(path)]) == 0
    drawn = np.array(Image.open(path))
    assert drawn.shape == (2 * 6, 16 * 6, 3)
    assert set(drawn[3, 3::6, 0]) == {0, 50, 100, 150, 200}


@pytest.mark.parametrize("output", ["missing/digits.png", "digits"])
def test_show_says_why_nothing_was_written(tmp_path, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)
    assert main(["show", "digits", "--output", output]) == 1
    assert f"{output} was not written: " in capsys.readouterr().out


def test_show_says_what_is_missing(tmp_path, capsys):
    assert main(["show", "svhn", str(tmp_path)]) == 1
    assert "svhn: SVHN is not complete" in capsys.readouterr().out


def test_an_unknown_name_lists_the_known_ones():
    command = [sys.executable, "-m", "tritoncaps.data", "check", "data", "cifar"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "no data set is called 'cifar'; there are mnist, fashion-mnist" in result.stderr
