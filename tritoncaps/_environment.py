"""Where a result comes from: the processor and the commit of a checkout."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def processor_name() -> str:
    """Name the CPU."""
    # torch 2.10 has no public name for its capabilities.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name") or platform.processor() or platform.machine())


def commit_of(folder: Path) -> str | None:
    """The commit of a checkout, followed by + if files differ from it.

    Benchmark results do not count, because one benchmark writes them before the next one runs.
    Outside git it is what TRITONCAPS_COMMIT says, or None.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    counted = (":(top)", ":(top,exclude)benchmarks/results")
    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        differing = git("status", "--porcelain", "--untracked-files=no", "--", *counted)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("TRITONCAPS_COMMIT")
    return f"{commit}+" if differing else commit
