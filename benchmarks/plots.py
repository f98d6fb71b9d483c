"""Pictures of the results, drawn from the JSON files alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cases import MAIN
from benchmarks.report import Row, load_results, machine, quantity, seconds, training_step
from benchmarks.tables import TITLES, chosen_rows, own

DPI = 120
# Colours that colour-blind readers can tell apart (Okabe and Ito), and a mark for print in grey.
_MARKS = {
    "eager": ("#d55e00", "o", "einsum, eager"),
    "compile": ("#e69f00", "s", "einsum, torch.compile"),
    "broadcast": ("#999999", "D", "broadcast matmul, eager"),
    "torch path": ("#0072b2", "^", "tritoncaps (torch path)"),
    "triton": ("#009e73", "v", "tritoncaps (Triton)"),
}
_OTHER = ("#cc79a7", "P")  # a rival without its own mark
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.titlesize": 11,
    "svg.hashsalt": "tritoncaps",
}


def draw(directory: Path) -> Iterator[Path]:
    """Draw all results that a device has, and yield the files."""
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


def _mark(rival: str) -> tuple[str, str, str]:
    """The colour, the marker and the label of a rival."""
    return _MARKS.get(rival, (*_OTHER, rival))


def _label(row: Row) -> str:
    sizes = f"{row['I']}×{row['P']} → {row['J']}×{row['D']}"
    precision = "" if row["precision"] == "fp32" else f", {row['precision']}"
    load = ", under load" if "loaded_cores" in row else ""
    return f"{row['shape']}{precision}{load}\n{sizes}, B={row['B']}"


def _legend(figure: Figure, rivals: list[str], extra: list[Any] | None = None) -> None:
    handles = [
        mpl.lines.Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
        for colour, marker, label in (_mark(rival) for rival in _in_order(rivals))
    ] + (extra or [])
    columns = len(handles) if len(handles) <= 5 else 3
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _in_order(rivals: list[str]) -> list[str]:
    """Each rival once, in the order of the marks. Others come last."""
    others = [name for name in dict.fromkeys(rivals) if name not in _MARKS]
    return [*(name for name in _MARKS if name in rivals), *others]


def draw_ops(data: dict[str, Any]) -> Figure:
    """Times of the routing by shape and rival, with the floor."""
    rows = [row for row in data["rows"] if row["op"] == MAIN and "median_s" in row]
    labels = list(dict.fromkeys(_label(row) for row in rows))
    rivals = _in_order([row["rival"] for row in rows])
    figure = _figure(data, 10, 1.6 + 0.55 * len(labels), f"{MAIN}: time of a call")
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
                _point(axes, row, y, rivals.index(row["rival"]))
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


def _point(axes: Axes, row: Row, y: float, number: int) -> None:
    """Draw a median with its p20 to p80. Rivals are a little apart, so none hides another."""
    colour, marker, _ = _mark(row["rival"])
    y += 0.13 * (number - 1.5)
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
    figure = _figure(data, 8, height, f"Peak memory of {MAIN}, forward + backward")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[*map(len, groups)])[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        bars = [
            _Bar(
                _mark(row["rival"])[2],
                _mark(row["rival"])[0],
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
    figure = _figure(data, 11, 5.4, f"{MAIN}, forward + backward: growth with each axis")
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
                colour, marker, _ = _mark(fit["rival"])
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


def draw_speed(devices: list[dict[str, Any]], path: Path) -> None:
    """Draw the README's plot: its rows, one panel for each device.

    The bars of a row are relative to einsum, so milliseconds and seconds fit on one linear axis.
    The labels of the bars are the times.
    """
    panels = [(device, rows) for device in devices if (rows := chosen_rows(device))]
    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE, "font.size": 10}):
        height = 0.9 + 0.62 * sum(len(rows) for _, rows in panels)
        figure = Figure((8, height), layout="constrained", facecolor="white")
        ratios = [len(rows) for _, rows in panels]
        all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
        for axes, (device, rows) in zip(all_axes, panels, strict=True):
            _draw_speed_panel(axes, rows)
            environment = (device.get("ops") or device["step"])["environment"]
            axes.set_title(f"{machine(environment)}: time relative to einsum", loc="left")
        handles = [
            mpl.patches.Patch(color=_mark(rival)[0], label=title)
            for rival, title in (*TITLES.items(), ("torch path", "tritoncaps"))
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=200, metadata={"Software": None})


def _draw_speed_panel(axes: Axes, rows: list[tuple[str, dict[str, float]]]) -> None:
    for y, (_, times) in enumerate(rows):
        for place, rival in zip((y - 0.26, y, y + 0.26), (*TITLES, own(times)), strict=True):
            ratio = times.get(rival, 0) / times["eager"]
            colour = _mark("torch path" if rival == own(times) else rival)[0]
            axes.barh(place, ratio, height=0.24, color=colour)
            axes.annotate(
                seconds(times[rival]) if rival in times else "not measured",
                (ratio, place), (4, 0), textcoords="offset points", va="center", fontsize=9,
            )  # fmt: skip
    axes.set_yticks(range(len(rows)), [name.replace(", ", "\n", 1) for name, _ in rows])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.set_xlim(right=1.12)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
