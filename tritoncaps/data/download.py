"""Download the files of a data set with pooch, without waiting for a dead mirror.

A server may accept a connection and stay silent, and resolving a host name can take any amount of
time. So all mirrors are first asked for the beginning of a file, at the same time and with one
deadline. The first to deliver it serves the download.
"""

import importlib.util
import os
import queue
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from tritoncaps.data.files import DataFile

# Users are promised an answer within 10 s. The rest is for imports.
ATTEMPT_SECONDS = 6.0
# A mirror must deliver this much in that time. At 44 kB/s, MNIST would take 5 minutes.
PROBE_BYTES = 256 * 1024
# Without "identity", a server may mark a .gz as compressed for transport, so it arrives unpacked.
HEADERS = {"User-Agent": "tritoncaps", "Accept-Encoding": "identity"}


class DownloadError(Exception):
    """Nothing was downloaded. The message briefly says why."""


def fetch(mirrors: Sequence[str], files: Sequence[DataFile], folder: Path) -> None:
    """Download all files into a folder, unpacked and verified, or none of them.

    Give up after `ATTEMPT_SECONDS` if no mirror answers, and later if the chosen one falls silent
    for as long. Several processes may download at once: each works in its own temporary folder and
    moves whole files into place.

    Args:
        mirrors: URLs that end in a slash, to which the `download` name of a file is appended.
        files: what to download.
        folder: where to put the files. It is created if necessary.

    Raises:
        DownloadError: the files could not be downloaded.
    """
    try:
        import pooch
    except ImportError as error:
        raise DownloadError(
            f'pooch cannot be imported ({error}): pip install "tritoncaps[train]"'
        ) from error
    # The clock starts after the import, which says nothing about the network.
    mirror = _answering_mirror(mirrors, files[0].download, time.monotonic() + ATTEMPT_SECONDS)
    downloader = pooch.HTTPDownloader(
        progressbar=importlib.util.find_spec("tqdm") is not None,
        chunk_size=1 << 16,
        timeout=ATTEMPT_SECONDS,
        headers=HEADERS,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            for file in files:
                is_packed = file.download != file.name
                pooch.retrieve(
                    mirror + file.download,
                    known_hash=file.download_hash,
                    fname=file.download,
                    path=temporary,
                    downloader=downloader,
                    processor=pooch.Decompress(name=file.name) if is_packed else None,
                )
            for file in files:
                os.replace(Path(temporary, file.name), folder / file.name)
    # All errors of requests are OSErrors; a wrong checksum is a ValueError.
    except (OSError, ValueError) as error:
        raise DownloadError(f"{_host(mirror)}: {_plain(error)}") from error


def _answering_mirror(mirrors: Sequence[str], name: str, deadline: float) -> str:
    """Return the mirror that is the first to deliver the beginning of a file.

    Each mirror is asked in its own thread. Threads that still wait at the deadline are left behind.
    They are daemons, so they do not delay the end of the program.
    """
    answers: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()

    def ask(mirror: str) -> None:
        try:
            answers.put((mirror, _probe(mirror + name, deadline - time.monotonic())))
        except Exception as error:
            answers.put((mirror, _plain(error)))

    for mirror in mirrors:
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    failures = dict.fromkeys(mirrors, _silence())
    for _ in mirrors:
        try:
            mirror, failure = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if failure is None:
            return mirror
        failures[mirror] = failure
    raise DownloadError("; ".join(f"{_host(mirror)}: {why}" for mirror, why in failures.items()))


def _probe(url: str, timeout: float) -> str | None:
    """Fetch the beginning of a file. Return why it is not that file, or None if it may be."""
    import requests  # comes with pooch

    headers = {**HEADERS, "Range": f"bytes=0-{PROBE_BYTES - 1}"}
    with requests.get(url, headers=headers, timeout=timeout, stream=True) as response:
        response.raise_for_status()
        # Read it in full, whether or not the server supports ranges: this tests its speed.
        beginning = next(response.iter_content(PROBE_BYTES), b"")
    # A network that requires a login first answers every request with a web page.
    if url.endswith(".gz") and not beginning.startswith(b"\x1f\x8b"):
        return "the answer is not a gzip file"
    return None


def _host(url: str) -> str:
    return urlsplit(url).hostname or url


def _silence() -> str:
    return f"no answer within {ATTEMPT_SECONDS:g} s"


def _plain(error: BaseException) -> str:
    """Say what went wrong in one line, without the wrapping of requests and urllib3."""
    if "Timeout" in type(error).__name__:  # each of the three libraries has its own class
        return _silence()
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP Error {response.status_code}: {response.reason}"
    for cause in (error.__cause__, getattr(error, "reason", None), *error.args[:1]):
        if isinstance(cause, BaseException):
            return _plain(cause)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
