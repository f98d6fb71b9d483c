"""The one rule that chooses the backend of a call.

The backends are `tritoncaps.kernels`, `tritoncaps._native` and `tritoncaps._torch_path`. All define
functions with the same names and signatures, `<operator>_fwd` and `<operator>_bwd`.
"""

import inspect
import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tritoncaps import _native

# Read once: Triton itself decides at import whether its kernels are interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "False")


def run(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of the torch path, or its twin in another backend.

    The Triton kernels run CUDA and ROCm tensors, and with TRITON_INTERPRET=1 also CPU tensors. The
    native kernels run those CPU tensors that they take. The torch path runs everything else: other
    devices and dtypes, platforms without Triton, operators without a kernel, and shapes that no
    launch fits. In the last two cases the user of a GPU is warned once. Autocast is off inside. It
    has already cast at the operator's boundary, and a backward may run outside the autocast block
    of its forward.
    """
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    device_type = tensor.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return run(function, *args)
    wants_kernels = tensor.is_cuda or (INTERPRETED and device_type == "cpu")
    triton = kernels() if wants_kernels else None
    name = function.__name__
    if triton is not None:
        kernel = getattr(triton, name, None)
        if kernel is None:
            _warn_once(f"{name} has no Triton kernel and runs in plain torch")
            return function(*args)
        try:
            return kernel(*args)
        except triton.REFUSALS as reason:
            _warn_once(f"{name} runs without its Triton kernel: {reason}")
    elif _native.takes(tensor):
        function = getattr(_native, name, function)
    return function(*args)


def dispatched(function: Callable[..., Any], **more: type) -> Callable[..., Any]:
    """`run` of a function of the torch path, with its arguments and annotations.

    `more` are options after its arguments that only the backward needs, with their types.
    """
    signature = inspect.signature(function)
    count = len(signature.parameters)

    def call(*args: Any) -> Any:
        return run(function, *args[:count])

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    options = [inspect.Parameter(name, kind, annotation=of) for name, of in more.items()]
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *options]
    )
    return call


@cache
def kernels() -> ModuleType | None:
    """The Triton kernels, or None on a platform without Triton."""
    try:
        return import_module("tritoncaps.kernels")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return None
        raise


_warned: dict[str, object] = {}


def _warn_once(message: str) -> None:
    """Give each warning once per process, even if several threads arrive together."""
    token = object()
    if _warned.setdefault(message, token) is token:
        try:
            warnings.warn(message, stacklevel=2)
        except Warning:  # a filter turns it into an error, which is raised every time
            del _warned[message]
            raise
