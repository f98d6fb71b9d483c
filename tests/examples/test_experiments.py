"""The experiments as their users see them: what each command writes, and how it continues.

Every program runs in this process, with networks that are a thousand times smaller, on a few of the
embedded digits. test_training.py and test_train_mnist.py test single training runs.
"""

import contextlib
import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from example_runs import small_network, stop_after
from image_sets import few_solids

import compare_models
import less_data
import reconstruct
import robustness
import routing_sweep
import train_mnist
import train_overlapping
import viewpoints
from engine import baseline, checkpoint, runner, training
from engine.tasks import TwoClasses
from tritoncaps.data import Batches, Dataset, ImageSet
from tritoncaps.models import create_model

pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")

MACHINE = ("--dataset=digits", "--device=cpu")
TINY = (
    *MACHINE, "--precision=fp32", "--epochs=2", "--batch-size=32", "--test-batch-size=25",
    "--limit-train=100", "--limit-test=40", "--lr=0.003", "--warmup-steps=2", "--log-interval=1",
)  # fmt: skip
RESULT = {
    "name", "model", "seed", "parameters", "epochs", "chosen_epoch", "test_accuracy",
    "final_test_accuracy", "highest_test_accuracy", "highest_epoch", "train_accuracy",
    "seconds_per_epoch", "device", "threads", "precision", "commit",
}  # fmt: skip
PAIR = {"primary_iterations", "secondary_iterations"}
NETWORKS = ["capsnet", "deep_capsnet", "cnn"]


@pytest.fixture(autouse=True, scope="module")
def small_and_single(one_thread: None):
    """Use small networks in one thread, for all tests in this file."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(baseline, "create_network", small_network)
        yield


def run(program, *flags):
    """Run a program. Return its exit status and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = program.main(list(flags))
    return status, printed.getvalue()


def finish(program, *flags):
    """Run a program that must succeed. Return what it printed."""
    status, printed = run(program, *flags)
    assert status == 0, printed
    return printed


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of(directory, name):
    """Return the rows of a table, after checking that both of its forms agree."""
    content = json.loads((directory / f"{name}.json").read_text())
    assert content["recipe"] == json.loads((directory / "experiment.json").read_text())["recipe"]
    rows = content["rows"]
    for row, text in zip(rows, table(directory / f"{name}.csv"), strict=True):
        assert list(row) == list(text)
        assert ["" if value is None else str(value) for value in row.values()] == list(
            text.values()
        )
    return rows


def untimed(rows):
    """Return rows without measured times."""
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def check_picture(path, least=(300, 300)):
    """Assert that a picture shows something, has nothing cut off, and is small enough."""
    from matplotlib.image import imread

    assert path.stat().st_size < 300_000
    picture = imread(path)[..., :3]
    assert picture.shape[0] >= least[0] and picture.shape[1] >= least[1], picture.shape
    assert 0.01 < (picture != 1).any(-1).mean() < 0.98
    for edge in (picture[:3], picture[-3:], picture[:, :3], picture[:, -3:]):
        assert (edge == 1).all(), f"something touches the edge of {path.name}"


def forbid_training(monkeypatch):
    def refuse(*args):
        raise AssertionError("a finished cell is trained again")

    monkeypatch.setattr(training.Trainer, "fit", refuse)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """All networks with two seeds: the directory, and what was printed."""
    directory = tmp_path_factory.mktemp("compared") / "out"
    return directory, finish(compare_models, *TINY, "--seeds=2", f"--output-dir={directory}")


@pytest.fixture
def a_comparison(compared, tmp_path):
    """A copy of the comparison, to be changed."""
    shutil.copytree(compared[0], tmp_path / "copy")
    return tmp_path / "copy"


class TestCompareModels:
    def test_it_writes_runs_tables_and_a_picture(self, compared):
        directory, _ = compared
        cells = {f"{model}-seed{seed}" for model in NETWORKS for seed in (1, 2)}
        files = {"experiment.json", "runs.csv", "runs.json", "networks.csv", "networks.json"}
        assert {path.name for path in directory.iterdir()} == cells | files | {"curves.png"}
        check_picture(directory / "curves.png", (600, 960))

    def test_a_row_for_each_run_agrees_with_its_own_table(self, compared):
        directory, _ = compared
        rows = rows_of(directory, "runs")
        assert len(rows) == 6 and all(set(row) == RESULT for row in rows)
        for row in rows:
            epochs = table(directory / row["name"] / "summary.csv")
            tested = [float(epoch["test_accuracy"]) for epoch in epochs]
            assert row["epochs"] == len(tested) == 2
            assert row["test_accuracy"] == tested[row["chosen_epoch"] - 1]
            assert row["final_test_accuracy"] == tested[-1]
            assert row["highest_test_accuracy"] == max(tested)
            assert row["seconds_per_epoch"] > 0 and row["precision"] == "fp32"
        # The recipe is the same, and every seed starts differently.
        args = [json.loads((directory / row["name"] / "args.json").read_text()) for row in rows]
        assert len({json.dumps(a["args"]["lr"]) for a in args}) == 1
        losses = {(directory / row["name"] / "metrics.jsonl").read_text() for row in rows}
        assert len(losses) == 6

    def test_a_row_for_each_network_has_mean_and_spread(self, compared):
        directory, printed = compared
        runs, networks = rows_of(directory, "runs"), rows_of(directory, "networks")
        assert [row["model"] for row in networks] == NETWORKS
        for row in networks:
            values = [run["test_accuracy"] for run in runs if run["model"] == row["model"]]
            assert row["seeds"] == 2
            assert row["test_accuracy"] == pytest.approx(sum(values) / 2)
            spread = abs(values[0] - values[1]) / 2**0.5
            assert row["test_accuracy_spread"] == pytest.approx(spread)
        assert re.search(r"CNN .*chosen by validation .* ± .* %", printed)

    def test_the_same_command_again_trains_nothing(self, a_comparison, monkeypatch):
        before = (a_comparison / "runs.csv").read_bytes()
        forbid_training(monkeypatch)
        printed = finish(compare_models, *TINY, "--seeds=2", f"--output-dir={a_comparison}")
        assert printed.count("finished before") == 6
        assert (a_comparison / "runs.csv").read_bytes() == before

    def test_a_stopped_one_continues_as_if_it_had_not_been_stopped(
        self, tmp_path, compared, monkeypatch
    ):
        """Stopped in the middle of an epoch of the second network, and once more in the third."""
        flags = (*TINY, "--seeds=2", f"--output-dir={tmp_path / 'out'}")
        for steps in (8, 9):
            with pytest.MonkeyPatch.context() as patch:
                stop_after(patch, steps)
                status, printed = run(compare_models, *flags)
            assert status == 130
            assert "stopped and saved; go on with the same command" in printed
            assert not (tmp_path / "out/runs.csv").exists()
        printed = finish(compare_models, *flags)
        assert "finished before" in printed and "resuming    after " in printed
        assert untimed(rows_of(tmp_path / "out", "runs")) == untimed(rows_of(compared[0], "runs"))

    def test_more_epochs_continue_every_run(self, a_comparison, tmp_path):
        longer = ("--epochs=3", "--seeds=1", "--models", "cnn", "capsnet")
        printed = finish(compare_models, *TINY, *longer, f"--output-dir={a_comparison}")
        assert printed.count("resuming    after 2 epochs and 0 batches") == 2
        finish(compare_models, *TINY, *longer, f"--output-dir={tmp_path / 'fresh'}")
        went_on, fresh = (rows_of(path, "runs") for path in (a_comparison, tmp_path / "fresh"))
        assert untimed(went_on) == untimed(fresh) and fresh[0]["epochs"] == 3

    def test_an_unfinished_run_cannot_go_back(self, tmp_path, monkeypatch):
        flags = (*TINY, "--models=cnn", f"--output-dir={tmp_path / 'out'}")
        stop_after(monkeypatch, 8)  # in the third epoch
        assert run(compare_models, *flags, "--epochs=4")[0] == 130
        status, printed = run(compare_models, *flags, "--epochs=1")
        assert status == 2 and "cnn-seed1 in" in printed and "give --epochs 2" in printed

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--lr=0.1",), "was made with --lr 0.003, not --lr 0.1: repeat its flags"),
            (("--limit-train=99",), "--limit-train 100, not --limit-train 99"),
            (("--precision=bf16",), "--precision fp32, not --precision bf16"),
            (("--epochs=1",), "was trained for 2 epochs, not 1: give --epochs 2"),
        ],
    )
    def test_another_recipe_is_refused(self, compared, flags, message):
        status, printed = run(compare_models, *TINY, *flags, f"--output-dir={compared[0]}")
        assert status == 2 and message in printed
        assert printed.splitlines()[-1].startswith("compare_models.py: error: ")

    def test_a_recipe_that_no_run_was_made_by_can_be_corrected(self, tmp_path):
        output = f"--output-dir={tmp_path / 'out'}"
        status, printed = run(compare_models, *TINY, "--validation-fraction=2", output)
        assert status == 2 and "holds out 200 of 100 images" in printed
        finish(compare_models, *TINY, "--models=cnn", "--epochs=1", output)

    def test_directories_of_others_are_not_touched(self, compared, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        status, printed = run(compare_models, *TINY, f"--output-dir={tmp_path}")
        assert status == 2 and "is not empty and holds no experiment" in printed
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
        status, printed = run(routing_sweep, *TINY, f"--output-dir={compared[0]}")
        assert status == 2 and "belongs to compare_models.py" in printed

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--device=nonsense",), "--device nonsense: not available here"),
            (("--dataset=mnist", "--no-download"), "MNIST is not complete in nowhere/MNIST/raw"),
            (("--limit-train=2000",), "--limit-train 2000: scikit-learn's digits has 1,437"),
            (("--limit-test=2000",), "--limit-test 2000: scikit-learn's digits has 360"),
        ],
    )
    def test_an_error_is_a_single_line(self, tmp_path, flags, message):
        out = tmp_path / "out"
        status, printed = run(
            compare_models, *TINY, "--data-dir=nowhere", f"--output-dir={out}", *flags
        )
        assert status == 2 and message in printed and len(printed.splitlines()) == 1
        assert not out.exists()

    def test_without_a_validation_set_the_last_epoch_counts(self, tmp_path):
        flags = ("--validation-fraction=0", "--models=capsnet", f"--output-dir={tmp_path / 'out'}")
        finish(compare_models, *TINY, *flags)
        (row,) = rows_of(tmp_path / "out", "runs")
        assert row["chosen_epoch"] == 2
        assert row["test_accuracy"] == row["final_test_accuracy"]
        header = (tmp_path / "out/capsnet-seed1/summary.csv").read_text().splitlines()[0]
        assert "validation" not in header and "test_accuracy" in header
        config = json.loads((tmp_path / "out/capsnet-seed1/config.json").read_text())
        assert config["best"] == {"epoch": 2, "validation": None}

    def test_a_loss_that_is_not_finite_names_the_cell(self, tmp_path):
        flags = ("--lr=1e30", "--models=cnn", f"--output-dir={tmp_path / 'out'}")
        status, printed = run(compare_models, *TINY, *flags)
        assert status == 2 and "error: cnn-seed1: " in printed and "a lower --lr" in printed

    def test_a_cell_is_a_run_like_any_other(self, compared, monkeypatch):
        cell = compared[0] / "capsnet-seed1"
        printed = finish(train_mnist, "--eval-only", f"--resume={cell}", "--device=cpu")
        assert re.search(r"test of epoch \d: test accuracy .* of 360 wrong", printed)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    directory = tmp_path_factory.mktemp("swept") / "out"
    grid = ("--main", "1", "2", "--secondary", "1", "2", "--epochs=1")
    return directory, finish(routing_sweep, *TINY, *grid, f"--output-dir={directory}")


class TestRoutingSweep:
    def test_it_writes_the_grid(self, swept):
        directory, printed = swept
        rows = rows_of(directory, "grid")
        assert [(row["main"], row["secondary"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
        assert list(rows[0]) == [
            "main", "secondary", "seeds", "test_accuracy", "test_accuracy_spread",
            "highest_test_accuracy", "highest_test_accuracy_spread", "seconds_per_epoch",
            "seconds_per_epoch_spread", "pareto_front",
        ]  # fmt: skip
        assert any(row["pareto_front"] for row in rows)
        runs = rows_of(directory, "runs")
        assert len(runs) == 4 and all(set(row) == RESULT | PAIR for row in runs)
        for row in runs:
            args = checkpoint.load(directory / row["name"] / "last.safetensors")["args"]
            kwargs = args["model_kwargs"]
            assert kwargs["primary_iterations"] == row["primary_iterations"]
            assert kwargs["secondary_iterations"] == row["secondary_iterations"]
        assert "most accurate: main " in printed and "Pareto front" in printed

    def test_it_draws_three_pictures(self, swept):
        assert {path.name for path in swept[0].glob("*.png")} == {
            "grid.png", "time.png", "equal.png",
        }  # fmt: skip
        for path in swept[0].glob("*.png"):
            check_picture(path)

    def test_a_larger_grid_adds_to_it(self, swept, tmp_path):
        shutil.copytree(swept[0], tmp_path / "out")
        grid = ("--main", "1", "2", "3", "--secondary", "1", "--epochs=1")
        printed = finish(routing_sweep, *TINY, *grid, f"--output-dir={tmp_path / 'out'}")
        assert printed.count("finished before") == 2 and printed.count("training to epoch") == 1
        assert len(rows_of(tmp_path / "out", "grid")) == 3

    @pytest.mark.parametrize(
        ("points", "front"),
        [
            ([(1.0, 0.5)], [0]),
            ([(1.0, 0.5), (2.0, 0.6)], [0, 1]),
            ([(1.0, 0.6), (2.0, 0.5)], [0]),
            ([(1.0, 0.5), (1.0, 0.6), (2.0, 0.6)], [1]),
            ([(1.0, 0.5), (1.0, 0.5)], [0, 1]),
            ([(3.0, 0.9), (1.0, 0.5), (2.0, 0.7), (2.5, 0.6)], [0, 1, 2]),
        ],
    )
    def test_the_pareto_front(self, points, front):
        assert routing_sweep.pareto_front(points) == front


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("overlapping") / "out"
    flags = ("--mode=shifted", "--partners=3", f"--output-dir={directory}")
    return directory, finish(train_overlapping, *TINY, *flags)


class TestOverlapping:
    def test_it_writes_both_rates_of_both_networks(self, trained):
        directory, printed = trained
        rows = rows_of(directory, "pairs")
        assert [row["model"] for row in rows] == ["capsnet", "deep_capsnet"]
        for row in rows:
            assert set(row) == RESULT | {"mode", "pairs", "exact_pairs", "digits"}
            assert row["mode"] == "shifted" and row["pairs"] == 120
            assert 0 <= row["exact_pairs"] <= row["digits"] <= 1
            # A pair that is not exact has at most one correct digit.
            assert row["digits"] <= (1 + row["exact_pairs"]) / 2 + 1e-9
        assert printed.count("exact pairs") == 2
        for name in ("curves.png", "capsnet.png", "deep_capsnet.png"):
            check_picture(directory / name)

    def test_the_network_is_made_for_the_padded_images(self, trained):
        args = checkpoint.load(trained[0] / "capsnet-seed1/last.safetensors")["args"]
        assert args["model_kwargs"]["image_size"] == (36, 36)
        assert args["mode"] == "shifted"

    def test_coincident_pairs_stay_28x28_and_a_stopped_run_continues(self, tmp_path):
        flags = (*TINY, "--models=deep_capsnet")
        finish(train_overlapping, *flags, f"--output-dir={tmp_path / 'whole'}")
        kwargs = checkpoint.load(tmp_path / "whole/deep_capsnet-seed1/last.safetensors")["args"]
        assert kwargs["model_kwargs"]["image_size"] == (28, 28)
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 4)
            assert run(train_overlapping, *flags, f"--output-dir={tmp_path / 'parts'}")[0] == 130
        finish(train_overlapping, *flags, f"--output-dir={tmp_path / 'parts'}")
        whole, parts = (rows_of(tmp_path / name, "pairs") for name in ("whole", "parts"))
        assert untimed(whole) == untimed(parts)
        last = [checkpoint.load(tmp_path / f"{name}/deep_capsnet-seed1/last.safetensors")["model"]
                for name in ("whole", "parts")]  # fmt: skip
        assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])

    @pytest.mark.parametrize("flag", ["--loss=spread", "--rotation=5", "--scaling=0.1"])
    def test_a_flag_that_would_change_nothing_is_refused(self, flag, capsys):
        with pytest.raises(SystemExit) as stop:
            train_overlapping.main([flag])
        assert stop.value.code == 2
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err

    def test_another_mode_needs_another_directory(self, trained):
        status, printed = run(train_overlapping, *TINY, f"--output-dir={trained[0]}")
        assert status == 2 and "was made with --mode shifted, not --mode coincident" in printed

    def test_it_learns_to_read_pairs(self, tmp_path):
        """By chance it would find one pair in 45, and two digits in ten."""
        flags = (
            *MACHINE, "--precision=fp32", "--models=capsnet", "--epochs=6", "--batch-size=16",
            "--lr=0.01", "--warmup-steps=10", "--limit-train=600", "--limit-test=100",
            f"--output-dir={tmp_path / 'out'}",
        )  # fmt: skip
        finish(train_overlapping, *flags)
        (row,) = rows_of(tmp_path / "out", "pairs")
        assert row["exact_pairs"] > 0.2 and row["digits"] > 0.5


@pytest.fixture(scope="module")
def measured(compared, tmp_path_factory):
    directory = tmp_path_factory.mktemp("robustness") / "out"
    cells = [str(compared[0] / f"{model}-seed1") for model in NETWORKS]
    flags = (*MACHINE, "--limit-test=40", f"--output-dir={directory}")
    return directory, finish(robustness, *cells, *flags)


class TestRobustness:
    def test_a_row_for_every_network_and_condition(self, measured, compared):
        rows = rows_of(measured[0], "robustness")
        conditions = sum(len(kind.amounts) for kind in robustness.KINDS)
        assert len(rows) == 3 * conditions
        assert {row["network"] for row in rows} == {"CapsNet", "DeepCapsNet", "CNN"}
        runs = {row["name"]: row for row in rows_of(compared[0], "runs")}
        for row in rows:
            neutral = 1 if row["kind"] == "scale" else 0
            if row["amount"] == neutral:
                # A condition that does nothing gives the accuracy that the run reported.
                assert row["accuracy"] == runs[Path(row["run"]).name]["test_accuracy"]
            assert (row["no_gradient"] is None) == (not row["kind"].startswith("fgsm"))

    def test_its_pictures(self, measured):
        check_picture(measured[0] / "robustness.png", (600, 1000))
        check_picture(measured[0] / "examples.png")

    def test_what_was_measured_is_not_measured_again(self, measured, compared, monkeypatch):
        def refuse(*args):
            raise AssertionError("measured again")

        before = (measured[0] / "robustness.csv").read_bytes()
        monkeypatch.setattr(robustness, "measure", refuse)
        cells = [str(compared[0] / f"{model}-seed1") for model in NETWORKS]
        finish(robustness, *cells, *MACHINE, "--limit-test=40", f"--output-dir={measured[0]}")
        assert (measured[0] / "robustness.csv").read_bytes() == before

    def test_two_networks_of_a_kind_are_told_apart(self, compared, tmp_path):
        cells = [str(compared[0] / f"cnn-seed{seed}") for seed in (1, 2)]
        flags = ("--limit-test=20", "--kinds=shift", f"--output-dir={tmp_path / 'out'}")
        finish(robustness, *cells, *MACHINE, *flags)
        names = {row["network"] for row in rows_of(tmp_path / "out", "robustness")}
        assert names == {"CNN (cnn-seed1)", "CNN (cnn-seed2)"}

    def test_a_directory_without_a_network_gives_a_one_line_error(self, compared, tmp_path):
        status, printed = run(robustness, str(compared[0]), *MACHINE)
        assert status == 2 and "did you mean one of those in it: capsnet-seed1, " in printed
        status, printed = run(robustness, str(tmp_path / "no"), *MACHINE)
        assert status == 2 and "is not a directory: give the directory of a run" in printed


class TestLessData:
    def test_every_size_takes_the_same_steps(self, tmp_path):
        out = tmp_path / "out"
        flags = ("--sizes", "20", "100", "--epochs=1", f"--output-dir={out}")
        printed = finish(less_data, *TINY, *flags)
        runs, rows = rows_of(out, "runs"), rows_of(out, "sizes")
        assert len(runs) == 6 and len(rows) == 6
        assert {(row["model"], row["train_size"]) for row in rows} == {
            (model, size) for model in NETWORKS for size in (20, 100)
        }
        assert list(rows[0]) == [
            "model", "train_size", "seeds", "test_accuracy", "test_accuracy_spread",
            "train_accuracy", "train_accuracy_spread",
        ]  # fmt: skip
        steps = {
            len((out / run["name"] / "metrics.jsonl").read_text().splitlines()) for run in runs
        }
        assert steps == {4}  # 100 images in batches of 32
        assert "20 images" in printed
        check_picture(out / "sizes.png", (600, 900))
        # Finished runs keep their accuracy, which none of their epochs records.
        again = finish(less_data, *TINY, *flags)
        assert again.count("finished before") == 6 and rows_of(out, "sizes") == rows
        # A different largest size would mean a different number of steps.
        more = ("--sizes", "20", "50", "--epochs=1", f"--output-dir={out}")
        status, printed = run(less_data, *TINY, *more)
        assert status == 2 and "was made with --epoch-size 100, not --epoch-size 50" in printed
        finish(less_data, *TINY, *more, "--epoch-size=100", "--models=cnn")

    def test_the_default_sizes_fit_the_training_set(self):
        assert less_data.choose_sizes(None, 1437) == [100, 300, 1000, 1437]
        assert less_data.choose_sizes(None, 60_000) == less_data.SIZES

    def test_a_set_is_repeated_as_a_whole(self):
        images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1)
        repeated = less_data.repeated(ImageSet(images, torch.tensor([0, 1, 2])), 8)
        assert repeated.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
        assert repeated.images.flatten().tolist() == repeated.labels.tolist()

    def test_a_size_that_is_too_large_gives_a_one_line_error(self, tmp_path):
        flags = ("--sizes", "200", f"--output-dir={tmp_path / 'out'}")
        status, printed = run(less_data, *TINY, *flags)
        assert status == 2 and "--sizes 200: there are 100 training images" in printed


@pytest.fixture
def solids(monkeypatch):
    """A few rendered solids in place of all, and a note of what was asked for."""
    train, test = few_solids(
        size=28, instances=2, elevations=[30, 40], azimuths=[0, 100, 200], lightings=1
    )
    names = ("L-shape", "pyramid", "cylinder", "cone", "ring")

    def load(name, data_dir, **_):
        return Dataset(name, "Solids", train, test, names, f"{name} in {data_dir}", epochs=2)

    monkeypatch.setattr(runner, "load_dataset", load)


SOLIDS = (
    "--device=cpu", "--precision=fp32", "--epochs=2", "--batch-size=8", "--crop=24",
    "--warmup-steps=2", "--max-shift=3",
)  # fmt: skip


@pytest.mark.usefixtures("solids")
class TestViewpoints:
    def test_networks_are_compared_where_they_are_alike(self, tmp_path, monkeypatch):
        out = tmp_path / "out"
        flags = (*SOLIDS, "--seeds=2", f"--output-dir={out}")
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 3)
            assert run(viewpoints, *flags)[0] == 130
        printed = finish(viewpoints, *flags)
        # Of 60 test images, those from 0° are familiar.
        assert "20 test images familiar, 40 novel" in printed
        assert re.search(
            r"MatrixCapsNet .* % of the familiar views, .* % wrong of the novel", printed
        )
        runs, compared, by_angle = (rows_of(out, name) for name in ("runs", "matched", "views"))
        assert [row["model"] for row in compared] == ["matrix_capsnet", "cnn"]
        for seed in (1, 2):
            same = [row for row in runs if row["seed"] == seed]
            tables = [table(out / row["name"] / "summary.csv") for row in same]
            familiar = [[float(row["validation_accuracy"]) for row in rows] for rows in tables]
            target = min(max(values) for values in familiar)
            for row, rows, values in zip(same, tables, familiar, strict=True):
                epoch = rows[row["matched_epoch"] - 1]
                assert row["familiar_accuracy"] == float(epoch["validation_accuracy"])
                assert row["novel_accuracy"] == float(epoch["test_accuracy"])
                assert row["novel_error"] == 1 - row["novel_accuracy"]
                nearest = min(abs(value - target) for value in values)
                assert abs(row["familiar_accuracy"] - target) == nearest
                # Both novel viewpoints have 20 images.
                both = (float(epoch["100"]) + float(epoch["200"])) / 2
                assert row["novel_accuracy"] == pytest.approx(both)
        for row in compared:
            errors = [run["novel_error"] for run in runs if run["model"] == row["model"]]
            assert row["novel_error"] == pytest.approx(sum(errors) / 2)
        assert [(row["azimuth"], row["familiar"]) for row in by_angle] == [
            (0, True), (100, False), (200, False),
        ] * 2  # fmt: skip
        check_picture(out / "viewpoints.png", (400, 800))
        check_picture(out / "images.png")
        forbid_training(monkeypatch)
        assert finish(viewpoints, *flags).count("finished before") == 4
        assert rows_of(out, "runs") == runs

    def test_it_trains_on_the_familiar_views_and_tests_on_both(self, tmp_path, monkeypatch):
        used = []

        class Recorded(Batches):
            def __init__(self, images, *args, **options):
                used.append(images)
                super().__init__(images, *args, **options)

        for module in (runner, training):
            monkeypatch.setattr(module, "Batches", Recorded)
        flags = ("--view=elevation", "--familiar", "40", "--models=cnn", "--epochs=1")
        out = tmp_path / "out"
        finish(viewpoints, *SOLIDS, *flags, f"--output-dir={out}")
        # Half of a set each: 5 classes, 2 instances, 3 azimuths, from one of two elevations.
        trained, familiar, novel = used
        for images, elevation, instances in (
            (trained, 40, {0, 1}), (familiar, 40, {2, 3}), (novel, 30, {2, 3}),
        ):  # fmt: skip
            assert len(images) == 30 and set(images.view("elevation").tolist()) == {elevation}
            assert set(images.view("instance").tolist()) == instances
        args = json.loads((out / "cnn-seed1/args.json").read_text())["args"]
        assert args["model_kwargs"]["image_size"] == [24, 24] and args["familiar"] == [40]
        epoch = table(out / "cnn-seed1/summary.csv")[0]
        assert {name for name in epoch if name.isdecimal()} == {"30", "40"}
        assert epoch["validation_accuracy"] == epoch["40"]
        assert epoch["test_accuracy"] == epoch["30"]
        shown = [(row["elevation"], row["familiar"]) for row in rows_of(out, "views")]
        assert shown == [(30, False), (40, True)]

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--familiar", "10"), "--familiar 10: familiar_and_novel: familiar=[10] is 0 of 60"),
            (("--familiar", "0", "100", "200"), "is 60 of 60 images"),
            (("--crop=29",), "--crop 29: the images are 28x28; give at most 28"),
        ],
    )
    def test_what_cannot_be_compared_gives_a_one_line_error(self, tmp_path, flags, message):
        status, printed = run(viewpoints, *SOLIDS, *flags, f"--output-dir={tmp_path / 'out'}")
        assert status == 2 and message in printed and len(printed.splitlines()) == 1

    def test_smallnorb_is_used_where_it_is(self, tmp_path):
        flags = (*SOLIDS, "--models=cnn", "--dry-run", f"--data-dir={tmp_path}")
        assert "data        rendered-solids in" in finish(viewpoints, *flags)
        folder = tmp_path / "smallnorb"
        folder.mkdir()
        (folder / "smallnorb-5x46789x9x18x6x2x96x96-training-cat.mat.gz").touch()
        assert "data        smallnorb in" in finish(viewpoints, *flags)


def test_the_cnn_gets_the_size_of_the_capsule_network(monkeypatch):
    monkeypatch.setattr(baseline, "create_network", create_model)
    shape = {"num_classes": 5, "in_channels": 2, "image_size": (32, 32)}
    for kwargs, parameters in (({}, 68_754), ({"size": "big"}, 317_194)):
        widths = baseline.like("matrix_capsnet", shape, kwargs)
        cnn = baseline.ConvNet(**shape, **widths)
        assert sum(p.numel() for p in cnn.parameters()) == pytest.approx(parameters, rel=0.05)


class TestReconstruct:
    def test_it_draws_and_measures_the_named_classes(self, compared, tmp_path):
        out = tmp_path / "out"
        flags = ("--classes", "3", "8", "5", "--limit-test=100", f"--output-dir={out}")
        printed = finish(reconstruct, str(compared[0] / "deep_capsnet-seed1"), *MACHINE, *flags)
        rows = rows_of(out, "reconstruction")
        assert [row["class"] for row in rows] == ["3", "8", "5"]
        assert list(rows[0]) == [
            "class", "images", "accuracy", "squared_error", "variation_image",
            "variation_reconstruction",
        ]  # fmt: skip
        assert all(row["squared_error"] > 0 and row["variation_image"] > 0 for row in rows)
        assert "3 " in printed
        check_picture(out / "grids.png", (200, 900))
        check_picture(out / "overview.png", (250, 1000))
        check_picture(out / "failures.png", (200, 200))

    def test_by_default_it_writes_into_the_run(self, a_comparison):
        cell = a_comparison / "capsnet-seed1"
        finish(reconstruct, str(cell), *MACHINE, "--limit-test=50", "--per-class=2")
        assert (cell / "reconstruct/grids.png").is_file()
        assert len(rows_of(cell / "reconstruct", "reconstruction")) == 10

    @pytest.mark.parametrize(
        ("cell", "flags", "message"),
        [
            ("cnn-seed1", (), "is a CNN, which has no decoder"),
            ("capsnet-seed1", ("--classes", "x"), "--classes x: there are 0, 1, 2"),
        ],
    )
    def test_what_cannot_be_drawn_gives_a_one_line_error(
        self, compared, tmp_path, cell, flags, message
    ):
        status, printed = run(
            reconstruct, str(compared[0] / cell), *MACHINE, *flags, f"--output-dir={tmp_path / 'o'}"
        )
        assert status == 2 and message in printed


def test_total_variation_of_a_small_image():
    image = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    assert reconstruct.total_variation(image).tolist() == [2.0]


def test_the_test_set_of_overlaps_does_not_leak_its_labels():
    """In a test, the decoded images depend only on the input image."""
    torch.manual_seed(0)
    model = small_network("capsnet", num_classes=10, in_channels=1, image_size=(28, 28))
    task = TwoClasses(model.decoder)  # type: ignore[arg-type]
    images = torch.rand(4, 1, 28, 28)
    output = task.run(model, images)
    chosen = task.predictions(output)
    assert output.reconstruction is not None
    for place in range(2):
        expected = model.decoder(output.poses, chosen[:, place])  # type: ignore[operator]
        assert torch.equal(output.reconstruction[:, place], expected)


DRY_RUNS = [
    (compare_models, NETWORKS),
    (routing_sweep, ["main1-secondary1-seed1", "main4-secondary4-seed1"]),
    (train_overlapping, ["capsnet-seed1", "deep_capsnet-seed1"]),
    (less_data, ["capsnet-", "deep_capsnet-", "cnn-"]),
]


@pytest.mark.parametrize(
    ("program", "cells"), DRY_RUNS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_dry_run_tries_everything_and_keeps_nothing(program, cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = finish(program, *MACHINE, "--dry-run")
    assert all(cell in printed for cell in cells)
    assert printed.endswith("dry run: everything works; nothing was kept\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", [robustness, reconstruct], ids=lambda module: module.__name__)
def test_a_dry_run_of_a_test_keeps_nothing(program, a_comparison, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    finish(program, str(a_comparison / "capsnet-seed1"), *MACHINE, "--dry-run")
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_the_embedded_digits_stand_in_for_mnist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--dataset=auto", "--no-download", "--dry-run", "--device=cpu", "--models=cnn")
    printed = finish(compare_models, *flags)
    assert "MNIST is not in data/MNIST/raw" in printed and "digits instead" in printed


@pytest.mark.parametrize(
    "program",
    [
        compare_models,
        less_data,
        reconstruct,
        robustness,
        routing_sweep,
        train_overlapping,
        viewpoints,
    ],
    ids=lambda module: module.__name__,
)
class TestHelp:
    def test_it_names_the_flags(self, program, capsys):
        with pytest.raises(SystemExit) as stop:
            program.main(["--help"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        for flag in ("--dataset", "--data-dir", "--device", "--precision", "--dry-run"):
            assert flag in printed

    def test_its_docstring_begins_with_commands(self, program):
        name = program.__name__.rpartition(".")[2]
        assert program.__doc__ is not None
        assert f"\n    python examples/{name}.py" in program.__doc__


def test_ctrl_c_outside_training_prints_no_traceback(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.runner.load_dataset", interrupt)
    status, printed = run(compare_models, *TINY, f"--output-dir={tmp_path / 'out'}")
    assert status == 130 and "the same command goes on" in printed
