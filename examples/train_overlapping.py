"""Train capsule networks to read two overlapping digits (Figures 14 to 16 of the paper).

    python examples/train_overlapping.py --dry-run                        # try it, in seconds
    python examples/train_overlapping.py                                  # fully coincident, 28×28
    python examples/train_overlapping.py --mode shifted                   # MultiMNIST, 36×36
    python examples/train_overlapping.py --mode shifted --models deep_capsnet --epochs 10

Two images of different classes are laid over each other on the fly, new ones in every epoch, and
their sum is clipped at white. The network sees the sum; the margin loss asks for both classes, and
the decoder draws each of them on its own, to be compared with the original that nobody overlaid.

Two rates are reported: *exact pairs*, of which both classes are found, and *digits* found. The same
command again goes on where it was stopped. Each network has a run directory; beside them stand
pairs.csv and pairs.json, curves.png, and a picture of successes and failures of each network.
"""

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from engine import baseline, experiment_figures
from engine.experiment import Cell, Experiment, Job, percent, run_program
from engine.experiment_figures import Overlapped
from engine.flags import add_machine_flags, add_seeds, add_training_flags, new_parser, positive
from engine.tasks import TwoClasses, TwoClassesLoss, per_class_rate
from engine.trained import Trained, load_trained
from tritoncaps.data import ImageSet, Overlays
from tritoncaps.models import list_models

# How far each image is padded and shifted: the paper's case, and Sabour's MultiMNIST.
MODES = {"coincident": (0, 0), "shifted": (4, 4)}

# The overlays of validation and test are the same for every seed.
FIXED_SEED = 0

# Examples of each kind in a picture.
SHOWN = 9


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = new_parser(__doc__)
    what = parser.add_argument_group("experiment")
    what.add_argument(
        "--mode",
        choices=list(MODES),
        default="coincident",
        help="coincident: no shift, 28×28; shifted: each by up to 4 pixels, 36×36",
    )
    what.add_argument(
        "--models", nargs="+", choices=list_models(), default=list_models(), help="which networks"
    )
    add_seeds(what)
    what.add_argument(
        "--partners",
        type=positive,
        default=1,
        metavar="N",
        help="overlays of each test image in the final test",
    )
    add_training_flags(parser, epochs=30, shifts=False)
    add_machine_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train and test; returns the exit status of the program."""
    return run_program("train_overlapping", tell, parse_arguments(argv))


def tell(args: argparse.Namespace) -> int:
    """Train each network, test it on pairs it never saw, and draw what it makes of them."""
    experiment = Experiment("train_overlapping", args, recipe=["mode"], variant=args.mode)
    cells = [
        Cell(f"{model}-seed{seed}", model, seed)
        for seed in range(1, args.seeds + 1)
        for model in args.models
    ]

    def make_job(cell: Cell) -> Job:
        train, validation = experiment.split(cell.seed)
        batches = overlays(args, train, args.batch_size, cell.seed, shuffle=True)
        model, kwargs = experiment.build(cell, batches.image_shape)
        held_out = None if validation is None else fixed_overlays(args, validation)
        test = fixed_overlays(args, experiment.test_images)
        task = TwoClasses(model.decoder)  # type: ignore[arg-type]
        return Job(model, kwargs, batches, held_out, test, TwoClassesLoss(), task)

    results = experiment.train(cells, make_job)
    if results is None:
        return 130

    # -- the final test: the model that the validation set chose, and as many pairs as asked for
    rows = []
    curves: dict[str, list[list[float]]] = {}
    for result in results:
        trained = load_trained(experiment.directory / result["name"], experiment.runtime)
        measured, examples = measure(experiment, trained)
        rows.append({"mode": args.mode, **result, **measured})
        title = baseline.TITLES[result["model"]]
        curves.setdefault(title, []).append(experiment.curve(result))
        print(
            f"{title}, seed {result['seed']}: exact pairs {percent(measured['exact_pairs'])}, "
            f"digits {percent(measured['digits'])} ({measured['pairs']:,} {args.mode} test pairs)"
        )
        if result["seed"] == 1:
            draw(experiment, result["model"], examples, measured["exact_pairs"])
    experiment.write_table("pairs", rows)
    title = f"Overlapping {experiment.dataset.title}, {args.mode}"
    experiment_figures.plot_model_curves(
        curves, experiment.directory / "curves.png", title, "exact pairs of the test set"
    )
    print(f"tables, pictures and checkpoints are in {experiment.directory}")
    return 0


def overlays(
    args: argparse.Namespace, images: ImageSet, batch_size: int, seed: int, *, shuffle: bool
) -> Overlays:
    """Lay the images of a set over each other, as --mode says."""
    padding, max_shift = MODES[args.mode]
    return Overlays(
        images, batch_size, seed=seed, shuffle=shuffle, padding=padding, max_shift=max_shift
    )


def fixed_overlays(args: argparse.Namespace, images: ImageSet) -> Overlays:
    """Return the overlays of a test, the same ones for every network and seed."""
    return overlays(args, images, args.test_batch_size, FIXED_SEED, shuffle=False)


@torch.inference_mode()
def measure(experiment: Experiment, trained: Trained) -> tuple[dict[str, Any], Overlapped]:
    """Test a network on the overlays of the test set; returns its rates, and some examples.

    The examples are the first ones that it reads right and the first that it does not.
    """
    args = experiment.args
    source = fixed_overlays(args, experiment.test_images)
    task = TwoClasses(trained.model.decoder)  # type: ignore[arg-type]
    predictions, labels, examples = [], [], []
    needed = {True: SHOWN, False: SHOWN}
    for epoch in range(args.partners):
        for images, originals in source.epoch(epoch):
            with experiment.runtime.autocast():
                output = task.run(trained.model, images)
            predicted = task.predictions(output.activations)
            predictions.append(predicted.cpu())
            labels.append(originals.labels.cpu())
            assert output.reconstruction is not None
            batch = Overlapped(
                images, originals.images, output.reconstruction, originals.labels, predicted
            )
            right = task.correct(output.activations, originals)
            for kind in (True, False):
                chosen = (right == kind).nonzero().squeeze(1)[: needed[kind]]
                needed[kind] -= len(chosen)
                examples.append(batch.take(chosen))
    predicted, shown = torch.cat(predictions), torch.cat(labels)
    exact = (predicted == shown).all(dim=1).double().mean().item()
    rates = {"pairs": len(shown), "exact_pairs": exact, "digits": per_class_rate(predicted, shown)}
    return rates, joined(examples)


def joined(parts: list[Overlapped]) -> Overlapped:
    """Join examples of several batches, on the CPU."""

    def join(name: str) -> Tensor:
        return torch.cat([getattr(part, name).cpu() for part in parts])

    names = ("overlays", "originals", "reconstructions", "labels", "predictions")
    return Overlapped(*map(join, names))


def draw(experiment: Experiment, model: str, examples: Overlapped, exact: float) -> None:
    """Draw successes over failures."""
    title = baseline.TITLES[model]
    right = (examples.predictions == examples.labels).all(dim=1)
    blocks = [examples.take(right), examples.take(~right)]
    experiment_figures.plot_overlapped(
        blocks,
        experiment.directory / f"{model}.png",
        f"{title}, {experiment.args.mode} pairs: read right above, wrong below "
        f"({percent(exact)} exact)",
        experiment.dataset.class_names,
    )


if __name__ == "__main__":
    sys.exit(main())
