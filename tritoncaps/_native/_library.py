"""Finds the native library that this processor runs best, and loads it when it is first needed.

setup.py builds one library for each set of instructions. They are optional. None of them needs to
be there, and one that does not load is passed over.
"""

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

FOLDER = Path(__file__).parent
# From the fastest: the lanes of a vector of float32.
VARIANTS = {"avx512": 16, "avx2": 8, "portable": 4}
CHOICES = ("native", "torch", *VARIANTS)


class Found(NamedTuple):
    """The library with its variant, or the reason why there is none."""

    library: ctypes.CDLL | None
    variant: str | None
    reason: str | None


@cache
def found() -> Found:
    """What TRITONCAPS_CPU asks for. By default, the best library that loads, or else none."""
    choice = os.environ.get("TRITONCAPS_CPU", "")
    if choice not in ("", *CHOICES):
        expected = ", ".join(CHOICES)
        raise ValueError(f"TRITONCAPS_CPU must be one of {expected}, or unset, got {choice!r}")
    if choice == "torch":
        result = Found(None, None, "TRITONCAPS_CPU is torch")
    else:
        result = _best([choice] if choice in VARIANTS else list(VARIANTS))
    if result.library is None and choice not in ("", "torch"):
        raise RuntimeError(
            f"TRITONCAPS_CPU is {choice}, but there is no such library ({result.reason}); unset it "
            f"to use what there is, or build it with a C++ compiler (see CONTRIBUTING.md)"
        )
    logging.getLogger("tritoncaps").info(
        "routing on a CPU: %s", result.variant or f"plain torch ({result.reason})"
    )
    return result


def library() -> ctypes.CDLL | None:
    """The native library, if there is one."""
    return found().library


def variant() -> str | None:
    """The name of the library in `VARIANTS`, if there is one."""
    return found().variant


def _best(variants: list[str]) -> Found:
    """The first of these libraries that this processor runs."""
    reasons = []
    try:
        # It asks the processor itself. What torch says of it can be set by ATEN_CPU_CAPABILITY.
        lanes = load("portable").tritoncaps_lanes()
        for name in variants:
            if VARIANTS[name] > lanes:
                reasons.append(f"this processor has no {name}")
                continue
            try:
                return Found(load(name), name, None)
            except OSError as error:
                reasons.append(str(error))
    except (OSError, AttributeError) as error:
        reasons.append(str(error))
    return Found(None, None, "; ".join(reasons))


def load(name: str) -> ctypes.CDLL:
    """Load a library by its variant. OSError says why it cannot be used.

    It contains calls of OpenMP, but is not linked to it. They find the OpenMP of torch, so that one
    pool of threads serves both.
    """
    path = FOLDER / f"_{name}.so"
    if not path.exists():
        raise OSError(f"{path.name} was not built")
    # Only a checkout has the sources. Functions of other arguments would crash the process.
    sources = [*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]
    if any(source.stat().st_mtime > path.stat().st_mtime for source in sources):
        raise OSError(f"{path.name} is older than its source")
    return ctypes.CDLL(str(path))


# A forked child --------------------------------------------------------------------------------

_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def threads() -> int:
    """How many threads a call may use: those of torch.

    In a forked child it is one. The threads of its parent do not exist there, and GNU's OpenMP
    would wait for them forever.
    """
    return 1 if _is_forked else torch.get_num_threads()
