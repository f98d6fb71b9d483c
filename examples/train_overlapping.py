"""Train capsule networks to read two overlapping digits (Figures 14 to 16 of the paper).

    python examples/train_overlapping.py --dry-run                        # try it, in seconds
    python examples/train_overlapping.py                                  # fully coincident, 28×28
    python examples/train_overlapping.py --mode shifted                   # MultiMNIST, 36×36
    python examples/train_overlapping.py --mode shifted --models deep_capsnet --epochs 10

Two images of different classes are laid over each other on the fly, new pairs in every epoch, and
their sum is clipped at white. The network sees the sum. The margin loss asks for both classes, and
the decoder draws each of them on its own, to be compared with its original.

Two rates are reported: *exact pairs*, in which both classes are found, and *digits* found. Repeat
the command to continue where it was stopped. Each run has its directory; beside them are pairs.csv
and pairs.json, curves.png, and for each network a picture of successes and failures.
"""

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine import figures
from engine.baseline import PAPER, TITLES, WITH_LOGITS
from engine.figures import Overlapped
from engine.flags import COUNT, Machine, Output, Recipe, flag, models_flag, seeds_flag
from engine.runner import VARIED, Experiment, Job, run_experiment
from engine.tables import grouped, percent
from engine.tasks import TwoClasses, per_class_rate
from engine.trained import Trained, load_trained
from tritoncaps.data import ImageSet, Overlays
from tritoncaps.models import list_models

# How far each image is padded and shifted, in the paper and in Sabour's MultiMNIST.
MODES = {"coincident": (0, 0), "shifted": (4, 4)}

# The overlays of validation and test are the same for every seed.
FIXED_SEED = 0

# Successes and failures in a picture.
SHOWN = 9


@dataclass(frozen=True)
class Pairs:
    """What is trained and tested."""

    mode: str = flag(
        "coincident",
        "coincident: no shift, 28×28; shifted: each by up to 4 pixels, 36×36",
        choices=list(MODES),
    )
    models: list[str] = models_flag(
        PAPER, [name for name in list_models(classifiers=True) if name not in WITH_LOGITS]
    )
    seeds: int = seeds_flag()
    partners: int = flag(1, "overlays of each test image in the final test", **COUNT)


def main(argv: list[str] | None = None) -> int:
    """Train and test; returns the exit status of the program."""
    # Overlays move the originals their own way, and the loss is always that of `TwoClasses`.
    left_out = (*VARIED, "max_shift", "crop", "rotation", "scaling", "loss")
    options = {"epochs": 30, "max_shift": 0, "crop": 0}
    groups = (Pairs, Recipe)
    return run_experiment(
        "train_overlapping", __doc__, tell, argv, *groups, leave_out=left_out, **options
    )


def tell(pairs: Pairs, recipe: Recipe, machine: Machine, output: Output) -> None:
    """Train each network, test it on new pairs, and draw what it makes of them."""
    experiment = Experiment("train_overlapping", recipe, machine, output, pairs)
    experiment.open(pairs.mode, mode=pairs.mode)
    recipes = {
        f"{model}-seed{seed}": replace(experiment.recipe, model=model, seed=seed)
        for seed in range(1, pairs.seeds + 1)
        for model in pairs.models
    }

    def fixed(images: ImageSet) -> Overlays:
        """Lay images over each other for a test: the same for every network and seed."""
        return overlays(pairs.mode, images, machine.test_batch_size, FIXED_SEED, shuffle=False)

    def make_job(recipe: Recipe) -> Job:
        train, held_out = experiment.split(recipe)
        batches = overlays(pairs.mode, train, recipe.batch_size, recipe.seed, shuffle=True)
        model, config = experiment.build(recipe, batches.image_shape)
        task = TwoClasses(model.decoder, recipe.reconstruction_weight)  # type: ignore[arg-type]
        validation = None if held_out is None else fixed(held_out)
        return Job(model, config, task, batches, validation, fixed(experiment.test_images))

    results = experiment.run(recipes, make_job)

    # -- the final test: the model that the validation set chose, and as many pairs as asked for
    rows = []
    for result in results:
        trained = load_trained(experiment.directory / result["name"], experiment.runtime)
        test = fixed(experiment.test_images)
        measured, examples = measure(experiment, trained, test, pairs.partners)
        rows.append({"mode": pairs.mode, **result, **measured})
        print(
            f"{trained.title}, seed {result['seed']}: "
            f"exact pairs {percent(measured['exact_pairs'])}, "
            f"digits {percent(measured['digits'])} ({measured['pairs']:,} {pairs.mode} test pairs)"
        )
        if result["seed"] == 1:
            draw(experiment, trained, examples, f"{pairs.mode} pairs", measured["exact_pairs"])
    experiment.write_table("pairs", rows)
    figures.plot_model_curves(
        {
            TITLES[model]: experiment.curves(runs)
            for (model,), runs in grouped(results, "model").items()
        },
        experiment.directory / "curves.png",
        f"Overlapping {experiment.dataset.title}, {pairs.mode}",
        "exact pairs of the test set",
    )
    print(f"tables, pictures and checkpoints are in {experiment.directory}")


def overlays(mode: str, images: ImageSet, batch_size: int, seed: int, *, shuffle: bool) -> Overlays:
    """Lay the images of a set over each other."""
    padding, max_shift = MODES[mode]
    return Overlays(
        images, batch_size, seed=seed, shuffle=shuffle, padding=padding, max_shift=max_shift
    )


@torch.inference_mode()
def measure(
    experiment: Experiment, trained: Trained, test: Overlays, partners: int
) -> tuple[dict[str, Any], Overlapped]:
    """Test a network on overlays; returns its rates, and the first successes and failures."""
    task = TwoClasses(trained.model.decoder)  # type: ignore[arg-type]
    predictions, labels, examples = [], [], []
    needed = {True: SHOWN, False: SHOWN}
    for epoch in range(partners):
        for images, originals in test.epoch(epoch):
            with experiment.runtime.autocast():
                output = task.run(trained.model, images)
            predicted = task.predictions(output)
            predictions.append(predicted.cpu())
            labels.append(originals.labels.cpu())
            assert output.reconstruction is not None
            batch = Overlapped(
                images, originals.images, output.reconstruction, originals.labels, predicted
            )
            right = task.correct(output, originals)
            for kind in (True, False):
                chosen = (right == kind).nonzero().squeeze(1)[: needed[kind]]
                needed[kind] -= len(chosen)
                examples.append(batch.take(chosen))
    predicted, shown = torch.cat(predictions), torch.cat(labels)
    exact = (predicted == shown).all(dim=1).double().mean().item()
    rates = {"pairs": len(shown), "exact_pairs": exact, "digits": per_class_rate(predicted, shown)}
    return rates, Overlapped(*(torch.cat(parts).cpu() for parts in zip(*examples, strict=True)))


def draw(
    experiment: Experiment, trained: Trained, examples: Overlapped, what: str, exact: float
) -> None:
    """Draw successes over failures."""
    right = (examples.predictions == examples.labels).all(dim=1)
    figures.plot_overlapped(
        [examples.take(right), examples.take(~right)],
        experiment.directory / f"{trained.network}.png",
        f"{trained.title}, {what}: read right above, wrong below ({percent(exact)} exact)",
        experiment.dataset.class_names,
    )


if __name__ == "__main__":
    sys.exit(main())
