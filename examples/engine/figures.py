"""The pictures of a training run: curves, reconstructions, perturbed capsules, confusion matrix.

Every function takes plain data and writes one PNG, `path`, with `title` above. Figures are drawn
without pyplot and in matplotlib's default style, whatever the user's settings, so the same input
gives the same bytes. Matplotlib is imported when the first picture is drawn. Images are grey or RGB
tensors (C = 1 or 3), uint8 or floats in [0, 1]. They are enlarged by whole numbers: each pixel
becomes a square.

Example:
    >>> import tempfile, torch
    >>> from engine import figures
    >>> path = tempfile.mkdtemp() + "/confusion.png"
    >>> figures.plot_confusion(torch.tensor([[9, 1], [0, 10]]), path, "Two digits", ["3", "8"])
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from engine.checkpoint import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from numpy import float64
    from numpy.typing import NDArray

DPI = 120
# Colours that colour-blind readers can tell apart.
_SPLITS = {"train": "#0072b2", "validation": "#d55e00"}
_WRONG = "#c00000"
_STYLE = {"font.size": 9, "figure.titlesize": 11}

# Pixels of the figure: an enlarged image, the space between two, the strip for the title.
_TILE = 84
_GAP = 6
_TITLE = 40

_ACCURACY_TICKS = [0, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 100]
_LOSS_TICKS = [step * 10.0**power for power in range(-6, 7) for step in (1, 2, 5)]


def plot_curves(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """Plot accuracy and loss by epoch, for training and validation, and mark the best epoch.

    The best epoch has the highest validation accuracy, and among equals the lowest validation loss.
    The axis of the accuracy is stretched towards 100 %: tenths of a percent show near the top, and
    the early epochs stay in view.

    `rows` are those of summary.csv, one mapping an epoch; values may be text. One that is not
    finite, or a loss beyond 10⁻⁶ to 10⁶, leaves a gap.
    """
    if not rows:
        raise ValueError("plot_curves: there is no epoch to plot")
    epochs = [int(row["epoch"]) for row in rows]
    panels = (
        ("accuracy", "accuracy (%), stretched towards 100", _ACCURACY_TICKS, 100),
        ("loss", "loss", _LOSS_TICKS, 1),
    )
    with _figure(path, 1200, 520, title, arrange=True) as figure:
        accuracy_axes, loss_axes = figure.subplots(1, 2)
        _stretch_axis(accuracy_axes)
        loss_axes.set_yscale("log")
        for axes, (quantity, label, ticks, unit) in zip(figure.axes, panels, strict=True):
            curves = {split: _column(rows, f"{split}_{quantity}", ticks, unit) for split in _SPLITS}
            for split, curve in curves.items():
                axes.plot(epochs, curve, ".-", color=_SPLITS[split], label=split, clip_on=False)
            _set_limits(axes, ticks, [value for curve in curves.values() for value in curve])
            axes.set_ylabel(label)
            _count_epochs(axes, epochs[0], epochs[-1])

        if (best := _best_epoch(rows)) is not None:
            epoch, accuracy = int(best["epoch"]), 100 * float(best["validation_accuracy"])
            label = f"best validation accuracy: {accuracy:.2f} % after epoch {epoch}"
            for axes in figure.axes:
                axes.axvline(epoch, color="0.4", linestyle="--", linewidth=1, label=label)
        handles, labels = accuracy_axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


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
    columns, text_height = min(10, len(images)), 42
    pairs = torch.stack([_enlarge(images), _enlarge(reconstructions)], dim=1)
    pairs = _pad(pairs, 2, 0)  # (N, 2, h, w, 3), with a line between the two
    height, width = pairs.shape[2:4]
    # Blank pairs fill the last strip; below each pair there is room for two lines of text.
    blank = pairs.new_full((-len(pairs) % columns, *pairs.shape[1:]), 255)
    pairs = rearrange(torch.cat([pairs, blank]), "n two h w rgb -> n (two h) w rgb")
    strips = rearrange(_pad(pairs, text_height, _GAP), "(s n) h w rgb -> s h (n w) rgb", n=columns)
    strip_height = strips.shape[1]

    mosaic = rearrange(strips, "s h w rgb -> (s h) w rgb")
    with _mosaic_figure(path, mosaic, title, left=128, bottom=0) as axes:
        from matplotlib.patches import Rectangle

        for top in range(0, len(mosaic), strip_height):
            axes.text(-_GAP, top + height / 2, "input", ha="right", va="center")
            axes.text(-_GAP, top + height * 3 / 2, "reconstruction", ha="right", va="center")
            axes.text(-_GAP, top + height * 2 + 4, "predicted", ha="right", va="top")
        for index, (label, prediction) in enumerate(zip(labels, predictions, strict=True)):
            left, top = index % columns * (width + _GAP), index // columns * strip_height
            name, colour = class_names[int(prediction)], "black"
            if int(label) != int(prediction):
                name, colour = f"{name}\ntrue: {class_names[int(label)]}", _WRONG
                frame = Rectangle((left - 1.5, top - 1.5), width + 3, 2 * height + 3)
                frame.set(fill=False, edgecolor=_WRONG, linewidth=1.5, clip_on=False)
                axes.add_patch(frame)
            x, y = left + width / 2, top + 2 * height + 4
            text = axes.text(x, y, name, color=colour, ha="center", va="top")
            _shrink_to(width, text)


def plot_perturbations(
    images_grid: Tensor, offsets: Sequence[float] | Tensor, path: str | Path, title: str
) -> None:
    """Draw what the decoder makes of a capsule when one of its dimensions is changed.

    `images_grid` (D, steps, C, H, W) has a row for each dimension and a column for each offset.
    """
    tiles = _pad(_enlarge(images_grid), _GAP, _GAP)  # (D, steps, h, w, 3)
    rows, columns, height, width = tiles.shape[:4]
    mosaic = rearrange(tiles, "d steps h w rgb -> (d h) (steps w) rgb")
    with _mosaic_figure(path, mosaic, title, left=64, bottom=52) as axes:
        axes.set_axis_on()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks(
            [column * width + (width - _GAP) / 2 for column in range(columns)],
            [_signed(float(offset)) for offset in offsets],
        )
        axes.set_yticks(
            [row * height + (height - _GAP) / 2 for row in range(rows)],
            [str(row + 1) for row in range(rows)],
        )
        axes.set_xlabel("offset")
        axes.set_ylabel("capsule dimension")


def plot_confusion(
    matrix: Tensor | Sequence[Sequence[int]],
    path: str | Path,
    title: str,
    class_names: Sequence[str],
) -> None:
    """Draw a confusion matrix: counts as numbers, rates within the true class as colours.

    Colours follow the logarithm of the rate, so that one confusion in a thousand is seen beside a
    full diagonal. Empty cells stay white. The title gets the accuracy added. Rows of `matrix`
    (K, K) are true classes, columns predicted ones.
    """
    counts = torch.as_tensor(matrix).cpu()
    total, right = int(counts.sum()), int(counts.diagonal().sum())
    rates = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    size = min(max(560, 56 * len(counts)), 1400)
    cell = size / len(counts)
    title = f"{title}: {right} of {total} right, accuracy {100 * right / max(1, total):.2f} %"
    with _figure(path, size + 260, size + 150, title, arrange=True) as figure:
        from matplotlib.colors import LogNorm

        axes = figure.subplots()
        shown = rates.where(counts > 0, torch.nan)
        image = axes.imshow(shown.numpy(), norm=LogNorm(1e-4, 1, clip=True), cmap="Blues")
        for row, column in counts.nonzero().tolist():
            colour = "white" if rates[row, column] > 0.03 else "black"
            number = f"{int(counts[row, column])}"
            text = axes.text(column, row, number, color=colour, ha="center", va="center")
            _shrink_to(cell - 6, text)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class (%)")
        bar.set_ticks([1e-4, 1e-3, 1e-2, 0.1, 1], labels=["0.01", "0.1", "1", "10", "100"])
        bar.minorticks_off()
        axes.set_yticks(range(len(counts)), class_names)
        axes.set_xticks(range(len(counts)), class_names)
        if max(map(len, class_names)) > 2:
            axes.tick_params("x", rotation=45)
            for name in axes.get_xticklabels():
                name.set(horizontalalignment="right", rotation_mode="anchor")
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")


@contextmanager
def _figure(
    path: str | Path, width: int, height: int, title: str, *, arrange: bool = False
) -> Iterator[Figure]:
    """Yield a figure of so many pixels, and write it to ``path`` when the block ends.

    ``arrange`` lets matplotlib find the places of the axes, below the strip for the title.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'pictures need matplotlib: pip install "tritoncaps[train]"'
        ) from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        canvas = FigureCanvasAgg(figure)
        heading = figure.suptitle(title, y=1 - _TITLE / 2 / height, verticalalignment="center")
        _shrink_to(width - 4 * _GAP, heading)
        if arrange:
            below = (0.0, 0.0, 1.0, 1 - _TITLE / height)
            figure.set_layout_engine("constrained", rect=below, w_pad=0.08, h_pad=0.06)
        yield figure
        with atomic_write(path) as file:
            canvas.print_png(file, metadata={"Software": None})


@contextmanager
def _mosaic_figure(
    path: str | Path, mosaic: Tensor, title: str, left: int, bottom: int
) -> Iterator[Axes]:
    """Yield axes that show a mosaic (h, w, 3) pixel by pixel, with their origin in its upper left.

    ``left`` and ``bottom`` are the margins for text, in pixels.
    """
    height, width = mosaic.shape[:2]
    full_width, full_height = left + width + _GAP, bottom + height + _TITLE
    with _figure(path, full_width, full_height, title) as figure:
        axes = figure.add_axes(
            (left / full_width, bottom / full_height, width / full_width, height / full_height)
        )
        axes.imshow(mosaic.numpy(), interpolation="nearest", extent=(0, width, height, 0))
        axes.set_axis_off()
        yield axes


def _enlarge(images: Tensor) -> Tensor:
    """Return images (..., C, H, W) as enlarged RGB bytes (..., h, w, 3)."""
    pixels = images.detach().cpu()
    if pixels.numel() == 0:
        raise ValueError(f"there are no images to draw (shape {tuple(pixels.shape)})")
    channels, height, width = pixels.shape[-3:]
    if channels not in (1, 3):
        raise ValueError(f"images have C={channels} channels; 1 (grey) or 3 (RGB) can be drawn")
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    scale = max(1, _TILE // max(height, width))
    pixels = pixels.expand(*pixels.shape[:-3], 3, height, width)
    return repeat(pixels, "... rgb h w -> ... (h y) (w x) rgb", y=scale, x=scale)


def _pad(tiles: Tensor, bottom: int, right: int) -> Tensor:
    """Add white space below and to the right of each tile (..., h, w, 3)."""
    return F.pad(tiles, (0, 0, 0, right, 0, bottom), value=255)


def _shrink_to(width: float, text: Text) -> None:
    """Reduce the font of a text until it is no wider than so many pixels."""
    actual = text.get_window_extent().width
    if actual > width:
        text.set_fontsize(float(text.get_fontsize()) * width / actual)


def _signed(offset: float) -> str:
    """Format an offset with its sign; ``-0.00`` and ``+0.00`` become ``0``."""
    text = f"{offset:+.2f}"
    return "0" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _column(
    rows: Sequence[Mapping[str, Any]], name: str, ticks: Sequence[float], unit: float
) -> list[float]:
    """Return one column of the table as numbers, with NaN for those that the axis cannot show."""
    values = [float(row[name]) * unit for row in rows]
    return [value if ticks[0] <= value <= ticks[-1] else math.nan for value in values]


def _best_epoch(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the row that model selection chooses, or None where every accuracy is NaN."""

    def quality(row: Mapping[str, Any]) -> tuple[float, float]:
        loss = float(row["validation_loss"])
        return float(row["validation_accuracy"]), -math.inf if math.isnan(loss) else -loss

    known = [row for row in rows if not math.isnan(float(row["validation_accuracy"]))]
    return max(known, key=quality, default=None)


def _set_limits(axes: Axes, ticks: Sequence[float], values: Sequence[float]) -> None:
    """Let the axis run from the last tick below the values to the first one above."""
    finite = [value for value in values if not math.isnan(value)]
    lower = max((tick for tick in ticks if tick < min(finite, default=1)), default=ticks[0])
    upper = min((tick for tick in ticks if tick > max(finite, default=1)), default=ticks[-1])
    shown = [tick for tick in ticks if lower <= tick <= upper]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.minorticks_off()
    axes.set_ylim(lower, upper)


def _count_epochs(axes: Axes, first: int, last: int) -> None:
    """Let the axis of epochs run from the first to the last, with whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def _stretch_axis(axes: Axes) -> None:
    """Stretch the axis of an accuracy in percent towards 100."""
    axes.set_yscale("function", functions=(_stretch, _unstretch))


def _stretch(percent: NDArray[float64]) -> NDArray[float64]:
    """Map an accuracy to its place on the axis: the logarithm of the error, finite at 100 %."""
    from numpy import log10, maximum

    return -log10(maximum(100.1 - percent, 1e-9))


def _unstretch(place: NDArray[float64]) -> NDArray[float64]:
    """Invert ``_stretch``."""
    return 100.1 - 10.0**-place
