"""Several processes that train one model, each on its share of every batch.

torchrun starts the processes and gives each its rank in environment variables. Without them there
is one process, and nothing here has an effect. A batch is divided image by image, so any number of
processes trains what one would with the same `--batch-size`.

    torchrun --standalone --nproc-per-node 8 examples/train_mnist.py --batch-size 1024
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

# The environment variables of torchrun.
_RANK, _SIZE, _LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"


@dataclass(frozen=True)
class World:
    """The processes that train together, and the place of this one among them.

    Process 0, the main one, writes all files and prints all text. All processes must call a
    function marked as collective, in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, batch: Any) -> Any:
        """Return this process's part of a tensor, or of each tensor in a named tuple.

        The parts differ by one image at most.
        """
        if self.size == 1:
            return batch
        if isinstance(batch, Tensor):
            count = len(batch)
            return batch[count * self.rank // self.size : count * (self.rank + 1) // self.size]
        return type(batch)(*map(self.share, batch))

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place. Collective."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process. Collective."""
        return bool(self.sum(torch.tensor(float(flag))).item())

    def gather(self, value: T) -> list[T]:
        """Collect a value of every process, in the order of their ranks. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, function: Callable[[], T]) -> T:
        """Call a function in the main process, and return its result in all. Collective.

        Raises:
            SystemExit: in the other processes, if the function raised an error in the main one.
        """
        if self.size == 1:
            return function()
        message: list[Any] = [False, None]
        try:
            if self.is_main:
                message = [True, function()]
        finally:
            dist.broadcast_object_list(message)
        if not message[0]:
            raise SystemExit(2)
        return message[1]

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Average the gradients of a model over all processes. Collective."""
        if self.size == 1:
            return model
        return DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None
        )

    @contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """Let one process on each machine go first, for example to download. Collective."""
        if self.local_rank > 0:
            self.any(False)  # waits for the first processes
        yield
        if self.local_rank == 0:
            self.any(False)

    def seed_apart(self, seed: int) -> None:
        """Reseed torch in all but the main process, so that no two draw the same numbers."""
        if not self.is_main:
            digest = hashlib.sha256(f"{seed} rank {self.rank}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def require_one_process(program: str) -> None:
    """Refuse to be started by torchrun as several processes."""
    size = int(os.environ.get(_SIZE, "1"))
    if size > 1:
        raise ValueError(
            f"{_SIZE} is {size}: {program}.py trains its networks one after another in one "
            "process; start it without torchrun"
        )


@contextmanager
def join() -> Iterator[World]:
    """Join the processes that torchrun started, and silence all but the main one.

    Raises:
        ValueError: the environment variables of torchrun are incomplete.
    """
    if int(os.environ.get(_SIZE, "1")) == 1:
        yield World()
        return
    missing = [name for name in (_RANK, _LOCAL_RANK) if name not in os.environ]
    if missing:
        raise ValueError(
            f"{_SIZE} is {os.environ[_SIZE]}, but {' and '.join(missing)} is not set: start "
            "several processes with torchrun"
        )
    world = World(*(int(os.environ[name]) for name in (_RANK, _SIZE, _LOCAL_RANK)))
    # Flags and states are exchanged on the CPU, by gloo; without a GPU everything is.
    has_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo")
    if world.is_main:
        yield world
    else:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield world
    # Not after an error: the other processes may wait for this one, and torchrun ends them.
    dist.destroy_process_group()
    # Torch keeps references to a wrapped model, so gloo's threads outlive the group. If one frees
    # its last tensor while the interpreter shuts down, the process aborts. Let them finish.
    time.sleep(0.2)
