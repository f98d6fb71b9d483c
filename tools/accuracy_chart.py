"""Set accuracy on MNIST against size: docs/figures/accuracy.png, and the table beside it.

    python -m tools.accuracy_chart

docs/accuracy.json has one line for each network: its parameters without the decoder, the accuracy
in percent, and whether it was "measured" here or "published" elsewhere. The picture sets the
two apart. The table goes between the marks in docs/reproduction.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from engine.drawing import PALETTE, figure, stretch_axis  # noqa: E402
from tritoncaps._files import atomic_write  # noqa: E402

RESULTS, PAGE = ROOT / "docs" / "accuracy.json", ROOT / "docs" / "reproduction.md"
PICTURE = ROOT / "docs" / "figures" / "accuracy.png"
BEGIN, END = "<!-- accuracy:begin -->\n", "<!-- accuracy:end -->\n"
KINDS = {"measured": "measured here", "published": "published elsewhere"}
TICKS = (99.0, 99.2, 99.4, 99.6, 99.7, 99.8)

Rows = Sequence[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture and write the table; returns the exit status of the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=PICTURE, help="where the picture goes")
    options = parser.parse_args(argv)
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw(rows, options.output)
    page = with_table(PAGE.read_text(encoding="utf-8"), rows)
    with atomic_write(PAGE) as file:
        file.write(page.encode())
    print(f"{options.output} and the table in {PAGE}")
    return 0


def draw(rows: Rows, path: Path) -> None:
    """Draw a point for each network: full where it was measured, hollow where it is quoted."""
    with figure(path, 960, 560, "Accuracy on MNIST against size") as drawn:
        axes = drawn.subplots()
        stretch_axis(axes)
        for kind, label in KINDS.items():
            own = [row for row in rows if row["kind"] == kind]
            colour = PALETTE[0] if kind == "measured" else "0.45"
            axes.plot(
                [row["parameters"] for row in own],
                [row["accuracy"] for row in own],
                "o",
                color=colour,
                markerfacecolor=colour if kind == "measured" else "none",
                label=label,
            )
            for row in own:
                is_left = row.get("side") == "left"
                axes.annotate(
                    row["network"],
                    (row["parameters"], row["accuracy"]),
                    xytext=(-7 if is_left else 7, 0),
                    textcoords="offset points",
                    ha="right" if is_left else "left",
                    va="center",
                    color=colour,
                    fontsize=8,
                )
        axes.set(xscale="log", xlim=(1e5, 1e8), ylim=(TICKS[0], TICKS[-1]))
        axes.set(xlabel="parameters without the decoder", ylabel="% of the test images")
        axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")


def with_table(page: str, rows: Rows) -> str:
    """Return the page with the table of these rows between the marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    lines = ["| network | parameters | accuracy | | source |", "| --- | ---: | ---: | --- | --- |"]
    for row in rows:
        kind = KINDS[row["kind"]] + (f": {row['how']}" if row["how"] else "")
        lines.append(
            f"| {row['network']} | {row['parameters']:,} | {row['accuracy']:.2f} % | {kind} "
            f"| {row['source']} |"
        )
    return f"{before}{BEGIN}\n{chr(10).join(lines)}\n\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
