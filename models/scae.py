"""Stacked capsule autoencoder: parts of an image, and objects that explain the parts. No labels.

Kosiorek, Sabour, Teh, Hinton: Stacked Capsule Autoencoders (2019). The defaults are those of the
authors' code for MNIST on a canvas of 40×40, with 3,535,827 parameters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from tritoncaps._checks import check_flag, check_size
from tritoncaps.layers import (
    ObjectDecoder,
    ObjectVotes,
    PartEncoder,
    Parts,
    SetTransformer,
    TemplateDecoder,
)
from tritoncaps.layers.parts import check_pixel_scale
from tritoncaps.models._mixin import PretrainedMixin
from tritoncaps.models._parts import check_images, image_sides


class SCAEOutput(NamedTuple):
    """What a stacked capsule autoencoder returns for images (B, C, H, W).

    `activations` (B, J): how present each object capsule is, in [0, 1].
    `explained` (B, J): how many of the parts each object capsule explains. This and `activations`
    are what an image is clustered or classified by.
    `reconstruction` (B, C, H, W): the image drawn from its parts.
    `parts`: poses (B, I, 2, 3), presence (B, I) and features (B, I, F).
    `votes`: what the object capsules predict about the parts. See `ObjectVotes`.
    `posterior` (B, I, J): the share of each part that each object capsule explains.
    `image_log_prob` (B,): log-likelihood of the image under its parts.
    `part_log_prob` (B,): log-likelihood of the parts' poses under the votes.
    """

    activations: Tensor
    explained: Tensor
    reconstruction: Tensor
    parts: Parts
    votes: ObjectVotes
    posterior: Tensor
    image_log_prob: Tensor
    part_log_prob: Tensor


# torch.export writes an output by the name of its type.
_register_namedtuple(SCAEOutput, serialized_type_name="tritoncaps.SCAEOutput")


class SCAE(PretrainedMixin, nn.Module):
    """The autoencoder of Kosiorek 2019, for images of any size.

    A part encoder finds the pose and the presence of each of I parts. Templates draw the image from
    them. A set transformer encodes the parts, and each of J object capsules votes for the pose of
    each part. `tritoncaps.losses.StackedCapsuleLoss` makes a loss of the two likelihoods and of how
    sparse the object capsules are. No gradient of the second likelihood reaches the poses, the
    presences or the templates. It does reach the features of the parts, as in the authors' code.

    Args:
        in_channels: channels of the images, C.
        image_size: side of square images, or (height, width). At least 23 by default.
        parts: part capsules, and templates, I.
        template_size: side of a template, or (height, width).
        features: components that describe a part beside its pose, F. With 0, templates have the
            same colours in every image.
        pixel_scale: standard deviation of a pixel about the colour of its template, from 1e-6 to
            1e6. With a small one, a few templates draw each pixel, and an image has few of them.
        objects: object capsules, J.
        channels, strides: of the convolutions of the part encoder.
        attention_dim, attention_heads, attention_blocks: of the set transformer.
        encoding_dim: components of what it says about each object capsule.
        params, hidden: of the perceptrons of the object capsules. See `ObjectDecoder`.
        noise: a uniform number in ±noise is added to the logits of all presences in training.
        noisy_evaluation: add it in evaluation too, as the authors' code does.
        normalize: divide the weights of the votes by their sum, as the paper does, and the authors'
            code for images does not. See `tritoncaps.ops.capsule_mixture_log_prob`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range, or the images are too small
            for the convolutions. In `forward`, the images have the wrong type or shape.

    Example:
        >>> import torch
        >>> model = SCAE(image_size=28, parts=16, objects=10)
        >>> output = model(torch.rand(2, 1, 28, 28))
        >>> output.activations.shape, output.reconstruction.shape
        (torch.Size([2, 10]), torch.Size([2, 1, 28, 28]))
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int | tuple[int, int] = 40,
        *,
        parts: int = 40,
        template_size: int | tuple[int, int] = 11,
        features: int = 16,
        pixel_scale: float = 1.0,
        objects: int = 32,
        channels: Sequence[int] = (128, 128, 128, 128),
        strides: Sequence[int] = (2, 2, 1, 1),
        attention_dim: int = 16,
        attention_heads: int = 1,
        attention_blocks: int = 3,
        encoding_dim: int = 256,
        params: int = 32,
        hidden: int = 128,
        noise: float = 2.0,
        noisy_evaluation: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_size(name, "in_channels", in_channels)
        check_size(name, "parts", parts)
        check_size(name, "features", features, 0)
        check_size(name, "objects", objects)
        check_pixel_scale(name, "pixel_scale", pixel_scale)
        check_flag(name, "normalize", normalize)
        sides = image_sides(name, image_size)
        side = template_size
        template = (side, side) if isinstance(side, int) else side
        self.image_shape = (in_channels, *sides)
        self.pixel_scale = pixel_scale
        self.normalize = normalize
        self.part_encoder = PartEncoder(
            in_channels,
            sides,
            parts,
            features=features,
            channels=channels,
            strides=strides,
            noise=noise,
            noisy_evaluation=noisy_evaluation,
        )
        self.template_decoder = TemplateDecoder(
            in_channels, sides, parts, template, features=features
        )
        pixels = in_channels * template[0] * template[1]
        self.object_encoder = SetTransformer(
            6 + 1 + features + pixels,
            objects,
            encoding_dim,
            blocks=attention_blocks,
            heads=attention_heads,
            dim=attention_dim,
        )
        self.object_decoder = ObjectDecoder(
            objects,
            encoding_dim,
            parts,
            params=params,
            hidden=hidden,
            noise=noise,
            noisy_evaluation=noisy_evaluation,
        )

    def forward(self, images: Tensor) -> SCAEOutput:
        """Find parts and objects, and draw the images again.

        Args:
            images: shape (B, C, H, W), values in [0, 1].
        """
        check_images(type(self).__name__, images, self.image_shape, self.part_encoder.readout)
        parts = self.part_encoder(images)
        features = parts.features if self.part_encoder.features else None
        drawn = self.template_decoder(parts.poses, parts.presence, features)
        poses, presence = parts.poses.detach(), parts.presence.detach()
        votes = self.object_decoder(self.object_encoder(self._described(parts), presence))
        part_log_prob, posterior = votes.log_prob(poses, presence, normalize=self.normalize)
        return SCAEOutput(
            activations=votes.presence,
            explained=posterior.sum(dim=1),
            reconstruction=drawn.mean(),
            parts=parts,
            votes=votes,
            posterior=posterior,
            image_log_prob=drawn.log_prob(images, self.pixel_scale),
            part_log_prob=part_log_prob,
        )

    def _described(self, parts: Parts) -> Tensor:
        """What the object encoder sees of the parts: pose, absence, features and template."""
        decoder = self.template_decoder
        templates = decoder.templates.detach().expand(parts.poses.shape[0], -1, -1, -1, -1)
        known = [parts.poses.detach().flatten(2), 1 - parts.presence.detach().unsqueeze(2)]
        if self.part_encoder.features:
            colours = decoder.colours(parts.features)
            assert colours is not None
            templates = templates * colours.detach()[..., None, None]
            known.append(parts.features)
        return torch.cat([*known, templates.flatten(2)], dim=2)
