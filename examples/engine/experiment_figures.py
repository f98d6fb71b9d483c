"""The pictures of the experiments, drawn as those in figures.py: plain data in, one PNG out.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart. Every line has a mark
of its own as well, for grey paper. Shares in 0 .. 1 are shown in percent.

Example:
    >>> import tempfile
    >>> from engine import experiment_figures
    >>> path = tempfile.mkdtemp() + "/curves.png"
    >>> curves = {"CapsNet": [[0.97, 0.98], [0.96, 0.99]], "CNN": [[0.98, 0.985]]}
    >>> experiment_figures.plot_model_curves(curves, path, "Two networks", "test accuracy")
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from engine.baseline import TITLES
from engine.figures import (
    _ACCURACY_TICKS,
    _GAP,
    _WRONG,
    _count_epochs,
    _enlarge,
    _figure,
    _mosaic_figure,
    _pad,
    _set_limits,
    _shrink_to,
    _stretch_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f"]
_MARKS = ["o", "s", "^", "D", "v", "P", "X", "*"]

# The two images of an overlay: where both are white, their colours add up to white.
_FIRST, _SECOND = (1.0, 0.55, 0.0), (0.0, 0.45, 1.0)

# Ticks of an accuracy axis that is stretched; more than figures.py has, for narrow ranges.
_FINE_TICKS = sorted({*_ACCURACY_TICKS, 10, 30, 60, 85, 97, 98.5, 99.2, 99.6, 99.7})


def plot_model_curves(
    curves: Mapping[str, Sequence[Sequence[float]]], path: str | Path, title: str, quantity: str
) -> None:
    """Plot a share by epoch for each network, from its runs: every seed thin, their mean thick.

    The legend gives the highest and the last value, mean ± standard deviation over the seeds. The
    axis is stretched towards 100 %. `quantity` is what the share is of, such as "test accuracy".
    """
    runs = [run for seeds in curves.values() for run in seeds]
    if not runs or not all(runs):
        raise ValueError("plot_model_curves: there is no epoch to plot")
    longest = max(map(len, runs))
    labels = ("epoch", f"{quantity} (%), stretched towards 100")
    with _chart(path, 560 + 22 * len(curves), title, labels) as axes:
        _stretch_axis(axes)
        styles = _styles(curves)
        for name, seeds in curves.items():
            colour, mark = styles[name]
            length = min(map(len, seeds))
            average = [100 * mean(run[epoch] for run in seeds) for epoch in range(length)]
            if len(seeds) > 1:
                for run in seeds:
                    values = [100 * value for value in run]
                    axes.plot(range(1, len(run) + 1), values, color=colour, lw=0.7, alpha=0.55)
            label = f"{name}: highest {_spread([max(run) for run in seeds])}"
            label += f", last {_spread([run[-1] for run in seeds])}"
            axes.plot(
                range(1, length + 1), average, color=colour, marker=mark, markersize=4, lw=2.2,
                label=label, clip_on=False,
            )  # fmt: skip
        _set_limits(axes, _FINE_TICKS, [100 * value for run in runs for value in run])
        _count_epochs(axes, 1, longest)


def plot_heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[int],
    columns: Sequence[int],
    path: str | Path,
    title: str,
    labels: tuple[str, str, str],
) -> None:
    """Draw a table of shares as colours and numbers, NaN as "not run"; the highest is framed.

    `rows` and `columns` number the table; `labels` name rows, columns and values.
    """
    table = 100 * torch.tensor(values, dtype=torch.float64)
    known = table[~table.isnan()]
    if known.numel() == 0:
        raise ValueError("plot_heat_map: there is no value to draw")
    width, height = 300 + 110 * len(columns), 190 + 80 * len(rows)
    with _figure(path, width, height, title, arrange=True) as figure:
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        lowest, highest = float(known.min()), float(known.max())
        image = axes.imshow(
            table.numpy(), cmap="cividis", aspect="auto", vmin=lowest, vmax=highest + 1e-9
        )
        for row, column in (~table.isnan()).nonzero().tolist():
            value = float(table[row, column])
            dark = value - lowest < 0.55 * (highest - lowest)
            colour = "white" if dark else "black"
            axes.text(column, row, f"{value:.2f}", color=colour, ha="center", va="center")
        for row, column in table.isnan().nonzero().tolist():
            axes.text(column, row, "not run", color="0.4", ha="center", va="center")
        best = int(table.nan_to_num(-1).argmax())
        corner = (best % len(columns) - 0.5, best // len(columns) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, ec=_PALETTE[1], lw=3, clip_on=False))
        axes.set_yticks(range(len(rows)), [str(row) for row in rows])
        axes.set_xticks(range(len(columns)), [str(column) for column in columns])
        axes.set_ylabel(labels[0])
        axes.set_xlabel(labels[1])
        bar = figure.colorbar(image, ax=axes, label=f"{labels[2]} (%)")
        bar.ax.ticklabel_format(axis="y", useOffset=False)


def plot_trade_off(
    points: Sequence[tuple[str, float, float]],
    front: Sequence[int],
    path: str | Path,
    title: str,
    labels: tuple[str, str],
) -> None:
    """Plot points (name, seconds, share), and join the Pareto front, the positions in `front`.

    `labels` name time and share.
    """
    if not points:
        raise ValueError("plot_trade_off: there is no point to plot")
    with _chart(path, 620, title, (labels[0], f"{labels[1]} (%)"), columns=2) as axes:
        ahead = sorted((points[index] for index in front), key=lambda point: point[1])
        others = [point for index, point in enumerate(points) if index not in set(front)]
        line: dict[str, Any] = {"color": _PALETTE[1], "marker": "s", "markersize": 8, "lw": 1.5}
        x, y = [point[1] for point in ahead], [100 * point[2] for point in ahead]
        axes.plot(x, y, drawstyle="steps-post", label="Pareto front", zorder=3, **line)
        if others:
            x, y = [point[1] for point in others], [100 * point[2] for point in others]
            axes.plot(x, y, "o", color=_PALETTE[0], label="faster and as accurate exists")
        for name, seconds, share in points:
            # Above and left of the front there is no point, so there is room for a name.
            style: dict[str, Any] = {"xytext": (6, -11), "ha": "left", "color": "0.35"}
            if any(name == point[0] for point in ahead):
                style = {"xytext": (-7, 5), "ha": "right", "weight": "bold"}
            axes.annotate(name, (seconds, 100 * share), textcoords="offset points", **style)
        axes.margins(0.12)
        axes.ticklabel_format(useOffset=False)


@dataclass(frozen=True)
class Panel:
    """One plot of `plot_panels`: a share against something, for each network.

    `lines` holds the values x and the shares of each network. `level` draws a dashed line at a
    share, with its name.
    """

    title: str
    x_label: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    level: tuple[float, str] | None = None


def plot_panels(panels: Sequence[Panel], path: str | Path, title: str, quantity: str) -> None:
    """Plot several shares of a `quantity`, three panels in a row, on one scale of 0 to 100 %."""
    if not panels:
        raise ValueError("plot_panels: there is no curve to plot")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with _figure(path, 420 * columns + 40, 380 * rows + 90, title, arrange=True) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for panel, axes in zip(panels, grid.flat, strict=False):
            styles = _styles(panel.lines)
            for name, (x, y) in panel.lines.items():
                colour, mark = styles[name]
                shares = [100 * share for share in y]
                style = {"color": colour, "marker": mark, "markersize": 4}
                axes.plot(x, shares, label=name, clip_on=False, zorder=3, **style)
            if panel.level is not None:
                share, name = panel.level
                axes.axhline(100 * share, color="0.4", ls="--", lw=1, label=name)
            axes.set_title(panel.title, fontsize=9)
            axes.set_xlabel(panel.x_label)
            axes.set_ylabel(f"{quantity} (%)")
            axes.set_ylim(0, 102)
            axes.grid(alpha=0.3)
        handles = {
            label: handle
            for axes in grid.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        columns = min(4, len(handles))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def plot_by_size(
    curves: Mapping[str, Mapping[int, Sequence[float]]],
    path: str | Path,
    title: str,
    labels: tuple[str, str],
) -> None:
    """Plot the shares of each network and size on a logarithmic axis: each run, and their mean.

    `labels` name size and share.
    """
    shares = [100 * share for sizes in curves.values() for runs in sizes.values() for share in runs]
    if not shares:
        raise ValueError("plot_by_size: there is no point to plot")
    y_label = f"{labels[1]} (%), stretched towards 100"
    with _chart(path, 620, title, (labels[0], y_label), columns=len(curves)) as axes:
        _stretch_axis(axes)
        axes.set_xscale("log")
        styles = _styles(curves)
        for name, sizes in curves.items():
            colour, mark = styles[name]
            known = sorted(sizes)
            average = [100 * mean(sizes[size]) for size in known]
            style: dict[str, Any] = {"color": colour, "marker": mark, "markersize": 5, "lw": 2}
            axes.plot(known, average, label=name, clip_on=False, zorder=3, **style)
            for size in known:
                values = [100 * share for share in sizes[size]]
                if len(values) > 1:
                    axes.plot([size] * len(values), values, "_", color=colour, markersize=9)
        _set_limits(axes, _FINE_TICKS, shares)
        all_sizes = sorted({size for sizes in curves.values() for size in sizes})
        axes.set_xticks(all_sizes, [f"{size:,}" for size in all_sizes])
        axes.minorticks_off()


@dataclass(frozen=True)
class Overlapped:
    """Overlapping images with their originals, and what a network made of them.

    `overlays` (N, C, H, W), `originals` and `reconstructions` (N, 2, C, H, W), in [0, 1];
    `labels` and `predictions` (N, 2), each row ascending and distinct.
    """

    overlays: Tensor
    originals: Tensor
    reconstructions: Tensor
    labels: Tensor
    predictions: Tensor

    def take(self, chosen: Tensor) -> Overlapped:
        """Return those at some positions."""
        parts = (self.overlays, self.originals, self.reconstructions, self.labels, self.predictions)
        return Overlapped(*(part[chosen] for part in parts))


def plot_overlapped(
    blocks: Sequence[Overlapped], path: str | Path, title: str, class_names: Sequence[str]
) -> None:
    """Draw overlays over their originals and reconstructions, one colour for each of the two.

    The decoded image of a class that was found has the colour of its original. A class that is not
    in the image takes the place and the colour of one that was missed. `blocks` are rows of
    examples, such as successes and failures; empty ones are left out.
    """
    pairs = [pair for pair in blocks if len(pair.overlays)]
    if not pairs:
        raise ValueError("plot_overlapped: there is no image to draw")
    names = ["input", "first original", "second original", "both", "first decoded"]
    names += ["second decoded", "both"]
    drawn = []
    for pair in pairs:
        captions = []
        for both in zip(pair.labels.tolist(), pair.predictions.tolist(), strict=True):
            lines = (", ".join(class_names[index] for index in classes) for classes in both)
            captions.append("\n".join(lines))
        wrong = (pair.labels != pair.predictions).any(dim=1).tolist()
        drawn.append(_Block(_coloured(pair), names, captions, wrong, "shown\nfound"))
    _plot_blocks(drawn, path, title, left=148, text_height=54)


@dataclass(frozen=True)
class _Block:
    """Rows of images, (rows, N, C, H, W), with a name beside each row and a caption each column.

    `heading` stands beside the captions; those of `wrong` columns are red.
    """

    images: Tensor
    names: Sequence[str]
    captions: Sequence[str]
    wrong: Sequence[bool]
    heading: str = ""


def _plot_blocks(
    blocks: Sequence[_Block], path: str | Path, title: str, left: int, text_height: int
) -> None:
    """Draw blocks of images under each other; `left` and `text_height` are room for text."""
    columns = max(block.images.shape[1] for block in blocks)
    strips = []
    for block in blocks:
        tiles = _enlarge(block.images)  # (rows, N, h, w, 3)
        blank = tiles.new_full((len(tiles), columns - tiles.shape[1], *tiles.shape[2:]), 255)
        tiles = _pad(torch.cat([tiles, blank], dim=1), _GAP, _GAP)
        strip = rearrange(tiles, "rows n h w rgb -> 1 (rows h) (n w) rgb")
        strips.append(_pad(strip, text_height, 0)[0])
    height, width = tiles.shape[2:4]
    with _mosaic_figure(path, torch.cat(strips), title, left=left, bottom=0) as axes:
        top = 0
        for block, strip in zip(blocks, strips, strict=True):
            for row, name in enumerate(block.names):
                axes.text(
                    -_GAP, top + (row + 0.5) * height - _GAP / 2, name, ha="right", va="center"
                )
            below = top + len(block.names) * height
            axes.text(-_GAP, below, block.heading, ha="right", va="top")
            for column, (caption, wrong) in enumerate(
                zip(block.captions, block.wrong, strict=True)
            ):
                place = ((column + 0.5) * width - _GAP / 2, below)
                colour = _WRONG if wrong else "black"
                text = axes.text(*place, caption, color=colour, ha="center", va="top")
                _shrink_to(width, text)
            top += len(strip)


def plot_grids(
    images: Tensor, reconstructions: Tensor, rows: Sequence[str], path: str | Path, title: str
) -> None:
    """Draw inputs, (rows, columns, C, H, W), beside their reconstructions; `rows` are names."""
    grids = []
    for part in (images, reconstructions):
        tiles = _pad(_enlarge(part), 2, 2)
        grids.append(rearrange(tiles, "r c h w rgb -> (r h) (c w) rgb"))
    height, width = grids[0].shape[:2]
    heading, gap = 26, 30
    grids = [torch.cat([grid.new_full((heading, width, 3), 255), grid]) for grid in grids]
    between = grids[0].new_full((height + heading, gap, 3), 255)
    mosaic = torch.cat([grids[0], between, grids[1]], dim=1)
    left = 20 + 8 * max(map(len, rows))
    with _mosaic_figure(path, mosaic, title, left=left, bottom=_GAP) as axes:
        for index, name in enumerate(rows):
            y = heading + (index + 0.5) * height / len(rows)
            axes.text(-_GAP, y, name, ha="right", va="center")
        for start, name in ((0, "input"), (width + gap, "reconstruction")):
            axes.text(start + width / 2, heading - 6, name, ha="center", va="bottom")


def plot_failures(
    images: Tensor,
    as_predicted: Tensor,
    as_labelled: Tensor,
    labels: Sequence[int] | Tensor,
    predictions: Sequence[int] | Tensor,
    path: str | Path,
    title: str,
    class_names: Sequence[str],
) -> None:
    """Draw images (N, C, H, W) that were misread over two decoded capsules of each.

    These are the capsules of the predicted and of the true class, as images of the same shape.
    """
    names = ("input", "predicted class,\ndecoded", "true class,\ndecoded")
    captions = [
        "\n".join(class_names[int(index)] for index in pair)
        for pair in zip(predictions, labels, strict=True)
    ]
    rows = torch.stack([images, as_predicted, as_labelled])
    block = _Block(rows, names, captions, [True] * len(images), "predicted\ntrue")
    _plot_blocks([block], path, title, left=140, text_height=58)


def plot_strips(
    strips: Sequence[tuple[str, Tensor, Sequence[str]]], path: str | Path, title: str
) -> None:
    """Draw rows of images, each a name, images (N, C, H, W) and a text below each image."""
    left = 30 + 7 * max(len(name) for name, _, _ in strips)
    blocks = [
        _Block(images.unsqueeze(0), [name], texts, [False] * len(images))
        for name, images, texts in strips
    ]
    _plot_blocks(blocks, path, title, left=left, text_height=16)


@contextmanager
def _chart(
    path: str | Path, height: int, title: str, labels: tuple[str, str], columns: int = 1
) -> Iterator[Axes]:
    """Yield the axes of a chart with these labels of x and y, and a legend of so many columns."""
    with _figure(path, 960, height, title, arrange=True) as figure:
        axes = figure.subplots()
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(alpha=0.3)
        yield axes
        figure.legend(loc="outside lower center", ncols=columns)


def _styles(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Choose a colour and a mark for each; those of a network are the same in every figure."""
    all_styles = list(zip(_PALETTE, _MARKS, strict=True))
    own = dict(zip(TITLES.values(), all_styles, strict=False))
    styles = {name: own[name] for name in names if name in own}
    free = [style for style in all_styles if style not in styles.values()]
    return styles | dict(zip([n for n in names if n not in own], cycle(free), strict=False))


def _spread(shares: Sequence[float]) -> str:
    if len(shares) == 1:
        return f"{100 * shares[0]:.2f} %"
    return f"{100 * mean(shares):.2f} ± {100 * stdev(shares):.2f} %"


def _coloured(block: Overlapped) -> Tensor:
    """Return the seven rows of pictures of `plot_overlapped`, (7, N, 3, H, W), in [0, 1]."""
    # A class that was found stands in the place of its original.
    crossed = (block.predictions == block.labels.flip(1)).any(dim=1)
    swap = crossed[:, None, None, None, None]
    decoded = block.reconstructions.where(~swap, block.reconstructions.flip(1))
    rows = [block.overlays.float().mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)]
    for pair in (block.originals, decoded):
        grey = pair.float().clamp(0, 1).mean(dim=2, keepdim=True)
        first = grey[:, 0] * torch.tensor(_FIRST)[:, None, None]
        second = grey[:, 1] * torch.tensor(_SECOND)[:, None, None]
        rows += [first, second, (first + second).clamp(max=1)]
    return torch.stack(rows)
