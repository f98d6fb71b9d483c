"""The shipped weights and their card come from the files of a run."""

import csv
import json

import pytest
import torch

from engine import checkpoint
from tools import ship_weights
from tritoncaps._files import read_sealed, write_sealed
from tritoncaps.models import _load, _pretrained, create_model

KWARGS = {
    "num_classes": 10, "in_channels": 1, "image_size": (18, 18), "channels": 4, "capsule_types": 1,
}  # fmt: skip
# What train_mnist.py writes, but for what the tool does not read.
ARGS = {
    "model": "capsnet", "model_kwargs": {**KWARGS, "image_size": [18, 18]}, "dataset": "digits",
    "validation_fraction": 0.1, "epochs": 2, "batch_size": 64, "max_shift": 0,
    "decoder_lr_factor": 3.0, "reconstruction_weight": 0.02, "lr": 0.001,
}  # fmt: skip
ENVIRONMENT = {
    "torch": "2.14.1", "processor": "CPU", "gpu": None, "precision": "fp32", "threads": 2,
    "commit": "0123456789ab",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty registry."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "registry.json").write_text("[]")
    monkeypatch.setattr(_pretrained, "FOLDER", folder)
    monkeypatch.setattr(_load, "FOLDER", folder)
    return folder


@pytest.fixture
def make_run(tmp_path):
    def make(seed, accuracies=(0.9, 0.95), validation=(0.8, 0.7), **args):
        run = tmp_path / f"run{seed}"
        run.mkdir()
        content = {"args": {**ARGS, "seed": seed, **args}, "environment": ENVIRONMENT}
        (run / "args.json").write_text(json.dumps(content))
        with (run / "summary.csv").open("w", newline="") as file:
            names = ["epoch", "train_accuracy", "validation_accuracy", "test_accuracy", "seconds"]
            writer = csv.writer(file)
            writer.writerow(names)
            for epoch, row in enumerate(zip(validation, accuracies, strict=True), 1):
                writer.writerow([epoch, 0.5, *row, 61.0])
        torch.manual_seed(seed)
        model = create_model("capsnet", **KWARGS, reconstruction=args.get("decoder", False))
        header = {
            "model": "capsnet", "dataset": "digits", "scaling": "pixels / 255", "epoch": 1,
            "model_kwargs": {**KWARGS, "reconstruction": args.get("decoder", False)},
            "class_names": list("0123456789"), "validation": 0.8,
        }  # fmt: skip
        write_sealed(run / "model_best.safetensors", model.state_dict(), header)
        return run

    return make


def test_weights_card_and_registry(folder, make_run, capsys):
    runs = [make_run(2, (0.9, 0.96), (0.7, 0.7)), make_run(1), make_run(3, (0.93, 0.97))]
    words = ["--description", "A small one.", "--paper", "arXiv:1710.09829"]
    assert ship_weights.main([*map(str, runs), "--tag=digits", *words]) == 0
    assert 'create_model("capsnet.digits", pretrained=True) works here' in capsys.readouterr().out
    model = create_model("capsnet.digits", pretrained=True)
    weights, _ = read_sealed(runs[1] / "model_best.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    assert model.pretrained_cfg == _pretrained.registry()[0]
    assert (
        model.pretrained_cfg
        == _load.load_model(folder / "capsnet.digits.safetensors").pretrained_cfg
    )
    assert model.pretrained_cfg.input_size == (1, 18, 18)
    assert model.pretrained_cfg.model_kwargs["iterations"] == 3  # a default, written down
    card = (folder / "capsnet.digits.md").read_text()
    for line in (
        "# capsnet.digits",
        "A small one.",
        "| 1 (this file) | 2 | 95.00 % | 90.00 % (epoch 1) |",
        "| 3 | 2 | 97.00 % | 93.00 % (epoch 1) |",
        "| mean ± standard deviation | | 96.00 ± 1.00 % | 91.00 ± 1.73 % |",
        "python examples/train_mnist.py --model capsnet --model-kwargs channels=4 capsule_types=1 "
        "--dataset digits --epochs 2 --batch-size 64 --seed 1 --precision fp32",
        "Commit 0123456789ab, torch 2.14.1, CPU, 2 threads, fp32; 0:02:02 without evaluations, "
        "0:01:01 for the median epoch.",
        "| data | scikit-learn's digits |",
        "The file holds the epoch that the validation images chose, of the seed that reads most of "
        "its validation images then.",
    ):
        assert line in card.splitlines()


def test_the_last_epoch(folder, make_run, capsys):
    run = make_run(1, resume="runs/1")
    torch.manual_seed(3)
    weights = create_model("capsnet", **KWARGS, reconstruction=False).state_dict()
    state = {"model": weights, "progress": {"epoch": 1}}
    checkpoint.save(run / "last.safetensors", state)
    assert ship_weights.main([str(run), "--tag=last", "--last"]) == 2
    said = "its weights are of epoch 1, by summary.csv it should be 2"
    assert said in capsys.readouterr().err
    state["progress"]["epoch"] = 2
    checkpoint.save(run / "last.safetensors", state)
    assert ship_weights.main([str(run), "--tag=last", "--last"]) == 0
    model = create_model("capsnet.last", pretrained=True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    card = (folder / "capsnet.last.md").read_text()
    assert "The file holds the last epoch." in card.splitlines()
    assert "Commit 0123456789ab when last resumed, torch" in card
    others = [make_run(2, validation=(0.9, 0.6)), make_run(3, validation=(0.6, 0.7))]
    assert ship_weights.main([*map(str, [*others, run]), "--tag=all", "--last"]) == 2
    assert f"{others[1] / 'last.safetensors'}" in capsys.readouterr().err  # the first of two equals


def test_the_order_of_the_tags(folder, make_run):
    run = str(make_run(1))
    for options in (["one"], ["two"], ["one"], ["three", "--default"], ["one"]):
        assert ship_weights.main([run, "--tag", *options]) == 0
    assert [cfg.tag for cfg in _pretrained.registry()] == ["three", "one", "two"]


def test_a_decoder_that_is_too_large(folder, make_run, capsys):
    run = str(make_run(1, decoder=True))
    assert ship_weights.main([run, "--tag=a"]) == 2
    assert "the decoder has 3,759 kB, at most 1,000 kB ship" in capsys.readouterr().err
    assert ship_weights.main([run, "--tag=a", "--without-decoder"]) == 0
    assert create_model("capsnet.a", pretrained=True).decoder is None


def test_an_encoder_that_is_too_large():
    with pytest.raises(ValueError, match="the encoder has 800 kB, at most 700 kB ship: train"):
        ship_weights.check_sizes({"conv.weight": torch.empty(200_000, device="meta")})


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"seed": 1}, "two runs have the same seed: [1, 1]"),
        ({"seed": 2, "lr": 0.1}, "was trained with --lr 0.1 and"),
        ({"seed": 2, "epochs": 3}, "has finished 2 of 3 epochs: go on with --resume"),
    ],
)
def test_runs_that_do_not_go_together(folder, make_run, capsys, second, message):
    first = make_run(1)
    if second["seed"] == 1:
        first = first.rename(first.with_name("first"))
    assert ship_weights.main([str(first), str(make_run(**second)), "--tag=a"]) == 2
    assert message in capsys.readouterr().err
    assert json.loads((folder / "registry.json").read_text()) == []


@pytest.mark.parametrize("content", [None, "{", "{}", "[]", '{"args": {}, "environment": {}}'])
def test_no_run(folder, make_run, capsys, content):
    run = make_run(1)
    if content is None:
        (run / "args.json").unlink()
    else:
        (run / "args.json").write_text(content)
    assert ship_weights.main([str(run), "--tag=a"]) == 2
    assert "is no run of train_mnist.py" in capsys.readouterr().err


@pytest.mark.parametrize("tag", ["", "../a", "a/b", "A", ".a", "a b"])
def test_a_tag_that_is_no_file_name(folder, make_run, capsys, tag):
    assert ship_weights.main([str(make_run(1)), "--tag", tag]) == 2
    assert "becomes a part of file names" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"registry.json"}
