"""Losses: margin, alone and with reconstruction; spread; that of stacked capsule autoencoders."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tritoncaps import ops
from tritoncaps._checks import (
    check_choice,
    check_floating,
    check_inputs,
    check_margins,
    check_not_negative,
    check_positive,
    check_size,
    check_tensor,
    shape_of,
)
from tritoncaps._targets import check_class_weight
from tritoncaps._tracing import concrete
from tritoncaps.ops._margin_loss import reduced

__all__ = [
    "CapsuleLoss",
    "MarginLoss",
    "SpreadLoss",
    "StackedCapsuleLoss",
    "entropy_sparsity",
    "l2_sparsity",
    "linear_margin",
    "reconstruction_error",
    "sigmoid_margin",
]


def reconstruction_error(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Sum the squared error over each image (Sabour 2017, section 4.1).

    16-bit images are subtracted and added up in float32.

    Args:
        reconstruction: shape (B, C, H, W), or any other shape that starts with B.
        images: of the same shape.

    Returns:
        The sums, shape (B,), at least in float32.

    Raises:
        TypeError: one of them is not a floating-point tensor.
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> reconstruction_error(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4))
        tensor([16., 16.])
    """
    check_floating("reconstruction_error", "reconstruction", reconstruction)
    check_floating("reconstruction_error", "images", images)
    if reconstruction.shape != images.shape:
        raise ValueError(
            f"reconstruction_error: reconstruction is {shape_of(reconstruction)} "
            f"but images is {shape_of(images)}"
        )
    dtype = torch.promote_types(reconstruction.dtype, images.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return (reconstruction.to(dtype) - images.to(dtype)).square().flatten(1).sum(dim=1)


class _Margins(nn.Module):
    """The arguments of the margin loss. `class_weight` is a buffer, so it moves with the module."""

    class_weight: Tensor | None

    def __init__(
        self,
        m_pos: float = 0.9,
        m_neg: float = 0.1,
        down_weight: float = 0.5,
        reduction: ops.Reduction = "mean",
        *,
        class_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_margins(name, m_pos, m_neg, down_weight)
        check_choice(name, "reduction", reduction, ("mean", "sum", "none"))
        check_class_weight(name, class_weight)
        self.m_pos = m_pos
        self.m_neg = m_neg
        self.down_weight = down_weight
        self.reduction: ops.Reduction = reduction
        self.register_buffer("class_weight", class_weight)

    def margin_loss(self, activations: Tensor, target: Tensor) -> Tensor:
        """Call the operator with these arguments."""
        return ops.margin_loss(
            activations,
            target,
            self.m_pos,
            self.m_neg,
            self.down_weight,
            self.reduction,
            class_weight=self.class_weight,
        )

    def extra_repr(self) -> str:
        """The arguments that build this module; of `class_weight`, the shape."""
        weight = self.class_weight
        return (
            f"m_pos={self.m_pos}, m_neg={self.m_neg}, down_weight={self.down_weight}, "
            f"reduction={self.reduction!r}"
            + ("" if weight is None else f", class_weight={shape_of(weight)}")
        )


class MarginLoss(_Margins):
    """`ops.margin_loss` as a module, with the same arguments.

    `class_weight` is a buffer: it moves with the module, and is part of its state dict.

    Example:
        >>> import torch
        >>> MarginLoss()(torch.tensor([[0.9, 0.1, 0.3]]), torch.tensor([0]))
        tensor(0.0200)
    """

    def forward(self, activations: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of activations (B, K) for class indices (B,) or multi-hot (B, K)."""
        return self.margin_loss(activations, target)


class CapsuleLoss(_Margins):
    """Margin loss + `reconstruction_weight` × summed squared error of each image.

    The reconstruction must be of what the target says is there: call the model as
    `model(images, target)` with the same target. For a multi-hot target it is then a picture of all
    the present classes, and is compared with the whole image. To compare the picture of each class
    with an original of its own, see "Several objects in an image" in docs/own-model.md.

    Args:
        reconstruction_weight: 0.0005 in Sabour 2017 (section 4.1), small enough that the margin
            loss dominates.
        m_pos, m_neg, down_weight, class_weight: of the margin loss. See `ops.margin_loss`.
        reduction: of both terms over the batch: "mean", "sum" or "none".

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range. In `forward`,
            whatever `ops.margin_loss` and `reconstruction_error` raise.

    Example:
        >>> import torch
        >>> images = torch.rand(2, 1, 28, 28)
        >>> loss = CapsuleLoss(class_weight=torch.tensor([1.0, 1.0, 5.0]), reduction="none")
        >>> loss(torch.rand(2, 3), torch.tensor([1, 2]), images, images).shape
        torch.Size([2])
    """

    def __init__(
        self,
        reconstruction_weight: float = 0.0005,
        m_pos: float = 0.9,
        m_neg: float = 0.1,
        down_weight: float = 0.5,
        reduction: ops.Reduction = "mean",
        *,
        class_weight: Tensor | None = None,
    ) -> None:
        super().__init__(m_pos, m_neg, down_weight, reduction, class_weight=class_weight)
        check_not_negative("CapsuleLoss", "reconstruction_weight", reconstruction_weight)
        self.reconstruction_weight = reconstruction_weight

    def forward(
        self, activations: Tensor, target: Tensor, reconstruction: Tensor | None, images: Tensor
    ) -> Tensor:
        """Compute the loss. Without a reconstruction it is the margin loss alone.

        Args:
            activations: shape (B, K).
            target: class indices (B,) or multi-hot (B, K), as the model was called with.
            reconstruction: shape (B, C, H, W), or None.
            images: of the shape of `reconstruction`, values in [0, 1].

        Returns:
            A scalar, or shape (B,) with the reduction "none".
        """
        loss = self.margin_loss(activations, target)
        if reconstruction is None:
            return loss
        error = reconstruction_error(reconstruction, images)
        if len(error) != len(activations):
            raise ValueError(
                f"CapsuleLoss: reconstruction has B={len(error)} but activations has "
                f"B={len(activations)}; give one picture for each image"
            )
        error = reduced(error, self.reduction)
        return torch.add(loss, error, alpha=self.reconstruction_weight)

    def extra_repr(self) -> str:
        """The arguments that build this module; of `class_weight`, the shape."""
        return f"reconstruction_weight={self.reconstruction_weight}, {super().extra_repr()}"


def linear_margin(step: int, steps: int, *, start: float = 0.2, end: float = 0.9) -> float:
    """Return a margin that changes linearly from `start` to `end`, and stays there.

    Hinton 2018 (section 4.1) raises the margin of the spread loss like this in training, from 0.2
    to 0.9, to avoid dead capsules. The paper does not say in how many steps.

    Args:
        step: batches trained so far, at least 0.
        steps: the step at which the margin comes to `end`, at least 1.
        start, end: margins, at least 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range.

    Example:
        >>> [round(linear_margin(step, steps=100), 2) for step in (0, 50, 100, 1000)]
        [0.2, 0.55, 0.9, 0.9]
    """
    check_size("linear_margin", "step", step, 0)
    check_size("linear_margin", "steps", steps)
    check_not_negative("linear_margin", "start", start)
    check_not_negative("linear_margin", "end", end)
    return start + (end - start) * min(1.0, step / steps)


def sigmoid_margin(step: int) -> float:
    """Return the margin of the authors' code: 0.2 + 0.79·sigmoid(min(10, step/50000 − 4)).

    It rises from 0.21 to 0.99, most steeply at 200,000 steps. Their code is `capsule_em` in
    github.com/google-research/google-research.

    Args:
        step: batches trained so far, at least 0.

    Raises:
        TypeError, ValueError: the step is not an int of at least 0.

    Example:
        >>> [round(sigmoid_margin(step), 3) for step in (0, 200_000, 400_000)]
        [0.214, 0.595, 0.976]
    """
    check_size("sigmoid_margin", "step", step, 0)
    return 0.2 + 0.79 / (1 + math.exp(-min(10.0, step / 50_000 - 4)))


class SpreadLoss(nn.Module):
    """`ops.spread_loss` as a module, with a margin that may depend on the step of training.

    Hinton 2018 (section 4.1, equation 3) raises the margin from 0.2 to 0.9 in training. Losses can
    only be compared if they have the same margin. To evaluate, use a module with the last margin.

    Args:
        margin: a number, or a function of the step such as `sigmoid_margin`.
        reduction: over the batch: "mean", "sum" or "none".

    Raises:
        TypeError, ValueError: an argument has the wrong type or range. In `forward`, the step is
            missing, and whatever `ops.spread_loss` raises.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> activations, target = torch.tensor([[0.9, 0.1, 0.3]]), torch.tensor([0])
        >>> SpreadLoss()(activations, target)
        tensor(0.1000)
        >>> loss = SpreadLoss(partial(linear_margin, steps=1000))
        >>> [round(loss(activations, target, step).item(), 4) for step in (0, 800, 1000)]
        [0.0, 0.0256, 0.1]
    """

    def __init__(
        self,
        margin: float | Callable[[int], float] = 0.9,
        reduction: ops.Reduction = "mean",
    ) -> None:
        super().__init__()
        if not callable(margin):
            check_not_negative("SpreadLoss", "margin", margin)
        check_choice("SpreadLoss", "reduction", reduction, ("mean", "sum", "none"))
        self.margin = margin
        self.reduction: ops.Reduction = reduction

    def forward(self, activations: Tensor, target: Tensor, step: int | None = None) -> Tensor:
        """Compute the loss.

        Args:
            activations: shape (B, K).
            target: class indices, shape (B,).
            step: batches trained so far. It is needed if the margin is a function.

        Returns:
            A scalar, or shape (B,) with the reduction "none".
        """
        step = concrete("step", step, None)
        if step is not None:
            check_size("SpreadLoss", "step", step, 0)
        margin = self.margin
        if callable(margin):
            if step is None:
                raise TypeError(
                    "SpreadLoss: step must be an int, got None; the margin is a function of it, "
                    "so call loss(activations, target, step)"
                )
            margin = margin(step)
        return ops.spread_loss(activations, target, margin, self.reduction)

    def extra_repr(self) -> str:
        """The arguments that build this module."""
        return f"margin={self.margin}, reduction={self.reduction!r}"


def entropy_sparsity(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Return how evenly capsules share each image, and how evenly they share the whole batch.

    Both are entropies, H(p) = −Σ_j p_j log p_j: the mean of those of each image, with p the shares
    of its mass, and that of the sums over the batch. To let a few capsules explain each image and
    others the next, make the first small and the second large.

    Args:
        mass: how much each of J capsules has of each image, ≥ 0, shape (B, J).

    Returns:
        The entropies within an image and between images, two scalars from 0 to log J, at least in
        float32. An image without mass has the entropy 0.

    Raises:
        TypeError: the mass is not a floating-point tensor.
        ValueError: it does not have two axes, or has no image or no capsule.

    Example:
        >>> import torch
        >>> entropy_sparsity(torch.eye(3))
        (tensor(0.), tensor(1.0986))

    Kosiorek, Sabour, Teh, Hinton: Stacked Capsule Autoencoders (2019), section 2.3.
    """
    _check_shares("entropy_sparsity", "mass", mass)
    mass = mass.to(torch.promote_types(mass.dtype, torch.float32))
    return _entropy(mass).mean(), _entropy(mass.sum(dim=0))


def l2_sparsity(
    presence: Tensor, num_classes: float, *, active: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return how far presences are from what they would be if each image had one of K classes.

    If J capsules are shared by K classes alike, J/K of them are present in each image, and each
    capsule is present in B/K images of a batch:

        within = mean_b (Σ_j a_bj − J/K)²,  between = mean_j (Σ_b a_bj − B/K)²

    Args:
        presence: shape (B, J), values in [0, 1].
        num_classes: K. If two of three capsules are present on average, it is 3/2.
        active: capsules that are present in an image, in place of J/K.

    Returns:
        The means of the squares, two scalars, at least in float32. Both are to be made small.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.

    Example:
        >>> import torch
        >>> l2_sparsity(torch.eye(3), num_classes=3)
        (tensor(0.), tensor(0.))

    Kosiorek, Sabour, Teh, Hinton: Stacked Capsule Autoencoders (2019), section 2.3.
    """
    _check_shares("l2_sparsity", "presence", presence)
    check_positive("l2_sparsity", "num_classes", num_classes)
    if active is not None:
        check_not_negative("l2_sparsity", "active", active)
    presence = presence.to(torch.promote_types(presence.dtype, torch.float32))
    B, J = presence.shape
    active = J / num_classes if active is None else active
    within = (presence.sum(dim=1) - active).square().mean()
    return within, (presence.sum(dim=0) - B / num_classes).square().mean()


class StackedCapsuleLoss(nn.Module):
    """The loss of a stacked capsule autoencoder: two likelihoods, and how sparse its objects are.

    L = −image − part + w_d·deformation + w_pw·prior within + w_pb·prior between
        + w_qw·posterior within − w_qb·posterior between

    The first three are means over the batch. The prior is the l2 sparsity of the presences of the
    object capsules, see `l2_sparsity`. The posterior is the entropy of what they explain, see
    `entropy_sparsity`.

    Args:
        num_classes: K, the number of classes to expect, for the prior.
        deformation: w_d, which keeps objects rigid.
        prior_within, prior_between, posterior_within, posterior_between: the weights. The defaults
            are those of the authors' command for MNIST.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range. In `forward`, a tensor has
            the wrong type or shape.

    Example:
        >>> import torch
        >>> from tritoncaps.models import SCAE
        >>> output = SCAE(image_size=28, parts=8, objects=10)(torch.rand(4, 1, 28, 28))
        >>> loss = StackedCapsuleLoss(num_classes=10)
        >>> loss(
        ...     output.image_log_prob,
        ...     output.part_log_prob,
        ...     output.activations,
        ...     output.explained,
        ...     output.votes.deformation,
        ... ).shape
        torch.Size([])

    Kosiorek, Sabour, Teh, Hinton: Stacked Capsule Autoencoders (2019), section 2.3.
    """

    def __init__(
        self,
        num_classes: float = 10,
        *,
        deformation: float = 10.0,
        prior_within: float = 2.0,
        prior_between: float = 0.35,
        posterior_within: float = 0.7,
        posterior_between: float = 0.2,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_positive(name, "num_classes", num_classes)
        self.num_classes = num_classes
        self.weights = {
            "deformation": deformation,
            "prior_within": prior_within,
            "prior_between": prior_between,
            "posterior_within": posterior_within,
            "posterior_between": posterior_between,
        }
        for argument, weight in self.weights.items():
            check_not_negative(name, argument, weight)

    def forward(
        self,
        image_log_prob: Tensor,
        part_log_prob: Tensor,
        presence: Tensor,
        explained: Tensor,
        deformation: Tensor,
    ) -> Tensor:
        """Compute the loss, a scalar.

        Args:
            image_log_prob: log-likelihood of each image, shape (B,).
            part_log_prob: log-likelihood of its parts, shape (B,).
            presence: of the object capsules, `SCAEOutput.activations`, shape (B, J), values in
                [0, 1].
            explained: how many parts each of them explains, shape (B, J).
            deformation: of the objects in each image, shape (B,).
        """
        axes = {
            "image_log_prob": "B",
            "part_log_prob": "B",
            "presence": "B J",
            "explained": "B J",
            "deformation": "B",
        }
        check_inputs(
            type(self).__name__,
            axes,
            image_log_prob=image_log_prob,
            part_log_prob=part_log_prob,
            presence=presence,
            explained=explained,
            deformation=deformation,
        )
        weights = self.weights
        prior_within, prior_between = l2_sparsity(presence, self.num_classes)
        posterior_within, posterior_between = entropy_sparsity(explained)
        return (
            weights["deformation"] * deformation.mean()
            - (image_log_prob + part_log_prob).mean()
            + weights["prior_within"] * prior_within
            + weights["prior_between"] * prior_between
            + weights["posterior_within"] * posterior_within
            - weights["posterior_between"] * posterior_between
        )

    def extra_repr(self) -> str:
        """The arguments that build this module."""
        weights = ", ".join(f"{name}={weight}" for name, weight in self.weights.items())
        return f"num_classes={self.num_classes}, {weights}"


def _check_shares(function: str, name: str, value: Tensor) -> None:
    """A number for each of J capsules and each image. Their mean needs an image."""
    check_tensor(function, name, value, "B J")
    if 0 in value.shape:
        raise ValueError(f"{function}: needs at least one image and capsule, got {shape_of(value)}")


def _entropy(mass: Tensor) -> Tensor:
    """−Σ p log p along the last axis, with p the shares of the mass. Of no mass it is 0.

    A total has a floor, because its inverse is a factor of the gradient.
    """
    tiny = torch.finfo(mass.dtype).tiny
    shares = mass / mass.sum(dim=-1, keepdim=True).clamp(min=math.sqrt(tiny))
    return -(shares * shares.clamp(min=tiny).log()).sum(dim=-1)
