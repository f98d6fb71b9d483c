"""Results: JSON files and lines on the terminal, with the machine and commit they come from."""

import datetime
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import tritoncaps
from tritoncaps import _operators
from tritoncaps._environment import commit_of, processor_name

FORMAT = 1
RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]

# What a row has in place of figures if nothing is wrong.
NO_TIME: Row = {"left_out": "no time was left"}
NO_BF16: Row = {"left_out": "this processor does not compute in bfloat16"}

_BACKENDS = {"avx512": "AVX-512", "avx2": "AVX2", "torch": "plain torch"}


class Report:
    """The rows of one benchmark. Each is saved at once, so a killed run keeps what it has."""

    def __init__(
        self, benchmark: str, device: torch.device, settings: dict[str, Any], directory: Path
    ) -> None:
        self.path = directory / f"{benchmark}.json"
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "benchmark": benchmark,
            "environment": describe_environment(device),
            "settings": settings,
            "rows": [],
        }
        directory.mkdir(parents=True, exist_ok=True)
        self._save()

    @property
    def rows(self) -> list[Row]:
        """The rows so far."""
        return self.data["rows"]

    @property
    def is_complete(self) -> bool:
        """Whether all that can be measured here was, or would have been with more time."""
        good = (None, NO_TIME["left_out"], NO_BF16["left_out"])
        return all(row.get("left_out") in good for row in self.rows)

    def note(self, **facts: Any) -> None:
        """Add facts that are not rows."""
        self.data.update(facts)
        self._save()

    def add(self, rows: Iterable[Row], *columns: str) -> None:
        """Add rows, save them, and print each: these columns, then its figures."""
        rows = list(rows)
        self.rows.extend(rows)
        for row in rows:
            print("  " + describe(row, columns), flush=True)
        self._save()

    def _save(self) -> None:
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n")
        os.replace(temporary, self.path)


# Environment --------------------------------------------------------------------------------------


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Collect what is needed to repeat a measurement: versions, device, commit."""
    native = tritoncaps.backend_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "interpreted": _operators.INTERPRETED,
        "cpu_backend": native["variant"] or native["cpu"],
        "tritoncaps": tritoncaps.__version__,
        "commit": commit_of(Path(__file__).parent),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def device_name(device: torch.device) -> str:
    """Name the processor or the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def directory_of(device: torch.device) -> Path:
    """Name the folder of a device's results, such as results/amd-epyc-2-threads."""
    name = device_name(device)
    if device.type == "cpu":
        name += f" {torch.get_num_threads()} threads"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return str(__import__(package).__version__)
    except ModuleNotFoundError:
        return None


# Figures for people -------------------------------------------------------------------------------


def seconds(value: float) -> str:
    """Format a duration with three digits: 3.11 s, 38.7 ms, 12.0 µs."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{_three_digits(value * factor)} {unit}"
    return f"{_three_digits(value * 1e6)} µs"


def machine(environment: dict[str, Any]) -> str:
    """Name the device of a result. For a CPU, add the number of threads and what computes there."""
    if environment["device_type"] != "cpu":
        return str(environment["device"])
    threads = environment["threads"]
    name = f"{environment['device']}, {threads} thread{'s' if threads != 1 else ''}"
    backend = environment.get("cpu_backend")  # older results have none
    return f"{name}, {_BACKENDS.get(backend, backend)}" if backend else name


def training_step(row: Row) -> str:
    """Name the network, the rival and the precision of a row of `step`."""
    name = f"{row['model']}, {row['rival']}, {row['precision']}"
    return f"{name}, CUDA graph" if row.get("method") == "graph" else name


def quantity(value: float, unit: str) -> str:
    """Format with a decimal prefix and three digits: 604 MB, 1.32 GFLOP/s."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{_three_digits(value / factor)} {prefix}{unit}"
    return f"{_three_digits(value)} {unit}"


def _three_digits(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def describe(row: Row, columns: Sequence[str]) -> str:
    """Write a row of any benchmark as a line of text."""
    words = [f"{row.get(column, '')!s:<13}" for column in columns]
    for key in ("left_out", "refused"):
        if key in row:
            return " ".join([*words, f"{key.replace('_', ' ')}: {row[key]}"])
    if "median_s" in row:
        spread = f"({seconds(row['p20_s'])} to {seconds(row['p80_s'])})"
        words.append(f"{seconds(row['median_s']):>8} {spread:<24}")
    for key, template in _FIGURES.items():
        if row.get(key) is not None:
            words.append(template(row[key]))
    return " ".join(words)


# How figures are written. A row has some of them.
_FIGURES: dict[str, Callable[[float], str]] = {
    "measured_s": lambda value: f"measured {seconds(value):>8}",
    "predicted_s": lambda value: f"predicted {seconds(value):>8}",
    "first_call_s": lambda value: f"first call {seconds(value):>8}",
    "speedup": lambda value: f"{value:7.2f} x",
    "bytes_per_second": lambda value: f"{quantity(value, 'B/s'):>9}",
    "flops_per_second": lambda value: f"{quantity(value, 'FLOP/s'):>13}",
    "share_of_floor": lambda value: f"{100 * value:5.1f} % of the floor's rate",
    "images_per_second": lambda value: f"{value:8.0f} images/s",
    "peak_bytes": lambda value: f"peak {quantity(value, 'B'):>8}",
    "error": lambda value: f"error {value:.1e} of the largest value",
    "eager_error": lambda value: f"(einsum {value:.1e})",
}


def load_results(directory: Path) -> dict[str, Any]:
    """Read the results of one device, by benchmark."""
    paths = [path for path in sorted(directory.glob("*.json")) if path.stem != "launch_table"]
    return {path.stem: json.loads(path.read_text()) for path in paths}
