"""predict.py: what it prints and draws, and its errors."""

import re

import pytest
import torch
from PIL import Image

import predict
from tritoncaps.data import DatasetError, load_dataset
from tritoncaps.models import create_model

KWARGS = {"channels": 4, "capsule_types": 1}
NAMES = "0123456789"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    create_model("capsnet", **KWARGS).save_pretrained(directory, class_names=NAMES)
    return directory


@pytest.fixture
def files(tmp_path):
    images = load_dataset("digits").test.images[:2, 0]
    paths = [tmp_path / "dark.png", tmp_path / "bright digit.png"]
    for path, image, flip in zip(paths, images, (255, 0), strict=True):
        Image.fromarray((flip - image if flip else image).numpy()).resize((90, 90)).save(path)
    return [str(path) for path in paths]


def tiles(picture, rows, columns):
    """The tiles of a picture of grey images, (rows, columns, 28, 28)."""
    with Image.open(picture) as drawn:
        assert drawn.size == (columns * 29 * 4, rows * 29 * 4)
        pixels = torch.frombuffer(bytearray(drawn.convert("L").tobytes()), dtype=torch.uint8)
    pixels = pixels.view(rows, 29, 4, columns, 29, 4)[:, :28, 0, :, :28, 0]
    return pixels.transpose(1, 2) / 255


def test_it_prints_the_answers_and_draws_what_is_decoded(run, files, tmp_path, capsys):
    picture = tmp_path / "out.png"
    assert predict.main([*files, "--model", str(run), "--picture", str(picture)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    images = torch.stack([predict.read_digit(file) for file in files])
    with torch.inference_mode():
        output = predict.load_model(run)(images)
    for path, line, activations in zip(files, lines, output.activations, strict=True):
        (first, second), (k, n) = (x.tolist() for x in activations.topk(2))
        answers = rf"{NAMES[k]} \({first:.3f}\), then {NAMES[n]} \({second:.3f}\)"
        assert re.fullmatch(rf"{re.escape(path)} +{answers}", line)
    assert last == f"{picture}: what the network saw, over what it decodes from its answer"
    expected = torch.stack([images, output.reconstruction])[:, :, 0]
    torch.testing.assert_close(tiles(picture, 2, 2), expected, rtol=0, atol=0.01)


def test_the_shipped_network_reads_digits(files, tmp_path, capsys):
    labels = load_dataset("digits").test.labels[:2].tolist()
    assert predict.main([*files, "--picture", str(tmp_path / "out.png")]) == 0
    for line, label in zip(capsys.readouterr().out.splitlines(), labels, strict=False):
        assert re.search(rf"png +{label} \(0\.\d", line)


def test_what_cannot_be_read_leaves_the_others(run, files, tmp_path, capsys):
    Image.new("L", (30, 30), 255).save(tmp_path / "blank.png")
    arguments = ["--model", str(run), "--picture", str(tmp_path / "out.png")]
    assert predict.main([files[0], str(tmp_path / "blank.png"), files[1], *arguments]) == 2
    out, error = capsys.readouterr()
    assert [line.partition(".png")[0] for line in out.splitlines()[:2]] == [
        file.removesuffix(".png") for file in files
    ]
    assert error.startswith("predict.py: error: ") and "blank.png: the picture is blank" in error
    assert tiles(tmp_path / "out.png", 2, 2).shape == (2, 2, 28, 28)


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


@pytest.mark.parametrize(
    ("cfg", "digits"),
    [
        ({"dataset": "mnist"}, True),
        ({}, True),
        ({"class_names": tuple(NAMES)}, True),
        ({"class_names": tuple("ABCDEFGHIJ")}, False),
        ({"dataset": "folder"}, False),
        ({"num_classes": 2}, False),
    ],
    ids=str,
)
def test_only_a_network_for_digits_gets_a_prepared_one(files, cfg, digits):
    cfg = {"num_classes": 10, **cfg}
    kwargs = {"num_classes": cfg.pop("num_classes"), "in_channels": 1, "image_size": 28}
    image = predict.read(files[0], predict.PretrainedCfg("capsnet", kwargs, **cfg))
    assert torch.equal(image, predict.read_digit(files[0])) == digits


def test_networks_that_cannot_answer(files, tmp_path, small_model, capsys):
    small_model("scae").save_pretrained(tmp_path / "objects")
    create_model("capsnet", in_channels=2, **KWARGS).save_pretrained(tmp_path / "two")
    nan = create_model("capsnet", **KWARGS)
    torch.nn.init.constant_(nan.routing.weight, float("nan"))
    nan.save_pretrained(tmp_path / "nan")
    words = {
        "objects": "scae has no classes to answer with",
        "two": "takes images of 2 channels; files have 1 or 3",
        "nan": "answers with numbers that are not finite",
    }
    for name, message in words.items():
        assert predict.main([files[0], "--model", str(tmp_path / name)]) == 2
        out, error = capsys.readouterr()
        assert not out and message in error


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
        (["FILE", "--picture="], "--picture '' must end in .png"),
        (["FILE", "--picture=out.jpg"], "--picture 'out.jpg' must end in .png"),
        (["FILE", "--device=tpu"], "--device tpu: not available here"),
        (["FILE", "--device=meta"], "--device meta: it holds no numbers"),
    ],
    ids=["image", "model", "folder", "picture", "no-picture", "format", "device", "meta"],
)
def test_errors(run, files, capsys, arguments, message):
    arguments = [argument.replace("FILE", files[0]) for argument in arguments]
    if not any(argument.startswith("--model") for argument in arguments):
        arguments += ["--model", str(run)]
    assert predict.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("predict.py: error: ")
    assert message in error
