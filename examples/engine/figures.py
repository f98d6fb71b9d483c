"""The pictures of the examples: plain data in, one PNG out, with a title.

Shares in 0 .. 1 are shown in percent. drawing.py tells what images may be.

Example:
    >>> import tempfile, torch
    >>> from engine import figures
    >>> path = tempfile.mkdtemp() + "/confusion.png"
    >>> figures.plot_confusion(torch.tensor([[9, 1], [0, 10]]), path, "Two digits", ["3", "8"])
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from engine.drawing import (
    GAP,
    PALETTE,
    Block,
    chart,
    count_epochs,
    draw_blocks,
    enlarged,
    figure,
    line_styles,
    mosaic_figure,
    set_limits,
    shortened,
    shrink_to,
    stretch_axis,
)
from engine.tables import best_epoch, mean_and_spread, percent

_SPLITS = {"train": PALETTE[0], "validation": PALETTE[1]}

_ACCURACY_TICKS = [0, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 100]
# For narrow ranges.
_FINE_TICKS = sorted({*_ACCURACY_TICKS, 10, 30, 60, 85, 97, 98.5, 99.2, 99.6, 99.7})
_LOSS_TICKS = [step * 10.0**power for power in range(-6, 7) for step in (1, 2, 5)]

# The two images of an overlay: where both are white, their colours add up to white.
_FIRST, _SECOND = (1.0, 0.55, 0.0), (0.0, 0.45, 1.0)

# -- one training run


def plot_curves(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """Plot accuracy and loss by epoch, for training and validation, and mark the best epoch.

    The axis of the accuracy is stretched towards 100 %: tenths of a percent show near the top, and
    the early epochs stay in view.

    `rows` are those of summary.csv, one mapping per epoch; values may be text. One that is not
    finite, or a loss beyond 10⁻⁶ to 10⁶, leaves a gap.
    """
    if not rows:
        raise ValueError("plot_curves: there is no epoch to plot")
    epochs = [int(row["epoch"]) for row in rows]
    panels = (
        ("accuracy", "accuracy (%), stretched towards 100", _ACCURACY_TICKS, 100),
        ("loss", "loss", _LOSS_TICKS, 1),
    )
    with figure(path, 1200, 520, title) as drawn:
        accuracy_axes, loss_axes = drawn.subplots(1, 2)
        stretch_axis(accuracy_axes)
        loss_axes.set_yscale("log")
        for axes, (quantity, label, ticks, unit) in zip(drawn.axes, panels, strict=True):
            shown = []
            for split, colour in _SPLITS.items():
                values = [unit * float(row[f"{split}_{quantity}"]) for row in rows]
                curve = [v if ticks[0] <= v <= ticks[-1] else math.nan for v in values]
                axes.plot(epochs, curve, ".-", color=colour, label=split, clip_on=False)
                shown += curve
            set_limits(axes, ticks, shown)
            axes.set_ylabel(label)
            count_epochs(axes, epochs[0], epochs[-1])

        best = best_epoch(rows)
        epoch, accuracy = int(best["epoch"]), float(best["validation_accuracy"])
        if not math.isnan(accuracy):
            label = f"best validation accuracy: {percent(accuracy)} after epoch {epoch}"
            for axes in drawn.axes:
                axes.axvline(epoch, color="0.4", linestyle="--", linewidth=1, label=label)
        handles, labels = accuracy_axes.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def plot_reconstructions(
    images: Tensor,
    reconstructions: Tensor,
    labels: Sequence[int] | Tensor,
    predictions: Sequence[int] | Tensor,
    path: str | Path,
    title: str,
    class_names: Sequence[str],
) -> None:
    """Draw each input over its reconstruction, with the predicted class below; wrong ones framed.

    Both are (N, C, H, W); `labels` and `predictions` are N class indices.
    """
    captions, wrong = [], []
    for label, prediction in zip(labels, predictions, strict=True):
        name, true = class_names[int(prediction)], class_names[int(label)]
        wrong.append(name != true)
        captions.append(f"{name}\ntrue: {true}" if wrong[-1] else name)
    blocks = []
    for start in range(0, max(1, len(images)), 10):
        part = slice(start, start + 10)
        rows = (images[part], reconstructions[part])
        names = ("input", "reconstruction")
        blocks.append(Block(rows, names, captions[part], wrong[part], "predicted"))
    draw_blocks(blocks, path, title, left=128, text_height=42, row_gap=2, frames=True)


def plot_perturbations(
    images_grid: Tensor, offsets: Sequence[float] | Tensor, path: str | Path, title: str
) -> None:
    """Draw what the decoder makes of a capsule when one of its dimensions is changed.

    `images_grid` (D, steps, C, H, W) has a row for each dimension and a column for each offset, in
    standard deviations σ of the dimension.
    """
    tiles = enlarged(images_grid, GAP, GAP)  # (D, steps, h, w, 3)
    rows, columns, height, width = tiles.shape[:4]
    mosaic = rearrange(tiles, "d steps h w rgb -> (d h) (steps w) rgb")
    with mosaic_figure(path, mosaic, title, left=64, bottom=52) as axes:
        axes.set_axis_on()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks(
            [column * width + (width - GAP) / 2 for column in range(columns)],
            [_signed(float(offset)) for offset in offsets],
        )
        axes.set_yticks(
            [row * height + (height - GAP) / 2 for row in range(rows)],
            [str(row + 1) for row in range(rows)],
        )
        axes.set(xlabel="offset in σ", ylabel="capsule dimension")


def _signed(offset: float) -> str:
    """Format an offset with its sign; -0.00 and +0.00 become 0."""
    text = f"{offset:+.2f}"
    return "0" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def plot_routing(
    images: Tensor,
    shares: Tensor,
    logits: Tensor,
    labels: Sequence[int] | Tensor,
    path: str | Path,
    title: str,
    class_names: Sequence[str],
) -> None:
    """Draw which places of an image feed its class, in orange, and which the next best, in blue.

    The class is drawn after each iteration. The first one shares everything evenly. The brightness
    is the root of the share, so a quarter is half as bright as the whole.

    Args:
        images: (N, C, H, W).
        shares: of each image, class and pixel, after each iteration, (T, N, K, H, W).
        logits: (N, K), by which the classes are ranked.
        labels: N class indices.
        path, title, class_names: of the picture.
    """
    best = logits.topk(min(2, logits.shape[1]), dim=1).indices
    everywhere = torch.arange(len(images))
    grey = images.float().mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)

    def tinted(share: Tensor, rank: int) -> Tensor:
        colour = torch.tensor((_FIRST, _SECOND)[rank])[:, None, None]
        return 0.3 * grey + 0.7 * share[everywhere, best[:, rank], None].sqrt() * colour

    rows = [grey, *(tinted(share, 0) for share in shares)]
    names = ["input", *(f"class,\niteration {t}" for t in range(1, len(shares) + 1))]
    if best.shape[1] > 1:
        rows.append(tinted(shares[-1], 1))
        names.append("next best")
    captions = ["\nthen ".join(class_names[label] for label in row) for row in best.tolist()]
    wrong = (best[:, 0] != torch.as_tensor(labels)).tolist()
    block = Block(rows, names, captions, wrong, "predicted")
    draw_blocks([block], path, title, left=96, text_height=42)


def plot_confusion(
    matrix: Tensor | Sequence[Sequence[int]],
    path: str | Path,
    title: str,
    class_names: Sequence[str],
) -> None:
    """Draw a confusion matrix: counts as numbers, rates within the true class as colours.

    Colours follow the logarithm of the rate, so that one confusion in a thousand is seen beside a
    full diagonal. Empty cells stay white. The accuracy is added to the title. Rows of `matrix`
    (K, K) are true classes, columns predicted ones.
    """
    counts = torch.as_tensor(matrix).cpu()
    total, right = int(counts.sum()), int(counts.diagonal().sum())
    rates = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    size = min(max(560, 56 * len(counts)), 1400)
    title = f"{title}: {right} of {total} right, accuracy {percent(right / max(1, total))}"
    with figure(path, size + 260, size + 150, title) as drawn:
        from matplotlib.colors import LogNorm

        axes = drawn.subplots()
        shown = rates.where(counts > 0, torch.nan)
        image = axes.imshow(shown.numpy(), norm=LogNorm(1e-4, 1, clip=True), cmap="Blues")
        for row, column in counts.nonzero().tolist():
            colour = "white" if rates[row, column] > 0.03 else "black"
            number = f"{int(counts[row, column])}"
            text = axes.text(column, row, number, color=colour, ha="center", va="center")
            shrink_to(size / len(counts) - 6, text)
        bar = drawn.colorbar(image, ax=axes, shrink=0.8, label="share of the true class (%)")
        bar.set_ticks([1e-4, 1e-3, 1e-2, 0.1, 1], labels=["0.01", "0.1", "1", "10", "100"])
        bar.minorticks_off()
        names = [shortened(name, 28) for name in class_names]
        font_size = min(9.0, 0.5 * size / len(counts))
        axes.set_yticks(range(len(counts)), names, fontsize=font_size)
        axes.set_xticks(range(len(counts)), names, fontsize=font_size)
        if max(map(len, class_names)) > 2:
            # Slanted names would run into each other where columns are narrow.
            rotation = 45 if len(counts) <= 25 else 90
            axes.tick_params("x", rotation=rotation)
            if rotation == 45:
                for name in axes.get_xticklabels():
                    name.set(horizontalalignment="right", rotation_mode="anchor")
        axes.set(xlabel="predicted", ylabel="true")


# -- experiments


def plot_model_curves(
    curves: Mapping[str, Sequence[Sequence[float]]], path: str | Path, title: str, quantity: str
) -> None:
    """Plot a share by epoch for each network, from its runs: every seed thin, their mean thick.

    The legend gives the highest and the last value, mean ± standard deviation over the seeds. The
    axis is stretched towards 100 %. `quantity` says what the share is of, such as "test accuracy".
    """
    runs = [run for seeds in curves.values() for run in seeds]
    if not runs or not all(runs):
        raise ValueError("plot_model_curves: there is no epoch to plot")
    labels = ("epoch", f"{quantity} (%), stretched towards 100")
    with chart(path, 560 + 22 * len(curves), title, labels) as axes:
        stretch_axis(axes)
        styles = line_styles(curves)
        for name, seeds in curves.items():
            if len(seeds) > 1:
                for run in seeds:
                    values = [100 * value for value in run]
                    colour = styles[name]["color"]
                    axes.plot(_counted(run), values, color=colour, lw=0.7, alpha=0.55)
            # To the end of the shortest run.
            average = [100 * mean(values) for values in zip(*seeds, strict=False)]
            highest = percent(*mean_and_spread([max(run) for run in seeds]))
            last = percent(*mean_and_spread([run[-1] for run in seeds]))
            label = f"{name}: highest {highest}, last {last}"
            style = {**styles[name], "markersize": 4, "lw": 2.2, "clip_on": False}
            axes.plot(_counted(average), average, label=label, **style)
        set_limits(axes, _FINE_TICKS, [100 * value for run in runs for value in run])
        count_epochs(axes, 1, max(map(len, runs)))


def _counted(values: Sequence[float]) -> range:
    return range(1, len(values) + 1)


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
    with figure(path, 300 + 110 * len(columns), 190 + 80 * len(rows), title) as drawn:
        from matplotlib.patches import Rectangle

        axes = drawn.subplots()
        lowest, highest = float(known.min()), float(known.max())
        image = axes.imshow(
            table.numpy(), cmap="cividis", aspect="auto", vmin=lowest, vmax=highest + 1e-9
        )
        for row, shares in enumerate(table.tolist()):
            for column, share in enumerate(shares):
                text, colour = f"{share:.2f}", "black"
                if math.isnan(share):
                    text, colour = "not run", "0.4"
                elif share - lowest < 0.55 * (highest - lowest):
                    colour = "white"
                axes.text(column, row, text, color=colour, ha="center", va="center")
        best_row, best_column = divmod(int(table.nan_to_num(-1).argmax()), len(columns))
        corner = (best_column - 0.5, best_row - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, ec=PALETTE[1], lw=3, clip_on=False))
        axes.set_yticks(range(len(rows)), [str(row) for row in rows])
        axes.set_xticks(range(len(columns)), [str(column) for column in columns])
        axes.set(ylabel=labels[0], xlabel=labels[1])
        bar = drawn.colorbar(image, ax=axes, label=f"{labels[2]} (%)")
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
    with chart(path, 620, title, (labels[0], f"{labels[1]} (%)"), columns=2) as axes:
        ahead = sorted((points[index] for index in front), key=lambda point: point[1])
        others = [point for index, point in enumerate(points) if index not in front]
        line: dict[str, Any] = {"color": PALETTE[1], "marker": "s", "markersize": 8, "lw": 1.5}
        x, y = [point[1] for point in ahead], [100 * point[2] for point in ahead]
        axes.plot(x, y, drawstyle="steps-post", label="Pareto front", zorder=3, **line)
        if others:
            x, y = [point[1] for point in others], [100 * point[2] for point in others]
            axes.plot(x, y, "o", color=PALETTE[0], label="faster and as accurate exists")
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
    share, with its name. `shaded` names ranges of x, (from, to), that stand out.
    """

    title: str
    x_label: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    level: tuple[float, str] | None = None
    shaded: tuple[str, Sequence[tuple[float, float]]] | None = None


def plot_panels(panels: Sequence[Panel], path: str | Path, title: str, quantity: str) -> None:
    """Plot several shares of a `quantity`, three panels in a row, on one scale of 0 to 100 %."""
    if not panels:
        raise ValueError("plot_panels: there is no curve to plot")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with figure(path, 420 * columns + 40, 380 * rows + 90, title) as drawn:
        handles: dict[str, Any] = {}
        for number, panel in enumerate(panels, 1):
            axes = drawn.add_subplot(rows, columns, number)
            styles = line_styles(panel.lines)
            for name, (x, y) in panel.lines.items():
                shares = [100 * share for share in y]
                style = {**styles[name], "markersize": 4, "clip_on": False, "zorder": 3}
                (handles[name],) = axes.plot(x, shares, **style)
            if panel.level is not None:
                share, name = panel.level
                handles[name] = axes.axhline(100 * share, color="0.4", ls="--", lw=1)
            if panel.shaded is not None:
                name, ranges = panel.shaded
                for start, end in ranges:
                    handles[name] = axes.axvspan(start, end, color="0.9", lw=0)
            axes.set_title(panel.title, fontsize=9)
            axes.set(xlabel=panel.x_label, ylabel=f"{quantity} (%)", ylim=(0, 102))
            axes.grid(alpha=0.3)
        legend = {"loc": "outside lower center", "ncols": min(4, len(handles))}
        drawn.legend(handles.values(), handles.keys(), **legend)


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
    with chart(path, 620, title, (labels[0], y_label), columns=len(curves)) as axes:
        stretch_axis(axes)
        axes.set_xscale("log")
        styles = line_styles(curves)
        for name, sizes in curves.items():
            known = sorted(sizes)
            average = [100 * mean(sizes[size]) for size in known]
            style = {**styles[name], "markersize": 5, "lw": 2, "clip_on": False, "zorder": 3}
            axes.plot(known, average, label=name, **style)
            for size in known:
                if len(sizes[size]) > 1:
                    values = [100 * share for share in sizes[size]]
                    colour = styles[name]["color"]
                    axes.plot([size] * len(values), values, "_", color=colour, markersize=9)
        set_limits(axes, _FINE_TICKS, shares)
        all_sizes = sorted({size for sizes in curves.values() for size in sizes})
        axes.set_xticks(all_sizes, [f"{size:,}" for size in all_sizes])
        axes.minorticks_off()


class Overlapped(NamedTuple):
    """Overlapping images with their originals, and what a network made of them.

    `overlays` (N, C, H, W), `originals` and `reconstructions` (N, 2, C, H, W), in [0, 1];
    `labels` and `predictions` (N, 2), each row ascending and distinct.
    """

    overlays: Tensor
    originals: Tensor
    reconstructions: Tensor
    labels: Tensor
    predictions: Tensor

    def take(self, chosen: Tensor) -> "Overlapped":
        """Return those at some positions."""
        return Overlapped(*(part[chosen] for part in self))


def plot_overlapped(
    blocks: Sequence[Overlapped], path: str | Path, title: str, class_names: Sequence[str]
) -> None:
    """Draw overlays over their originals and reconstructions, one colour for each of the two.

    The decoded image of a class that was found has the colour of its original. A class that is not
    in the image takes the place and the colour of one that was missed. `blocks` are rows of
    examples, such as successes and failures; empty ones are left out.
    """
    names = ["input", "first original", "second original", "both"]
    names += ["first decoded", "second decoded", "both"]
    drawn = []
    for block in blocks:
        if len(block.overlays) == 0:
            continue
        captions = []
        for both in zip(block.labels.tolist(), block.predictions.tolist(), strict=True):
            lines = (", ".join(class_names[index] for index in classes) for classes in both)
            captions.append("\n".join(lines))
        wrong = (block.labels != block.predictions).any(dim=1).tolist()
        drawn.append(Block(_coloured(block), names, captions, wrong, "shown\nfound"))
    if not drawn:
        raise ValueError("plot_overlapped: there is no image to draw")
    draw_blocks(drawn, path, title, left=148, text_height=54)


def _coloured(block: Overlapped) -> list[Tensor]:
    """Return the seven rows of pictures of `plot_overlapped`, (N, 3, H, W), in [0, 1]."""
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
    return rows


def plot_grids(
    images: Tensor, reconstructions: Tensor, rows: Sequence[str], path: str | Path, title: str
) -> None:
    """Draw inputs (rows, columns, C, H, W) beside their reconstructions; `rows` are names."""
    heading, gap = 26, 30
    tiles = enlarged(torch.stack([images, reconstructions]), 2, 2)
    grids = rearrange(tiles, "two r c h w rgb -> two (r h) (c w) rgb")
    height, width = grids.shape[1:3]
    grids = F.pad(grids, (0, 0, 0, gap, heading, 0), value=255)
    mosaic = rearrange(grids, "two h w rgb -> h (two w) rgb")[:, :-gap]
    left = 20 + 8 * max(map(len, rows))
    with mosaic_figure(path, mosaic, title, left, bottom=GAP) as axes:
        for index, name in enumerate(rows):
            y = heading + (index + 0.5) * height / len(rows)
            axes.text(-GAP, y, name, ha="right", va="center")
        for start, name in ((0, "input"), (width + gap, "reconstruction")):
            axes.text(start + width / 2, heading - 6, name, ha="center", va="bottom")


def plot_overview(
    images: Tensor,
    decoded: Tensor,
    moved: Tensor,
    class_names: Sequence[str],
    path: str | Path,
    title: str,
) -> None:
    """Draw images (N, C, H, W) over what they decode to, and below a capsule as it is moved.

    `moved` are the images (steps, C, H, W) of a capsule with one dimension moved step by step.
    """
    plain = [False] * max(len(images), len(moved))
    blocks = [
        Block([images, decoded], ["image", "decoded"], class_names, plain[: len(images)], "class"),
        Block([moved], ["one dimension\nmoved"], [""] * len(moved), plain[: len(moved)]),
    ]
    draw_blocks(blocks, path, title, left=140, text_height=26)


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
        f"{class_names[int(prediction)]}\n{class_names[int(label)]}"
        for prediction, label in zip(predictions, labels, strict=True)
    ]
    rows = (images, as_predicted, as_labelled)
    block = Block(rows, names, captions, [True] * len(images), "predicted\ntrue")
    draw_blocks([block], path, title, left=140, text_height=58)


def plot_strips(
    strips: Sequence[tuple[str, Tensor, Sequence[str]]], path: str | Path, title: str
) -> None:
    """Draw rows of images, each a name, images (N, C, H, W) and a text below each image."""
    left = 30 + 7 * max(len(name) for name, _, _ in strips)
    blocks = [
        Block([images], [name], texts, [False] * len(images)) for name, images, texts in strips
    ]
    draw_blocks(blocks, path, title, left, text_height=16)
