"""The broadcast form."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def broadcast(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    iterations: int,
    temperature: float | None,
    min_variance: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Route with the votes in memory and broadcast products, as most implementations do.

    The softmax is over the output types of one position. Most take densities for their logarithms
    and stop gradients, which is not done here: their results would be wrong.
    """
    B, I, R = poses.shape[:3]
    J, Q = weight.shape[2:]
    # A pose for each output type, and a weight for each image.
    tiled = poses.unsqueeze(2).expand(-1, -1, J, -1, -1)
    votes = tiled @ weight.permute(0, 2, 1, 3).expand(B, -1, -1, -1, -1)
    votes = votes.reshape(B, I, J, R * Q)
    assignment = votes.new_full((B, I, J, 1), 1 / J)
    for t in range(1, iterations + 1):
        shares = assignment * activations[:, :, None, None]
        mass = shares.sum(dim=1, keepdim=True)
        shares = shares / mass
        mean = (shares * votes).sum(dim=1, keepdim=True)  # (B, 1, J, D)
        variance = (shares * (votes - mean) ** 2).sum(dim=1, keepdim=True) + min_variance
        cost = (beta_u[:, None] + variance.sqrt().log()) * mass
        scale = 0.01 * (1 - 0.95**t) if temperature is None else temperature
        logits = scale * (beta_a[:, None] - cost.sum(dim=3, keepdim=True))
        if t < iterations:
            log_p = (votes - mean) ** 2 / (2 * variance) + variance.sqrt().log()
            log_p = -(log_p + 0.5 * math.log(2 * math.pi)).sum(dim=3, keepdim=True)
            assignment = torch.softmax(log_p + F.logsigmoid(logits), dim=2)
    return mean.view(B, J, R, Q), logits.sigmoid().view(B, J)


RIVALS = {"broadcast": broadcast}
