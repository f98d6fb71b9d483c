"""The softmax of EM routing: which output capsules compete for an input capsule.

There are g rows, with I input capsules and J output capsules each. What belongs to an input capsule
of a row is (I, g) here. What belongs to a pair of capsules is (I, 1, G), with G = g·J.

In a convolution the rows are positions of images, and neighbours share input capsules. The input
capsules of a row are then (ky, kx, c). So a sum over all output capsules that compete is a sum over
J in each row, which is added to an image at the place of the input capsule, and read from there.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Competition:
    """Softmax over the output capsules that an input capsule feeds.

    Without a grid they are those of its row. With grid = (H', W', K, S) they are those of all
    positions of its image whose K×K window, at steps of S, it is in.
    """

    def __init__(self, grid: Sequence[int], J: int) -> None:
        self._grid, self._J = grid, J
        # So many rows have to be together: those of an image.
        self.together = grid[0] * grid[1] if grid else 1

    def first(self, like: Tensor) -> Tensor:
        """1 / the number of output capsules that compete."""
        return self._per_pair(1 / self._sum(torch.ones_like(like)))

    def softmax(self, logits: Tensor) -> Tensor:
        """The softmax."""
        tops = self._per_row(logits).amax(dim=2)
        top = self._over_windows(tops, torch.maximum, nothing=-torch.inf)
        shares = (logits - self._per_pair(top)).exp_()
        return shares.div_(self._per_pair(self._sum(shares)))

    def backward(self, R: Tensor, grad_R: Tensor) -> Tensor:
        """The gradient of the logits."""
        return (grad_R - self._per_pair(self._sum(R * grad_R))).mul_(R)

    def _sum(self, pairs: Tensor) -> Tensor:
        """The sum over all output capsules that compete, (I, 1, G) → (I, g)."""
        return self._over_windows(self._per_row(pairs).sum(dim=2), torch.add, nothing=0)

    def _per_row(self, pairs: Tensor) -> Tensor:
        """(I, 1, G) → (I, g, J)."""
        return pairs.view(len(pairs), -1, self._J)

    def _per_pair(self, x: Tensor) -> Tensor:
        """(I, g) → (I, 1, G)."""
        return x.unsqueeze(2).expand(-1, -1, self._J).flatten(1).unsqueeze(1)

    def _over_windows(
        self, x: Tensor, combine: Callable[[Tensor, Tensor], Tensor], nothing: float
    ) -> Tensor:
        """Combine the numbers of an input capsule in all rows that share it, (I, g) → (I, g).

        The order is fixed: by the place of the input capsule in the window.
        """
        if not self._grid:
            return x
        height, width, K, S = self._grid
        rows, columns = (
            [slice(k, k + (size - 1) * S + 1, S) for k in range(K)] for size in (height, width)
        )
        # The parts of an image that are at (ky, kx) in the windows.
        places = [(..., row, column) for row in rows for column in columns]
        of_places = x.view(K * K, len(x) // K**2, -1, height, width)
        image = ((size - 1) * S + K for size in (height, width))
        combined = x.new_full((*of_places.shape[1:3], *image), nothing)
        for at, of_place in zip(places, of_places, strict=True):
            combined[at] = combine(combined[at], of_place)
        return torch.stack([combined[at] for at in places]).view(x.shape)
