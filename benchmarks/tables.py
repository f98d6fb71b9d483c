"""The tables of the project's README and of docs/memory.md, made from the results in JSON."""

from pathlib import Path
from typing import Any

from benchmarks.report import Row, load_results, machine, quantity, seconds, training_step

README = Path(__file__).parent.parent / "README.md"
MEMORY_PAGE = README.parent / "docs" / "memory.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def readme_block(results: Path) -> str:
    """Write the tables of all devices, with the markers."""
    devices = [load_results(folder) for folder in sorted(results.iterdir()) if folder.is_dir()]
    parts = [_device_tables(device) for device in devices if device]
    return "\n\n".join([BEGIN, *parts, END])


def memory_block(results: Path) -> str:
    """Write the tables of docs/memory.md for all devices, with the markers."""
    devices = [load_results(folder) for folder in sorted(results.iterdir()) if folder.is_dir()]
    parts = []
    for device in devices:
        if "memory-grid" in device:
            data = device["memory-grid"]
            parts += [_origin([data]), *_memory_grid_tables(data["rows"])]
    return "\n\n".join([BEGIN, *parts, END])


def replace_block(text: str, block: str) -> str:
    """Put a block in the place of the one between the markers.

    Raises:
        ValueError: the text has not one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one {BEGIN} and after it one {END}")
    head, rest = text.split(BEGIN)
    return head + block + rest.split(END)[1]


def _device_tables(device: dict[str, Any]) -> str:
    tables = [_origin([data for name, data in device.items() if name != "memory-grid"])]
    if "ops" in device:
        tables.append(_ops_table(device["ops"]["rows"]))
    if "step" in device:
        tables.append(_step_table(device["step"]["rows"]))
    if "memory" in device:
        tables.append(_memory_table(device["memory"]["rows"]))
    return "\n\n".join(tables)


def _origin(results: list[dict[str, Any]]) -> str:
    """Say where figures come from."""
    environment = results[0]["environment"]
    commits = sorted({str(data["environment"]["commit"]) for data in results})
    return (
        f"**{machine(environment)}** (torch {environment['torch']}, "
        f"commit {' and '.join(commits)}, {environment['date']})"
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_rival(rows: list[Row], value: str) -> dict[str, float]:
    return {row["rival"]: row[value] for row in rows if value in row}


def _own(figures: dict[str, float]) -> str:
    """The path that tritoncaps takes on the device."""
    return "triton" if "triton" in figures else "torch path"


def _ops_table(rows: list[Row]) -> str:
    lines = []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["op"] == "fused_dynamic_routing" and row["phase"] in ("forward", "both"):
            groups.setdefault((row["case"], row["phase"]), []).append(row)
    for (case, phase), group in groups.items():
        medians = _by_rival(group, "median_s")
        own = _own(medians)
        if own not in medians:
            continue
        first = group[0]
        name = f"{first['shape']} {case.split()[2]}, B={first['B']}, {first['precision']}"
        cells = [seconds(medians[r]) if r in medians else "" for r in ("eager", "compile", own)]
        ratios = [
            f"{medians[r] / medians[own]:.1f}" if r in medians else "" for r in ("eager", "compile")
        ]
        phase = {"forward": "forward", "both": "forward + backward"}[phase]
        lines.append([f"{name}, {phase}", *cells, *ratios])
    header = ["`fused_dynamic_routing`", "einsum", "compiled einsum", "tritoncaps"]
    return _table([*header, "× einsum", "× compiled"], lines)


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
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        group = [row for row in rows if row["case"] == case]
        peaks = _by_rival(group, "peak_bytes")
        names = ("eager", "compile", _own(peaks))
        cells = [quantity(peaks[name], "B") if name in peaks else "" for name in names]
        name = f"{group[0]['shape']} {case.split()[2]}, B={group[0]['B']}"
        lines.append([name, quantity(group[0]["u_hat_bytes"], "B"), *cells])
    header = ["Peak of forward + backward", "û alone", "einsum", "compiled einsum", "tritoncaps"]
    return _table(header, lines)


def _memory_grid_tables(rows: list[Row]) -> list[str]:
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
                own = _own(formulas)
                figures += [_peak(peaks.get("eager")), _peak(peaks.get(own))]
                figures.append(_peak(formulas.get(own)))
            lines.append([f"{I}", f"{J}", *figures])
        columns = ["einsum", "tritoncaps", "formula"]
        names = [f"{phase}: {name}" for phase in ("forward", "with backward") for name in columns]
        tables.append(f"Batch {B}:\n\n{_table(['I', 'J', 'û alone', *names], lines)}")
    return tables


def _peak(value: float | None) -> str:
    """Write a size; the kernel, which counts pages in batches, cannot tell one under 1 MB."""
    if value is None:
        return ""
    return quantity(value, "B") if value >= 1e6 else "< 1 MB"
