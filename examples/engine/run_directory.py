"""The directory of a run: what was asked, how it went, and what came out.

args.json               the flags, and the versions, device and commit they ran on
summary.csv             one row per epoch
metrics.jsonl           one record every few steps
last.safetensors        all that is needed to continue: three times as large as the weights
model_best.safetensors  the weights of the best epoch by validation, and a description of the model
config.json             the same description, to read
.lock                   held by the process that trains, so that no other one does

Until the run is finished, last.previous.safetensors and model_best.previous.safetensors hold what
the two checkpoints replaced.
"""

import csv
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from engine import checkpoint
from engine.flags import flag_name
from tritoncaps._files import atomic_write, is_temporary, naming

T = TypeVar("T")

ROOT = Path("runs")
LAST, BEST = "last.safetensors", "model_best.safetensors"

_LOCK = ".lock"
# What a run writes before its first checkpoint. If it was cut off there, nothing is lost.
_BEGINNINGS = {"args.json", "metrics.jsonl", "tensorboard", _LOCK}


class RunDirectoryError(RuntimeError):
    """The directory cannot be used; the message says why and what to do."""


def new_directory(
    requested: str | None, model: str, dataset: str, *, resuming: bool = False
) -> Path:
    """Create the directory of a new run: the requested one, or runs/<model>-<dataset>-<time>.

    `resuming` accepts a directory whose run was cut off before its first checkpoint.

    Raises:
        RunDirectoryError: it is not empty, or cannot be created.
    """
    if requested is None:
        return _unique_directory(f"{model}-{dataset}-{datetime.now():%Y%m%d-%H%M%S}")
    path = Path(requested)
    try:
        path.mkdir(parents=True, exist_ok=True)
        inside = list(path.iterdir())
    except OSError as error:
        raise RunDirectoryError(f"--output-dir {path}: {error.strerror}") from error
    begun = resuming and all(e.name in _BEGINNINGS or is_temporary(e) for e in inside)
    if inside and not begun:
        remedy = f"continue the run in it with --resume {path}, or " if has_checkpoint(path) else ""
        raise RunDirectoryError(
            f"--output-dir {path} is not empty, and nothing is ever overwritten: "
            f"{remedy}choose another directory"
        )
    return path


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Refuse a directory in which another process trains, and keep others out of it.

    The lock ends with its process.
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
    """Create a directory under runs/. If two runs start at once, the second gets a number."""
    path, number = ROOT / name, 1
    try:
        ROOT.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileExistsError):
                path.mkdir()
                return path
            number += 1
            path = ROOT / f"{name}-{number}"
    except OSError as error:
        raise RunDirectoryError(f"{error.filename} cannot be created: {error.strerror}") from error


def check_directory(requested: str | None) -> None:
    """Refuse a directory, in a dry run, that could not be made or written to; nothing is made."""
    path = Path(requested or ROOT).absolute()
    while not path.exists() and not path.is_symlink():
        path = path.parent
    if not path.is_dir():
        raise RunDirectoryError(f"--output-dir {requested or ROOT}: {path} is not a directory")
    if not os.access(path, os.W_OK):
        raise RunDirectoryError(f"--output-dir {requested or ROOT}: {path} cannot be written to")


def find_run(resume: str, output_dir: str | None, model: str, name: str = LAST) -> Path | None:
    """Find the run that --resume means, or None where "auto" finds none.

    "auto" means the run in --output-dir, or without one the newest run of this model under runs/.
    A path is a run directory or a checkpoint in one. The directory holds the checkpoint `name`.

    Raises:
        RunDirectoryError: the path holds no checkpoint.
    """
    if resume == "auto":
        if output_dir:
            return Path(output_dir) if has_checkpoint(Path(output_dir), name) else None
        runs = [run for run in ROOT.glob("*-*-*-*") if has_checkpoint(run, name)]
        runs.sort(key=lambda run: max(p.stat().st_mtime for p in _generations(run, name)))
        own = [run for run in runs if run.match(f"{model}-*-*-*")]
        if own and runs[-1] != own[-1]:
            print(f"resuming    {own[-1]}; {runs[-1]} is newer, but not of --model {model}")
        return own[-1] if own else None
    path = Path(resume)
    if path.is_file():
        return path.parent
    if path.suffix:
        raise RunDirectoryError(f"--resume {resume}: there is no checkpoint of that name")
    if not has_checkpoint(path, name):
        raise RunDirectoryError(f"--resume {resume}: there is no {name} in {path}")
    return path


def has_checkpoint(run: Path, name: str = LAST) -> bool:
    """Whether a run has a checkpoint of this name, or the one before."""
    return bool(_generations(run, name))


def _generations(run: Path, name: str) -> list[Path]:
    path = run / name
    return [p for p in (path, checkpoint.previous_path(path)) if p.is_file()]


def latest(loaded: tuple[T, Path, str | None]) -> T:
    """Return what `checkpoint.load_latest` loaded, and print its warning."""
    content, _, warning = loaded
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    return content


def finish(directory: Path) -> None:
    """Remove the replaced checkpoints of a finished run: nothing writes over the newest again."""
    for path in directory.glob("*.previous.safetensors"):
        path.unlink()


def open_experiment(directory: Path, program: str, recipe: dict[str, Any]) -> None:
    """Create the directory of an experiment, or check that it was made by the same recipe.

    Raises:
        RunDirectoryError: it was not, it holds other things, or it cannot be created.
    """
    marker = directory / "experiment.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        inside = list(directory.iterdir())
        if inside and marker not in inside:
            raise RunDirectoryError(
                f"--output-dir {directory} is not empty and holds no experiment, and nothing is "
                "ever overwritten: choose another directory"
            )
        if inside in ([], [marker]):  # no run has begun
            write_json(marker, {"experiment": program, "recipe": recipe})
        found = json.loads(marker.read_text())
    except OSError as error:
        raise RunDirectoryError(f"--output-dir {directory}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise RunDirectoryError(f"{marker} is damaged: choose another directory") from error
    if found["experiment"] != program:
        raise RunDirectoryError(
            f"--output-dir {directory} belongs to {found['experiment']}.py: choose another"
        )
    for name, value in recipe.items():
        before = found["recipe"].get(name)
        # As JSON, which knows no tuples.
        if json.dumps(before) != json.dumps(value):
            raise RunDirectoryError(
                f"--output-dir {directory} was made with {_flag(name, before)}, not "
                f"{_flag(name, value)}: repeat its flags, or choose another directory"
            )


def _flag(name: str, value: Any) -> str:
    return f"no {flag_name(name)}" if value is None else f"{flag_name(name)} {value}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_summary(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


class MetricsLog:
    """metrics.jsonl: one record per line, so that a crash costs the last line at most.

    Records from `before_step` on are dropped: a resumed run repeats them.
    """

    def __init__(self, path: Path, before_step: int) -> None:
        kept: list[str] = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with suppress(json.JSONDecodeError):  # cut off by a crash
                if json.loads(line)["step"] < before_step:
                    kept.append(line + "\n")
        with atomic_write(path) as file:
            file.write("".join(kept).encode())
        self._path = path
        self._file = path.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        with naming(self._path):
            self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        with naming(self._path):
            self._file.close()


def tensorboard_writer(
    directory: Path, steps_done: int
) -> Callable[[int, Mapping[str, float]], None]:
    """Return a callback that logs to TensorBoard in the run directory.

    Points after `steps_done` are hidden: a resumed run draws them again.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory / "tensorboard"), purge_step=steps_done + 1)

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write
