"""Measure how routings start, by size and by depth, and draw docs/figures/initialisation.png.

    python tools/initialisation.py               # tables and picture, two minutes on one core
    python tools/initialisation.py --learn       # also 100 Adam steps at some sizes, ten minutes

For a size, `before` is σ = J/√(I·D), which makes the first sums 1 long, and `after` is the rule of
`tritoncaps/layers/_initialisation.py`. For a depth, `after` is `calibrate`. Inputs are random
directions of length 0.85. All weights come from seed 0.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from engine.drawing import figure, line_styles  # noqa: E402
from tritoncaps import RoutedCapsules, ops  # noqa: E402
from tritoncaps.layers import calibrate, capsule_lengths  # noqa: E402
from tritoncaps.layers._initialisation import routing_weight_std  # noqa: E402

PICTURE = ROOT / "docs" / "figures" / "initialisation.png"
OUTPUTS = (1, 2, 10, 26, 43, 100, 200, 1000)
DIMENSIONS = (2, 8, 16, 64)
INPUTS = (10, 288, 1152)
DRAWN = (10, 288)
# The lengths at the start do not depend on it: û = W u is a random vector, whatever P is.
IN_DIM = 2
BATCH = 4
# The numbers in the prediction vectors of one image.
LARGEST = 8_000_000
DEPTHS = range(1, 11)
# I, P, J, D
LEARNT = [(10, 16, 43, 16), (64, 8, 10, 2), (64, 8, 10, 64), (64, 2, 43, 16), (64, 64, 43, 16),
          (288, 8, 43, 16), (1152, 8, 100, 16)]  # fmt: skip


class Start(NamedTuple):
    """A layer before its first step."""

    length: float
    longest: float
    loss: float
    gradient: float


def first_rule(inputs: int, out_capsules: int, out_dim: int) -> float:
    """Return σ for first sums of length 1."""
    return out_capsules / math.sqrt(inputs * out_dim)


def start(sizes: tuple[int, int, int], sigma: float, *, prior: bool = False) -> Start:
    """Measure a routing (I, J, D); a random prior is drawn from a normal distribution."""
    I, J, D = sizes
    torch.manual_seed(0)
    u = 0.85 * F.normalize(torch.randn(BATCH, I, IN_DIM), dim=-1)
    weight = sigma * torch.randn(I, IN_DIM, J, D)
    weight.requires_grad_()
    logits = torch.randn(I, J) if prior else None
    lengths = capsule_lengths(ops.fused_dynamic_routing(u, weight, prior=logits))
    loss = ops.margin_loss(lengths, torch.arange(BATCH) % J)
    (gradient,) = torch.autograd.grad(loss, weight)
    longest = lengths.max().item()
    return Start(lengths.mean().item(), longest, loss.item(), gradient.norm().item())


def grid() -> Iterator[tuple[tuple[int, int, int], bool, Start, Start]]:
    """Yield sizes, whether there is a random prior, and the start before and after."""
    for prior in (False, True):
        for J in OUTPUTS:
            for D in DIMENSIONS:
                for I in INPUTS:
                    if I * J * D <= LARGEST:
                        sizes = (I, J, D)
                        before = start(sizes, first_rule(*sizes), prior=prior)
                        yield (
                            sizes,
                            prior,
                            before,
                            start(sizes, routing_weight_std(*sizes), prior=prior),
                        )


def stack_lengths(depth: int, stem: bool, *, calibrated: bool) -> list[float]:
    """Return the mean length after each routing of a stack, 128 → 10 → … → 10 capsules.

    The stem is a convolution with torch's own initialisation, cut into capsules and squashed.
    """
    torch.manual_seed(0)
    layers = [RoutedCapsules(128, 8, 10, 16)]
    layers += [RoutedCapsules(10, 16, 10, 16) for _ in range(depth - 1)]
    model = nn.Sequential(*layers)
    x = torch.rand(32, 1, 16, 16)
    if stem:
        model.insert(0, Capsules(nn.Conv2d(1, 64, 9, 2)))
    else:
        x = 0.85 * F.normalize(torch.randn(32, 128, 8), dim=-1)
    if calibrated:
        calibrate(model, x)
    lengths = []
    for layer in model:
        x = layer(x)
        if isinstance(layer, RoutedCapsules):
            lengths.append(capsule_lengths(x).mean().item())
    return lengths


class Capsules(nn.Module):
    """A convolution whose channels are cut into squashed capsules of 8."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, images: Tensor) -> Tensor:
        """Return capsules, (B, C, H, W) → (B, I, 8)."""
        return ops.squash(self.convolution(images).flatten(1).unflatten(1, (-1, 8)))


def learn(sizes: tuple[int, int, int, int], sigma: float) -> float:
    """Train a routing (I, P, J, D) on J noisy patterns for 100 steps; return the last accuracy."""
    I, P, J, D = sizes
    torch.manual_seed(0)
    layer = RoutedCapsules(I, P, J, D)
    nn.init.normal_(layer.weight, std=sigma)
    patterns = torch.randn(J, I, P)
    optimizer = torch.optim.Adam(layer.parameters())
    correct: list[float] = []
    for _ in range(100):
        labels = torch.randint(J, (32,))
        u = ops.squash(patterns[labels] + 0.3 * torch.randn(32, I, P))
        lengths = capsule_lengths(layer(u))
        loss = ops.margin_loss(lengths, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        correct.append((lengths.argmax(dim=1) == labels).float().mean().item())
    return sum(correct[-5:]) / 5


def draw(
    by_outputs: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    by_depth: Mapping[str, Sequence[float]],
    path: Path,
) -> None:
    """Draw mean lengths by the number of outputs, and by the layer of a stack."""
    with figure(path, 1200, 560, "Mean length of the output capsules before training") as drawn:
        left, right = drawn.subplots(1, 2)
        styles = line_styles(by_outputs)
        for name, (outputs, lengths) in by_outputs.items():
            left.plot(outputs, lengths, label=name, markersize=5, **styles[name])
        styles = line_styles(by_depth)
        for name, lengths in by_depth.items():
            x = range(1, len(lengths) + 1)
            # Underflow ends a line: 0 has no logarithm.
            right.plot(x, [length or math.nan for length in lengths], label=name, **styles[name])
        left.set(xscale="log", xlabel="output capsules, of 16 components")
        left.set_title("One routing, before and after the rule", fontsize=9)
        left.axhspan(0.8, 1, color="0.9", zorder=0)
        left.text(1, 0.8, "saturated", color="0.4", va="bottom")
        right.set(xlabel="number of the routing")
        right.set_title("Ten in series, 10 capsules of 16, before and after calibrate", fontsize=9)
        for axes, lowest, side in ((left, 1e-4, "left"), (right, 1e-12, "right")):
            axes.set(yscale="log", ylabel="mean length", ylim=(lowest, 2))
            axes.axhspan(lowest, 1e-3, color="0.9", zorder=0)
            axes.text(1, 2 * lowest, "dead", color="0.4")
            axes.grid(alpha=0.3)
            axes.legend(loc=f"center {side}", fontsize=8)


def main() -> None:
    """Print the tables and draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--learn", action="store_true", help="also train at some sizes")
    parser.add_argument("--output", type=Path, default=PICTURE, help="where the picture goes")
    flags = parser.parse_args()
    torch.set_num_threads(1)

    by_outputs: dict[str, tuple[list[int], list[float]]] = {}
    print("| inputs | outputs | D | prior | mean length | longest | loss | gradient |")
    print("| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for (I, J, D), prior, before, after in grid():
        cells = [f"{a:.2g} → {b:.2g}" for a, b in zip(before, after, strict=True)]
        print(
            f"| {I} | {J} | {D} | {'random' if prior else ''} | {' | '.join(cells)} |", flush=True
        )
        if D == 16 and not prior and I in DRAWN:
            for when, measured in (("before", before), ("after", after)):
                x, y = by_outputs.setdefault(f"{when}, {I} inputs", ([], []))
                x.append(J)
                y.append(measured.length)

    by_depth = {}
    print("\n| stack of ten | " + " | ".join(map(str, DEPTHS)) + " |")
    print("| --- |" + " ---: |" * len(DEPTHS))
    for stem in (False, True):
        for calibrated in (False, True):
            name = f"{'after' if calibrated else 'before'}, {'convolution' if stem else 'capsules'}"
            by_depth[name] = stack_lengths(len(DEPTHS), stem, calibrated=calibrated)
            print(f"| {name} | " + " | ".join(f"{x:.2g}" for x in by_depth[name]) + " |")

    if flags.learn:
        print("\n| I, P, J, D | before (%) | after (%) |\n| --- | ---: | ---: |")
        for sizes in LEARNT:
            I, _, J, D = sizes
            rules = (first_rule(I, J, D), routing_weight_std(I, J, D))
            cells = [f"{100 * learn(sizes, sigma):.0f}" for sigma in rules]
            print(f"| {', '.join(map(str, sizes))} | {' | '.join(cells)} |", flush=True)
    draw(by_outputs, by_depth, flags.output)
    print(f"\nwrote {flags.output}")


if __name__ == "__main__":
    main()
