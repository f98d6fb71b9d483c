"""Find patterns in sets of points without labels: object capsules alone, without images.

    python examples/constellations.py --dry-run           # try it, in seconds
    python examples/constellations.py                     # one seed
    python examples/constellations.py --seeds 3

The experiment of Kosiorek, Sabour, Teh, Hinton: Stacked Capsule Autoencoders (2019), section 3.1. A
constellation has up to eleven points: two squares and a triangle, each there with probability 1/2,
under a rotation, scaling and translation of its own. The points come in any order. A set
transformer reads them, and each of three object capsules votes for four points. They are trained
without labels. A constellation is explained by as few capsules as it needs: those whose likelihood
is largest after a cost is taken off for each. The segmentation error is the share of points that
are explained by another capsule than the one that fits their pattern best, in each constellation.
The accuracy in the lines of the epochs is the share of constellations without such a point.

New constellations are drawn for every step. Some networks end in a bad explanation. So a seed
starts with three, and the one with the lowest loss after half of the epochs goes on. Repeat the
command to continue where it was stopped. Each start has its directory, see
engine/run_directory.py. Beside the seeds are segmentation.csv and segmentation.json, and
constellations.png, where the colour of a point is the capsule that explains it.
"""

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.drawing import PALETTE, figure
from engine.flags import COUNT, Output, as_dict, check_limit, flag, parse, seeds_flag
from engine.run_directory import open_experiment, write_json, write_summary
from engine.runner import run_program
from engine.runtime import choose_runtime, require
from engine.seeds import train_seed
from engine.tables import mean_and_spread, percent
from engine.tasks import Task
from engine.training import Evaluation, OneCycle, Trainer
from tritoncaps.layers import ObjectDecoder, ObjectVotes, SetTransformer
from tritoncaps.losses import entropy_sparsity, l2_sparsity

SQUARE = ((3.0, 3.0), (1.0, 1.0), (3.0, 1.0), (1.0, 3.0))
TRIANGLE = ((1.0, 2.0), (3.0, 1.0), (3.0, 3.0))
PATTERNS = (SQUARE, TRIANGLE, SQUARE)
OWNER = torch.tensor([k for k, pattern in enumerate(PATTERNS) for _ in pattern])

# Capsules vote for as many points as the largest pattern has.
VOTES = max(map(len, PATTERNS))

# The poses of points in their patterns start this much smaller than those of parts in objects,
# because a pattern is small in its constellation.
SMALL = 0.3

# Until this share of the steps, capsules learn whole patterns. Then they learn which are needed.
SETTLED = 0.45

# Gradients are cut to this length: votes that are exact have large ones.
LARGEST_GRADIENT = 1.0

# Constellations of the test, and in the picture.
TESTED, DRAWN = 2000, 12


@dataclass(frozen=True)
class Recipe:
    """What the result depends on. See docs/scae.md for what was tried."""

    epochs: int = flag(20, "epochs, of --steps each", **COUNT)
    steps: int = flag(1000, "steps of an epoch", **COUNT)
    starts: int = flag(
        3, "networks of a seed, of which the best goes on after half of the epochs", **COUNT
    )
    batch_size: int = flag(64, "constellations per step", **COUNT)
    lr: float = flag(2e-3, "highest learning rate of Adam, in one cycle")
    dim: int = flag(64, "components inside the set transformer", **COUNT)
    blocks: int = flag(4, "blocks of the set transformer", **COUNT)
    frequencies: int = flag(
        3, "sines and cosines of each coordinate, of doubling frequency", metavar="N"
    )
    deformation: float = flag(100.0, "weight of the deformation of patterns", metavar="W")
    capsule_cost: float = flag(
        5.0, "how much a capsule must add to the log-likelihood to explain something", metavar="C"
    )
    prior_within: float = flag(0.0, "weight of the l2 sparsity of an example", metavar="W")
    prior_between: float = flag(0.01, "weight of the l2 sparsity between examples", metavar="W")
    posterior_within: float = flag(8.0, "highest weight of the entropy of an example", metavar="W")
    posterior_between: float = flag(2.0, "how much more the entropy of a batch weighs", metavar="W")
    seeds: int = seeds_flag()


# -- the data


class Points(NamedTuple):
    """Constellations: `points` (B, N, 2), `presence` (B, N) and `pattern` (B, N), of each point."""

    points: Tensor
    presence: Tensor
    pattern: Tensor


def draw_constellations(count: int, generator: torch.Generator) -> Points:
    """Draw constellations.

    A pattern is turned by up to 90° either way, enlarged to 1 .. 4 times its size s, and moved by
    up to 24/s. All coordinates lie in [−1, 1]. This is the distribution of the authors' code, which
    scales each batch to the interval instead.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    K = len(PATTERNS)
    angle = math.pi * (uniform(count, K, 1) - 0.5)
    scale = 1 + 3 * uniform(count, K, 1)
    shift = 24 * uniform(count, K, 2) / scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    drawn = []
    for k, pattern in enumerate(PATTERNS):
        x, y = torch.tensor(pattern).T
        moved = torch.stack([x * cos[:, k] - y * sin[:, k], x * sin[:, k] + y * cos[:, k]], dim=2)
        drawn.append(moved + shift[:, k, None])
    # From −12, a corner that is enlarged 4 times and turned by 90°, to 24 + 3√2.
    points = 2 * (torch.cat(drawn, dim=1) + 12) / (36 + 3 * math.sqrt(2)) - 1
    presence = (uniform(count, K) < 0.5).float()[:, OWNER]
    order = uniform(count, len(OWNER)).argsort(dim=1)
    return Points(
        points.gather(1, order[..., None].expand(-1, -1, 2)),
        presence.gather(1, order),
        OWNER.expand(count, -1).gather(1, order),
    )


class Constellations:
    """Batches of new constellations, which depend only on the seed, the epoch and the batch.

    They are laid out as images with a row for each point: x, y and presence are the channels.
    """

    def __init__(self, seed: int, batches: int, batch_size: int) -> None:
        self.seed, self.batches, self.batch_size = seed, batches, batch_size
        self.images: Any = range(batches * batch_size)  # what the trainer counts

    def __len__(self) -> int:
        return self.batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over (constellations (B, 3, N, 1), patterns (B, N)) of an epoch."""
        for batch in range(start, self.batches):
            number = (self.seed * 1_000_003 + epoch) * 1_000_003 + batch
            drawn = draw_constellations(self.batch_size, torch.Generator().manual_seed(number))
            channels = torch.cat([drawn.points, drawn.presence.unsqueeze(2)], dim=2)
            yield channels.mT.unsqueeze(3), drawn.pattern


# -- the network and its loss


class Explained(NamedTuple):
    """What capsules say of points: log p (B,), posterior (B, N, J), their votes, and the points.

    The points are (B, N, 2), their presences (B, N).
    """

    log_prob: Tensor
    posterior: Tensor
    votes: ObjectVotes
    points: Tensor
    presence: Tensor

    def by(self, capsules: Tensor) -> "Explained":
        """Explain the points by these capsules, (B, J), whatever presence they have."""
        # Of 0, a logarithm that is finite.
        logits = torch.where(capsules > 0, 0.0, -1e4).unsqueeze(1).expand_as(self.votes.logits)
        of_capsules = self.votes._replace(logits=logits)
        log_prob, posterior = of_capsules.set_log_prob(self.points, self.presence)
        return self._replace(log_prob=log_prob, posterior=posterior)


class ConstellationNet(nn.Module):
    """A set transformer and three object capsules. Their poses are similarities."""

    def __init__(self, dim: int, blocks: int, frequencies: int) -> None:
        super().__init__()
        J = len(PATTERNS)
        in_dim = 2 + 4 * frequencies
        self.encoder = SetTransformer(in_dim, J, 32, blocks=blocks, heads=4, dim=dim)
        self.decoder = ObjectDecoder(J, 32, VOTES, similarity=True)
        self.frequencies = frequencies
        with torch.no_grad():
            self.decoder.static.mul_(SMALL)

    def forward(self, constellations: Tensor) -> Explained:
        """Explain constellations (B, 3, N, 1)."""
        points, presence = constellations.squeeze(3).mT.split([2, 1], dim=2)
        presence = presence.squeeze(2)
        waves = [math.pi * 2**k * points for k in range(self.frequencies)]
        seen = [points, *(wave.sin() for wave in waves), *(wave.cos() for wave in waves)]
        votes = self.decoder(self.encoder(torch.cat(seen, dim=2), presence))
        # A capsule is there with all its votes: none takes two corners of a square.
        logits = F.logsigmoid(votes.capsule_logits).unsqueeze(1).expand_as(votes.logits)
        votes = votes._replace(logits=logits)
        log_prob, posterior = votes.set_log_prob(points, presence)
        return Explained(log_prob, posterior, votes, points, presence)


@torch.no_grad()
def needed(output: Explained, cost: float) -> Tensor:
    """Return the capsules that explain the points best, less a cost for each, (B, J)."""
    J = output.votes.presence.shape[1]
    choices = torch.tensor([*itertools.product((0.0, 1.0), repeat=J)])
    likelihoods = [
        output.by(choice.expand_as(output.votes.presence)).log_prob for choice in choices
    ]
    scores = torch.stack(likelihoods, dim=1) - cost * choices.sum(dim=1)
    return choices[scores.argmax(dim=1)]


class Explain(Task):
    """The likelihood of the points, and sparse capsules. The answer is a capsule for each point.

    First all capsules learn from all constellations. Then the entropies ask few of them to explain
    each: the weight goes up to `posterior_within` in a quarter of the steps. So each capsule learns
    whole patterns. Then it falls to 1, in a fifth of the steps, so that several patterns have a
    capsule each. From there on, only the capsules that are needed explain a constellation, and
    these learn to be present.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def run(self, model: Any, images: Tensor, target: Any = None) -> Any:
        """Explain constellations. The target is not used."""
        return model(images)

    def loss(self, output: Any, target: Tensor, images: Tensor) -> Tensor:
        """Compute the mean loss of a batch, a scalar."""
        recipe, votes = self.recipe, output.votes
        loss = recipe.deformation * votes.deformation.mean()
        if self.progress() >= SETTLED:
            capsules = needed(output, recipe.capsule_cost)
            present = F.binary_cross_entropy_with_logits(votes.capsule_logits, capsules)
            return loss - output.by(capsules).log_prob.mean() + capsules.shape[1] * present
        posterior = output.posterior * output.presence.unsqueeze(2)
        # On average, 3/2 of the patterns are there, and each is in half of the constellations.
        prior = l2_sparsity(votes.presence, num_classes=2)
        entropy = entropy_sparsity(posterior.sum(dim=1))
        within = self.entropy_weight()
        return (
            loss
            - output.log_prob.mean()
            + recipe.prior_within * prior[0]
            + recipe.prior_between * prior[1]
            + within * entropy[0]
            - (within + recipe.posterior_between) * entropy[1]
        )

    def progress(self) -> float:
        """Return the share of the steps that are done. For a test it is 1."""
        if self.step is None:
            return 1.0
        return self.step / (self.recipe.epochs * self.recipe.steps)

    def entropy_weight(self) -> float:
        """Return the weight of the entropy of an example.

        It rises until a quarter of the steps, and falls to 1 until 45 % of them.
        """
        highest, done = self.recipe.posterior_within, self.progress()
        if done < 0.25:
            return highest * max(done - 0.05, 0.0) / 0.2
        return max(highest * (1 - (done - 0.25) / 0.2), min(1.0, highest))

    def predictions(self, output: Any) -> Tensor:
        """Return the capsule that explains most of each point, (B, N)."""
        chosen = output.by(needed(output, self.recipe.capsule_cost))
        capsules: Tensor = chosen.posterior.argmax(dim=2)
        return capsules

    def correct(self, output: Any, target: Tensor) -> Tensor:
        """Return which constellations are segmented without any error, (B,), bool."""
        right, present = segmented(self.predictions(output), target, output.presence)
        return right == present


def segmented(capsules: Tensor, patterns: Tensor, presence: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many points are right in each constellation, and how many there are, (B,) both.

    Capsules have no names, so in each constellation they are given to the patterns in the order
    that is right most often. All three tensors are (B, N).
    """
    J = len(PATTERNS)
    claimed = F.one_hot(capsules, J) * presence.unsqueeze(2).to(torch.int64)
    table = claimed.mT @ F.one_hot(patterns, J)  # (B, capsules, patterns)
    columns = torch.arange(J, device=table.device)
    orders = torch.tensor([*itertools.permutations(range(J))], device=table.device)
    right = table[:, orders, columns].sum(dim=2).amax(dim=1)
    return right, presence.sum(dim=1).to(torch.int64)


# -- the runs


def main(argv: list[str] | None = None) -> int:
    """Train and measure; returns the exit status of the program."""
    flags = parse(__doc__, argv, Recipe, Output)
    return run_program(
        "constellations", tell, *flags, interrupted="what was saved stays, the same command goes on"
    )


def tell(recipe: Recipe, output: Output) -> None:
    """Train every seed, then draw what the capsules of the first one explain."""
    require("matplotlib")
    weights = "deformation", "capsule_cost", "prior_within", "prior_between"
    check_limit(recipe, ">= 0 and finite", *weights, "posterior_within", "posterior_between")
    # Beyond that, float32 leaves few digits of a wave's phase.
    check_limit(recipe, "in 0 .. 16", "frequencies")
    if output.dry_run:
        recipe = replace(recipe, epochs=1, steps=2, batch_size=8, seeds=1)
    directory = Path(output.output_dir or "runs/constellations")
    shared = {name: value for name, value in as_dict(recipe).items() if name != "seeds"}
    open_experiment(directory, "constellations", shared)
    test = Constellations(seed=0, batches=1, batch_size=16 if output.dry_run else TESTED)
    print(f"results     {directory}", flush=True)
    rows = []
    for seed in range(1, recipe.seeds + 1):
        rows.append(run_seed(seed, recipe, output, directory, test))
        write_summary(directory / "segmentation.csv", rows)
        content = {"experiment": "constellations", "recipe": shared, "rows": rows}
        write_json(directory / "segmentation.json", content)
    error, spread = mean_and_spread([row["segmentation_error"] for row in rows])
    print(f"segmentation error {percent(error, spread)}")
    draw(directory, recipe, output, test)
    print(f"tables, the picture and checkpoints are in {directory}")


def new_trainers(seed: int, recipe: Recipe, output: Output, directory: Path) -> list[Trainer]:
    """Build the networks with which a seed starts, and what trains them."""
    return [
        new_trainer(seed, start, recipe, output, directory / f"start{start}")
        for start in range(1, recipe.starts + 1)
    ]


def new_trainer(seed: int, start: int, recipe: Recipe, output: Output, directory: Path) -> Trainer:
    """Build a network of a seed, and what trains it."""
    torch.manual_seed(number_of(seed, start))
    model = ConstellationNet(recipe.dim, recipe.blocks, recipe.frequencies)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, betas=(0.9, 0.99), fused=True)

    def cut_gradients(*_: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)

    optimizer.register_step_pre_hook(cut_gradients)
    return Trainer(
        model,
        directory,
        task=Explain(recipe),
        optimizer=optimizer,
        schedule=OneCycle(recipe.lr, recipe.epochs * recipe.steps),
        runtime=choose_runtime("cpu", "fp32"),
        args=as_dict(recipe, output),
        config={"model": "constellations", "seed": seed, "start": start},
        test_batch_size=TESTED,
        log_interval=output.log_interval,
        checkpoint_interval=output.checkpoint_interval,
    )


def run_seed(
    seed: int, recipe: Recipe, output: Output, directory: Path, test: Constellations
) -> dict[str, Any]:
    """Train a seed, or finish a run that was stopped; returns its row of the table."""
    constellations, patterns = next(test.epoch(0))
    presence = constellations[:, 2, :, 0]

    def measure(split: str, found: Evaluation) -> dict[str, float]:
        right, present = segmented(found.predictions, patterns, presence)
        error = 1 - right.sum().item() / present.sum().item()
        print(f"segmentation error {percent(error)}", flush=True)
        return {"segmentation_error": error}

    trainers = new_trainers(seed, recipe, output, directory / f"seed{seed}")
    for start, trainer in enumerate(trainers, start=1):
        trainer.more_columns = measure
        train = Constellations(number_of(seed, start), recipe.steps, recipe.batch_size)
        train_seed(trainer, train, test, half_way(recipe), output)
    best = best_of(trainers, recipe)
    start = best.config["start"]
    if recipe.starts > 1:
        print(f"seed {seed} goes on with start {start}, which has the lowest loss half-way")
    train = Constellations(number_of(seed, start), recipe.steps, recipe.batch_size)
    row = train_seed(best, train, test, recipe.epochs, output)
    row["seconds"] = sum(epoch["seconds"] for trainer in trainers for epoch in trainer.rows)
    error = best.rows[-1]["segmentation_error"]
    return {"seed": seed, "start": start, "segmentation_error": error, **row}


def number_of(seed: int, start: int) -> int:
    """Return the number that a start's weights and data are drawn from."""
    return seed + 1000 * (start - 1)


def half_way(recipe: Recipe) -> int:
    """Return the epoch after which the best start goes on alone."""
    return (recipe.epochs + 1) // 2


def best_of(trainers: Sequence[Trainer], recipe: Recipe) -> Trainer:
    """Return the start that had the lowest loss half-way. No label and no test has a part in it."""
    return min(trainers, key=lambda trainer: trainer.rows[half_way(recipe) - 1]["train_loss"])


def draw(directory: Path, recipe: Recipe, output: Output, test: Constellations) -> None:
    """Draw test constellations: their patterns as lines, and points coloured by capsule."""
    trainers = new_trainers(1, recipe, output, directory / "seed1")
    for trainer in trainers:
        trainer.resume()
    trainer = best_of(trainers, recipe)
    constellations, patterns = next(test.epoch(0))
    capsules = trainer.task.predictions(trainer.predict(constellations))
    present = constellations[:, 2, :, 0] > 0
    right, _ = segmented(capsules, patterns, present)
    shown = (present.sum(dim=1) > VOTES).nonzero().flatten()[:DRAWN].tolist()
    with figure(directory / "constellations.png", 960, 760, title(recipe)) as drawn:
        grid: Sequence[Any] = drawn.subplots(3, 4).flat
        for axes, index in itertools.zip_longest(grid, shown):
            if index is None:
                axes.set_axis_off()
                continue
            axes.set(xticks=[], yticks=[])
            axes.set_aspect("equal", adjustable="datalim")
            axes.spines[:].set_color("0.8")
            points = int(present[index].sum())
            wrong = points - int(right[index])
            axes.set_title(f"{points} points, {wrong or 'none'} wrong", fontsize=8, color="0.4")
            for k in range(len(PATTERNS)):
                mine = present[index] & (patterns[index] == k)
                corners = hull(constellations[index, :2, mine, 0].T)
                axes.plot(*corners.T.numpy(), color="0.8", lw=1, zorder=1)
            where = constellations[index, :2, present[index], 0]
            colours = [PALETTE[j] for j in capsules[index, present[index]].tolist()]
            axes.scatter(*where.numpy(), c=colours, s=24, zorder=2)


def title(recipe: Recipe) -> str:
    """Say what the picture shows."""
    steps = recipe.epochs * recipe.steps
    return f"Points, coloured by the capsule that explains them ({steps:,} steps, seed 1)"


def hull(points: Tensor) -> Tensor:
    """Order the corners (n, 2) of a convex pattern around their middle, and close the line."""
    if len(points) == 0:
        return points
    x, y = (points - points.mean(dim=0)).T
    order = torch.atan2(y, x).argsort()
    return points[torch.cat([order, order[:1]])]


if __name__ == "__main__":
    sys.exit(main())
