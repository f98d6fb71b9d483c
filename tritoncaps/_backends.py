"""`backend_info`: what computes the operators here."""

import sys
from typing import Any

import torch

from tritoncaps._native import _library
from tritoncaps._operators import _dispatch
from tritoncaps._version import __version__


class BackendInfo(dict[str, Any]):
    """What `backend_info` returns: a dict that prints one entry a line."""

    def __str__(self) -> str:
        return "\n".join(f"{key}: {value}" for key, value in self.items() if value is not None)


def backend_info() -> BackendInfo:
    """Say what computes the operators in this process.

    Returns:
        A dict, which prints one entry a line:

        - "tritoncaps", "torch", "triton": their versions. None without Triton.
        - "cuda": "triton" or, without Triton, "torch". The same for ROCm.
        - "cpu": "native" if the C++ kernels serve float32 and bfloat16. They have `squash` and the
          routings. All else is "torch". With TRITON_INTERPRET=1 it is "interpreted".
        - "variant": the instructions of the native kernels: "avx512", "avx2" or "portable".
        - "threads": how many threads they use.
        - "reason": why there are no native kernels, or None.

    Raises:
        ValueError: TRITONCAPS_CPU has an unknown value.
        RuntimeError: TRITONCAPS_CPU asks for native kernels that are not there.

    Example:
        >>> import tritoncaps
        >>> info = tritoncaps.backend_info()
        >>> info["cpu"] in ("native", "torch", "interpreted")
        True
        >>> print(info)  # doctest: +ELLIPSIS
        tritoncaps: ...
    """
    native = _library.found()
    has_kernels = _dispatch.kernels() is not None
    if _dispatch.INTERPRETED and has_kernels:
        cpu = "interpreted"
    else:
        cpu = "torch" if native.library is None else "native"
    return BackendInfo(
        tritoncaps=__version__,
        torch=torch.__version__,
        triton=sys.modules["triton"].__version__ if has_kernels else None,
        cuda="triton" if has_kernels else "torch",
        cpu=cpu,
        variant=native.variant,
        threads=_library.threads(),
        reason=native.reason,
    )
