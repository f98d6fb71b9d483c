"""predict.py: what it prints and draws, and its errors."""

import re

import pytest
import torch
from PIL import Image

import predict
from tritoncaps.data import DatasetError, load_dataset
from tritoncaps.models import create_model

KWARGS = {"channels": 4, "capsule_types": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    create_model("capsnet", **KWARGS).save_pretrained(directory, class_names="ABCDEFGHIJ")
    return directory


@pytest.fixture
def files(tmp_path):
    images = load_dataset("digits").test.images[:2, 0]
    paths = [tmp_path / "dark.png", tmp_path / "bright digit.png"]
    for path, image, flip in zip(paths, images, (255, 0), strict=True):
        Image.fromarray((flip - image if flip else image).numpy()).resize((90, 90)).save(path)
    return [str(path) for path in paths]


def test_it_prints_the_answers_and_draws_what_is_decoded(run, files, tmp_path, capsys):
    picture = tmp_path / "out.png"
    assert predict.main([*files, "--model", str(run), "--picture", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for path, line in zip(files, lines, strict=False):
        assert re.fullmatch(
            rf"{re.escape(path)} +[A-J] \(0\.\d{{3}}\), then [A-J] \(0\.\d{{3}}\)", line
        )
    with Image.open(picture) as drawn:
        assert drawn.size == (2 * 29 * 4, 2 * 29 * 4)
        pixels = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8)
    seen = pixels.view(232, 232, 3)[::4, ::4, 0][:28, :28] / 255
    torch.testing.assert_close(seen, predict.read_digit(files[0])[0], rtol=0, atol=0.01)


def test_many_images_fill_rows(tmp_path):
    images = torch.rand(18, 1, 28, 28)
    predict.draw(images, images, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.size == (9 * 29 * 4, 4 * 29 * 4)
    predict.draw(images[:17], images[:17], tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.size == (9 * 29 * 4, 4 * 29 * 4)
        pixels = torch.frombuffer(bytearray(drawn.convert("L").tobytes()), dtype=torch.uint8)
    assert (pixels.view(4 * 29 * 4, -1)[2 * 29 * 4 :, -29 * 4 :] == 255).all()  # no 18th


def test_other_images_are_resized(tmp_path, capsys):
    images = {"num_classes": 2, "in_channels": 3, "image_size": 20}
    model = create_model("capsnet", reconstruction=False, **images, **KWARGS)
    model.save_pretrained(tmp_path / "pets")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    Image.new("L", (50, 40), 9).save(tmp_path / "grey.png")
    paths = [str(tmp_path / "red.png"), str(tmp_path / "grey.png")]
    assert predict.main([*paths, "--model", str(tmp_path / "pets")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"red\.png +[01] \(", out)
    assert out.endswith("the model has no decoder, so there is no picture\n")
    red = predict.read(paths[0], predict.load_model(tmp_path / "pets").pretrained_cfg)
    assert red.shape == (3, 20, 20)
    assert red[0].eq(1).all() and not red[1:].any()


def test_colours_for_a_grey_network(tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    cfg = predict.PretrainedCfg("capsnet", {"in_channels": 1, "image_size": 20})
    with pytest.raises(DatasetError, match=r"red\.png has colours, and the network sees grey"):
        predict.read(str(tmp_path / "red.png"), cfg)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "none.png does not exist"),
        (["FILE", "--model=none"], "load_model: none does not exist; give a run directory"),
        (
            ["FILE", "--picture=no/such/folder.png"],
            "No such file or directory: 'no/such/folder.png'",
        ),
        (["FILE", "--picture=FILE"], "would replace an image: give another name"),
        (["FILE", "--device=tpu"], "--device tpu: not available here"),
    ],
    ids=["image", "model", "folder", "picture", "device"],
)
def test_errors(run, files, capsys, arguments, message):
    arguments = [argument.replace("FILE", files[0]) for argument in arguments]
    if not any(argument.startswith("--model") for argument in arguments):
        arguments += ["--model", str(run)]
    assert predict.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("predict.py: error: ")
    assert message in error
