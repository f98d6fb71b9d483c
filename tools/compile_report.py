"""What the kernels cost on each target: registers, shared memory, instructions. Needs no GPU.

    python tools/compile_report.py [--target sm90] [--dtype float32]

The launchers run on tensors without storage, and every launch is only recorded. Each distinct
launch is then compiled ahead of time on all cores, with the specialisation that Triton would give
it. tests/kernels/test_kernels_compile.py checks the same launches.
"""

import argparse
import importlib
import inspect
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tritoncaps import kernels
from tritoncaps.kernels._launch import Target
from tritoncaps.testing import OPERATORS, Operator

BATCH = 128

SHAPES = {  # (I, P, J, D)
    "MNIST": (1152, 8, 10, 16),
    "second stage": (10, 16, 10, 16),
    "CIFAR": (2048, 8, 10, 16),
    "100 classes": (1152, 8, 100, 16),
    "1000 classes": (1152, 8, 1000, 16),
    "tiny": (5, 3, 2, 4),
}

# Shared memory of one program in bytes, as the vendors document it.
TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), Target("sm80", 166912)),
    "sm90": (GPUTarget("cuda", 90, 32), Target("sm90", 232448)),
    "sm100": (GPUTarget("cuda", 100, 32), Target("sm100", 232448)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Target("gfx942", 65536)),
}

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


@dataclass(frozen=True)
class Launch:
    """A kernel as a launcher would start it. Holds enough to compile it, hashable and picklable."""

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible_by_16: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def kernel(self) -> JITFunction:
        """The function that is launched."""
        return getattr(importlib.import_module(self.module), self.name)


@dataclass(frozen=True)
class Footprint:
    """The resources that a compiled kernel takes.

    Registers and stack (bytes) per thread, shared memory (bytes) per program, and the number of
    machine instructions if they were counted.
    """

    registers: int
    stack: int
    shared_memory: int
    instructions: int | None = None


def _record(kernel: JITFunction, *args: Any, **kwargs: Any) -> Launch:
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | kwargs
    options = {name: value for name, value in kwargs.items() if name not in names}
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            divisible.append(name)
        elif parameter.is_constexpr or value == 1:
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
    return Launch(
        kernel.fn.__module__,
        kernel.fn.__name__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        tuple(options.items()),
    )


def record_launches(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    target: Target,
    *,
    batch: int = BATCH,
    iterations: int = 3,
    optional: Collection[str] = (),
    with_coupling: bool = False,
    gradient: str = "full",
    leaky: bool = False,
    output: str = "v",
) -> Iterator[Launch]:
    """Return every distinct launch of every operator in the table, forward and backward.

    `optional` names the optional inputs that are given.
    """
    found: dict[Launch, None] = {}

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[_record(kernel, *args, **kwargs)] = None

    sizes = dict(zip("BIPJD", (batch, *shape), strict=True))
    chosen = {"iterations": iterations, "gradient": gradient, "return_coupling": with_coupling}
    chosen |= {"leaky": leaky, "output": output}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        for module in vars(kernels).values():
            if isinstance(module, ModuleType) and hasattr(module, "target_of"):
                stack.enter_context(mock.patch.object(module, "target_of", lambda _: target))
        for operator in OPERATORS.values():
            if operator.registered is not None:
                for form in operator.options.get("form", (None,)):
                    _launch(operator, sizes, dtype, optional, {**chosen, "form": form})
    yield from found


def _launch(
    operator: Operator,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    optional: Collection[str],
    options: Mapping[str, Any],
) -> None:
    """Call both launchers of an operator with tensors that have no storage."""
    given: dict[str, Any] = dict(options)
    for name, axes in operator.axes.items():
        tensor = torch.empty([sizes[axis] for axis in axes.split()], dtype=dtype, device="meta")
        if operator.is_elementwise:
            tensor = tensor.flatten(0, -2)
        given[name] = None if name in operator.optional and name not in optional else tensor
    results = _call(f"{operator}_fwd", given)
    listed = (results,) if isinstance(results, torch.Tensor) else results
    for name, result in zip(operator.registered.outputs, listed, strict=True):
        given[name.removesuffix("?")] = result
        is_given = options.get(f"return_{name[:-1]}") if name.endswith("?") else True
        given[f"grad_{name.removesuffix('?')}"] = result if is_given else None
    _call(f"{operator}_bwd", given)


def _call(launcher: str, given: Mapping[str, Any]) -> Any:
    """Call a launcher with the arguments that it names."""
    function = getattr(kernels, launcher)
    return function(*(given[name] for name in inspect.signature(function).parameters))


def _cuobjdump(cubin: bytes, flag: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def footprint(compiled: Any, *, instructions: bool = False) -> Footprint:
    """Read the footprint from the compiler's output, a cubin or AMD assembly.

    Instructions are counted only on demand, because disassembling a cubin takes as long as
    compiling it.
    """
    if "cubin" in compiled.asm:
        text = _cuobjdump(compiled.asm["cubin"], "-res-usage")
        registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    else:
        text = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
        stack = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    if registers is None or stack is None:
        raise ValueError(f"no register count in {text[-1000:]!r}")
    count = _count_instructions(compiled) if instructions else None
    return Footprint(int(registers[1]), int(stack[1]), compiled.metadata.shared, count)


def _count_instructions(compiled: Any) -> int:
    if "cubin" in compiled.asm:
        assembly = _cuobjdump(compiled.asm["cubin"], "-sass")
        return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", assembly, re.MULTILINE))
    return len(re.findall(r"^\t[a-z]+_\w+", compiled.asm["amdgcn"], re.MULTILINE))


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


def _footprint_of(launch: Launch, target: GPUTarget, instructions: bool) -> Footprint:
    return footprint(compile_launch(launch, target), instructions=instructions)


def compilers() -> ProcessPoolExecutor:
    """Start one compiling process per core. The result is a context manager."""
    # Spawned, not forked, because torch has threads by now.
    return ProcessPoolExecutor(os.cpu_count() or 1, multiprocessing.get_context("spawn"))


def footprints(
    launches: Iterable[Launch], target: GPUTarget, pool: Executor, *, instructions: bool = False
) -> Iterator[tuple[Launch, Footprint]]:
    """Compile the launches in a pool and yield each, in order, with its footprint."""
    launches = list(launches)
    measure = partial(_footprint_of, target=target, instructions=instructions)
    yield from zip(launches, pool.map(measure, launches), strict=True)


def main() -> int:
    """Print one line for every distinct launch."""
    parser = argparse.ArgumentParser(description="The kernels' footprints, compiled without a GPU.")
    parser.add_argument("--target", choices=TARGETS, default="sm90")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in _TYPES]
    parser.add_argument("--dtype", choices=dtypes, default="float32")
    arguments = parser.parse_args()
    gpu, target = TARGETS[arguments.target]
    print(f"{arguments.target}, {arguments.dtype}, Triton {triton.__version__}, B = {BATCH}")
    print(
        f"{'shape':14}{'kernel':28}{'warps':>6}"
        f"{'registers':>10}{'stack':>6}{'shared':>8}{'instructions':>13}"
    )
    found: dict[Launch, str] = {}
    for shape_name, shape in SHAPES.items():
        for launch in record_launches(shape, getattr(torch, arguments.dtype), target):
            found.setdefault(launch, shape_name)
    with compilers() as pool:
        for launch, cost in footprints(found, gpu, pool, instructions=True):
            print(
                f"{found[launch]:14}{launch.name:28}{dict(launch.options)['num_warps']:6}"
                f"{cost.registers:10}{cost.stack:6}{cost.shared_memory:8}{cost.instructions:13}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("compile_report: unset TRITON_INTERPRET; interpreted kernels are not compiled")
    sys.exit(main())
