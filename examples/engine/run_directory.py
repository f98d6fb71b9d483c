"""The directory of a run: what it was asked, how it went, and what came out.

args.json               the flags, and the versions, device and commit they ran on
summary.csv             one row an epoch
metrics.jsonl           one record every few steps
last.pt                 everything needed to continue; last.previous.pt is the one before
model_best.pt           the same, at the best validation accuracy
model_best.safetensors  the weights of it alone, and config.json, to share
.lock                   held by the process that trains, so that no second one does
"""

import csv
import errno
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from engine import checkpoint

ROOT = Path("runs")

_LOCK = ".lock"
# What a run writes before its first checkpoint: one that was cut off there has lost nothing.
_BEGINNINGS = {"args.json", "metrics.jsonl", "tensorboard", _LOCK}


class RunDirectoryError(RuntimeError):
    """The directory cannot be used; the message says why and what to do."""


def new_directory(
    requested: str | None, model: str, dataset: str, *, resuming: bool = False
) -> Path:
    """Create the directory of a new run: the one asked for, or runs/<model>-<dataset>-<time>.

    Args:
        requested: the directory asked for, or None.
        model: name of the model.
        dataset: name of the data set.
        resuming: take also one whose run was cut off before its first checkpoint.

    Raises:
        RunDirectoryError: it is there already and holds something, or cannot be created.
    """
    if requested is None:
        return _unique_directory(f"{model}-{dataset}-{datetime.now():%Y%m%d-%H%M%S}")
    path = Path(requested)
    try:
        path.mkdir(parents=True, exist_ok=True)
        occupied = any(not (resuming and _is_beginning(entry)) for entry in path.iterdir())
    except OSError as error:
        raise RunDirectoryError(f"--output-dir {path}: {error.strerror}") from error
    if occupied:
        remedy = f"continue the run in it with --resume {path}, or " if has_checkpoint(path) else ""
        raise RunDirectoryError(
            f"--output-dir {path} is not empty, and nothing is ever overwritten: "
            f"{remedy}choose another directory"
        )
    return path


def _is_beginning(entry: Path) -> bool:
    return entry.name in _BEGINNINGS or checkpoint.is_temporary(entry)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes from training in a directory; a process that dies lets go of it.

    Raises:
        RunDirectoryError: another process trains in it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(directory / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunDirectoryError(f"{directory} is in use: another process trains in it") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"warning: {directory} cannot be locked on its file system", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def _unique_directory(name: str) -> Path:
    """Create a directory under runs/, with a number after its name where two runs start at once."""
    path, number = ROOT / name, 1
    try:
        ROOT.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{ROOT} cannot be created: {error.strerror}") from error
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = ROOT / f"{name}-{number}"
        except OSError as error:
            raise RunDirectoryError(f"{path} cannot be created: {error.strerror}") from error


def find_run(resume: str, output_dir: str | None, model: str) -> Path | None:
    """Find the run that --resume means; None where "auto" finds none and a new run may begin.

    "auto" means the run in --output-dir, or without one the newest run of this model under runs/.
    A path is a run directory or a checkpoint in one.

    Raises:
        RunDirectoryError: the path holds no checkpoint.
    """
    if resume == "auto":
        runs = [Path(output_dir)] if output_dir else sorted(ROOT.glob(f"{model}-*-*-*"))
        runs = [run for run in runs if has_checkpoint(run)]
        return max(runs, key=lambda run: _newest(run)) if runs else None
    path = Path(resume)
    run = path.parent if path.suffix == ".pt" else path
    if not has_checkpoint(run) and not path.is_file():
        raise RunDirectoryError(f"--resume {resume}: there is no checkpoint in {run}")
    return run


def has_checkpoint(run: Path) -> bool:
    """Whether a run got as far as its first checkpoint."""
    return any((run / name).is_file() for name in ("last.pt", "last.previous.pt"))


def _newest(run: Path) -> float:
    return max(file.stat().st_mtime for file in run.glob("last*.pt"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    with checkpoint.atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_summary(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write summary.csv, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with checkpoint.atomic_write(path) as file:
        file.write(text.getvalue().encode())


class MetricsLog:
    """metrics.jsonl: one line is one record, so that a crash costs the last line at most."""

    def __init__(self, path: Path, before_step: int) -> None:
        """Open the log; records from `before_step` on are dropped: a resumed run repeats them."""
        kept: list[str] = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # cut off by a crash
                    continue
                if record["step"] < before_step:
                    kept.append(line + "\n")
        with checkpoint.atomic_write(path) as file:
            file.write("".join(kept).encode())
        self._path = path
        self._file = path.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        with checkpoint.naming(self._path):
            self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        with checkpoint.naming(self._path):
            self._file.close()
