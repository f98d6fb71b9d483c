"""What every picture is made of: a figure of a given size, rows of images, and axes.

Figures are drawn without pyplot and in matplotlib's default style, whatever the user's settings, so
the same input gives the same bytes. Matplotlib is imported when the first picture is drawn. Images
are grey or RGB tensors (C = 1 or 3) or stereo pairs (C = 2, of which the first is drawn), uint8 or
floats in [0, 1]. They are enlarged by a whole number: each pixel becomes a square.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from engine.baseline import TITLES
from tritoncaps._files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

# The colours of Okabe and Ito, which colour-blind readers can tell apart. Every line has a marker
# of its own as well, for grey paper.
PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f"]
_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
_WRONG = "#c00000"

_DPI = 120
# In pixels: an enlarged image, the space between two images, the strip for the title.
_TILE = 84
GAP = 6
_TITLE = 40


@contextmanager
def figure(
    path: str | Path, width: int, height: int, title: str, *, arrange: bool = True
) -> Iterator[Figure]:
    """Yield a figure of this size in pixels, and write it to `path` when the block ends.

    `arrange` lets matplotlib place the axes, below the strip for the title.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'pictures need matplotlib: pip install "tritoncaps[train]"'
        ) from None
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A title may hold the name of any folder.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 9, "figure.titlesize": 11})
        drawn = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        canvas = FigureCanvasAgg(drawn)
        heading = drawn.suptitle(title, y=1 - _TITLE / 2 / height, verticalalignment="center")
        shrink_to(width - 4 * GAP, heading)
        if arrange:
            below = (0.0, 0.0, 1.0, 1 - _TITLE / height)
            drawn.set_layout_engine("constrained", rect=below, w_pad=0.08, h_pad=0.06)
        yield drawn
        with atomic_write(path) as file:
            canvas.print_png(file, metadata={"Software": None})


def shrink_to(width: float, text: Text) -> None:
    """Reduce the font of a text until it is at most this many pixels wide."""
    # The width of small letters is not quite proportional to the font, so again until it fits.
    for _ in range(10):
        actual = text.get_window_extent().width
        if actual <= width:
            return
        smaller = float(text.get_fontsize()) * min(width / actual, 0.98)
        text.set_fontsize(max(1.0, smaller))


def shortened(name: str, length: int) -> str:
    """Cut a long name, such as that of a folder, to this many characters."""
    return name if len(name) <= length else f"{name[: length - 1]}\N{HORIZONTAL ELLIPSIS}"


def drawable(class_names: Sequence[str]) -> list[str]:
    """Return the names, with "class 3" in place of one in a script that the font lacks."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    return [
        name if all(ord(character) in known for character in name) else f"class {label}"
        for label, name in enumerate(class_names)
    ]


# -- images


@contextmanager
def mosaic_figure(
    path: str | Path, mosaic: Tensor, title: str, left: int, bottom: int = 0
) -> Iterator[Axes]:
    """Yield axes that show a mosaic (h, w, 3) pixel by pixel, with the origin at its upper left.

    `left` and `bottom` are the margins for text, in pixels.
    """
    height, width = mosaic.shape[:2]
    full_width, full_height = left + width + GAP, bottom + height + _TITLE
    with figure(path, full_width, full_height, title, arrange=False) as drawn:
        axes = drawn.add_axes(
            (left / full_width, bottom / full_height, width / full_width, height / full_height)
        )
        axes.imshow(mosaic.numpy(), interpolation="nearest", extent=(0, width, height, 0))
        axes.set_axis_off()
        yield axes


def enlarged(images: Tensor, bottom: int, right: int) -> Tensor:
    """Return images (..., C, H, W) as enlarged RGB bytes (..., h, w, 3) with white margins."""
    pixels = images.detach().cpu()
    if pixels.numel() == 0:
        raise ValueError(f"there are no images to draw (shape {tuple(pixels.shape)})")
    channels, height, width = pixels.shape[-3:]
    if channels not in (1, 2, 3):
        raise ValueError(
            f"images have C={channels} channels; 1 (grey), 2 (stereo) or 3 (RGB) can be drawn"
        )
    if channels == 2:
        pixels = pixels[..., :1, :, :]
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    scale = max(1, _TILE // max(height, width))
    pixels = pixels.expand(*pixels.shape[:-3], 3, height, width)
    tiles = repeat(pixels, "... rgb h w -> ... (h y) (w x) rgb", y=scale, x=scale)
    return F.pad(tiles, (0, 0, 0, right, 0, bottom), value=255)


@dataclass(frozen=True)
class Block:
    """Rows of images (N, C, H, W), a name beside each row and a caption below each column.

    `heading` stands beside the captions; those of the `wrong` columns are red.
    """

    rows: Sequence[Tensor]
    names: Sequence[str]
    captions: Sequence[str]
    wrong: Sequence[bool]
    heading: str = ""


def draw_blocks(
    blocks: Sequence[Block],
    path: str | Path,
    title: str,
    left: int,
    text_height: int,
    *,
    row_gap: int = GAP,
    frames: bool = False,
) -> None:
    """Draw blocks below each other.

    `left` and `text_height` are the room for names and captions, and `row_gap` is the space between
    two rows, in pixels. `frames` puts a red frame round the wrong columns.
    """
    columns = max(len(row) for block in blocks for row in block.rows)
    strips = []
    for block in blocks:
        tiles = torch.stack([enlarged(row, row_gap, GAP) for row in block.rows])
        height, width = tiles.shape[2:4]
        strip = rearrange(tiles, "rows n h w rgb -> (rows h) (n w) rgb")
        right = columns * width - strip.shape[1]
        strips.append(F.pad(strip, (0, 0, 0, right, 0, text_height), value=255))
    with mosaic_figure(path, torch.cat(strips), title, left) as axes:
        from matplotlib.patches import Rectangle

        top = 0
        for block, strip in zip(blocks, strips, strict=True):
            for row, name in enumerate(block.names):
                y = top + (row + 0.5) * height - row_gap / 2
                axes.text(-GAP, y, name, ha="right", va="center")
            below = top + len(block.names) * height + GAP - row_gap
            axes.text(-GAP, below, block.heading, ha="right", va="top")
            for column, (caption, wrong) in enumerate(
                zip(block.captions, block.wrong, strict=True)
            ):
                x = (column + 0.5) * width - GAP / 2
                colour = _WRONG if wrong else "black"
                lines = "\n".join(shortened(line, 18) for line in caption.splitlines())
                text = axes.text(x, below, lines, color=colour, ha="center", va="top")
                shrink_to(width - GAP, text)
                if wrong and frames:
                    corner = (column * width - 1.5, top - 1.5)
                    size = (width - GAP + 3, len(block.names) * height - row_gap + 3)
                    frame = Rectangle(corner, *size, fill=False, ec=_WRONG, lw=1.5, clip_on=False)
                    axes.add_patch(frame)
            top += len(strip)


# -- lines


@contextmanager
def chart(
    path: str | Path, height: int, title: str, labels: tuple[str, str], columns: int = 1
) -> Iterator[Axes]:
    """Yield the axes of a chart. `labels` name x and y; the legend has this many columns."""
    with figure(path, 960, height, title) as drawn:
        axes = drawn.subplots()
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.grid(alpha=0.3)
        yield axes
        drawn.legend(loc="outside lower center", ncols=columns)


def line_styles(names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Choose a colour and a marker for each name. A network has the same in every picture."""
    every = [
        {"color": colour, "marker": marker}
        for colour, marker in zip(PALETTE, _MARKERS, strict=True)
    ]
    own = {
        name: style for name, style in zip(TITLES.values(), every, strict=False) if name in names
    }
    free = cycle([style for style in every if style not in own.values()])
    return {name: own.get(name) or next(free) for name in names}


def stretch_axis(axes: Axes) -> None:
    """Stretch the axis of an accuracy towards 100 %: by the logarithm of the error."""
    from numpy import log10, maximum

    axes.set_yscale(
        "function",
        functions=(
            # Finite at 100 %.
            lambda percent: -log10(maximum(100.1 - percent, 1e-9)),
            lambda place: 100.1 - 10.0**-place,
        ),
    )


def set_limits(axes: Axes, ticks: Sequence[float], values: Sequence[float]) -> None:
    """Let the axis run from the last tick below the values to the first one above."""
    finite = [value for value in values if not math.isnan(value)]
    lower = max((tick for tick in ticks if tick < min(finite, default=1)), default=ticks[0])
    upper = min((tick for tick in ticks if tick > max(finite, default=1)), default=ticks[-1])
    shown = [tick for tick in ticks if lower <= tick <= upper]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.minorticks_off()
    axes.set_ylim(lower, upper)


def count_epochs(axes: Axes, first: int, last: int) -> None:
    """Let the axis of epochs run from the first to the last, in whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
