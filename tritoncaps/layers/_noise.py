"""Noise on presences, which parts and objects of a stacked capsule autoencoder share."""

import torch
from torch import Tensor, nn

from tritoncaps import _checks


class NoisyPresence(nn.Module):
    """A module whose presences are noisy in training.

    Args:
        noise: a uniform number in ±noise is added to the logit of each presence.
        noisy_evaluation: add it in evaluation too.
    """

    def __init__(self, noise: float, noisy_evaluation: bool) -> None:
        super().__init__()
        name = type(self).__name__
        _checks.check_not_negative(name, "noise", noise)
        _checks.check_flag(name, "noisy_evaluation", noisy_evaluation)
        self.noise, self.noisy_evaluation = noise, noisy_evaluation

    def noisy(self, logits: Tensor) -> Tensor:
        """Return logits of presences with noise, if it is on."""
        if self.noise and (self.training or self.noisy_evaluation):
            return logits + self.noise * (2 * torch.rand_like(logits) - 1)
        return logits
