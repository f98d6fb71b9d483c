"""The one rule that chooses the backend of a call.

The backends are `tritoncaps.kernels` and `tritoncaps._torch_path`. Both define functions with the
same names and signatures, `<operator>_fwd` and `<operator>_bwd`.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Read once: Triton itself decides at import whether its kernels are interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "False")


def run(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of the torch path, or its twin among the Triton kernels.

    The kernels run CUDA and ROCm tensors, and with TRITON_INTERPRET=1 also CPU tensors. The torch
    path runs on every other device, on platforms without Triton, for operators without a kernel,
    and for shapes that no launch fits. In the last two cases the user is warned once. Autocast is
    off inside. It has already cast at the operator's boundary, and a backward may run outside the
    autocast block of its forward.
    """
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    device_type = tensor.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return run(function, *args)
    wants_kernels = tensor.is_cuda or (INTERPRETED and device_type == "cpu")
    kernels = _kernels() if wants_kernels else None
    if kernels is not None:
        name = function.__name__
        kernel = getattr(kernels, name, None)
        if kernel is None:
            _warn_once(f"{name} has no Triton kernel and runs in plain torch")
            return function(*args)
        try:
            return kernel(*args)
        except kernels.REFUSALS as reason:
            _warn_once(f"{name} runs without its Triton kernel: {reason}")
    return function(*args)


@cache
def _kernels() -> ModuleType | None:
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
