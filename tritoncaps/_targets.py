"""What losses and decoders make of a target."""

import torch
from torch import Tensor


def present_classes(target: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return how present each class is, (B, K), given class indices (B,) or multi-hot (B, K).

    `F.one_hot` reads the indices on the host, which `torch.func` does not allow. The comparison
    reads nothing. An index that is no class marks no class: all of them are absent.
    """
    if target.ndim == 1:
        target = target.unsqueeze(1) == torch.arange(num_classes, device=target.device)
    return target.to(dtype)
