"""Fetch IDX files through torchvision, which knows their mirrors, without waiting for a dead one.

torchvision's own download has no time limit, and writes where it will later read, so that an
interruption leaves a file that is too short. Therefore the mirrors are asked for a piece of a file
first, against a clock; the download then runs in a temporary folder, under a limit for silence, and
the files are moved to their places when all are whole.
"""

import gzip
import os
import queue
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tritoncaps.data.idx import IdxFile, IdxSet

# Users are promised an answer within 10 s; what remains is for imports.
ATTEMPT_SECONDS = 6.0
# A mirror that cannot deliver this much in that time is too slow: at 44 kB/s MNIST takes 5 minutes.
PROBE_BYTES = 256 * 1024


class DownloadError(Exception):
    """Nothing was downloaded; the message says why, in a few words."""


def fetch(spec: IdxSet, files: Sequence[IdxFile], folder: Path) -> None:
    """Download files of a data set into its folder, uncompressed, all of them or none.

    Gives up within `ATTEMPT_SECONDS` where no mirror answers, be it that its name is not resolved
    or that it accepts and stays silent; and later when a mirror falls silent for as long.

    Raises:
        DownloadError: the files could not be fetched.
    """
    try:
        import torchvision
        from torchvision.datasets.utils import download_and_extract_archive
    except Exception as error:
        # A torchvision that does not match torch fails with RuntimeError, not with ImportError.
        reason = f"torchvision cannot be imported: {type(error).__name__}: {error}"
        raise DownloadError(reason) from error
    source: Any = getattr(torchvision.datasets, spec.folder)
    checksums = dict(source.resources)
    # The clock starts here: how long the import takes says nothing about the network.
    deadline = time.monotonic() + ATTEMPT_SECONDS
    mirror = _answering_mirror(source.mirrors, f"{files[0].name}.gz", deadline)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary,
            _socket_timeout(ATTEMPT_SECONDS),
        ):
            for file in files:
                archive = f"{file.name}.gz"
                download_and_extract_archive(
                    mirror + archive, temporary, filename=archive, md5=checksums[archive]
                )
            for file in files:
                os.replace(Path(temporary, file.name), folder / file.name)
    except (OSError, RuntimeError, EOFError, HTTPException) as error:
        raise DownloadError(f"{_host(mirror)}: {_plain(error)}") from error


def _answering_mirror(mirrors: Sequence[str], archive: str, deadline: float) -> str:
    """Return the mirror that is the first to deliver the beginning of a .gz file.

    Every mirror is asked in a thread of its own, since nothing else bounds the time in which a host
    name is resolved. A thread that is left waiting is a daemon: it delays neither the caller nor
    the end of the program.
    """
    answers: queue.SimpleQueue[tuple[str, Exception | None]] = queue.SimpleQueue()

    def ask(mirror: str) -> None:
        try:
            _probe(mirror + archive, deadline - time.monotonic())
            answers.put((mirror, None))
        except Exception as error:
            answers.put((mirror, error))

    for mirror in mirrors:
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    failures = dict.fromkeys(mirrors, f"no answer within {ATTEMPT_SECONDS:g} s")
    for _ in mirrors:
        try:
            mirror, error = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if error is None:
            return mirror
        failures[mirror] = _plain(error)
    raise DownloadError("; ".join(f"{_host(mirror)}: {why}" for mirror, why in failures.items()))


def _probe(url: str, timeout: float) -> None:
    """Fetch the beginning of a .gz file, or raise."""
    headers = {"Range": f"bytes=0-{PROBE_BYTES - 1}", "User-Agent": "tritoncaps"}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=max(0.1, timeout)) as response:
        beginning = response.read(PROBE_BYTES)
    # A captive portal answers every address, with its own page.
    if not beginning.startswith(b"\x1f\x8b"):
        raise gzip.BadGzipFile("the answer is not a gzip file")


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    # The one way to give torchvision's connections a limit: it takes none itself.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _host(url: str) -> str:
    return urlsplit(url).hostname or url


def _plain(error: BaseException) -> str:
    """Say what went wrong in one line, without the wrapping of urllib."""
    if isinstance(error, TimeoutError):
        return f"no answer within {ATTEMPT_SECONDS:g} s"
    cause = getattr(error, "reason", None)
    if isinstance(cause, BaseException):
        return _plain(cause)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
