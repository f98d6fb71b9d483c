"""What the machine offers and what a run uses: device, precision, versions."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_runs import small_model
from torch import Tensor, nn

from engine.runtime import Runtime, choose_runtime, describe_environment, make_deterministic
from engine.training import Trainer
from tritoncaps._environment import commit_of
from tritoncaps.data import Batches

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Runtime(torch.device("cpu"), "fp32")


class TestRuntime:
    @pytest.mark.parametrize(
        "capabilities, expected",
        [
            ({"amx_bf16": True, "avx512_bf16": True}, "bf16"),
            ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, "bf16"),
            ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R)"}, "fp32"),
            ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R)"}, "bf16"),
            ({"amx_bf16": True, "avx512_bf16": False}, "bf16"),
            ({"amx_bf16": False, "avx512_bf16": False, "avx2": True}, "fp32"),
            ({"architecture": "aarch64", "neon": True}, "fp32"),
            ({}, "fp32"),
        ],
    )
    def test_a_cpu_computes_in_bf16_where_it_is_faster(self, monkeypatch, capabilities, expected):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        assert choose_runtime("cpu").precision == expected
        # The user's choice wins.
        assert choose_runtime("cpu", "fp32").precision == "fp32"
        assert choose_runtime("cpu", "bf16").precision == "bf16"

    def test_a_torch_that_does_not_know_means_fp32(self, monkeypatch):
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        assert choose_runtime("cpu").precision == "fp32"

    @pytest.mark.parametrize("supported, expected", [(True, "bf16"), (False, "fp32")])
    def test_a_gpu_computes_in_bf16_where_it_does_not_emulate_it(
        self, monkeypatch, supported, expected
    ):
        """A GPU that only emulates bf16 says so. There, bf16 is slower than fp32."""
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: including_emulation or supported,
        )
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
        )
        chosen = choose_runtime()
        assert (chosen.device.type, chosen.precision) == ("cuda", expected)
        assert chosen.sum_dtype is torch.float64

    def test_apples_gpus_get_no_float64(self, monkeypatch):
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps")
        )
        chosen = choose_runtime()
        assert (chosen.device.type, chosen.precision) == ("mps", "fp32")
        assert chosen.sum_dtype is torch.float32

    def test_float64_appears_nowhere_but_in_the_sums(self, tmp_path, digits, monkeypatch):
        """With float32 sums, as for MPS, an epoch makes no float64 tensor at all."""

        class NoFloat64(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                for tensor in torch.utils._pytree.tree_leaves(result):
                    if isinstance(tensor, Tensor):
                        assert tensor.dtype is not torch.float64, func
                return result

        monkeypatch.setattr(Runtime, "sum_dtype", torch.float32)
        trainer = Trainer(small_model(), tmp_path, runtime=CPU)
        batches = Batches(digits.subset(range(40)), 16, seed=1, max_shift=2)
        with NoFloat64():
            assert trainer.fit(batches, digits.subset(range(40, 60)), epochs=1)

    def test_without_an_accelerator_auto_is_the_cpu(self, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
        assert choose_runtime().device == torch.device("cpu")

    @pytest.mark.parametrize("device", ["nonsense", "", "cuda:99", "hpu", "vulkan"])
    def test_a_device_that_is_not_there_is_named(self, device):
        with pytest.raises(ValueError, match=f"--device {device}: not available here") as caught:
            choose_runtime(device)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_bf16_is_for_convolutions_and_fp32_for_routing_and_loss(
        self, tmp_path, digits, precision
    ):
        trainer = Trainer(small_model(), tmp_path, runtime=choose_runtime("cpu", precision))
        kinds = {}
        for name, module in trainer.model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):

                def record(_, args, output, name=name):
                    kinds[name] = output.dtype

                module.register_forward_hook(record)
        lengths = []
        inner = trainer.task.loss

        def loss(output, *args):
            lengths.append(output.activations.dtype)
            return inner(output, *args)

        trainer.task.loss = loss
        loss_sum, _ = trainer._step(digits.images[:8] / 255, digits.labels[:8])
        expected = torch.bfloat16 if precision == "bf16" else torch.float32
        assert len(kinds) == 5 and set(kinds.values()) == {expected}
        assert lengths == [torch.float32] and loss_sum.dtype is torch.float64
        assert {p.grad.dtype for p in trainer.model.parameters()} == {torch.float32}

    def test_convolutions_are_placed_with_channels_last(self):
        model = CPU.place(small_model())
        weight = model.primary.conv.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
        # A tensor with four axes need not be a convolution kernel.
        assert model.routing.weight.ndim == 4 and model.routing.weight.is_contiguous()

    def test_deterministic_is_what_torch_says_it_is(self, monkeypatch):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        # Set it, so that monkeypatch removes it again.
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        try:
            make_deterministic()
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.backends.cudnn.benchmark
            # The user's choice is kept.
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
            make_deterministic()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        finally:
            torch.use_deterministic_algorithms(False)


class TestEnvironment:
    def test_it_tells_versions_and_machine(self):
        environment = describe_environment(Runtime(torch.device("cpu"), "bf16"))
        assert str(torch.__version__).startswith(environment["torch"])
        assert environment["torch_build"] == str(torch.__version__)
        assert (environment["device"], environment["gpu"]) == ("cpu", None)
        assert environment["precision"] == "bf16"
        assert environment["threads"] == 1
        assert environment["processor"] and environment["platform"]
        assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
        json.dumps(environment)

    @pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
    def test_the_commit_is_that_of_the_checkout(self, tmp_path, monkeypatch):
        # Keep out configurations of the user and the machine, and a repository above.
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv("TRITONCAPS_COMMIT", raising=False)
        source = tmp_path / "source.py"
        assert commit_of(tmp_path) is None
        monkeypatch.setenv("TRITONCAPS_COMMIT", "abc")
        assert commit_of(tmp_path) == "abc"

        def git(*arguments) -> str:
            identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
            command = ["git", *identity, *arguments]
            return subprocess.run(
                command, cwd=tmp_path, check=True, capture_output=True, text=True
            ).stdout.strip()

        source.write_text("one")
        results = tmp_path / "benchmarks" / "results"
        results.mkdir(parents=True)
        (results / "ops.json").write_text("one")
        git("init", "-q")
        git("add", ".")
        git("commit", "-q", "-m", "one")
        # A tag does not replace it.
        git("tag", "-a", "v1", "-m", "one")
        (results / "ops.json").write_text("two")  # results do not count
        for folder in (tmp_path, results.parent):
            assert commit_of(folder) == git("rev-parse", "HEAD")[:12]
        source.write_text("two")
        for folder in (tmp_path, results.parent):
            assert commit_of(folder) == git("rev-parse", "HEAD")[:12] + "+"

    def test_without_git_there_is_no_commit(self, monkeypatch):
        def run(*args, **kwargs):
            raise FileNotFoundError("git")

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.delenv("TRITONCAPS_COMMIT", raising=False)
        assert commit_of(Path(__file__).parent) is None
