"""Runs that are killed, or whose disk fails, at any moment: nothing is lost and nothing is wrong.

The program is the MNIST example with a small network on a few digits, and a checkpoint at every
step. Its processes are forked from one that has imported everything, so each starts at once.
"""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from example_runs import NEW, assert_same_run, few_digits, make_small
from tqdm import tqdm

import train_mnist
from engine import checkpoint

KILLS = 20
FLAGS = (*NEW, "--epochs=6", "--checkpoint-interval=1", "--resume=auto")
needs_fork = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no fork here"
)


def run_program(directory):
    """Run the program to its end, silently. The processes of the tests below do this."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (as long as the process lives)
    # A killed process would leave the semaphore of the default lock behind.
    tqdm.set_lock(threading.RLock())
    make_small(setattr, few_digits())
    sys.exit(train_mnist.main([*FLAGS, f"--output-dir={directory}"]))


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    # Include what torch and the program import late.
    late = ["torch._dynamo", "sklearn.datasets", "safetensors.torch", "filelock"]
    context.set_forkserver_preload(["test_kills", *late])
    with pytest.MonkeyPatch.context() as patch:
        # The server does not know where this module is.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        process = context.Process(target=int)
        process.start()
        process.join(120)
    yield context


@needs_fork
def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path, processes):
    """SIGKILL at twenty random moments of several runs, from their first lines to their last."""

    def start(directory):
        process = processes.Process(target=run_program, args=(directory,))
        process.start()
        return process

    whole = start(tmp_path / "whole")
    whole.join(120)
    assert whole.exitcode == 0
    begun = time.perf_counter()
    again = start(tmp_path / "again")
    again.join(120)
    duration = time.perf_counter() - begun
    assert_same_run(tmp_path / "again", tmp_path / "whole", in_one_process=False)

    moments = random.Random(0)
    kills = in_training = runs = 0
    while kills < KILLS:
        runs += 1
        directory = tmp_path / f"run {runs}"
        while True:
            process = start(directory)
            # Two or three lives per run: early, when there is little to resume, and late.
            process.join(moments.uniform(0, 0.7) * duration if kills < KILLS else 120)
            if process.exitcode is not None:
                break
            process.kill()
            process.join(120)
            if process.exitcode != -signal.SIGKILL:  # it had just finished
                break
            kills += 1
            in_training += (directory / "last.safetensors").exists()
        assert process.exitcode == 0
        assert_same_run(directory, tmp_path / "whole", in_one_process=False)
    assert in_training >= KILLS / 2, "most kills came before the training: they prove little"
    print(f"{kills} kills in {runs} runs, {in_training} of them in training")


def mounted(script, directory):
    """Run shell commands where file systems can be mounted without anybody else seeing them."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("mounting needs Linux's command unshare")
    command = [unshare, "--user", "--map-root-user", "--mount", "sh", "-ec"]
    if subprocess.run([*command, "mount -t tmpfs tmpfs /mnt"], capture_output=True).returncode:
        pytest.skip("users cannot mount file systems on this system")
    return subprocess.run(
        [*command, script],
        cwd=directory,
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONWARNINGS": "ignore",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )


class TestDisks:
    """Tests on real file systems. test_checkpoint.py tests single system calls."""

    PROGRAM = "from test_kills import run_loudly; run_loudly"

    def test_a_full_disk_keeps_the_last_checkpoint(self, tmp_path):
        script = f"""
            mkdir disk
            mount -t tmpfs -o size=32m tmpfs disk
            "$PYTHON" -c '{self.PROGRAM}("disk/run", "--epochs=1")'
            head -c 32m /dev/zero > disk/filler 2> filled || true
            truncate -s -200k disk/filler
            status=0
            "$PYTHON" -c '{self.PROGRAM}("disk/run", "--epochs=6")' || status=$?
            echo "exit status $status"
            rm disk/filler
            cp -r disk/run kept
        """
        done = mounted(script, tmp_path)
        assert "exit status 2" in done.stdout, done.stderr
        assert (
            "error: [Errno 28] No space left on device: 'disk/run/last.safetensors'" in done.stderr
        )
        state = checkpoint.load(tmp_path / "kept" / "last.safetensors")
        assert state["progress"]["epoch"] == 1
        assert not list((tmp_path / "kept").glob("*.tmp"))

    def test_a_read_only_disk_is_reported(self, tmp_path):
        script = f"""
            mkdir disk
            mount -t tmpfs tmpfs disk
            "$PYTHON" -c '{self.PROGRAM}("disk/run", "--epochs=1")'
            mount -o remount,ro disk
            for path in run new; do
                status=0
                "$PYTHON" -c "{self.PROGRAM}('disk/$path', '--epochs=6')" || status=$?
                echo "exit status $status"
            done
            cp -r disk/run kept
        """
        done = mounted(script, tmp_path)
        assert done.stdout.count("exit status 2") == 2, done.stderr
        assert done.stderr.count("Read-only file system") == 2
        assert "disk/run" in done.stderr and "disk/new" in done.stderr
        assert checkpoint.load(tmp_path / "kept" / "last.safetensors")["progress"]["epoch"] == 1


def run_loudly(directory, *flags):
    """Run the program in its own process, and let it print."""
    torch.set_num_threads(1)
    make_small(setattr, few_digits())
    sys.exit(train_mnist.main([*FLAGS, f"--output-dir={directory}", *flags]))
