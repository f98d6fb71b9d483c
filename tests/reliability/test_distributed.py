"""Several processes train what one would: the same losses, gradients, files and decisions.

The processes are real. torchrun starts them, on the CPU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from engine import checkpoint, distributed
from engine.distributed import World
from engine.runtime import choose_runtime
from tritoncaps.models import CapsNet
from tritoncaps.ops import margin_loss

pytestmark = pytest.mark.usefixtures("one_thread")

REPOSITORY = Path(__file__).parents[2]
PATHS = (REPOSITORY, REPOSITORY / "examples", REPOSITORY / "tests/examples")
SCRIPT = Path(small_run.__file__)
TIMEOUT = 240

# Float32 sums are added in another order. Adam divides by the size of each gradient, so a small and
# uncertain one moves a weight as far as a large one. After twelve steps there is less agreement.
FIRST_STEP = {"rtol": 1e-4, "atol": 1e-6}
LATER_STEPS = {"rtol": 2e-3, "atol": 1e-4}


def torchrun(*arguments, cwd=REPOSITORY):
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", *map(str, arguments)),
        ],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, PATHS))},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return small_run.train(tmp_path_factory.mktemp("alone"), World())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A run of two processes."""
    directory = tmp_path_factory.mktemp("together")
    finished = torchrun(SCRIPT, directory)
    assert finished.returncode == 0, finished.stderr
    # Only the main process prints: lines of the whole run, and of the one in two parts.
    lines = [line[:9] for line in finished.stdout.splitlines()]
    assert lines == ["epoch 1/2", "epoch 2/2", "epoch 1/2", "epoch 2/2"]
    return directory


@pytest.fixture(scope="module")
def results(directory):
    result: dict[str, Any] = torch.load(directory / "result.pt")
    return result


@pytest.fixture(scope="module")
def together(results):
    whole: dict[str, Any] = results["whole"]
    return whole


class TestAgreement:
    def test_there_were_two(self, alone, together):
        assert (alone["world"], together["world"]) == (1, 2)

    def test_gradients_are_those_of_one_process(self, alone, together):
        assert len(together["gradients"]) == 12
        assert_close(together["gradients"][0], alone["gradients"][0], **FIRST_STEP)
        assert_close(together["gradients"], alone["gradients"], **LATER_STEPS)

    def test_losses_are_those_of_one_process(self, alone, together):
        assert len(together["losses"]) == 12
        assert together["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-6)
        assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)

    def test_evaluations_count_every_image_once(self, alone, together):
        """The batches have 16, 16 and 1 images. Predictions are in the order of the images."""
        assert len(together["predictions"]) == small_run.HELD_OUT
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        right = together["predictions"] == together["labels"]
        assert together["accuracy"] == right.double().mean().item()
        same = (together["predictions"] == alone["predictions"]).double().mean()
        assert same > 0.9
        for row, expected in zip(together["rows"], alone["rows"], strict=True):
            assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
            # An image or two may be on the border between two classes.
            for name, count in (("train", small_run.IMAGES), ("validation", small_run.HELD_OUT)):
                difference = row[f"{name}_accuracy"] - expected[f"{name}_accuracy"]
                assert abs(difference) < 2.5 / count

    def test_no_two_processes_draw_the_same_numbers(self, together):
        assert len(set(together["random"])) == 2


class TestFaults:
    """Both processes know what happens to one of them."""

    def test_a_signal_to_one_stops_both_and_they_go_on_from_there(self, results, together):
        """The signal comes at step 7. They agree at step 10, in the second epoch."""
        assert not results["stopped"]["finished"] and results["resumed"]["finished"]
        assert len(results["stopped"]["losses"]) == 10
        assert len(results["resumed"]["losses"]) == 2
        assert_close(results["resumed"]["weights"], together["weights"], rtol=0, atol=0)
        losses = results["stopped"]["losses"] + results["resumed"]["losses"]
        assert losses == together["losses"]

    def test_a_nan_in_the_share_of_one_is_named_by_both(self, results):
        first, second = results["spoilt"]
        assert first.startswith("the loss of batch 5 of 6 is nan, in epoch 1")
        assert first == second


class TestFiles:
    def test_one_process_wrote_them(self, directory, together):
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 12
        state = checkpoint.load(directory / "last.safetensors")
        assert_close(state["model"], together["weights"], rtol=0, atol=0)
        assert len(state["rng_of_others"]) == 1

    def test_one_process_goes_on_with_the_run_of_two(self, tmp_path, directory, together):
        """It finds nothing left to train and evaluates the same model."""
        shutil.copy(directory / "last.safetensors", tmp_path)
        result = small_run.train(tmp_path, World())
        assert result["finished"]
        assert_close(result["weights"], together["weights"], rtol=0, atol=0)
        assert torch.equal(result["predictions"], together["predictions"])


def test_a_killed_process_ends_the_run_and_it_can_be_resumed(tmp_path, together):
    """Killed at step 9, both processes continue from the checkpoint of step 8, to the same bits."""
    killed = torchrun(SCRIPT, tmp_path, "--kill-at", "9")
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    assert checkpoint.load(tmp_path / "last.safetensors")["progress"]["step"] == 8
    assert not (tmp_path / "result.pt").exists()

    resumed = torchrun(SCRIPT, tmp_path, "--alone")
    assert resumed.returncode == 0, resumed.stderr
    result = torch.load(tmp_path / "result.pt")["whole"]
    assert result["rows"][0]["train_loss"] == together["rows"][0]["train_loss"]
    assert result["losses"] == together["losses"][8:]
    assert_close(result["weights"], together["weights"], rtol=0, atol=0)
    assert result["random"] == together["random"]


def test_the_main_job_runs_under_torchrun(tmp_path):
    run = tmp_path / "run"
    finished = torchrun(
        REPOSITORY / "examples" / "train_mnist.py",
        *("--dataset", "digits", "--model", "capsnet", "--epochs", "1", "--dry-run"),
        *("--precision", "fp32", "--device", "cpu", "-b", "8", "--output-dir", run),
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("device      2 processes, each on cpu (1 threads)") == 1
    assert "2 batches of 8 (4 on each process), seed 1" in finished.stdout
    assert "dry run: everything works; nothing was kept" in finished.stdout


@pytest.fixture
def process_group(tmp_path):
    """This process alone. DistributedDataParallel asks no less of it."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class TestUnusedDecoder:
    """What docs/own-model.md says of a loss without reconstruction."""

    @pytest.mark.parametrize(
        ("reconstruction", "options"), [(False, {}), (True, {"find_unused_parameters": True})]
    )
    def test_it_is_left_out_or_announced(self, process_group, reconstruction, options):
        self.train(reconstruction, **options)

    def test_else_torch_stops(self, process_group):
        with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
            self.train(reconstruction=True)

    def train(self, reconstruction, **options):
        model = CapsNet(channels=2, capsule_types=1, reconstruction=reconstruction)
        parallel = DistributedDataParallel(model, **options)
        for _ in range(2):
            output = parallel(torch.rand(2, 1, 28, 28))
            margin_loss(output.activations, torch.tensor([3, 1])).backward()


class TestWorld:
    @pytest.mark.parametrize("size", [1, 2, 3, 8])
    @pytest.mark.parametrize("count", [0, 1, 7, 16])
    def test_shares_are_the_whole_batch_once(self, size, count):
        batch = torch.arange(count)
        shares = [World(rank, size).share(batch) for rank in range(size)]
        assert torch.equal(torch.cat(shares), batch)
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1

    def test_environment_without_a_rank_is_an_error(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        with (
            pytest.raises(ValueError, match="WORLD_SIZE is 2, but LOCAL_RANK is not set"),
            distributed.join(),
        ):
            pass

    def test_an_experiment_refuses_torchrun(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "4")
        with pytest.raises(ValueError, match=r"WORLD_SIZE is 4: less_data\.py trains"):
            distributed.require_one_process("less_data")

    @pytest.mark.parametrize("device", ["cuda:0", "mps"])
    def test_one_gpu_is_not_shared(self, device):
        message = f"--device {device}: each of 2 processes takes a GPU of its own.* not {device}$"
        with pytest.raises(ValueError, match=message):
            choose_runtime(device, "fp32", World(0, 2))

    def test_each_process_takes_a_gpu(self, monkeypatch):
        taken: list[int] = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
        for rank in range(2):
            choose_runtime("cuda", "fp32", World(rank, 3, rank))
        assert taken == [0, 1]
        with pytest.raises(ValueError, match="a process 2 on this machine, but its GPUs are 2"):
            choose_runtime("cuda", "fp32", World(2, 3, 2))
