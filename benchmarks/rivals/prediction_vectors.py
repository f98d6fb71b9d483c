"""The form of most implementations: each image has its own view of the weight."""

from torch import Tensor, matmul


def broadcast(u: Tensor, weight: Tensor) -> Tensor:
    """One row vector times one matrix for each pair of capsules."""
    matrices = weight.permute(0, 2, 1, 3)  # (I, J, P, D)
    return matmul(u[:, :, None, None, :], matrices).squeeze(3)  # (B, I, J, D)


RIVALS = {"broadcast": broadcast}
