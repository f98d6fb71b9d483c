"""Train on some viewpoints and test on others: capsule networks against a CNN of their size.

    python examples/viewpoints.py --dry-run                              # try it, in seconds
    python examples/viewpoints.py --epochs 10                            # rendered solids, on a CPU
    python examples/viewpoints.py --view elevation --epochs 10
    python examples/viewpoints.py --dataset smallnorb --epochs 50 --seeds 3

The experiment of Hinton, Sabour, Frosst: Matrix Capsules with EM Routing (2018). The networks are
trained on a third of the azimuths, or on the three lowest elevations. They are tested on other
objects, from these familiar viewpoints and from all others, the novel ones. A better network is
better on both. So networks are compared where they are equal on the familiar ones: each at the
epoch whose familiar accuracy is nearest to the best one of the weakest network. The novel images
choose nothing.

It uses smallNORB, cut to 32×32, if its files are below --data-dir, and otherwise solids that it
renders. The tables of a run call the familiar test images "validation" and the novel ones
"test". Repeat the command to continue where it was stopped. Beside the runs are runs.csv and
runs.json (a row per run), matched.csv and matched.json (the comparison), views.csv and views.json
(accuracy by viewpoint), viewpoints.png and images.png.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from torch import Tensor

from engine import figures
from engine.baseline import CNN, TITLES, like, list_networks
from engine.figures import Panel
from engine.flags import Machine, Output, Recipe, flag, models_flag, seeds_flag
from engine.runner import Experiment, Job, run_experiment
from engine.tables import averages, grouped, mean_and_spread, percent
from engine.training import Evaluation
from tritoncaps.data import ViewSet, familiar_and_novel
from tritoncaps.data.load import has_files
from tritoncaps.data.views import FAMILIAR

# The data sets that know their viewpoints.
DATASETS = ("smallnorb", "rendered-solids")

# Viewpoints in a picture, at most.
COLUMNS = 9

# If familiar accuracies differ by more, a warning says so.
LIKE = 0.01

# What is compared, and what a table says of the origin of its numbers.
ACCURACIES = ("familiar_accuracy", "novel_error")
ORIGIN = ("seconds_per_epoch", "device", "threads", "precision", "commit")

Row = Mapping[str, Any]
Epochs = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Views:
    """What is compared."""

    models: list[str] = models_flag(("matrix_capsnet", CNN), list_networks())
    view: str = flag("azimuth", "what is novel in the test", choices=list(FAMILIAR))
    familiar: list[int] | None = flag(
        None,
        "the viewpoints to train on, in degrees (default: "
        + ", ".join(f"{view} {' '.join(map(str, known))}" for view, known in FAMILIAR.items())
        + ")",
        nargs="+",
        type=int,
        metavar="DEGREES",
    )
    seeds: int = seeds_flag()


@dataclass(frozen=True)
class ViewRecipe(Recipe):
    """A recipe for images with viewpoints. --model-kwargs are for the capsule networks."""

    dataset: str = flag(
        "auto",
        "auto: smallNORB if it is there, else rendered solids",
        choices=["auto", *DATASETS],
    )


def main(argv: list[str] | None = None) -> int:
    """Train and compare; returns the exit status of the program."""
    left_out = ("model", "seed", "validation_fraction", "image_size")
    options = {"validation_fraction": 0.0}
    groups = (Views, ViewRecipe)
    return run_experiment("viewpoints", __doc__, tell, argv, *groups, leave_out=left_out, **options)


def tell(views: Views, recipe: ViewRecipe, machine: Machine, output: Output) -> None:
    """Train every network with every seed, then compare them at equal familiar accuracy."""
    if recipe.dataset == "auto":
        present = has_files("smallnorb", machine.data_dir)
        recipe = replace(recipe, dataset=DATASETS[0] if present else DATASETS[1])
    experiment = Experiment("viewpoints", recipe, machine, output, views)
    train, test = experiment.train_images, experiment.test_images
    assert isinstance(train, ViewSet) and isinstance(test, ViewSet)
    familiar = list(views.familiar or FAMILIAR[views.view])
    try:
        seen, _ = familiar_and_novel(train, views.view, familiar)
        known, novel = familiar_and_novel(test, views.view, familiar)
    except ValueError as refused:
        raise ValueError(f"--familiar {' '.join(map(str, familiar))}: {refused}") from refused
    given = experiment.recipe.model_kwargs
    experiment.open(views.view, view=views.view, familiar=familiar, model_kwargs=given)
    print(f"views       {len(known):,} test images familiar, {len(novel):,} novel")

    def measure(split: str, found: Evaluation) -> dict[str, float]:
        part = known if split == "validation" else novel
        right = (found.predictions == part.labels.cpu()).double()
        angles = part.view(views.view).cpu()
        return {str(angle): right[angles == angle].mean().item() for angle in distinct(angles)}

    def make_job(recipe: Recipe) -> Job:
        job = experiment.classification(recipe, seen)
        return replace(job, validation=known, test=novel, more_columns=measure)

    # Seed by seed, so that a comparison that is stopped early has all networks.
    kwargs = sized(views.models, experiment)
    recipes = {
        f"{model}-seed{seed}": replace(
            experiment.recipe, model=model, seed=seed, model_kwargs=kwargs[model]
        )
        for seed in range(1, views.seeds + 1)
        for model in views.models
    }
    results = experiment.run(recipes, make_job)

    epochs = {result["name"]: experiment.epochs_of(result) for result in results}
    rows = matched(results, epochs)
    experiment.write_table("runs", rows)
    compared = averages(rows, ("model",), ACCURACIES, kept=("parameters",))
    experiment.write_table("matched", compared)
    for row in compared:
        accuracy, error = (percent(row[name], row[f"{name}_spread"]) for name in ACCURACIES)
        print(
            f"{TITLES[row['model']]:<17} {row['parameters']:>9,} parameters: at "
            f"{accuracy} of the familiar views, {error} wrong of the novel ones"
        )
    levels = [row["familiar_accuracy"] for row in compared]
    if max(levels) - min(levels) > LIKE:
        print("warning: familiar accuracies differ, so compare with care", file=sys.stderr)
    by_angle = angle_table(rows, epochs, views.view, familiar)
    experiment.write_table("views", by_angle)
    draw(experiment, by_angle, rows, epochs, views.view)
    draw_images(experiment, views.view, familiar)
    print(f"tables, pictures and checkpoints are in {experiment.directory}")


# -- the images


def distinct(angles: Tensor) -> list[int]:
    """Return the different angles, in ascending order."""
    found: list[int] = angles.unique().tolist()
    return found


def sized(models: Sequence[str], experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Return the arguments of each network: the CNN gets the size of the first other one."""
    given = experiment.recipe.model_kwargs
    channels, height, width = experiment.test_images.images.shape[1:]
    from_data = {
        "num_classes": len(experiment.dataset.class_names),
        "in_channels": channels,
        "image_size": (height, width),
    }
    others = [model for model in models if model != CNN]
    cnn = like(others[0], from_data, given) if others else {}
    return {model: cnn if model == CNN else given for model in models}


# -- the comparison


def matched(results: Sequence[Row], epochs: Mapping[str, Epochs]) -> list[dict[str, Any]]:
    """Return a row for each run, at the epoch where the networks of its seed are alike.

    The best familiar accuracy of the weakest network is the level that all are compared at.
    """
    rows = []
    for (seed,), runs in grouped(results, "seed").items():
        best = [max(row["validation_accuracy"] for row in epochs[run["name"]]) for run in runs]
        for run in runs:
            row = min(
                epochs[run["name"]],
                key=lambda row: abs(row["validation_accuracy"] - min(best)),
            )
            rows.append(
                {
                    "name": run["name"],
                    "model": run["model"],
                    "seed": seed,
                    "parameters": run["parameters"],
                    "epochs": run["epochs"],
                    "matched_epoch": int(row["epoch"]),
                    "familiar_accuracy": row["validation_accuracy"],
                    "novel_accuracy": row["test_accuracy"],
                    "novel_error": 1 - row["test_accuracy"],
                    **{name: run[name] for name in ORIGIN},
                }
            )
    return rows


def angle_table(
    rows: Sequence[Row], epochs: Mapping[str, Epochs], view: str, familiar: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the accuracy of each network at each angle, at its matched epochs."""
    table = []
    for (model,), runs in grouped(rows, "model").items():
        found = [epochs[run["name"]][run["matched_epoch"] - 1] for run in runs]
        for angle in sorted(int(name) for name in found[0] if name.isdecimal()):
            accuracy, spread = mean_and_spread([row[str(angle)] for row in found])
            values = {"accuracy": accuracy, "accuracy_spread": spread}
            is_familiar = angle in familiar
            table.append({"model": model, view: angle, "familiar": is_familiar, **values})
    return table


# -- the pictures


def centred(angle: int, view: str) -> int:
    """Count azimuths from -180, so that those around 0 are in the middle."""
    return (angle + 180) % 360 - 180 if view == "azimuth" else angle


def draw(
    experiment: Experiment,
    by_angle: Sequence[Row],
    rows: Sequence[Row],
    epochs: Mapping[str, Epochs],
    view: str,
) -> None:
    """Draw accuracy by viewpoint, and novel accuracy by familiar accuracy."""
    lines = {}
    for (model,), found in grouped(by_angle, "model").items():
        points = sorted((centred(row[view], view), row["accuracy"]) for row in found)
        lines[TITLES[model]] = ([x for x, _ in points], [y for _, y in points])
    angles = next(iter(lines.values()))[0]
    half = min((b - a for a, b in itertools.pairwise(angles)), default=1) / 2
    known = {centred(row[view], view) for row in by_angle if row["familiar"]}
    shaded = [(angle - half, angle + half) for angle in sorted(known)]
    by_epoch = {}
    for (model,), runs in grouped(rows, "model").items():
        both = [
            [mean(row[f"{split}_accuracy"] for row in same) for split in ("validation", "test")]
            for same in zip(*(epochs[run["name"]] for run in runs), strict=True)
        ]
        by_epoch[TITLES[model]] = ([100 * x for x, _ in both], [y for _, y in both])
    figures.plot_panels(
        [
            Panel(
                f"by {view}, at the matched epochs",
                f"{view} (degrees)",
                lines,
                shaded=("familiar", shaded),
            ),
            Panel("novel by familiar, after each epoch", "familiar accuracy (%)", by_epoch),
        ],
        experiment.directory / "viewpoints.png",
        f"{experiment.dataset.title} from novel {view}s",
        "test accuracy",
    )


def draw_images(experiment: Experiment, view: str, familiar: Sequence[int]) -> None:
    """Draw a test object of each class from one viewpoint after the other."""
    images = experiment.test_images
    assert isinstance(images, ViewSet)
    angles = sorted(distinct(images.view(view)), key=lambda angle: centred(angle, view))
    strips = []
    for label, name in enumerate(experiment.dataset.class_names):
        # The first instance, in the first lighting.
        members = sorted(
            (images.labels == label).nonzero().flatten().tolist(),
            key=lambda index: images.views[index].tolist(),
        )
        first = {int(images.view(view)[index]): index for index in reversed(members)}
        shown = [angle for angle in angles[:: -(-len(angles) // COLUMNS)] if angle in first]
        if shown:
            texts = [f"{angle}°{' familiar' if angle in familiar else ''}" for angle in shown]
            chosen = images.subset([first[angle] for angle in shown])
            strips.append((name, chosen.images.cpu(), texts))
    figures.plot_strips(
        strips, experiment.directory / "images.png", f"{experiment.dataset.title} by {view}"
    )


if __name__ == "__main__":
    sys.exit(main())
