"""Compiles recorded launches ahead of time, without a GPU, and reads off what they take."""

import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tools.gpu_model.launches import Launch
from tools.gpu_model.sass import cuobjdump


@dataclass(frozen=True)
class Footprint:
    """The resources that a compiled kernel takes.

    Registers and stack (bytes) per thread, and shared memory (bytes) per program.
    """

    registers: int
    stack: int
    shared_memory: int


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Compile ahead of time what Triton would compile just in time."""
    kernel = launch.kernel
    position = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={position[name]: value for name, value in launch.constants},
        attrs={position[name]: [["tt.divisibility", 16]] for name in launch.divisible_by_16},
    )
    return triton.compile(source, target=target, options=dict(launch.options))


def footprint(compiled: Any) -> Footprint:
    """Read the footprint from the compiler's output, a cubin or AMD assembly."""
    if "cubin" in compiled.asm:
        text = cuobjdump(compiled.asm["cubin"], "-res-usage")
        registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    else:
        text = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
        stack = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    if registers is None or stack is None:
        raise ValueError(f"no register count in {text[-1000:]!r}")
    return Footprint(int(registers[1]), int(stack[1]), compiled.metadata.shared)


def _footprint_of(launch: Launch, target: GPUTarget) -> Footprint:
    return footprint(compile_launch(launch, target))


def compilers() -> ProcessPoolExecutor:
    """Start one compiling process per core. The result is a context manager."""
    # Spawned, not forked, because torch has threads by now.
    return ProcessPoolExecutor(os.cpu_count() or 1, multiprocessing.get_context("spawn"))


def footprints(
    launches: Iterable[Launch], target: GPUTarget, pool: Executor
) -> Iterator[tuple[Launch, Footprint]]:
    """Compile the launches in a pool and yield each, in order, with its footprint."""
    launches = list(launches)
    measure = partial(_footprint_of, target=target)
    yield from zip(launches, pool.map(measure, launches), strict=True)
