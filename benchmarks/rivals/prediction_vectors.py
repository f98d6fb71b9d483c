"""The broadcast form of most implementations, in which each image has a view of the weight."""

from torch import Tensor, matmul


def broadcast(u: Tensor, weight: Tensor) -> Tensor:
    """Multiply one row vector by one matrix for each pair of capsules."""
    matrices = weight.permute(0, 2, 1, 3)  # (I, J, P, D)
    return matmul(u[:, :, None, None, :], matrices).squeeze(3)  # (B, I, J, D)


RIVALS = {"broadcast": broadcast}
