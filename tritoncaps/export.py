"""Models without this package: ONNX files, `.pt2` programs, and the formulas that make them.

`torch.export` keeps each operator as one node, which only this package can run. `decompositions`
replaces the nodes by their formulas in `tritoncaps.reference`. What is left are torch's own
operators, so the program runs wherever torch, AOTInductor, ONNX or ExecuTorch runs.
"""

import inspect
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import (
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

from tritoncaps import _checks, _operators
from tritoncaps._files import atomic_write

# A protocol buffer, and so an ONNX file, holds less than this. The graph takes a little of it.
_LARGEST_ONNX = 2**31 - 2**24


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Return the formula of each operator, for `ExportedProgram.run_decompositions`.

    The formulas are the functions of `tritoncaps.reference`. Like the operators, they accumulate
    16-bit inputs in float32. The prediction vectors û are then written to memory in full.

    Example:
        >>> from tritoncaps import RoutedCapsules
        >>> layer = RoutedCapsules(6, 4, 3, 5)
        >>> program = torch.export.export(layer, (torch.rand(2, 6, 4),))
        >>> program = program.run_decompositions(decompositions())
        >>> any("tritoncaps" in str(node.target) for node in program.graph.nodes)
        False
    """
    names = [module.name for module in iter_modules(_operators.__path__)]
    table: dict[OpOverload, Callable[..., Any]] = {}
    for name in names:
        if not name.startswith("_"):
            operator = getattr(import_module(f"tritoncaps._operators.{name}"), name)
            table[getattr(torch.ops.tritoncaps, name).default] = operator.formula
    return table


def to_program(
    model: nn.Module, example: Tensor | tuple[Any, ...], *, dynamic_batch: bool = True
) -> ExportedProgram:
    """Export a model, or any module that calls our operators, as torch's own operators alone.

    Args:
        model: the module. It is exported in evaluation mode, and left in the mode that it has.
        example: its positional arguments, or the only one. Their values do not matter.
        dynamic_batch: allow any batch size. The batch is the first axis of every tensor in
            `example`, whatever its size there. All other sizes are fixed.

    Returns:
        A program whose result is made of plain containers, which torch can load without this
        package: a named tuple becomes a dict, without the entries that are None. It runs on the
        type of device that it was exported on.

    Raises:
        TypeError: `model` is not a module, `example` holds no tensor, or `dynamic_batch` is not a
            bool.
        ValueError: the tensors of `example` differ in their first axis or have none, while
            `dynamic_batch` is true.

    Example:
        >>> from tritoncaps import RoutedCapsules
        >>> layer = RoutedCapsules(6, 4, 3, 5)
        >>> program = to_program(layer, torch.rand(1, 6, 4))
        >>> program.module()(torch.rand(7, 6, 4)).shape
        torch.Size([7, 3, 5])
    """
    return _program("to_program", model, example, dynamic_batch)


def to_pt2(
    model: nn.Module,
    path: str | Path,
    example: Tensor | tuple[Any, ...],
    *,
    dynamic_batch: bool = True,
) -> None:
    """Write a model to a `.pt2` file, which `torch.export.load` reads without this package.

    The file is written as a whole or not at all.

    Args:
        model: as for `to_program`.
        path: the file. Its name ends in `.pt2`.
        example: as for `to_program`.
        dynamic_batch: as for `to_program`.

    Raises:
        TypeError, ValueError: as for `to_program`.
        ValueError: the name of the file does not end in `.pt2`.
        OSError: the file cannot be written. A wrong directory is noticed before the export.

    Example:
        >>> import tempfile
        >>> from tritoncaps.models import create_model
        >>> path = tempfile.mkdtemp() + "/capsnet.pt2"
        >>> to_pt2(create_model("capsnet", channels=4), path, torch.rand(1, 1, 28, 28))
        >>> program = torch.export.load(path).module()
        >>> program(torch.rand(5, 1, 28, 28))["activations"].shape
        torch.Size([5, 10])
    """
    if Path(path).suffix != ".pt2":
        raise ValueError(
            f"to_pt2: the name of the file must end in .pt2, or torch.export.load refuses it, "
            f"got {str(path)!r}"
        )
    _check_path("to_pt2", path)
    program = _program("to_pt2", model, example, dynamic_batch)
    content = BytesIO()
    torch.export.save(program, content)
    _write(path, content.getbuffer())


def to_onnx(
    model: nn.Module,
    path: str | Path,
    example: Tensor | tuple[Any, ...],
    *,
    dynamic_batch: bool = True,
) -> None:
    """Write a model to an ONNX file, for ONNX Runtime, TensorRT or a browser.

    The inputs are named as the parameters of `forward`. The outputs are named as the fields or keys
    of the result: `activations`, `poses` and `reconstruction` for our networks. A single tensor is
    called "output", and those of a tuple "output_0", "output_1" and so on. The dynamic axis is
    called "batch". The file is written as a whole or not at all.

    Args:
        model: as for `to_program`.
        path: the file. By convention its name ends in `.onnx`.
        example: as for `to_program`.
        dynamic_batch: as for `to_program`.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing.
        TypeError, ValueError: as for `to_program`.
        ValueError: the weights take 2 GB or more, which one ONNX file cannot hold.
        OSError: the file cannot be written. A wrong directory is noticed before the export.

    Example:
        >>> import tempfile
        >>> import onnxruntime
        >>> from tritoncaps.models import create_model
        >>> path = tempfile.mkdtemp() + "/capsnet.onnx"
        >>> to_onnx(create_model("capsnet", channels=4), path, torch.rand(1, 1, 28, 28))
        >>> session = onnxruntime.InferenceSession(path)
        >>> lengths, _, _ = session.run(None, {"images": torch.rand(5, 1, 28, 28).numpy()})
        >>> lengths.shape
        (5, 10)
    """
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"to_onnx: needs {' and '.join(missing)}; pip install 'tritoncaps[export]'"
        )
    _check_path("to_onnx", path)
    program = _program("to_onnx", model, example, dynamic_batch)
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size >= _LARGEST_ONNX:
        raise ValueError(
            f"to_onnx: the weights take {size:,} bytes, but one ONNX file holds less than 2 GB; "
            "torch.onnx.export(to_program(model, example), f=path) puts them into a second file"
        )
    input_names, output_names = _input_names(model, example), _output_names(program)
    if both := set(input_names) & set(output_names):
        raise ValueError(
            f"to_onnx: {', '.join(sorted(both))} is the name of an input and of an output; rename "
            "the argument of forward, or the key or field of its result"
        )
    # All inputs share the dynamic axis, and torch warns if its name is given for each.
    axes = ({0: "batch"}, *({0: None} for _ in input_names[1:])) if dynamic_batch else None
    made = torch.onnx.export(
        program,
        input_names=input_names,
        output_names=output_names,
        dynamic_shapes=axes,
        dynamo=True,
        verbose=False,
    )
    assert made is not None  # it would be None from the exporter without dynamo
    proto = made.model_proto
    # The exporter writes where in which file each operation was called, on this machine.
    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        for node in nodes:
            node.ClearField("metadata_props")
    _write(path, proto.SerializeToString())


# programs -----------------------------------------------------------------------------------------


class _Plain(nn.Module):
    """A model whose result any process can rebuild."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        return _plain(self.model(*args))


def _plain(result: Any) -> Any:
    """The same result without entries that are None, and a dict in place of each named tuple."""
    if hasattr(result, "_asdict"):
        entries = result._asdict().items()
        return {name: _plain(value) for name, value in entries if value is not None}
    if type(result) in (tuple, list):
        return type(result)(_plain(value) for value in result if value is not None)
    if type(result) is dict:
        return {name: _plain(value) for name, value in result.items() if value is not None}
    return result


def _program(
    function: str, model: nn.Module, example: Tensor | tuple[Any, ...], dynamic_batch: bool
) -> ExportedProgram:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")
    _checks.check_flag(function, "dynamic_batch", dynamic_batch)
    args = _arguments(example)
    is_given = isinstance(example, (Tensor, tuple))
    if not (is_given and any(isinstance(leaf, Tensor) for leaf in tree_leaves(args))):
        raise TypeError(
            f"{function}: example must be a tensor, or a tuple with one, "
            f"got {type(example).__name__}"
        )
    if dynamic_batch and _batch_size(function, args) < 2:
        # torch.export takes a size of 0 or 1 for a constant.
        args = tree_map_only(Tensor, lambda arg: arg.new_zeros(2, *arg.shape[1:]), args)
    # It also takes a tensor that is given twice for a single input.
    args = tree_map_only(Tensor, torch.clone, args)
    shapes = None
    if dynamic_batch:
        batch = Dim("batch")
        shapes = (tree_map(lambda leaf: {0: batch} if isinstance(leaf, Tensor) else None, args),)
    modes = {module: module.training for module in model.modules()}
    try:
        program = torch.export.export(_Plain(model).eval(), args, dynamic_shapes=shapes)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return program.run_decompositions(decompositions())


def _batch_size(function: str, args: tuple[Any, ...]) -> int:
    """The size of the first axis, which all tensors share."""
    shapes = [_checks.shape_of(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    if not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"{function}: the first axis of every tensor in example is the batch, but the shapes "
            f"are {', '.join(map(str, shapes))}; use dynamic_batch=False, which fixes all sizes"
        )
    return shapes[0][0]


def _arguments(example: Tensor | tuple[Any, ...]) -> tuple[Any, ...]:
    # `Capsules` is a tuple too, but one argument.
    return example if type(example) is tuple else (example,)


def _input_names(model: nn.Module, example: Tensor | tuple[Any, ...]) -> list[str]:
    given = inspect.signature(model.forward).bind(*_arguments(example)).arguments
    names: list[str] = []
    for name, value in given.items():
        several = isinstance(value, tuple)
        for index, arg in enumerate(value if several else (value,)):
            if isinstance(arg, Tensor):
                names.append(f"{name}_{index}" if several else name)
    return names


def _output_names(program: ExportedProgram) -> list[str]:
    tree = program.call_spec.out_spec
    leaves, _ = tree_flatten_with_path(tree_unflatten([0] * tree.num_leaves, tree))
    names = []
    for path, _ in leaves:
        # A key of a dict, an index of a tuple, or a field of a dataclass that a user registered.
        keys = [
            next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind))
            for key in path
        ]
        if not isinstance(next(iter(keys), 0), str):
            keys.insert(0, "output")
        names.append("_".join(map(str, keys)))
    return names


def _check_path(function: str, path: str | Path) -> None:
    """Refuse a file that cannot be written, before the export takes a minute."""
    path = Path(path)
    directory = path.parent
    if path.is_dir():
        raise IsADirectoryError(
            f"{function}: path {path} is a directory; give the name of a file in it"
        )
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{function}: path {path} is in {directory}, which is no directory; create it"
        )
    if not os.access(directory, os.W_OK):
        raise PermissionError(
            f"{function}: path {path} is in {directory}, which cannot be written to"
        )


def _write(path: str | Path, content: Any) -> None:
    with atomic_write(path) as file:
        file.write(content)
