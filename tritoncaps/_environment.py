"""Where a result comes from: the processor, and the commit of a checkout."""

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
    """The commit of a checkout, with a + where files differ from it.

    Outside of git it is what TRITONCAPS_COMMIT says, or None.
    """
    try:
        describe = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("TRITONCAPS_COMMIT")
    return describe.stdout.strip()
