"""Draw the pictures of docs/mathematics.md.

    python -m tools.math_pictures

`squash.svg`: both forms of the squash. `agreement.svg`: votes in the plane, and the coupling after
one, two and three iterations of routing by agreement.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from tritoncaps import ops

matplotlib.use("agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parents[1] / "docs/figures"
# The same file from the same program.
STYLE = {"svg.hashsalt": "tritoncaps", "font.size": 10, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False}
COLOURS = ("#2563c9", "#d9730d")
ITERATIONS = (1, 2, 3)


def main(argv: list[str] | None = None) -> int:
    """Draw both; returns the exit status of the program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder of the pictures")
    folder = parser.parse_args(argv).output
    with plt.rc_context(STYLE):
        save(draw_squash(), folder / "squash.svg")
        save(draw_agreement(), folder / "agreement.svg")
    return 0


def save(figure: plt.Figure, path: Path) -> None:
    """Write a figure without a date."""
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def draw_squash() -> plt.Figure:
    """The length after the squash, over the length before."""
    before = torch.linspace(0, 5, 200)
    figure, axes = plt.subplots(figsize=(5, 2.6))
    after = {
        "quadratic": ops.squash(before[:, None], form="quadratic"),
        "exponential": ops.squash(before[:, None], form="exponential"),
    }
    for (form, lengths), colour in zip(after.items(), COLOURS, strict=True):
        axes.plot(before, lengths[:, 0], color=colour, label=form)
    axes.axhline(1, color="#999999", linewidth=0.8, linestyle=":")
    axes.set(xlabel="length of s", ylabel="length of squash(s)", ylim=(0, 1.05), xlim=(0, 5))
    axes.legend(frameon=False, loc="lower right")
    return figure


def votes() -> Tensor:
    """Votes of 12 input capsules for 2 output capsules, (1, 12, 2, 2).

    For the first output, 8 of them agree. For the second, the other 4 do.
    """
    generator = torch.Generator().manual_seed(3)
    angles = 2 * torch.pi * torch.rand(12, 2, generator=generator)
    angles[:8, 0] = 0.9 + 0.15 * torch.randn(8, generator=generator)
    angles[8:, 1] = 2.4 + 0.15 * torch.randn(4, generator=generator)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None]


def draw_agreement() -> plt.Figure:
    """The votes for each output capsule as dots, as large as their coupling."""
    u_hat = votes()
    figure, grid = plt.subplots(2, len(ITERATIONS), figsize=(7.5, 5), sharex=True, sharey=True)
    for iterations, column in zip(ITERATIONS, grid.T, strict=True):
        v, coupling = ops.dynamic_routing(u_hat, iterations, return_coupling=True)
        column[0].set_title(f"iteration {iterations}")
        for j, (axes, colour) in enumerate(zip(column, COLOURS, strict=True)):
            x, y = u_hat[0, :, j].T
            axes.scatter(x, y, s=160 * coupling[0, :, j], color=colour, alpha=0.45, linewidths=0)
            end = v[0, j].tolist()
            axes.annotate("", xy=end, xytext=(0, 0), arrowprops={"arrowstyle": "-|>", "lw": 1.8})
            axes.text(-1.15, -1.2, f"length {v[0, j].norm():.2f}")
            axes.set(aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_visible(False)
    for j, axes in enumerate(grid[:, 0]):
        axes.set_ylabel(f"votes for output {j + 1}")
    return figure


if __name__ == "__main__":
    sys.exit(main())
