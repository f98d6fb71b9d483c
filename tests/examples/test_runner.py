"""Parts of the runner and the tables that the tests of the commands do not cover."""

import json
import math

import pytest

from engine.flags import Recipe
from engine.run_directory import RunDirectoryError, check_directory, open_experiment
from engine.runner import _task, limited
from engine.tables import accuracies, averages, counted, mean_and_spread, percent
from engine.tasks import CrossEntropy, Spread, Task
from engine.trained import check_trained
from tritoncaps.data import load_dataset


class TestRefusals:
    def test_more_images_than_there_are(self):
        dataset = load_dataset("digits")
        with pytest.raises(ValueError, match=r"--limit-test 361: .* has 360 such images"):
            limited(dataset, None, 361)
        with pytest.raises(ValueError, match=r"--limit-train 1438: .* has 1,437 such images"):
            limited(dataset, 1438, None)
        kept = limited(dataset, 1437, 360)
        assert (len(kept.train), len(kept.test)) == (1437, 360)

    def test_an_output_directory_that_cannot_be_used(self, tmp_path):
        recipe = {"epochs": 2}
        content = {"experiment": "less_data", "recipe": recipe}
        file = tmp_path / "file"
        file.touch()
        with pytest.raises(RunDirectoryError, match=r"--output-dir .*file: File exists"):
            open_experiment(file, "less_data", recipe)
        directory = tmp_path / "experiment"
        open_experiment(directory, "less_data", recipe)
        assert json.loads((directory / "experiment.json").read_text()) == content
        (directory / "run").touch()
        (directory / "experiment.json").write_text("{")
        with pytest.raises(RunDirectoryError, match=r"experiment\.json is damaged"):
            open_experiment(directory, "less_data", recipe)

    def test_a_run_that_has_no_trained_network(self, tmp_path):
        with pytest.raises(
            RunDirectoryError, match=r"holds no model_best\.safetensors: give a directory"
        ):
            check_trained(tmp_path)
        (tmp_path / "last.safetensors").touch()
        with pytest.raises(RunDirectoryError, match="has not finished an epoch: go on with it"):
            check_trained(tmp_path)
        (tmp_path / "model_best.previous.safetensors").touch()
        assert check_trained(str(tmp_path)) == tmp_path

    def test_a_directory_that_a_run_could_not_make(self, tmp_path):
        check_directory(str(tmp_path / "new" / "run"))
        assert not (tmp_path / "new").exists()
        (tmp_path / "file").touch()
        with pytest.raises(RunDirectoryError, match=r"--output-dir .*file/run: .*file is not a"):
            check_directory(str(tmp_path / "file" / "run"))


class TestLosses:
    @pytest.mark.parametrize(
        ("model", "loss", "task"),
        [
            ("capsnet", "auto", Task),
            ("matrix_capsnet", "auto", CrossEntropy),
            ("matrix_capsnet", "cross-entropy", CrossEntropy),
            ("matrix_capsnet", "margin", Task),
            ("matrix_capsnet", "spread", Spread),
            ("capsnet", "spread", Spread),
        ],
    )
    def test_a_network_with_logits_takes_any_loss(self, model, loss, task):
        recipe = Recipe(model=model, loss=loss).on("mnist", epochs=1)
        assert type(_task(recipe, batches=3)) is task

    def test_a_network_without_logits_has_no_cross_entropy(self):
        with pytest.raises(
            ValueError, match="--loss cross-entropy: capsnet returns no logits; use"
        ):
            _task(Recipe(model="capsnet", loss="cross-entropy"), batches=3)


class TestTables:
    def test_numbers_for_people(self):
        assert percent(0.99444) == "99.44 %"
        assert percent(0.99444, 0.0005) == "99.44 ± 0.05 %"
        assert mean_and_spread([0.5]) == (0.5, None)
        assert mean_and_spread([0.4, 0.6]) == (0.5, pytest.approx(math.sqrt(0.02)))
        assert counted(1, "epoch") == "1 epoch" and counted(1200, "image") == "1,200 images"
        assert counted(2, "batch", "batches") == "2 batches"

    def test_averages_are_over_the_seeds(self):
        runs = [
            {"model": "a", "size": 1, "share": 0.4, "epochs": 2},
            {"model": "b", "size": 1, "share": 0.9, "epochs": 2},
            {"model": "a", "size": 1, "share": 0.6, "epochs": 2},
        ]
        first, second = averages(runs, ("model", "size"), ("share",), kept=("epochs",))
        assert list(first) == ["model", "size", "epochs", "seeds", "share", "share_spread"]
        assert (first["seeds"], first["share"]) == (2, 0.5)
        assert first["share_spread"] == pytest.approx(math.sqrt(0.02))
        assert (second["seeds"], second["share"], second["share_spread"]) == (1, 0.9, None)

    def test_the_accuracy_of_a_run_is_that_of_the_chosen_epoch(self):
        rows = [
            {"epoch": n, "test_accuracy": share, "train_accuracy": 1.0, "seconds": n}
            for n, share in ((1, 0.7), (2, 0.9), (3, 0.8))
        ]
        quality = {1: 0.9, 2: 0.8, 3: 0.7}
        validated = [
            {**row, "validation_accuracy": quality[row["epoch"]], "validation_loss": 0.1}
            for row in rows
        ]
        chosen = accuracies(validated)
        assert (chosen["test_accuracy"], chosen["chosen_epoch"]) == (0.7, 1)
        assert (chosen["final_test_accuracy"], chosen["highest_test_accuracy"]) == (0.8, 0.9)
        assert (chosen["highest_epoch"], chosen["seconds_per_epoch"]) == (2, 2)
        last = accuracies(rows)
        assert (last["test_accuracy"], last["chosen_epoch"]) == (0.8, 3)
