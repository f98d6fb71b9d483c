"""What tritoncaps is measured against: other ways to write the same mathematics.

Every operator has two rivals from the operator table: `eager`, its reference, and `compile`, the
same through `torch.compile`. A file here that is named after an operator can define:

- `RIVALS`, more rivals by name, which take tensors and options by name, like the operator;
- `takes(case)`, whether these rivals can take a call, if there are calls that they cannot take;
- `flops(case, phase)`, the fewest operations that a fused operator needs for "forward" and
  "backward", if torch's FLOP counter finds another number.

The oracle checks every rival before it is timed.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import tritoncaps
from benchmarks.cases import Case
from tritoncaps import _native, _operators

# A function that takes the tensors of a call by name. It returns all outputs as a tuple, even a
# single one.
Rival = Callable[..., tuple[Tensor, ...]]


def ours(device: torch.device) -> str:
    """Name the path that `tritoncaps.ops` takes on a device."""
    return "triton" if device.type == "cuda" or _operators.INTERPRETED else "torch path"


def backend(case: Case, device: torch.device) -> str:
    """Name what computes a call of tritoncaps: "triton", "torch", or the native variant."""
    if ours(device) == "triton":
        return "triton"
    is_native = hasattr(_native, f"{case.op}_fwd") and case.precision in ("fp32", "bf16")
    variant = tritoncaps.backend_info()["variant"] if is_native else None
    return f"native {variant}" if variant else "torch"


def rival_names(case: Case, device: torch.device) -> list[str]:
    """List the rivals that can take a call, tritoncaps last."""
    takes = getattr(_file_of(case.op), "takes", lambda _: True)
    others = [name for name in _own_rivals(case.op) if name != ours(device)] if takes(case) else []
    return ["eager", "compile", *others, ours(device)]


def op_rival(name: str, case: Case, device: torch.device) -> Rival:
    """Build one rival of an operator, with the case's options."""
    if name == ours(device):
        return case.operator.bound(case.options)
    if name in ("eager", "compile"):
        rival = case.operator.bound(case.options, case.operator.reference)
        return _compiled(rival) if name == "compile" else rival
    return case.operator.bound(case.options, _own_rivals(case.op)[name])


def flops_formula(op: str) -> Callable[[Case, str], int] | None:
    """Return the operator's own count of the operations of a phase, if its file has one."""
    return getattr(_file_of(op), "flops", None)


def _own_rivals(op: str) -> dict[str, Callable[..., Any]]:
    return getattr(_file_of(op), "RIVALS", {})


def _file_of(op: str) -> ModuleType | None:
    name = f"{__name__}.{op}"
    return import_module(name) if find_spec(name) else None


def _compiled(rival: Rival) -> Rival:
    # Code compiled for other shapes counts against a limit beyond which torch gives up.
    torch.compiler.reset()
    return torch.compile(rival, fullgraph=True, dynamic=False)
