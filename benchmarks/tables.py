"""The tables of README.md, docs/speed.md and docs/memory.md, written from the JSON results."""

from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

from benchmarks.cases import MAIN
from benchmarks.report import Row, load_results, machine, quantity, seconds, training_step

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

# What the README and its picture show: rows of `ops` by shape and phase, all in fp32 with the
# usual batch size, then training steps of CapsNet by precision.
README_CALLS = (("mnist", "forward"), ("mnist", "both"), ("cifar", "both"), ("classes100", "both"))
README_STEPS = ("fp32", "bf16")
PHASES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
# The titles of rivals. For other rivals, the name is the title.
TITLES = {"eager": "einsum", "compile": "compiled einsum"}

Times = dict[str, float]  # median seconds by rival


def readme_block(results: Path) -> str:
    """Write a few rows for each device, and say how often tritoncaps is slower in all rows."""
    parts = []
    for device in load_devices(results):
        rows = [[name, *_cells(times, TITLES)] for name, times in chosen_rows(device)]
        if rows:
            header = ["", *TITLES.values(), "tritoncaps"]
            parts += [_origin(_of(device, "ops", "step")), _table(header, rows)]
            parts.append(f"[All rows](docs/speed.md): tritoncaps is slower {_slower(device)}.")
    return "\n\n".join([BEGIN, *parts, END])


def speed_block(results: Path) -> str:
    """Write every time and every peak that was measured at a named shape."""
    parts = []
    for device in load_devices(results):
        parts.append(_origin(_of(device, "ops", "step", "memory")))
        if "ops" in device:
            parts.append(f"tritoncaps is slower {_slower(device)}; there, × is below 1 and bold.")
            parts += _ops_tables(_rows(device, "ops"))
        if "step" in device:
            parts.append(_step_table(device["step"]["rows"]))
        if "memory" in device:
            parts.append(_memory_table(device["memory"]["rows"]))
    return "\n\n".join([BEGIN, *parts, END])


def memory_block(results: Path) -> str:
    """Write the tables of docs/memory.md."""
    parts = []
    for device in load_devices(results):
        if "memory-grid" in device:
            data = device["memory-grid"]
            parts += [_origin([data]), *_memory_grid_tables(data["rows"])]
    return "\n\n".join([BEGIN, *parts, END])


# The pages, and what to write between their markers.
PAGES: dict[Path, Callable[[Path], str]] = {
    Path("README.md"): readme_block,
    Path("docs/speed.md"): speed_block,
    Path("docs/memory.md"): memory_block,
}


def replace_block(text: str, block: str) -> str:
    """Replace the block between the markers.

    Raises:
        ValueError: the text does not have exactly one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"replace_block: expected one {BEGIN} and one {END} after it, "
            f"found {text.count(BEGIN)} and {text.count(END)}"
        )
    head, rest = text.split(BEGIN)
    return head + block + rest.split(END)[1]


def chosen_rows(device: dict[str, Any]) -> list[tuple[str, Times]]:
    """Return the README's rows that a device has, with the time of each rival."""
    rows = []
    calls = [
        row for row in _rows(device, "ops") if row["op"] == MAIN and row["precision"] == "fp32"
    ]
    for shape, phase in README_CALLS:
        group = [row for row in calls if (row["shape"], row["phase"]) == (shape, phase)]
        # If a shape was timed in several ways, take the first, which has the usual batch size.
        times = _by_rival([row for row in group if row["case"] == group[0]["case"]], "median_s")
        if "eager" in times and own(times) in times:
            name = f"{shape} ({group[0]['I']} → {group[0]['J']} capsules), batch {group[0]['B']}"
            rows.append((f"{name}, {PHASES[phase]}", times))
    names = {"einsum port": "eager", "compiled port": "compile", "tritoncaps": "torch path"}
    for precision in README_STEPS:
        steps = [
            row
            for row in _rows(device, "step")
            if (row["model"], row["precision"]) == ("CapsNet", precision)
            and row.get("method", "calls") == "calls"
        ]
        times = {names[row["rival"]]: row["median_s"] for row in steps}
        if "eager" in times and own(times) in times:
            name = f"CapsNet, one training step, batch {steps[0]['B']}, {precision}"
            rows.append((name, times))
    return rows


def load_devices(results: Path) -> list[dict[str, Any]]:
    """Read the results of every device, each file's content under the name of its benchmark."""
    devices = [load_results(folder) for folder in sorted(results.iterdir()) if folder.is_dir()]
    return [device for device in devices if device]


def _of(device: dict[str, Any], *benchmarks: str) -> list[dict[str, Any]]:
    return [device[name] for name in benchmarks if name in device]


def _rows(device: dict[str, Any], benchmark: str) -> list[Row]:
    """The rows of a benchmark that have a time."""
    return [row for data in _of(device, benchmark) for row in data["rows"] if "median_s" in row]


def _origin(results: list[dict[str, Any]]) -> str:
    """Say which device, version, commit and date the figures come from."""
    environment = results[0]["environment"]
    commits = sorted({str(data["environment"]["commit"]) for data in results})
    return (
        f"**{machine(environment)}** (torch {environment['torch']}, "
        f"commit {' and '.join(commits)}, {environment['date']})"
    )


def _slower(device: dict[str, Any]) -> str:
    """Say in how many timed operator calls tritoncaps is slower."""
    groups = [times for _, times in _call_times(_rows(device, "ops"))]
    counts = []
    for rival, title in TITLES.items():
        pairs = [
            (times[own(times)], times[rival])
            for times in groups
            if {rival, own(times)} <= times.keys()
        ]
        slower = sum(ours > theirs for ours, theirs in pairs)
        counts.append(f"than {title} in {slower} of {len(pairs)} calls")
    return " and ".join(counts)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_rival(rows: list[Row], value: str) -> dict[str, float]:
    return {row["rival"]: row[value] for row in rows if value in row}


def own(figures: Container[str]) -> str:
    """Name the path that tritoncaps takes on the device."""
    return "triton" if "triton" in figures else "torch path"


def _cells(times: Times, rivals: Iterable[str]) -> list[str]:
    """The times of these rivals, empty where nothing was measured, then that of tritoncaps."""
    return [seconds(times[name]) if name in times else "" for name in (*rivals, own(times))]


def _ratio(times: Times, rival: str) -> str:
    """The rival's time divided by that of tritoncaps, in bold where tritoncaps is slower."""
    if rival not in times:
        return ""
    ratio = times[rival] / times[own(times)]
    return f"{ratio:.1f}" if ratio >= 1 else f"**{ratio:.2f}**"


def _call_times(rows: list[Row]) -> list[tuple[Row, Times]]:
    """The times of the rivals by case and phase, each with its first row."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["phase"]), []).append(row)
    return [(group[0], _by_rival(group, "median_s")) for group in groups.values()]


def _ops_tables(rows: list[Row]) -> list[str]:
    tables = []
    for op in dict.fromkeys(row["op"] for row in rows):
        calls = _call_times([row for row in rows if row["op"] == op])
        rivals = _others([times for _, times in calls])
        lines = []
        for first, times in calls:
            if own(times) not in times:
                continue
            ratios = [_ratio(times, rival) for rival in rivals]
            lines.append([call_title(first), *_cells(times, rivals), *ratios])
        titles = [TITLES.get(rival, rival) for rival in rivals]
        header = [f"`{op}`", *titles, "tritoncaps", *(f"× {title}" for title in titles)]
        tables.append(_table(header, lines))
    return tables


def call_title(row: Row) -> str:
    """Name the shape, batch, precision and phase of a row of `ops`, and whether cores were busy."""
    name = f"{row['shape']} {row['case'].split()[2]}, B={row['B']}, {row['precision']}"
    return f"{name}, {PHASES[row['phase']]}" + (", under load" if "loaded_cores" in row else "")


def _others(groups: list[dict[str, float]]) -> list[str]:
    """All rivals of tritoncaps that have a figure. Those with a title come first."""
    names = dict.fromkeys(name for group in groups for name in group if name != own(group))
    return sorted(names, key=lambda name: list(TITLES).index(name) if name in TITLES else 9)


def _step_table(rows: list[Row]) -> str:
    lines = [
        [
            training_step(row),
            seconds(row["median_s"]),
            f"{row['images_per_second']:.0f}",
            f"{row['speedup']:.2f}",
        ]
        for row in rows
        if "median_s" in row
    ]
    header = f"Training step, batch {rows[0]['B']}"
    return _table([header, "time", "images/s", "× einsum port, fp32"], lines)


def _memory_table(rows: list[Row]) -> str:
    groups = [
        [row for row in rows if row["case"] == case]
        for case in dict.fromkeys(row["case"] for row in rows)
    ]
    rivals = _others([_by_rival(group, "peak_bytes") for group in groups])
    lines = []
    for group in groups:
        peaks, first = _by_rival(group, "peak_bytes"), group[0]
        names = (*rivals, own(peaks))
        cells = [quantity(peaks[name], "B") if name in peaks else "" for name in names]
        name = f"{first['shape']} {first['case'].split()[2]}, B={first['B']}"
        lines.append([name, quantity(first["u_hat_bytes"], "B"), *cells])
    titles = [TITLES.get(rival, rival) for rival in rivals]
    return _table(["Peak of forward + backward", "û alone", *titles, "tritoncaps"], lines)


def _memory_grid_tables(rows: list[Row]) -> list[str]:
    has_formula = any("formula_bytes" in row for row in rows)
    columns = ["einsum", "tritoncaps", *["formula"] * has_formula]
    names = [f"{phase}: {name}" for phase in ("forward", "with backward") for name in columns]
    tables = []
    for B in dict.fromkeys(row["B"] for row in rows):
        lines = []
        own_rows = [row for row in rows if row["B"] == B]
        for I, J in dict.fromkeys((row["I"], row["J"]) for row in own_rows):
            cell = [row for row in own_rows if (row["I"], row["J"]) == (I, J)]
            figures = [quantity(cell[0]["u_hat_bytes"], "B")]
            for phase in ("forward", "both"):
                group = [row for row in cell if row["phase"] == phase]
                peaks, formulas = _by_rival(group, "peak_bytes"), _by_rival(group, "formula_bytes")
                path = own({row["rival"] for row in group})
                figures += [_peak(peaks.get("eager")), _peak(peaks.get(path))]
                figures += [_peak(formulas.get(path))] * has_formula
            lines.append([f"{I}", f"{J}", *figures])
        tables.append(f"Batch {B}:\n\n{_table(['I', 'J', 'û alone', *names], lines)}")
    return tables


def _peak(value: float | None) -> str:
    """Write a size. The system counts pages in batches, so less than 1 MB cannot be resolved."""
    if value is None:
        return ""
    return quantity(value, "B") if value >= 1e6 else "< 1 MB"
