"""Collects what a call would launch: the launchers run on tensors without storage.

Every launch is recorded instead of run, with its arguments and its grid. So are the operators of
torch that a launcher calls, such as a product of the vendor's library.
"""

import importlib
import inspect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.cases import MATRIX_LAYERS, Layer
from tritoncaps import kernels
from tritoncaps.kernels._launch import Target
from tritoncaps.ops._em_routing import temperatures
from tritoncaps.testing import OPERATORS, Operator

BATCH = 128

# The operators on vectors, whose axes are B, I, P, J and D.
ON_VECTORS = [
    name
    for name, row in OPERATORS.items()
    if row.registered is not None
    and not any({"R", "H"} & set(axes.split()) for axes in row.axes.values())
]

SHAPES = {  # (I, P, J, D)
    "MNIST": (1152, 8, 10, 16),
    "second stage": (10, 16, 10, 16),
    "CIFAR": (2048, 8, 10, 16),
    "100 classes": (1152, 8, 100, 16),
    "1000 classes": (1152, 8, 1000, 16),
    "tiny": (5, 3, 2, 4),
}


@dataclass(frozen=True)
class Matrices:
    """A layer of matrix capsules. Those of the networks have poses of 4×4.

    A batch row is a position of an image. The grid is (H', W', K, S), or empty where there is one
    position.
    """

    B: int
    I: int
    J: int
    grid: tuple[int, ...] = ()
    R: int = 4
    P: int = 4
    Q: int = 4

    @staticmethod
    def of(layer: Layer, images: int) -> "Matrices":
        """A layer for a number of images."""
        size = (layer.grid - layer.kernel) // layer.stride + 1
        grid = (size, size, layer.kernel, layer.stride) if size > 1 else ()
        return Matrices(images * size**2, layer.kernel**2 * layer.C, layer.J, grid)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis."""
        return {axis: getattr(self, axis) for axis in "BIRPJQ"}

    @property
    def sizes_of_grid(self) -> dict[str, int]:
        """The size of each axis of the convolution, whose windows leave nothing of the grid out."""
        rows, columns, K, stride = self.grid
        sides = {"H": (rows - 1) * stride + K, "W": (columns - 1) * stride + K}
        return {
            **self.sizes, **sides, "K": K, "B": self.B // (rows * columns), "C": self.I // K**2
        }  # fmt: skip


MATRICES = {name: Matrices.of(layer, 64) for name, layer in MATRIX_LAYERS.items()}

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
class Buffer:
    """A tensor that a launch takes: which memory it is in, where it starts, how much it spans."""

    storage: int
    offset: int
    nbytes: int

    @staticmethod
    def of(tensor: Tensor) -> "Buffer":
        """The part of its storage that a tensor spans."""
        size = tensor.element_size()
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        nbytes = (int(last) + 1) * size if tensor.numel() else 0
        # A meta tensor has no address. The storage's own identity serves as one.
        offset = int(tensor.storage_offset()) * size
        return Buffer(tensor.untyped_storage()._cdata, offset, nbytes)


@dataclass(frozen=True)
class Start:
    """One start of a kernel: its arguments in the order of its signature, and its grid."""

    launch: Launch
    arguments: tuple[Buffer | int, ...]
    grid: tuple[int, int, int]

    @property
    def programs(self) -> int:
        """The number of programs in the grid."""
        return math.prod(self.grid)

    def extent(self, name: str) -> int | None:
        """The value of an integer argument, or None if there is none of that name."""
        values = dict(zip(self._names, self.arguments, strict=True))
        value = values.get(name)
        return value if isinstance(value, int) else None

    def with_extent(self, name: str, value: int) -> "Start":
        """The same with another value of an integer argument."""
        pairs = zip(self._names, self.arguments, strict=True)
        return replace(self, arguments=tuple(value if n == name else old for n, old in pairs))

    @property
    def _names(self) -> list[str]:
        return [name for name, kind in self.launch.signature if kind != "constexpr"]

    @property
    def canonical(self) -> "Start":
        """The same, with storages numbered in the order of the arguments: equal for equal work."""
        numbers: dict[int, int] = {}
        arguments = tuple(
            replace(argument, storage=numbers.setdefault(argument.storage, len(numbers)))
            if isinstance(argument, Buffer)
            else argument
            for argument in self.arguments
        )
        return replace(self, arguments=arguments)


@dataclass(frozen=True)
class LibraryCall:
    """An operator of torch that a launcher calls: what it reads, writes and multiplies."""

    name: str
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    flops: int


Step = Start | LibraryCall


def _record(kernel: JITFunction, grid: Sequence[int], *args: Any, **kwargs: Any) -> Start:
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | kwargs
    options = {name: value for name, value in kwargs.items() if name not in names}
    signature, constants, divisible = {}, {}, []
    arguments: list[Buffer | int] = []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            divisible.append(name)
            arguments.append(Buffer.of(value))
        elif parameter.is_constexpr or value == 1:
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
            arguments.append(int(np.float32(value).view(np.uint32)))
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
            arguments.append(value)
    launch = Launch(
        kernel.fn.__module__,
        kernel.fn.__name__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        tuple(options.items()),
    )
    x, y, z = (*grid, 1, 1)[:3]
    return Start(launch, tuple(arguments), (x, y, z))


class Recorder(TorchDispatchMode):
    """Collects the steps of what runs inside, for one target."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.allocated: dict[int, int] = {}  # bytes by storage
        self._target = target
        self._kept: list[Any] = []  # so that no storage's identity is used twice
        self._patches = ExitStack()

    def __enter__(self) -> "Recorder":
        """Catch launches."""
        self._patches.enter_context(mock.patch.object(JITFunction, "run", self._launched()))
        for module in vars(kernels).values():
            if isinstance(module, ModuleType) and hasattr(module, "target_of"):
                patch = mock.patch.object(module, "target_of", lambda _: self._target)
                self._patches.enter_context(patch)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Launch as before."""
        super().__exit__(*error)
        self._patches.close()

    def _launched(self) -> Any:
        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            self._kept.append(args)
            self.steps.append(_record(kernel, grid, *args, **kwargs))

        return run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Record an operator that moves data."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not isinstance(result, Tensor) or func.is_view:
            return result
        self._kept.append(result)
        if not name.endswith("_"):
            memory = result.untyped_storage()
            self.allocated[memory._cdata] = memory.nbytes()
        if name not in _MOVES_NOTHING:
            given = [value for value in args if isinstance(value, Tensor)]
            is_inplace = name.endswith("_")
            read = given[1:] if is_inplace else given
            packet = func.overloadpacket
            flops = 0
            if packet in flop_registry:
                flops = flop_registry[packet](*args, **kwargs, out_val=result)
            if result.numel():
                buffers = tuple(map(Buffer.of, read))
                self.steps.append(LibraryCall(name, buffers, (Buffer.of(result),), flops))
        return result


_MOVES_NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view"}


@dataclass(frozen=True)
class Recording:
    """The steps of one call of an operator, forward and backward.

    `scratch_bytes` is what both launchers allocate beyond the results that they return to a user.
    """

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    scratch_bytes: int


def record(
    operator: Operator,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    target: Target,
    *,
    batch: int = BATCH,
    optional: Collection[str] = (),
    **options: Any,
) -> Recording:
    """Call both launchers of an operator with tensors that have no storage.

    Args:
        operator: a row of the table that is registered with torch.
        shape: (I, P, J, D).
        dtype: of the inputs.
        target: what the kernels are for.
        batch: B.
        optional: the optional inputs that are given.
        options: the options of the call. Those that are left out have their usual values.
    """
    sizes = dict(zip("BIPJD", (batch, *shape), strict=True))
    return record_call(operator, sizes, dtype, target, optional, operator.defaults | options)


def record_matrices(
    shape: Matrices,
    dtype: torch.dtype,
    target: Target,
    *,
    unused: Collection[str] = (),
    **options: Any,
) -> Recording:
    """Call both launchers of EM routing with tensors that have no storage, T = 3 if not given.

    With a grid they are those of the convolution. `unused` names the outputs that have no gradient.
    """
    operator, sizes = OPERATORS["em_routing"], shape.sizes
    if shape.grid:
        operator, sizes = OPERATORS["conv_em_routing"], shape.sizes_of_grid
        options = {"stride": shape.grid[3], **options}
    chosen = {**operator.defaults, "iterations": 3, **options}
    return record_call(operator, sizes, dtype, target, (), chosen, unused)


def record_call(
    operator: Operator,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    target: Target,
    optional: Collection[str],
    chosen: Mapping[str, Any],
    unused: Collection[str] = (),
) -> Recording:
    """The steps of a call of both launchers, with these sizes and every option."""
    tensors = {
        name: torch.empty([sizes[axis] for axis in axes.split()], dtype=dtype, device="meta")
        for name, axes in operator.axes.items()
        if name not in operator.optional or name in optional
    }
    with Recorder(target) as recorder:
        given, outputs = call_forward(operator, tensors, chosen)
        forward = len(recorder.steps)
        grads = call_backward(operator, given | {f"grad_{name}": None for name in unused})
    steps = recorder.steps
    returned = [*returned_outputs(operator, outputs, chosen).values(), *grads]
    kept = {Buffer.of(tensor).storage for tensor in returned if tensor is not None}
    scratch = sum(size for storage, size in recorder.allocated.items() if storage not in kept)
    return Recording(tuple(steps[:forward]), tuple(steps[forward:]), scratch)


def call_forward(
    operator: Operator, tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """Call an operator's forward launcher. Return what the backward needs, and the outputs.

    The gradients of the outputs are the outputs themselves. The launchers of EM routing also take a
    `grid`, which is empty in a call of the operator.
    """
    given: dict[str, Any] = {"grid": [], **options, **dict.fromkeys(operator.axes), **tensors}
    if "temperature" in options:
        given["temperature"] = temperatures(options["temperature"], options["iterations"])
    if operator.is_elementwise:
        given |= {name: tensor.flatten(0, -2) for name, tensor in tensors.items()}
    outputs = _call(f"{operator}_fwd", given)
    returned = returned_outputs(operator, outputs, options)
    for name, output in zip(operator.registered.outputs, outputs, strict=True):
        bare = name.removesuffix("?")
        given |= {bare: output, f"grad_{bare}": returned.get(bare)}
    return given, outputs


def returned_outputs(
    operator: Operator, outputs: Sequence[Tensor], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The outputs of a forward launcher that a call returns, or makes its results from, by name.

    The others are saved for the backward.
    """
    wanted = {name.removesuffix("?") for name in operator.outputs}
    return {
        bare: output
        for name, output in zip(operator.registered.outputs, outputs, strict=True)
        if (bare := name.removesuffix("?")) in wanted
        and (bare == name or options.get(f"return_{bare}"))
    }


def call_backward(operator: Operator, given: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
    """Call an operator's backward launcher. Return the gradients of its inputs."""
    return _call(f"{operator}_bwd", given)


def _call(launcher: str, given: Mapping[str, Any]) -> tuple[Any, ...]:
    """Call a launcher with the arguments that it names."""
    function = getattr(kernels, launcher)
    results = function(*(given[name] for name in inspect.signature(function).parameters))
    return (results,) if isinstance(results, Tensor) else tuple(results)


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
    """Return every distinct launch of every operator on vectors, forward and backward.

    `optional` names the optional inputs that are given.
    """
    options = {"iterations": iterations, "gradient": gradient, "return_coupling": with_coupling}
    options |= {"leaky": leaky, "output": output}
    found: dict[Launch, None] = {}
    for operator in map(OPERATORS.__getitem__, ON_VECTORS):
        for form in operator.options.get("form", (None,)):
            recording = record(
                operator, shape, dtype, target,
                batch=batch, optional=optional, form=form, **options,
            )  # fmt: skip
            for step in (*recording.forward, *recording.backward):
                if isinstance(step, Start):
                    found[step.launch] = None
    yield from found
