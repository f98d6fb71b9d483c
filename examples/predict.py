"""Read digits from image files with a trained network.

    python examples/predict.py seven.png photo.jpg
    python examples/predict.py --model runs/NAME digits/*.png     # a run of train_mnist.py
    python examples/predict.py --model hf-hub:OWNER/NAME seven.png

Each picture shows one digit, dark on bright or bright on dark. It is made like an image of MNIST
(see `tritoncaps.data.prepare_digit`). A network that was trained on other images gets them resized.

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
from engine.runtime import choose_runtime
from tritoncaps._files import CheckpointError, atomic_write
from tritoncaps.data import DatasetError, read_digit, to_float
from tritoncaps.data.image_pixels import read_image, read_images
from tritoncaps.models import CapsuleOutput, PretrainedCfg, load_model

# The data sets whose images are made as `read_digit` makes them.
_DIGITS = ("mnist", "digits")
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
        predict(what)
    except (DatasetError, CheckpointError, ValueError, OSError, ModuleNotFoundError) as error:
        print(f"predict.py: error: {error}", file=sys.stderr)
        return 2
    return 0


@torch.inference_mode()
def predict(what: Predict) -> None:
    """Read the images, print what they show, and draw what the network decodes."""
    device = choose_runtime(what.device).device
    if Path(what.picture).resolve() in {Path(path).resolve() for path in what.images}:
        raise ValueError(f"--picture {what.picture} would replace an image: give another name")
    model = load_model(what.model, device=device)
    cfg = model.pretrained_cfg
    assert isinstance(cfg, PretrainedCfg)
    images = torch.stack([read(path, cfg) for path in what.images])
    output: CapsuleOutput = model(images.to(device))
    names = cfg.class_names or tuple(map(str, range(output.activations.shape[1])))
    width = max(map(len, what.images))
    for path, activations in zip(what.images, output.activations.cpu(), strict=True):
        values, classes = activations.sort(descending=True)
        answers = [f"{names[k]} ({value:.3f})" for k, value in zip(classes, values, strict=True)]
        second = f", then {answers[1]}" if len(answers) > 1 else ""
        print(f"{path:<{width}}  {answers[0]}{second}")
    if output.reconstruction is None:
        print("the model has no decoder, so there is no picture")
        return
    draw(images, output.reconstruction.cpu(), Path(what.picture))
    print(f"{what.picture}: what the network saw, over what it decodes from its answer")


def read(path: str, cfg: PretrainedCfg) -> Tensor:
    """Read an image as the network takes it, (C, H, W).

    Raises:
        DatasetError: it cannot be read, or has colours and the network sees none.
    """
    assert cfg.input_size is not None
    channels, height, width = cfg.input_size
    if cfg.input_size == (1, 28, 28) and cfg.dataset in ("", *_DIGITS):
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
