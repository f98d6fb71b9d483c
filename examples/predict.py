"""Read digits from image files with a trained network.

    python examples/predict.py seven.png photo.jpg
    python examples/predict.py --model runs/NAME digits/*.png     # a run of train_mnist.py
    python examples/predict.py --model hf-hub:OWNER/NAME seven.png

Each picture shows one digit, dark on bright or bright on dark. It is made like an image of MNIST
(see `tritoncaps.data.prepare_digit`). A network that was trained on other images gets them resized.
What cannot be read is named, the others are read, and the exit status is 2.

predictions.png shows what the network saw, over what it decodes from the capsule of its answer, in
rows of up to 16 images.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from engine.flags import flag, parse
from engine.runtime import choose_runtime, require
from tritoncaps._files import CheckpointError, atomic_write
from tritoncaps.data import DatasetError, read_digit, to_float
from tritoncaps.data.image_pixels import read_image, read_images
from tritoncaps.models import CapsuleOutput, PretrainedCfg, load_model

# The data sets whose images are made as `read_digit` makes them.
_DIGITS = ("mnist", "digits")
_NAMES_OF_DIGITS = tuple("0123456789")
_ENLARGED = 4
_MOST_IN_A_ROW = 16


@dataclass(frozen=True)
class Predict:
    """What is read, and by which network."""

    images: list[str] = flag(..., "image files", nargs="+", metavar="IMAGE")
    model: str = flag(
        "efficient_capsnet",
        "a pretrained model, a run directory, a weight file or hf-hub:OWNER/NAME",
        metavar="MODEL",
    )
    picture: str = flag("predictions.png", "where the picture goes", metavar="FILE")
    device: str = flag("cpu", "cpu, cuda, cuda:1, mps, ...")


def main(argv: list[str] | None = None) -> int:
    """Predict; returns the exit status of the program."""
    (what,) = parse(__doc__, argv, Predict)
    try:
        return predict(what)
    except (DatasetError, CheckpointError, ValueError, OSError, ModuleNotFoundError) as error:
        print(f"predict.py: error: {error}", file=sys.stderr)
        return 2


@torch.inference_mode()
def predict(what: Predict) -> int:
    """Read the images, print what they show, draw what the network decodes; returns the status."""
    require("PIL")
    device = choose_runtime(what.device).device
    picture = Path(what.picture)
    if picture.suffix.lower() != ".png":
        raise ValueError(f"--picture {what.picture!r} must end in .png")
    if picture.resolve() in {Path(path).resolve() for path in what.images}:
        raise ValueError(f"--picture {what.picture} would replace an image: give another name")
    model = load_model(what.model, device=device)
    cfg = model.pretrained_cfg
    assert isinstance(cfg, PretrainedCfg)
    if cfg.num_classes is None:
        raise ValueError(f"--model {what.model}: {cfg.model} has no classes to answer with")
    images: dict[str, Tensor] = {}
    for path in what.images:
        try:
            images[path] = read(path, cfg)
        except DatasetError as error:
            print(f"predict.py: error: {error}", file=sys.stderr)
    if not images:
        return 2
    seen = torch.stack(list(images.values()))
    output: CapsuleOutput = model(seen.to(device))
    if not output.activations.isfinite().all():
        raise ValueError(f"--model {what.model} answers with numbers that are not finite")
    names = cfg.class_names or tuple(map(str, range(cfg.num_classes)))
    width = max(map(len, images))
    for path, activations in zip(images, output.activations.cpu(), strict=True):
        values, classes = activations.sort(descending=True)
        answers = [f"{names[k]} ({value:.3f})" for k, value in zip(classes, values, strict=True)]
        second = f", then {answers[1]}" if len(answers) > 1 else ""
        print(f"{path:<{width}}  {answers[0]}{second}")
    if output.reconstruction is None:
        print("the model has no decoder, so there is no picture")
    else:
        draw(seen, output.reconstruction.cpu(), picture)
        print(f"{picture}: what the network saw, over what it decodes from its answer")
    return 0 if images.keys() == set(what.images) else 2


def read(path: str, cfg: PretrainedCfg) -> Tensor:
    """Read an image as the network takes it, (C, H, W).

    Raises:
        DatasetError: it cannot be read, or has colours and the network sees none.
        ValueError: the network takes images of neither one nor three channels.
    """
    assert cfg.input_size is not None
    channels, height, width = cfg.input_size
    if channels not in (1, 3):
        raise ValueError(f"the network takes images of {channels} channels; files have 1 or 3")
    reads_digits = cfg.dataset in _DIGITS
    if not cfg.dataset and cfg.num_classes == len(_NAMES_OF_DIGITS):
        reads_digits = cfg.class_names in ((), _NAMES_OF_DIGITS)
    if reads_digits and cfg.input_size == (1, 28, 28):
        return read_digit(path)
    read_image(Path(path))  # its errors name the file
    pixels = read_images([Path(path)], (height, width), Path(path).parent)[0]
    if len(pixels) > channels:
        raise DatasetError(f"{path} has colours, and the network sees grey images: convert it")
    return to_float(pixels).expand(channels, height, width)


def draw(images: Tensor, decoded: Tensor, path: Path) -> None:
    """Draw each image, (N, C, H, W), over its reconstruction, in rows."""
    from PIL import Image

    tiles = nn.functional.pad(torch.stack([images, decoded], dim=1), (0, 1, 0, 1), value=1.0)
    rows = math.ceil(len(tiles) / _MOST_IN_A_ROW)
    tiles = nn.utils.rnn.pad_sequence(
        list(tiles.tensor_split(rows)), batch_first=True, padding_value=1.0
    )
    pixels = rearrange(tiles, "r n two c h w -> (r two h) (n w) c")
    pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.expand(-1, -1, 3).contiguous()
    height, width = pixels.shape[:2]
    picture = Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist()))
    picture = picture.resize((width * _ENLARGED, height * _ENLARGED), Image.Resampling.NEAREST)
    with atomic_write(path) as file:
        picture.save(file, format="PNG")


if __name__ == "__main__":
    sys.exit(main())
