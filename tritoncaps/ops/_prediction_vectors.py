"""`prediction_vectors`."""

from torch import Tensor

from tritoncaps import _checks
from tritoncaps._operators.prediction_vectors import prediction_vectors as _registered
from tritoncaps._tracing import one_node


@one_node
def prediction_vectors(u: Tensor, weight: Tensor) -> Tensor:
    """Compute what each input capsule predicts for each output capsule: û_{j|i} = W_ij u_i.

    Args:
        u: input capsules, shape (B, I, P).
        weight: one P×D matrix per pair of capsules, shape (I, P, J, D).

    Returns:
        û, shape (B, I, J, D), dtype of `u`.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes differ.
        ValueError: wrong rank, axes that do not match, an empty axis other than B, two devices.

    Example:
        >>> import torch
        >>> u, weight = torch.randn(2, 1152, 8), torch.randn(1152, 8, 10, 16)
        >>> prediction_vectors(u, weight).shape
        torch.Size([2, 1152, 10, 16])

    Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (2017), equation 2.
    """
    _checks.check_inputs("prediction_vectors", _registered.inputs, u=u, weight=weight)
    return _registered.forward(u, weight)
