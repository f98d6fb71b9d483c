"""The two networks that the page runs: one reads a digit, the other draws a capsule."""

from typing import cast

import torch
from torch import Tensor, nn

from tritoncaps.layers import ReconstructionDecoder
from tritoncaps.models import CapsuleOutput, EfficientCapsNet

# Keeps a division by the length of a vector finite where it is 0.
_TINY = 1e-6


class Reader(nn.Module):
    """An image to activations, capsules, and what each primary capsule saw of the answer.

    A primary capsule is a weighted sum over a 9×9 grid of features, and a class capsule is a sum of
    matrix products of them, before it is squashed. For a given coupling both are linear. So the
    length of the answer is a sum with one term for each primary capsule and each place of the grid.
    The terms of an empty image are subtracted. What is left is the effect of the ink.
    """

    blank: Tensor

    def __init__(self, model: EfficientCapsNet) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            blank = model.features(torch.zeros(1, *model.image_shape))
        self.register_buffer("blank", blank)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Read images, (B, 1, 28, 28).

        Returns:
            `activations` (B, K), `poses` (B, K, D), and `shares` (B, I, 9, 9): how much each
            primary capsule and each place add to the length of the longest class capsule.
        """
        model = self.model
        output: CapsuleOutput = model(images, return_coupling=True)
        coupling = cast(Tensor, output.coupling)
        features = model.features(images)
        places = (features - self.blank) * model.primary.weight[:, 0]
        places = places.unflatten(1, (model.routing.in_capsules, model.routing.in_dim))
        maps = model.primary(features).flatten(1).unflatten(1, places.shape[1:3])
        length = maps.norm(dim=-1)
        # The squash keeps the direction of a primary capsule, so it only scales all its places.
        scale = (1 - torch.exp(-length)) / (length + _TINY)

        classes = torch.arange(output.activations.shape[1])
        longest = (output.activations.argmax(dim=1, keepdim=True) == classes).to(images.dtype)
        pose = torch.einsum("bjd,bj->bd", output.poses, longest)
        direction = pose / (pose.norm(dim=-1, keepdim=True) + _TINY)
        weight = torch.einsum("ipjd,bj->bipd", model.routing.weight, longest)
        effect = torch.einsum("bipd,bd->bip", weight, direction)
        coupled = torch.einsum("bij,bj->bi", coupling, longest)
        shares = torch.einsum("bipyx,bip,bi->biyx", places, effect, scale * coupled)
        return {"activations": output.activations, "poses": output.poses, "shares": shares}


class Drawer(nn.Module):
    """One class capsule to the image that it stands for."""

    def __init__(self, decoder: ReconstructionDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, pose: Tensor, digit: Tensor) -> dict[str, Tensor]:
        """Draw capsules, (B, D), of the classes that are 1 in `digit`, (B, K)."""
        poses = pose[:, None] * digit[:, :, None]
        return {"image": self.decoder(poses, digit)}
