"""Training on images alone: what is asked of the capsules, and how a run goes."""

import pytest
import torch
import train_scae
from example_runs import few_digits, stop_after
from test_experiments import check_picture, finish, rows_of, run, untimed
from train_scae import Recipe, linear_accuracy, new_model, unsupervised_accuracy, with_margin

from tritoncaps.data import to_float
from tritoncaps.models import load_model

for package in ("matplotlib", "sklearn"):
    pytest.importorskip(package, reason=f"{package} is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (
    "--dataset=digits", "--device=cpu", "--limit-train=90", "--limit-test=40", "--epochs=2",
    "--batch-size=45", "--parts=3", "--objects=3", "--channels=4", "--template-size=5",
)  # fmt: skip


def blobs(names, count=40):
    """Features of as many images of each class, far apart, and the labels that they are given."""
    labels = torch.arange(3).repeat(count)
    return 10 * torch.eye(3)[labels] + torch.rand(3 * count, 3), torch.tensor(names)[labels]


@pytest.mark.parametrize("names", [[0, 1, 2], [2, 0, 1]])
def test_clusters_get_the_classes_that_fit_best(names):
    train, _ = blobs([0, 0, 0])
    test, labels = blobs(names)
    accuracy, classes = unsupervised_accuracy(train, test, labels, 3, seed=0)
    assert accuracy == 1 and torch.equal(classes, labels)
    # Two clusters cannot both have the class that they show.
    labels = torch.where(labels == names[0], names[1], labels)
    accuracy, classes = unsupervised_accuracy(train, test, labels, 3, seed=0)
    assert accuracy == pytest.approx(2 / 3) and len(classes.unique()) == 3


def test_a_linear_classifier_learns_from_training_images_alone():
    train, train_labels = blobs([1, 0, 2])
    test, labels = blobs([1, 2, 0])
    assert linear_accuracy(train, train_labels, test, train_labels) == 1
    assert linear_accuracy(train, train_labels, test, labels) == pytest.approx(1 / 3)


def small_watched():
    recipe = Recipe(parts=3, objects=3, channels=4, template_size=5).filled()
    train = few_digits().train
    return recipe, new_model(recipe, 1, train, 10), to_float(train.images[:8]), train.labels[:8]


def test_labels_reach_the_classifier_alone():
    recipe, model, images, labels = small_watched()
    task = train_scae.Autoencode(recipe, 10)
    output = task.run(model, images, labels)
    before = torch.autograd.grad(
        task.loss(output, labels, images), [*model.parameters()], retain_graph=True
    )
    after = torch.autograd.grad(task.loss(output, 9 - labels, images), [*model.parameters()])
    changed = {
        name.partition(".")[0]
        for (name, _), one, other in zip(model.named_parameters(), before, after, strict=True)
        if not torch.equal(one, other)
    }
    assert changed == {"classifier"}
    assert torch.equal(task.correct(output, labels), output[1].argmax(dim=1) == labels)
    said = torch.cat([output[0].activations, output[0].explained], dim=1)
    assert torch.equal(task.predictions(output), said)


def test_parts_learn_first_and_then_stay_as_they_are():
    recipe, model, images, labels = small_watched()
    task = train_scae.Autoencode(recipe, 10, part_steps=5)
    learning = {}
    for task.step in (0, 4, 5, 9):
        model.zero_grad()
        task.loss(task.run(model, images, labels), labels, images).backward()
        learning[task.step] = {
            name.removeprefix("autoencoder.").partition(".")[0]
            for name, p in model.named_parameters()
            if p.grad is not None
        }
    parts, objects = {"part_encoder", "template_decoder"}, {"object_encoder", "object_decoder"}
    assert learning[0] == learning[4] == parts
    assert learning[5] == learning[9] == objects | {"classifier"}


def test_each_half_has_a_cycle_of_the_learning_rate():
    rate = train_scae.Cycles(1.0, steps=100, part_steps=40)
    assert rate(0, 0) == pytest.approx(rate(40, 0)) == pytest.approx(1 / 25)
    assert rate(12, 0) == pytest.approx(rate(58, 0)) == pytest.approx(1)
    assert max(rate(39, 0), rate(99, 0)) < 0.01
    assert train_scae.Cycles(1.0, 100)(30, 0) == pytest.approx(1)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--parts-share=1"], "--parts-share 1.0 must be at least 0 and below 1"),
        (["--features=2"], "--parts-share 0.7 needs --features 0, got 2"),
        (["--features=-1"], "SCAE: features must be >= 0, got -1"),
        (["--max-shift=28"], "--max-shift 28 must be less than the side of the images, 28x28"),
    ],
)
def test_a_wrong_flag_is_refused(flags, words, tmp_path):
    status, printed = run(train_scae, *TINY, *flags, f"--output-dir={tmp_path / 'run'}")
    assert status == 2 and words in printed


def test_the_background_starts_as_the_images_are():
    _, model, images, _ = small_watched()
    background = model.autoencoder.template_decoder.background.sigmoid()
    assert background.item() == pytest.approx(0.02)
    assert images.median() == 0


def test_a_margin_is_black():
    dataset = with_margin(few_digits(), 6)
    assert dataset.train.images.shape == (90, 1, 40, 40)
    assert not dataset.test.images[:, :, :6].any() and not dataset.test.images[..., 34:].any()
    assert torch.equal(dataset.test.images[:, :, 6:34, 6:34], few_digits().test.images)
    with pytest.raises(ValueError, match="--margin -1 must be >= 0"):
        with_margin(dataset, -1)


def test_flags_win_over_a_size():
    recipe = Recipe(size="paper", parts=5).filled()
    assert (recipe.parts, recipe.objects, recipe.margin, recipe.batch_size) == (5, 32, 6, 128)


def table_of(directory):
    return untimed(rows_of(directory, "classes"))


def test_a_stopped_run_continues_as_if_it_had_not_been_stopped(tmp_path):
    flags = (*TINY, "--seeds=2")
    printed = finish(train_scae, *flags, f"--output-dir={tmp_path / 'whole'}")
    assert printed.count("by explained  unsupervised ") == 2
    assert "parts learn for 1 of 2 epochs, then objects" in printed
    assert f"network     {tmp_path / 'whole/seed2/scae'}, for tritoncaps.models" in printed
    for name in ("curves", "templates", "parts", "clusters"):
        check_picture(tmp_path / f"whole/seed2/{name}.png", (150, 300))
    model = load_model(tmp_path / "whole/seed1/scae")
    assert model(torch.rand(2, 1, 28, 28)).explained.shape == (2, 3)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5)  # in the first epoch of the second seed
        status, printed = run(train_scae, *flags, f"--output-dir={tmp_path / 'parts'}")
    assert status == 130 and "stopped and saved" in printed
    printed = finish(train_scae, *flags, f"--output-dir={tmp_path / 'parts'}")
    assert "resuming    seed 2 after 0 epochs and 1 batch" in printed
    assert table_of(tmp_path / "parts") == table_of(tmp_path / "whole")
    status, printed = run(train_scae, *TINY, "--lr=1", f"--output-dir={tmp_path / 'parts'}")
    assert status == 2 and "was made with --lr 0.003, not --lr 1" in printed


def test_a_dry_run_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(train_scae, "make_deterministic", lambda: asked.append(True))
    flags = [flag for flag in TINY if not flag.startswith(("--limit", "--epochs", "--batch"))]
    assert "dry run: everything works" in finish(train_scae, "--dry-run", "--deterministic", *flags)
    assert asked == [True]
    assert list(tmp_path.iterdir()) == []
