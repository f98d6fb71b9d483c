"""Draw the results of one device from its JSON files: what is in the picture is in the file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import Row, load_results, machine, quantity, seconds, training_step

DPI = 120
# Colours that colour-blind readers can tell apart (Okabe and Ito), and a mark for grey paper.
_MARKS = {
    "eager": ("#d55e00", "o", "einsum, eager"),
    "compile": ("#e69f00", "s", "einsum, torch.compile"),
    "broadcast": ("#999999", "D", "broadcast matmul, eager"),
    "torch path": ("#0072b2", "^", "tritoncaps (torch path)"),
    "triton": ("#009e73", "v", "tritoncaps (Triton)"),
}
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.titlesize": 11,
    "svg.hashsalt": "tritoncaps",
}


def draw(directory: Path) -> Iterator[Path]:
    """Draw what a device has results of; yields the files."""
    results = load_results(directory)
    drawings = {
        "ops": draw_ops,
        "memory": draw_memory,
        "step": draw_step,
        "scaling": draw_scaling,
    }
    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE}):
        for name, drawing in drawings.items():
            rows = results[name]["rows"] if name in results else []
            if any("left_out" not in row for row in rows):
                figure = drawing(results[name])
                path = directory / f"{name}.png"
                figure.savefig(path, dpi=DPI, metadata={"Software": None})
                yield path


def _figure(data: dict[str, Any], width: float, height: float, title: str) -> Figure:
    figure = Figure((width, height), layout="constrained")
    environment = data["environment"]
    figure.suptitle(f"{title}\n{machine(environment)}, torch {environment['torch']}")
    return figure


def _label(row: Row) -> str:
    sizes = f"{row['I']}×{row['P']} → {row['J']}×{row['D']}"
    precision = "" if row["precision"] == "fp32" else f", {row['precision']}"
    return f"{row['shape']}{precision}\n{sizes}, B={row['B']}"


def _legend(figure: Figure, rivals: list[str], extra: list[Any] | None = None) -> None:
    handles = [
        mpl.lines.Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
        for rival, (colour, marker, label) in _MARKS.items()
        if rival in rivals
    ] + (extra or [])
    columns = len(handles) if len(handles) <= 5 else 3
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def draw_ops(data: dict[str, Any]) -> Figure:
    """Times of the routing by shape and rival, with the floor."""
    rows = [
        row for row in data["rows"] if row["op"] == "fused_dynamic_routing" and "median_s" in row
    ]
    labels = list(dict.fromkeys(_label(row) for row in rows))
    figure = _figure(data, 10, 1.6 + 0.55 * len(labels), "fused_dynamic_routing: time of a call")
    titles = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (phase, title) in zip(panels, titles.items(), strict=True):
        axes.set(title=title, xscale="log", xlabel="milliseconds", ylim=(len(labels) - 0.5, -0.5))
        axes.set_yticks(range(len(labels)), labels)
        axes.grid(axis="x", alpha=0.25)
        for row in rows:
            if row["phase"] == phase:
                y = labels.index(_label(row))
                axes.vlines(1e3 * row["floor_s"], y - 0.3, y + 0.3, color="black", linewidth=1)
                _point(axes, row, y)
    floor = mpl.lines.Line2D(
        [],
        [],
        color="black",
        marker="|",
        markersize=12,
        linestyle="",
        label="floor of this machine",
    )
    _legend(figure, [row["rival"] for row in rows], [floor])
    return figure


def _point(axes: Axes, row: Row, y: float) -> None:
    """A median with its p20 to p80; rivals a little apart so that none hides another."""
    colour, marker, _ = _MARKS[row["rival"]]
    y += 0.13 * (list(_MARKS).index(row["rival"]) - 1.5)
    median, p20, p80 = (1e3 * row[name] for name in ("median_s", "p20_s", "p80_s"))
    axes.plot([p20, p80], [y, y], color=colour, linewidth=1)
    axes.plot(median, y, color=colour, marker=marker, markersize=5)


class _Bar(NamedTuple):
    label: str
    colour: str
    value: float
    text: str
    spread: tuple[float, float] | None = None


def _draw_bars(axes: Axes, bars: list[_Bar]) -> None:
    axes.barh(range(len(bars)), [b.value for b in bars], color=[b.colour for b in bars], height=0.7)
    axes.set_yticks(range(len(bars)), [b.label for b in bars])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    for y, bar in enumerate(bars):
        end = bar.value
        if bar.spread is not None:
            axes.plot(bar.spread, (y, y), color="black", linewidth=1)
            end = max(end, bar.spread[1])
        axes.annotate(
            bar.text,
            (end, y),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )


def draw_memory(data: dict[str, Any]) -> Figure:
    """Peaks by shape and rival, beside the size of û."""
    rows = [row for row in data["rows"] if "peak_bytes" in row]
    groups = [
        [row for row in rows if row["case"] == case]
        for case in dict.fromkeys(row["case"] for row in rows)
    ]
    height = 1.1 + 0.5 * len(groups) + 0.25 * len(rows)
    figure = _figure(data, 8, height, "Peak memory of fused_dynamic_routing, forward + backward")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[*map(len, groups)])[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        bars = [
            _Bar(
                _MARKS[row["rival"]][2],
                _MARKS[row["rival"]][0],
                row["peak_bytes"] / 1e6,
                quantity(row["peak_bytes"], "B"),
            )
            for row in group
        ]
        _draw_bars(axes, bars)
        u_hat = group[0]["u_hat_bytes"]
        axes.axvline(u_hat / 1e6, color="black", linewidth=1, linestyle=":")
        size = _label(group[0]).replace("\n", ": ")
        axes.set_title(f"{size}; dotted: û alone, {quantity(u_hat, 'B')}", loc="left")
        axes.margins(x=0.12)
    panels[-1].set_xlabel("megabytes beyond the inputs")
    return figure


def draw_step(data: dict[str, Any]) -> Figure:
    """Times of whole training steps."""
    rows = [row for row in data["rows"] if "median_s" in row]
    title = f"One training step, batch {rows[0]['B']}, with decoder and Adam"
    figure = _figure(data, 8, 1.4 + 0.32 * len(rows), title)
    axes = figure.subplots()
    bars = [
        _Bar(
            training_step(row),
            _MARKS["torch path" if row["rival"] == "tritoncaps" else "eager"][0],
            1e3 * row["median_s"],
            f"{seconds(row['median_s'])}, {row['images_per_second']:.0f} images/s",
            (1e3 * row["p20_s"], 1e3 * row["p80_s"]),
        )
        for row in rows
    ]
    _draw_bars(axes, bars)
    axes.set_xlabel("milliseconds")
    axes.margins(x=0.3)
    return figure


def draw_scaling(data: dict[str, Any]) -> Figure:
    """Time and memory against each axis, with the fitted exponents."""
    rows = [row for row in data["rows"] if "median_s" in row]
    names = {"I": "input capsules I", "J": "output capsules J", "B": "batch B", "r": "iterations r"}
    figure = _figure(
        data, 11, 5.4, "fused_dynamic_routing, forward + backward: growth with each axis"
    )
    panels = figure.subplots(2, len(names), sharey="row")
    for column, (axis, name) in enumerate(names.items()):
        for line, (value, fit_name, factor) in enumerate(
            [("median_s", "time_exponent", 1e3), ("peak_bytes", "memory_exponent", 1e-6)]
        ):
            axes = panels[line, column]
            axes.set(xscale="log", yscale="log", xlabel=name)
            axes.grid(which="major", alpha=0.25)
            for fit in data["fits"]:
                own = [
                    row for row in rows
                    if row["axis"] == axis and row["rival"] == fit["rival"] and row.get(value)
                ]  # fmt: skip
                if fit["axis"] != axis or not own:
                    continue
                colour, marker, _ = _MARKS[fit["rival"]]
                label = "" if fit[fit_name] is None else f"∝ {axis}$^{{{fit[fit_name]:.2f}}}$"
                axes.plot(
                    [row["value"] for row in own], [factor * row[value] for row in own],
                    color=colour, marker=marker, markersize=5, label=label,
                )  # fmt: skip
            ticks = sorted({row["value"] for row in rows if row["axis"] == axis})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, handlelength=1.5)
    panels[0, 0].set_ylabel("milliseconds")
    panels[1, 0].set_ylabel("peak, megabytes")
    _legend(figure, [row["rival"] for row in rows])
    return figure
