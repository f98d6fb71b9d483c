"""Which output capsules compete for an input capsule, in EM routing."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


class Competition:
    """Softmax over the output capsules that an input capsule feeds.

    Without a grid they are those of its row. With grid = (H', W', K, S), where rows are positions
    of a convolution and input capsules are (ky, kx, c), they are those of all positions that it
    feeds. What belongs to a pair of capsules is (I, 1, G), for g rows with J output capsules each.
    """

    def __init__(self, grid: Sequence[int], J: int, device: torch.device) -> None:
        self._J = J
        self.together = 1  # the number of rows that have to be together
        self._inputs: Tensor | None = None
        if not grid:
            return
        height, width, K, stride = grid
        self.together = height * width
        self._offsets = K * K
        rows, columns = ((size - 1) * stride + K for size in (height, width))
        # The input position at each place (y', x', ky, kx), and the places of each input position.
        positions = torch.arange(rows * columns).view(rows, columns)
        self._inputs = positions.unfold(0, K, stride).unfold(1, K, stride).flatten()
        counts = self._inputs.bincount(minlength=positions.numel())
        nth = torch.arange(int(counts.max()))
        nowhere = len(self._inputs)
        sorted_places = pad(self._inputs.argsort(stable=True), (0, len(nth)), value=nowhere)
        starts = (counts.cumsum(0) - counts)[:, None]
        self._places = torch.where(nth < counts[:, None], sorted_places[starts + nth], nowhere)
        self._inputs, self._places = self._inputs.to(device), self._places.to(device)

    def first(self, like: Tensor) -> Tensor:
        """1 / the number of output capsules that compete."""
        ones = torch.ones_like(self._per_row(like)[:, :, 0])
        return self._per_pair(1 / (self._J * self._sum(ones)))

    def softmax(self, logits: Tensor) -> Tensor:
        """The softmax."""
        top = self._over_rows(self._per_row(logits).amax(dim=2), torch.amax, -torch.inf)
        shares = (logits - self._per_pair(top)).exp_()
        return shares.div_(self._per_pair(self._sum(self._per_row(shares).sum(dim=2))))

    def backward(self, R: Tensor, grad_R: Tensor) -> Tensor:
        """The gradient of the logits."""
        totals = self._sum(self._per_row(R * grad_R).sum(dim=2))
        return (grad_R - self._per_pair(totals)).mul_(R)

    def _per_row(self, pairs: Tensor) -> Tensor:
        return pairs.view(len(pairs), -1, self._J)

    def _per_pair(self, x: Tensor) -> Tensor:
        """(I, g) → (I, 1, G)."""
        return x.unsqueeze(2).expand(-1, -1, self._J).flatten(1).unsqueeze(1)

    def _sum(self, x: Tensor) -> Tensor:
        return self._over_rows(x, torch.sum, 0)

    def _over_rows(self, x: Tensor, reduce: Callable[..., Tensor], nothing: float) -> Tensor:
        """Reduce x, (I, g), over all rows that an input capsule feeds. Every row gets the result.

        The rows are gathered in a fixed order. Where there are fewer, `nothing` stands in.
        """
        if self._inputs is None:
            return x
        places = x.view(self._offsets, len(x) // self._offsets, -1, self.together)
        places = pad(places.permute(1, 2, 3, 0).flatten(2), (0, 1), value=nothing)
        of_inputs = reduce(places[:, :, self._places], dim=3)  # (C, images, input positions)
        places = of_inputs[:, :, self._inputs].unflatten(2, (self.together, self._offsets))
        return places.permute(3, 0, 1, 2).reshape(x.shape)
