"""A folder of one's own images, from the first command to the test of the trained model."""

import json
import re
import shutil
from pathlib import Path

import pytest
from example_runs import small_network

import compare_models
import reconstruct
import train_mnist
from engine import baseline

Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("blue and fairly dark", "grey", "red")
COLOURS = ((0, 0, 100), (100, 100, 100), (200, 0, 0))
NETWORK = ("--model=capsnet", "--model-kwargs", "channels=4", "capsule_types=2")
MACHINE = ("--device=cpu", "--precision=fp32")
NEW = (*NETWORK, *MACHINE, "--epochs=1", "--batch-size=8")
COUNTS = {"train": 6, "val": 2, "test": 4}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Coloured images in three classes and three parts, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for part, count in COUNTS.items():
        for name, colour in zip(NAMES, COLOURS, strict=True):
            folder = tmp_path / "own" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (30, 40), colour).save(folder / f"{index}.png")
    return tmp_path / "own"


def run(*flags):
    return train_mnist.main(list(flags))


def train(*flags):
    return run(*NEW, "--dataset=folder", "--data-dir=own", "--output-dir=run", *flags)


def test_it_is_trained_tested_and_continued(own, tmp_path, capsys):
    assert train("--image-size", "20", "18") == 0
    printed = capsys.readouterr().out
    assert "3 classes in own, RGB, 20x18, tested on test/, validated on val/" in printed
    assert "18 to train, 6 to validate, 12 to test" in printed
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["dataset"] == "folder" and config["class_names"] == list(NAMES)
    assert config["model_kwargs"]["image_size"] == [20, 18]
    for name in ("curves", "reconstructions", "perturbations", "confusion"):
        assert (tmp_path / f"run/{name}.png").stat().st_size > 0

    # The size is remembered, even by the weights alone, and may be given again.
    assert run("--eval-only", "--resume=run", *MACHINE) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    (tmp_path / "alone/args.json").unlink()
    file = "--resume=alone/model_best.safetensors"
    assert run("--eval-only", file, "--data-dir=own", *MACHINE) == 0
    assert run("--resume=run", "--epochs=2", "--image-size", "20", "18") == 0
    assert "test accuracy" in capsys.readouterr().out

    # The experiments take the run too, and say which size it needs.
    there = ("run", "--dataset=folder", "--data-dir=own", *MACHINE)
    assert reconstruct.main([*there, "--image-size", "20", "18"]) == 0
    assert reconstruct.main([*there, "--output-dir=out"]) == 2
    expected = "images of 20x18 pixels, not 40x30: give --image-size 20 18"
    assert expected in capsys.readouterr().err

    # Other images, or of other classes, colours or sizes, are refused.
    Image.new("RGB", (30, 40), COLOURS[0]).save(own / "train/red/0.png")
    assert run("--resume=run", "--epochs=3") == 2
    expected = r"on 36 images with the checksum (\w{8}), but --data-dir holds 36 .* (?!\1)\w{8}: "
    assert re.search(expected, capsys.readouterr().err)
    assert run("--resume=run", "--epochs=3", "--image-size=20") == 2
    assert (
        "--image-size [20, 20] differs from the resumed run's [20, 18]" in capsys.readouterr().err
    )
    for path in own.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert run("--eval-only", "--resume=run") == 2
    error = capsys.readouterr().err
    assert "trained on images of 3 channels, but those of --data-dir are grey: with one" in error
    for part in COUNTS:
        (own / part / "red").rename(own / part / "rot")
    for flags in (("--epochs=3",), ("--eval-only",)):
        assert run("--resume=run", *flags) == 2
        error = capsys.readouterr().err
        assert "trained on the classes blue and fairly dark, grey, red, but --data-dir" in error
        assert "grey, rot: give a folder with the same subfolders" in error


def test_a_folder_without_parts_is_split_like_any_training_set(own, capsys):
    assert run(*NEW, "--dataset=folder", "--data-dir=own/train", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "tested on a fifth of each class" in printed and "everything works" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--image-size=16",), "--image-size 16 16: CapsNet: image_size=(16, 16) is too small"),
        (("--image-size", "1", "2", "3"), "expected SIDE or HEIGHT WIDTH"),
        (("--data-dir=typo",), "--dataset folder: the folder typo does not exist: check data_dir"),
        (
            ("--dataset=digits", "--image-size=20"),
            "--dataset digits: load_dataset: image_size=(20, 20) is for",
        ),
    ],
)
@pytest.mark.usefixtures("own")
def test_a_wrong_flag_is_named(tmp_path, capsys, flags, message):
    try:
        status = train(*flags)
    except SystemExit as exited:
        status = exited.code
    assert status == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fraction", ["0", "0.0001", "1", "nan"])
def test_a_share_that_leaves_one_part_empty_is_named(tmp_path, monkeypatch, capsys, fraction):
    monkeypatch.chdir(tmp_path)
    flags = ("--dataset=digits", f"--validation-fraction={fraction}", "--output-dir=run")
    assert run(*NEW, *flags) == 2
    expected = f"error: --validation-fraction {float(fraction)} holds out"
    assert expected in capsys.readouterr().err


@pytest.mark.usefixtures("own")
def test_an_experiment_keeps_to_its_folder(monkeypatch, capsys):
    monkeypatch.setattr(baseline, "create_network", small_network)
    flags = ("--models=cnn", "--dataset=folder", "--epochs=1", "--batch-size=8", "--output-dir=out")
    assert compare_models.main([*flags, *MACHINE, "--data-dir=own"]) == 0
    assert compare_models.main([*flags, *MACHINE, "--data-dir=./own"]) == 0
    assert "finished before" in capsys.readouterr().out
    shutil.copytree("own", "other")
    assert compare_models.main([*flags, *MACHINE, "--data-dir=other"]) == 2
    assert f"not --data-dir {Path('other').resolve()}" in capsys.readouterr().err
