"""Device, precision, determinism: what the hardware offers, and what a run asks of it."""

import importlib.util
import os
import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tritoncaps
from engine.distributed import World
from tritoncaps._environment import commit_of, processor_name


@dataclass(frozen=True)
class Runtime:
    """Where and how the model runs.

    `precision` is "fp32" or "bf16". bf16 runs convolutions and fully connected layers under
    autocast; the routing and the loss stay in float32. `world` is the processes that train the
    model together.
    """

    device: torch.device
    precision: str
    world: World = field(default_factory=World)

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype of sums over many batches: float64, which Apple's GPUs (MPS) lack."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which the model runs forward."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        )

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, and its convolutions to channels-last, which is faster."""
        model = model.to(self.device)
        # `model.to(memory_format=...)` would change all weights with four axes, a routing's too.
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
        return model

    def describe(self) -> str:
        """Describe in a few words where the model runs."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"{torch.get_num_threads()} threads"
        processes = f"{self.world.size} processes, each on " if self.world.size > 1 else ""
        return f"{processes}{self.device} ({name}), precision {self.precision}"


def choose_runtime(
    device: str = "auto", precision: str = "auto", world: World | None = None
) -> Runtime:
    """Turn the flags --device and --precision into a `Runtime`.

    "auto" takes an accelerator if there is one, and bf16 where it is the faster: on NVIDIA's GPUs
    from compute capability 8.0, on AMD's from CDNA, on CPUs with AMX, and on AMD's with
    AVX512-BF16. On Intel's without AMX, a convolution takes up to 1.6 times as long in bf16 as in
    fp32.

    Raises:
        ValueError: torch has no such device here, or too few for all processes, or it is "meta".
    """
    world = World() if world is None else world
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        chosen = accelerator or torch.device("cpu")
        _take_device(device, chosen, world)
    else:
        try:
            chosen = torch.device(device)
            _take_device(device, chosen, world)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError, ImportError) as error:
            # Without the list of all devices of all builds that follows.
            reason = str(error).splitlines()[0].partition(". ")[0]
            raise ValueError(f"--device {device}: not available here ({reason})") from error
    if chosen.type == "meta":
        raise ValueError(
            f"--device {device}: it holds no numbers, so nothing can be computed on it"
        )
    if precision == "auto":
        precision = "bf16" if _is_faster_in_bf16(chosen) else "fp32"
    return Runtime(chosen, precision, world)


def _take_device(flag: str, device: torch.device, world: World) -> None:
    """Give each of several processes a GPU of its own; the CPU they share."""
    if world.size == 1 or device.type == "cpu":
        return
    if device.type != "cuda" or device.index is not None:
        raise ValueError(
            f"--device {flag}: each of {world.size} processes takes a GPU of its own; give cuda "
            f"or cpu, not {device}"
        )
    if world.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"--device {flag}: there is a process {world.local_rank} on this machine, but its GPUs "
            f"are {torch.cuda.device_count()}, counted from 0"
        )
    torch.cuda.set_device(world.local_rank)


def _is_faster_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Torch 2.10 has no public function for this.
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        if capabilities.get("amx_bf16"):
            return True
        return bool(capabilities.get("avx512_bf16")) and "Intel" not in processor_name()
    return False


def require(*modules: str) -> None:
    """Fail now, and not hours later, if a package is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f'{module} is not installed, and this run needs it: pip install "tritoncaps[train]"'
            )


def make_deterministic() -> None:
    """Give the same bits from run to run on the same hardware and versions.

    From now on, torch raises an error where an operation has no deterministic form.
    """
    # cuBLAS reads this when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def describe_environment(runtime: Runtime) -> dict[str, Any]:
    """Collect what is needed to reproduce a result: versions, machine, commit."""
    device = runtime.device
    return {
        "tritoncaps": tritoncaps.__version__,
        "torch": torch.__version__.split("+")[0],
        "torch_build": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "precision": runtime.precision,
        "threads": torch.get_num_threads(),
        "processes": runtime.world.size,
        "commit": commit_of(Path(__file__).parent),
    }
