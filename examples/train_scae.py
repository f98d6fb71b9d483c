"""Train a stacked capsule autoencoder on images alone, then ask what its capsules know of classes.

    python examples/train_scae.py --dry-run               # try it, in seconds
    python examples/train_scae.py                         # MNIST, on a CPU
    python examples/train_scae.py --size paper            # the authors' size, for a GPU
    python examples/train_scae.py --dataset svhn --size paper

Kosiorek, Sabour, Teh, Hinton: Stacked Capsule Autoencoders (2019), section 3.2. No label reaches
the autoencoder. First its parts learn to draw the images. Then they stay as they are, and its
object capsules learn to explain them. A linear classifier learns beside these, from what they say
of each training image: how present they are, and how many parts they explain. The accuracy in the
lines of the epochs is that of this classifier, so it stays at chance until the objects learn. At
the end, both are asked for the classes on their own:

unsupervised   k-means finds as many clusters as there are classes, in the training images. Each
               cluster is given a class, so that most test images are right. Five times.
linear         a logistic regression from the training images and their labels.

Repeat the command to continue where it was stopped. Each seed has its directory, see
engine/run_directory.py, with curves.png, templates.png, parts.png (which template draws what) and
clusters.png. Its folder scae/ is for `tritoncaps.models.load_model`. Beside the seeds are
classes.csv and classes.json.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn
from torch.nn import functional as F

from engine import figures
from engine.distributed import require_one_process
from engine.drawing import Block, draw_blocks, drawable
from engine.figures import Panel
from engine.flags import (
    COUNT,
    Machine,
    Output,
    as_dict,
    check_max_shift,
    flag,
    parse,
    seeds_flag,
)
from engine.run_directory import open_experiment, write_json, write_summary
from engine.runner import limited, run_program
from engine.runtime import Runtime, choose_runtime, make_deterministic, require
from engine.seeds import train_seed
from engine.tables import mean_and_spread, percent
from engine.tasks import Task
from engine.training import OneCycle, Trainer
from tritoncaps.data import Batches, Dataset, ImageSet, list_datasets, load_dataset, to_float
from tritoncaps.layers import TemplateDecoder
from tritoncaps.losses import StackedCapsuleLoss
from tritoncaps.models import SCAE, SCAEOutput

# What is asked about classes.
FEATURES = ("presence", "explained")

CLUSTERINGS = 5

# Images of a picture.
SHOWN = 12

# The sizes of --size. The authors' pads images of 28×28 to 40×40 and moves them there.
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "parts": 24, "objects": 32, "features": 0, "channels": 64,
        "batch_size": 64, "epochs": 10, "margin": 0, "max_shift": 2, "parts_share": 0.7,
    },
    "paper": {
        "parts": 40, "objects": 32, "features": 16, "channels": 128,
        "batch_size": 128, "epochs": 640, "margin": 6, "max_shift": 6, "parts_share": 0.0,
    },
}  # fmt: skip


def sized(name: str, help: str, **options: Any) -> Any:
    """Declare a flag whose default depends on --size."""
    small, paper = (SIZES[size][name] for size in SIZES)
    help = f"{help} (default: {small}; with --size paper {paper})"
    return flag(None, help, **{"type": type(small), **options})


@dataclass(frozen=True)
class Recipe:
    """What the result depends on. See docs/scae.md for what was tried."""

    dataset: str = flag(
        "auto",
        "auto: MNIST if it is there or can be downloaded, else digits",
        choices=["auto", *(name for name in list_datasets() if name != "folder")],
    )
    limit_train: int | None = flag(None, "use N training images (default: all)", **COUNT)
    limit_test: int | None = flag(None, "use N test images (default: all)", **COUNT)
    size: str = flag("small", "for two CPU cores, or the authors'", choices=list(SIZES))
    margin: int = sized(
        "margin", "black pixels added on every side of the images", metavar="PIXELS"
    )
    max_shift: int = sized(
        "max_shift", "shift each training image by up to this much", metavar="PIXELS"
    )
    parts: int = sized("parts", "templates", **COUNT)
    template_size: int = flag(11, "side of a template", **COUNT)
    features: int = sized(
        "features", "components that describe a part beside its pose", metavar="N"
    )
    channels: int = sized("channels", "maps of each convolution", **COUNT)
    objects: int = sized("objects", "object capsules", **COUNT)
    pixel_scale: float = flag(0.3, "standard deviation of a pixel; 1 in the authors' code")
    epochs: int = sized("epochs", "passes over the training images", **COUNT)
    batch_size: int = sized("batch_size", "images per step", **COUNT)
    lr: float = flag(3e-3, "highest learning rate of Adam, in one cycle for parts and objects each")
    parts_share: float = sized(
        "parts_share",
        "share of the steps in which the parts learn, before the objects; 0: both together",
        metavar="F",
    )
    deformation: float = flag(10.0, "weight of the deformation of objects", metavar="W")
    prior_within: float = flag(2.0, "weight of the l2 sparsity of an image", metavar="W")
    prior_between: float = flag(0.35, "weight of the l2 sparsity between images", metavar="W")
    posterior_within: float = flag(5.0, "weight of the entropy of an image", metavar="W")
    posterior_between: float = flag(6.0, "weight of the entropy of a batch", metavar="W")
    seeds: int = seeds_flag()

    def filled(self) -> "Recipe":
        """Fill in what depends on the size."""
        missing = {k: v for k, v in SIZES[self.size].items() if getattr(self, k) is None}
        return replace(self, **missing)


# -- the network and its loss


class Watched(nn.Module):
    """An autoencoder, and a linear classifier that sees its object capsules and changes nothing.

    Returns what the autoencoder does, and logits, (B, K).
    """

    def __init__(self, autoencoder: SCAE, num_classes: int) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        objects = autoencoder.object_decoder.objects
        self.classifier = nn.Linear(len(FEATURES) * objects, num_classes)

    def forward(self, images: Tensor) -> tuple[SCAEOutput, Tensor]:
        """Explain images (B, C, H, W)."""
        output = self.autoencoder(images)
        return output, self.classifier(described(output).detach())


def described(output: SCAEOutput) -> Tensor:
    """What the object capsules say of images: all of `FEATURES`, (B, 2·J)."""
    return torch.cat([output.activations, output.explained], dim=1)


class Autoencode(Task):
    """The loss of the autoencoder, and the cross entropy of the classifier beside it.

    The parts learn to draw the images in the first `part_steps`. Then they stay as they are, and
    the objects learn to explain them. With 0, both learn together from the first step. A test has
    the whole loss.
    """

    def __init__(self, recipe: Recipe, num_classes: int, part_steps: int = 0) -> None:
        super().__init__()
        self.part_steps = part_steps
        names = "deformation", "prior_within", "prior_between", "posterior_within"
        weights = {name: getattr(recipe, name) for name in (*names, "posterior_between")}
        self.autoencoding = StackedCapsuleLoss(num_classes, **weights)

    def run(self, model: Any, images: Tensor, target: Any = None) -> Any:
        """Explain images. The target is not used."""
        return model(images)

    def loss(self, output: Any, target: Tensor, images: Tensor) -> Tensor:
        """Compute the mean loss of a batch, a scalar."""
        found, logits = output
        image_log_prob = found.image_log_prob
        if self.step is not None and self.part_steps:
            if self.step < self.part_steps:
                return -image_log_prob.mean()
            # No gradient reaches the parts, so Adam leaves them alone.
            image_log_prob = image_log_prob.detach()
        loss = self.autoencoding(
            image_log_prob,
            found.part_log_prob,
            found.activations,
            found.explained,
            found.votes.deformation,
        )
        # The gradients of the two have no parameter in common.
        return loss + F.cross_entropy(logits, target)

    def predictions(self, output: Any) -> Tensor:
        """Return what the object capsules say, (B, 2·J)."""
        return described(output[0])

    def correct(self, output: Any, target: Tensor) -> Tensor:
        """Return which images the linear classifier reads, (B,), bool."""
        right: Tensor = output[1].argmax(dim=1) == target
        return right


@dataclass(frozen=True)
class Cycles(OneCycle):
    """A cycle of the learning rate for the parts, in the first `part_steps`, and then another."""

    part_steps: int = 0

    def __call__(self, step: int, epoch: int) -> float:
        """Return the rate of a step, counted from 0 over the whole run."""
        if step < self.part_steps:
            return OneCycle(self.lr, self.part_steps)(step, epoch)
        return OneCycle(self.lr, self.steps - self.part_steps)(step - self.part_steps, epoch)


def new_model(recipe: Recipe, seed: int, train: ImageSet, num_classes: int) -> Watched:
    """Build the network of a seed. Its background starts with the usual colour of the images."""
    torch.manual_seed(seed)
    channels, *sides = train.images.shape[1:]
    autoencoder = SCAE(
        channels,
        (sides[0], sides[1]),
        parts=recipe.parts,
        template_size=recipe.template_size,
        features=recipe.features,
        objects=recipe.objects,
        channels=(recipe.channels,) * 4,
        pixel_scale=recipe.pixel_scale,
        normalize=True,
    )
    usual = to_float(train.images[:1000]).transpose(0, 1).flatten(1).median(dim=1).values
    with torch.no_grad():
        autoencoder.template_decoder.background.copy_(usual.clamp(0.02, 0.98).logit())
    return Watched(autoencoder, num_classes)


# -- what the capsules know of classes


def unsupervised_accuracy(
    train: Tensor, test: Tensor, labels: Tensor, num_classes: int, seed: int
) -> tuple[float, Tensor]:
    """Cluster the training images; returns how many test images are right, and their classes.

    Args:
        train, test: features of the images, (N, J).
        labels: of the test images. They only name the clusters.
        num_classes: how many clusters to find.
        seed: of k-means.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans

    clustering = KMeans(num_classes, n_init=10, random_state=seed).fit(train.numpy())
    clusters = torch.from_numpy(clustering.predict(test.numpy())).long()
    table = F.one_hot(clusters, num_classes).T @ F.one_hot(labels, num_classes)
    _, names = linear_sum_assignment(table.numpy(), maximize=True)
    classes = torch.from_numpy(names)[clusters]
    return (classes == labels).double().mean().item(), classes


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, labels: Tensor) -> float:
    """Fit a logistic regression to the training images; returns its accuracy on test images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(train.numpy(), train_labels.numpy())
    return float(model.score(test.numpy(), labels.numpy()))


# -- the runs


def main(argv: list[str] | None = None) -> int:
    """Train and measure; returns the exit status of the program."""
    left_out = ("precision", "torchcompile")
    flags = parse(__doc__, argv, Recipe, Machine, Output, leave_out=left_out)
    again = "what was saved stays, the same command goes on"
    return run_program("train_scae", tell, *flags, interrupted=again)


def tell(recipe: Recipe, machine: Machine, output: Output) -> None:
    """Train every seed, then measure and draw what its capsules know."""
    require("matplotlib", "sklearn")
    require_one_process("train_scae")
    recipe = recipe.filled()
    if not 0 <= recipe.parts_share < 1:
        raise ValueError(f"--parts-share {recipe.parts_share} must be at least 0 and below 1")
    if recipe.parts_share and recipe.features > 0:
        raise ValueError(
            f"--parts-share {recipe.parts_share} needs --features 0, got {recipe.features}: "
            "the objects change the features of the parts"
        )
    if machine.deterministic:
        make_deterministic()
    runtime = choose_runtime(machine.device, "fp32")
    dataset = load_dataset(recipe.dataset, machine.data_dir, download=machine.download)
    if output.dry_run:
        recipe = replace(recipe, limit_train=64, limit_test=64, epochs=1, batch_size=16, seeds=1)
    dataset = with_margin(limited(dataset, recipe.limit_train, recipe.limit_test), recipe.margin)
    check_max_shift(recipe.max_shift, *dataset.train.images.shape[2:])
    recipe = replace(recipe, dataset=dataset.name)
    directory = Path(output.output_dir or f"runs/train_scae-{dataset.name}")
    shared = {name: value for name, value in as_dict(recipe).items() if name != "seeds"}
    open_experiment(directory, "train_scae", shared)
    print(f"device      {runtime.describe()}")
    print(f"data        {dataset.note}")
    print(f"            {len(dataset.train):,} to train, {len(dataset.test):,} to test")
    print(f"results     {directory}", flush=True)
    rows = []
    for seed in range(1, recipe.seeds + 1):
        rows.append(run_seed(seed, recipe, machine, output, runtime, dataset, directory))
        write_summary(directory / "classes.csv", rows)
        content = {"experiment": "train_scae", "recipe": shared, "rows": rows}
        write_json(directory / "classes.json", content)
    print(f"tables, pictures and checkpoints are in {directory}")


def with_margin(dataset: Dataset, margin: int) -> Dataset:
    """Add black pixels on every side of the images."""
    if margin < 0:
        raise ValueError(f"--margin {margin} must be >= 0")

    def padded(part: ImageSet) -> ImageSet:
        return replace(part, images=F.pad(part.images, (margin,) * 4))

    return replace(dataset, train=padded(dataset.train), test=padded(dataset.test))


def run_seed(
    seed: int,
    recipe: Recipe,
    machine: Machine,
    output: Output,
    runtime: Runtime,
    dataset: Dataset,
    directory: Path,
) -> dict[str, Any]:
    """Train a seed, or finish a run that was stopped; returns its row of the table."""
    train, test = dataset.train.to(runtime.device), dataset.test.to(runtime.device)
    num_classes = len(dataset.class_names)
    batches = Batches(train, recipe.batch_size, seed=seed, max_shift=recipe.max_shift)
    model = new_model(recipe, seed, train, num_classes)
    steps = recipe.epochs * len(batches)
    part_steps = int(recipe.parts_share * steps)
    trainer = Trainer(
        model,
        directory / f"seed{seed}",
        task=Autoencode(recipe, num_classes, part_steps),
        optimizer=torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=True),
        schedule=Cycles(recipe.lr, steps, part_steps),
        runtime=runtime,
        args=as_dict(recipe, machine, output),
        config={"model": "train_scae", "seed": seed, "dataset": dataset.name},
        test_batch_size=machine.test_batch_size,
        log_interval=output.log_interval,
        checkpoint_interval=output.checkpoint_interval,
    )
    if part_steps:
        first = part_steps / len(batches)
        print(f"parts learn for {first:.4g} of {recipe.epochs} epochs, then objects", flush=True)
    row = train_seed(trainer, batches, test, recipe.epochs, output)
    network = trainer.directory / "scae"
    model.autoencoder.save_pretrained(network)
    print(f"network     {network}, for tritoncaps.models.load_model")
    measured, classes = measure(trainer, train, test, num_classes)
    draw(trainer, model.autoencoder, dataset, classes, f"seed {seed}, {dataset.title}")
    return {"seed": seed, **measured, **row}


def measure(
    trainer: Trainer, train: ImageSet, test: ImageSet, num_classes: int
) -> tuple[dict[str, Any], Tensor]:
    """Ask what the object capsules know of classes.

    Returns figures, and the class of each test image by the first clustering of presences, (N,).
    """
    known, asked = (trainer.evaluate(part).predictions.chunk(2, dim=1) for part in (train, test))
    labels, train_labels = test.labels.cpu(), train.labels.cpu()
    row: dict[str, Any] = {}
    classes = []
    for name, features, tested in zip(FEATURES, known, asked, strict=True):
        clusterings = [
            unsupervised_accuracy(features, tested, labels, num_classes, seed)
            for seed in range(CLUSTERINGS)
        ]
        accuracy, spread = mean_and_spread([right for right, _ in clusterings])
        classes.append(clusterings[0][1])
        linear = linear_accuracy(features, train_labels, tested, labels)
        row[f"unsupervised_{name}"] = accuracy
        row[f"unsupervised_{name}_spread"] = spread
        row[f"linear_{name}"] = linear
        print(
            f"by {name:<10} unsupervised {percent(accuracy, spread)}, linear {percent(linear)}",
            flush=True,
        )
    return row, classes[0]


# -- the pictures


def draw(
    trainer: Trainer, autoencoder: SCAE, dataset: Dataset, classes: Tensor, title: str
) -> None:
    """Draw the curves, the templates, which of them draws what, and the clusters."""
    directory = trainer.directory
    draw_curves(trainer, title)
    draw_templates(
        autoencoder.template_decoder, directory / "templates.png", f"Templates ({title})"
    )
    images = to_float(dataset.test.images[:SHOWN])
    output, _ = trainer.predict(images.to(trainer.runtime.device))
    parts = coloured_parts(autoencoder, output).cpu()
    names = drawable(dataset.class_names)
    captions = [names[label] for label in dataset.test.labels[:SHOWN].tolist()]
    rows = [as_rgb(images), as_rgb(output.reconstruction.cpu()), parts]
    block = Block(rows, ("image", "reconstruction", "templates"), captions, [False] * len(images))
    heading = f"Test images, and the templates that draw them ({title})"
    draw_blocks([block], directory / "parts.png", heading, left=128, text_height=26)
    draw_clusters(dataset, names, classes, directory / "clusters.png", title)


def draw_curves(trainer: Trainer, title: str) -> None:
    """Draw the accuracy of the linear classifier by epoch."""
    epochs = [row["epoch"] for row in trainer.rows]
    splits = ("train", "test")
    lines = {
        split: (epochs, [row[f"{split}_accuracy"] for row in trainer.rows]) for split in splits
    }
    figures.plot_panels(
        [Panel("from what object capsules say", "epoch", lines)],
        trainer.directory / "curves.png",
        f"The linear classifier ({title})",
        "accuracy",
    )


def draw_templates(decoder: TemplateDecoder, path: Path, title: str) -> None:
    """Draw each template as it lies on the background, and in its colour."""
    opacity, rest = decoder.opacity.detach(), F.softplus(decoder.background_opacity.detach())
    share = (opacity - rest).sigmoid()
    colour = share * decoder.templates.detach()
    background = decoder.background.detach().sigmoid()[:, None, None]
    alone = as_rgb(colour + (1 - share) * background).cpu()
    in_colour = colours_of(len(alone))[..., None, None] * colour.mean(dim=1, keepdim=True).cpu()
    blocks = [
        Block(
            [part[start : start + SHOWN] for part in (alone, in_colour)],
            ("template", "its colour"),
            [str(i) for i in range(start, min(start + SHOWN, len(alone)))],
            [False] * len(alone[start : start + SHOWN]),
        )
        for start in range(0, len(alone), SHOWN)
    ]
    draw_blocks(blocks, path, title, left=80, text_height=26)


def draw_clusters(
    dataset: Dataset, names: Sequence[str], classes: Tensor, path: Path, title: str
) -> None:
    """Draw the first test images of each cluster; those of another class have red captions."""
    blocks = []
    for label, name in enumerate(names):
        found = dataset.test.subset((classes == label).nonzero()[:SHOWN, 0])
        if len(found):
            labels = found.labels.tolist()
            captions = [names[true] for true in labels]
            wrong = [true != label for true in labels]
            blocks.append(Block([found.images], [f"cluster {name}"], captions, wrong))
    heading = f"Test images, clustered by their object capsules; other classes in red ({title})"
    draw_blocks(blocks, path, heading, left=30 + 7 * max(map(len, names)) + 50, text_height=26)


def colours_of(parts: int) -> Tensor:
    """A colour for each part, (I, 3): the hues of a circle, two brightnesses in turn."""
    from matplotlib.colors import hsv_to_rgb

    hues = torch.arange(parts) / max(parts, 1)
    values = 1 - 0.35 * (torch.arange(parts) % 2)
    hsv = torch.stack([hues, torch.full_like(hues, 0.85), values], dim=1)
    return torch.from_numpy(hsv_to_rgb(hsv.numpy())).float()


def as_rgb(images: Tensor) -> Tensor:
    """Images (..., C, H, W) with the first channel three times, or the three that they have."""
    first = images[..., :1, :, :]
    return images if images.shape[-3] == 3 else torch.cat([first] * 3, dim=-3)


@torch.inference_mode()
def coloured_parts(model: SCAE, output: SCAEOutput) -> Tensor:
    """Draw images with each template in its colour, (B, 3, H, W)."""
    poses, presence, features = output.parts
    decoder = model.template_decoder
    drawn = decoder(poses, presence, features if decoder.features else None)
    shares = drawn.log_weights.exp() * drawn.means.mean(dim=2, keepdim=True)
    colours = colours_of(decoder.parts).to(shares)
    return einsum(shares[:, :-1, 0], colours, "b i h w, i c -> b c h w").clamp(0, 1)


if __name__ == "__main__":
    sys.exit(main())
