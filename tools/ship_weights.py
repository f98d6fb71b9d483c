"""Put the weights of a run into the package: models/weights/, its registry and a model card.

    python -m tools.ship_weights RUN --tag mnist
    python -m tools.ship_weights RUN RUN RUN --tag mnist --description "…" --paper arXiv:2101.12491

A RUN is a directory of examples/train_mnist.py. What ships is the epoch that its validation set
chose, or with --last its last epoch. Of several runs, which differ in the seed alone, the one ships
that then reads most of its validation images, and the card has the mean and deviation of all. All
figures are read from the runs. Commit what is written.
"""

import argparse
import csv
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from engine import checkpoint  # noqa: E402
from engine.flags import Recipe, flag_name  # noqa: E402
from engine.run_directory import BEST, LAST  # noqa: E402
from engine.runner import FROM_DATA  # noqa: E402
from engine.tables import accuracies, best_epoch, mean_and_spread, percent  # noqa: E402
from tritoncaps._files import CheckpointError, atomic_write, read_sealed, write_sealed  # noqa: E402
from tritoncaps.data.registry import REGISTRY  # noqa: E402
from tritoncaps.models import PretrainedCfg, create_model, load_model  # noqa: E402
from tritoncaps.models import _pretrained as shipped  # noqa: E402
from tritoncaps.models._mixin import describe  # noqa: E402

# In bytes. The wheel has to stay small.
LARGEST = {"encoder": 700_000, "decoder": 1_000_000}

# What BatchNorm counts on the way. The optimiser does not train it.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

# What a reader of the card must know about the data.
_LIMITS = {
    "mnist": "It reads single upright digits that were made like those of MNIST: white on black, "
    "in a box of 20×20, centred by mass (`tritoncaps.data.read_digit` makes them so).",
    "digits": "Training and test set come from the same writers, so the accuracy says nothing "
    "about an unknown hand.",
}


@dataclass(frozen=True)
class Run:
    """What a finished run says about itself."""

    directory: Path
    args: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def accuracies(self) -> dict[str, Any]:
        """The accuracies on the test set, in [0, 1]."""
        return accuracies(self.rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Ship; returns the exit status of the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--tag", required=True, help="the weights are MODEL.TAG")
    parser.add_argument("--description", help="one line (default: model and data)")
    parser.add_argument("--paper", nargs="*", default=[], metavar="ID", help="as arXiv:2101.12491")
    parser.add_argument("--license", default="mit", help="of the weights (default: mit)")
    parser.add_argument(
        "--last", action="store_true", help="ship the last epoch, as after one cycle"
    )
    parser.add_argument("--default", action="store_true", help="make it the model's default")
    parser.add_argument("--without-decoder", action="store_true", help="leave the decoder out")
    options = parser.parse_args(argv)
    try:
        ship(options)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"ship_weights: error: {error}", file=sys.stderr)
        return 2
    return 0


def ship(options: argparse.Namespace) -> None:
    """Write the weights, the card and the registry's entry."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", options.tag):
        raise ValueError(
            f"--tag {options.tag!r} becomes a part of file names: use lowercase letters, digits, "
            '"_", "-" and "."'
        )
    runs = [read_run(directory) for directory in options.runs]
    check_alike(runs)
    shipping = choose(runs, options.last)
    directory, found = shipping.directory, shipping.accuracies
    weights, header = read_sealed(directory / BEST)
    epoch, expected = header["epoch"], found["chosen_epoch"]
    if options.last:
        state = checkpoint.load(directory / LAST)
        weights, epoch, expected = state["model"], state["progress"]["epoch"], found["epochs"]
    if epoch != expected:
        raise ValueError(
            f"{directory}: its weights are of epoch {epoch}, by summary.csv it should be {expected}"
        )
    kwargs = dict(header["model_kwargs"])
    if options.without_decoder:
        weights = {key: value for key, value in weights.items() if not key.startswith("decoder.")}
        kwargs["reconstruction"] = False
    weights = {
        key: value.float() if value.is_floating_point() else value for key, value in weights.items()
    }
    sizes = check_sizes(weights)
    with torch.device("meta"):
        arguments = describe("ship_weights", create_model(header["model"], **kwargs)).model_kwargs
    data = header["dataset"]
    title = REGISTRY[data].title if data in REGISTRY else data
    name = f"{header['model']}.{options.tag}"
    cfg = PretrainedCfg(
        model=header["model"],
        model_kwargs=arguments,
        tag=options.tag,
        file=f"{name}.safetensors",
        dataset=data,
        class_names=tuple(header["class_names"]),
        scaling=header["scaling"],
        license=options.license,
        description=options.description or f"{header['model']}, trained on {title}.",
        paper_ids=tuple(options.paper),
    )
    # Through JSON, so that the header of the weights says the same as the registry.
    entry = json.loads(json.dumps(cfg.to_config()))
    folder = shipped.FOLDER
    write_sealed(folder / cfg.file, weights, entry)
    write_text(
        folder / f"{name}.md",
        card(PretrainedCfg.from_config(entry), runs, shipping, title, sizes, options.last),
    )
    entries = {known.name: known.to_config() for known in shipped.registry()}
    entries |= {name: entry}  # keeps its place, or comes last
    if options.default:
        entries = {name: entry} | entries
    write_text(
        folder / shipped.REGISTRY,
        json.dumps([*entries.values()], indent=2, ensure_ascii=False) + "\n",
    )

    model = load_model(folder / cfg.file)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    print(f"{folder / cfg.file}: {(folder / cfg.file).stat().st_size / 1e3:,.0f} kB")
    print(f"{folder / name}.md: its card, to be read once")
    print(f'create_model("{name}", pretrained=True) works here')


def read_run(directory: Path) -> Run:
    """Read the files of a finished run.

    Raises:
        ValueError: it is not finished, or it is no run of train_mnist.py.
    """
    try:
        args = json.loads((directory / "args.json").read_text(encoding="utf-8"))
        with (directory / "summary.csv").open(newline="") as file:
            rows: list[dict[str, Any]] = [
                {key: _number(value) for key, value in row.items() if value}
                for row in csv.DictReader(file)
            ]
        run = Run(directory, args["args"], args["environment"], rows)
        done = rows[-1]["epoch"] if rows else 0
        is_done = done == run.args["epochs"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{directory} is no run of train_mnist.py: {error!r}") from error
    if not is_done:
        raise ValueError(
            f"{directory} has finished {done} of {run.args['epochs']} epochs: go on with --resume"
        )
    if run.accuracies["test_accuracy"] is None:
        raise ValueError(f"{directory}: summary.csv lacks the test accuracy of the chosen epoch")
    return run


def _number(text: str) -> float | int:
    return int(text) if text.isdigit() else float(text)


def check_alike(runs: Sequence[Run]) -> None:
    """Refuse runs that differ in more than the seed, or not even in it."""
    first = runs[0]
    for run in runs[1:]:
        for entry in fields(Recipe):
            before, now = first.args.get(entry.name), run.args.get(entry.name)
            if entry.name != "seed" and before != now:
                raise ValueError(
                    f"{run.directory} was trained with {flag_name(entry.name)} {now} and "
                    f"{first.directory} with {before}: give runs that differ in the seed alone"
                )
    seeds = [run.args["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"two runs have the same seed: {seeds}")


def choose(runs: Sequence[Run], last: bool) -> Run:
    """Return the run that reads most of its validation images in the epoch that ships.

    The loss breaks ties. Without a validation set, it is the first run.
    """
    rows = [run.rows[-1] if last else best_epoch(run.rows) for run in runs]
    if "validation_accuracy" not in rows[0]:
        return runs[0]
    best = best_epoch(rows)
    return next(run for run, row in zip(runs, rows, strict=True) if row is best)


def check_sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the parameters of encoder and decoder, and refuse those that make the wheel large."""
    counts = {"encoder": 0, "decoder": 0}
    for key, value in weights.items():
        if key.rpartition(".")[2] not in _STATISTICS:
            counts["decoder" if key.startswith("decoder.") else "encoder"] += value.numel()
    for part, count in counts.items():
        if 4 * count > LARGEST[part]:
            remedy = ", or give --without-decoder" if part == "decoder" else ""
            raise ValueError(
                f"the {part} has {4 * count / 1e3:,.0f} kB, at most {LARGEST[part] / 1e3:,.0f} kB "
                f"ship: train a smaller one{remedy}"
            )
    return counts


def command(run: Run) -> str:
    """Return the command that trains a run, with every flag that is not a default."""
    args = run.args
    default = Recipe(model=args["model"], dataset=args["dataset"])
    default = default.on(args["dataset"], 0)
    flags = []
    for entry in fields(Recipe):
        value, usual = args.get(entry.name, ...), getattr(default, entry.name)
        if entry.name == "model_kwargs":
            pairs = [f"{k}={v}" for k, v in value.items() if k not in FROM_DATA]
            flags += [flag_name(entry.name), *pairs] if pairs else []
        elif entry.name in ("model", "dataset", "epochs", "seed") or value not in (usual, ...):
            name = flag_name(entry.name)
            if isinstance(value, bool):
                flags.append(name if value else name.replace("--", "--no-", 1))
            else:
                items = value if isinstance(value, list) else [value]
                flags += [name, *map(str, items)]
    precision = ["--precision", run.environment["precision"]]
    return shlex.join(["python", "examples/train_mnist.py", *flags, *precision])


def card(
    cfg: PretrainedCfg,
    runs: Sequence[Run],
    shipping: Run,
    title: str,
    sizes: Mapping[str, int],
    is_last: bool,
) -> str:
    """Return the model card."""
    where = shipping.environment
    taken = timedelta(seconds=round(sum(float(row["seconds"]) for row in shipping.rows)))
    epoch = timedelta(seconds=round(shipping.accuracies["seconds_per_epoch"]))
    resumed = " when last resumed" if shipping.args.get("resume") else ""
    share = f"{100 * shipping.args['validation_fraction']:g} %"
    threads = where["threads"]
    device = where["gpu"] or f"{where['processor']}, {threads} thread{'s'[: threads != 1]}"
    facts = {
        "parameters": f"{sizes['encoder']:,} in the encoder"
        + (f", {sizes['decoder']:,} in the decoder" if sizes["decoder"] else ", no decoder"),
        "input": f"(B, {', '.join(map(str, cfg.input_size or ()))}), {cfg.scaling}",
        "classes": ", ".join(cfg.class_names),
        "data": title,
        "validation": f"{share} of the training images, drawn with the seed",
        "papers": ", ".join(cfg.paper_ids),
        "licence": cfg.license,
    }
    lines = ["---", "library_name: tritoncaps", f"license: {cfg.license}",
             "pipeline_tag: image-classification", "datasets:", f"- {cfg.dataset}", "tags:",
             "- capsule-network", "---", ""]  # fmt: skip
    lines += [f"# {cfg.name}", "", cfg.description, "", "```python"]
    lines += ["from tritoncaps.models import create_model", ""]
    lines += [f'model = create_model("{cfg.name}", pretrained=True)', "```", "", "| | |"]
    lines += ["| --- | --- |", *(f"| {key} | {value} |" for key, value in facts.items() if value)]
    lines += ["", "## Accuracy on the test images", ""]
    lines += ["| seed | epochs | last epoch | epoch chosen by validation |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for run in runs:
        found = run.accuracies
        lines.append(
            f"| {run.args['seed']}{' (this file)' if run is shipping else ''} | {found['epochs']} "
            f"| {percent(found['final_test_accuracy'])} "
            f"| {percent(found['test_accuracy'])} (epoch {found['chosen_epoch']}) |"
        )
    if len(runs) > 1:
        means = (
            percent(*mean_and_spread([run.accuracies[key] for run in runs]))
            for key in ("final_test_accuracy", "test_accuracy")
        )
        lines.append(f"| mean ± standard deviation | | {' | '.join(means)} |")
    held = "the last epoch" if is_last else "the epoch that the validation images chose"
    if len(runs) > 1:
        held += ", of the seed that reads most of its validation images then"
    lines += ["", f"The file holds {held}."]
    lines += ["", "## Training", "", "```sh", command(shipping), "```", ""]
    lines += [f"Commit {where['commit']}{resumed}, torch {where['torch']}, {device}, "
              f"{where['precision']}; {taken} without evaluations, {epoch} for the median "
              "epoch."]  # fmt: skip
    lines += ["", "## Limits", ""]
    if cfg.dataset in _LIMITS:
        lines.append(f"- {_LIMITS[cfg.dataset]}")
    lines += ["- Any image gets an answer. Activations are no probabilities: they need not add up "
              "to 1, and one near 1 is no proof of a digit."]  # fmt: skip
    lines += ["- It was not tested for robustness, fairness or safety: use it for study and as "
              "a start of your own training.", ""]  # fmt: skip
    return "\n".join(lines)


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode())


if __name__ == "__main__":
    sys.exit(main())
