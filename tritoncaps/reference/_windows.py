"""The windows of a grid that a convolution sees."""

import torch
from torch import Tensor
from torch.nn import functional as F


def windows(grid: Tensor, K: int, stride: int, padding: int) -> Tensor:
    """Cut a grid, padded with zeros; (B, H, W, C, ...) → (B, H', W', K, K, C, ...)."""
    padded = F.pad(grid, (0, 0) * (grid.ndim - 3) + (padding,) * 4)
    # The first corners of all windows lie before `ends`.
    ends = [size - K + 1 for size in padded.shape[1:3]]
    places = [
        padded[:, ky : ky + ends[0] : stride, kx : kx + ends[1] : stride]
        for ky in range(K)
        for kx in range(K)
    ]
    return torch.stack(places, dim=3).unflatten(3, (K, K))
