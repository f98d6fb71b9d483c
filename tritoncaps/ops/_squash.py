"""`squash`."""

from typing import Literal

from torch import Tensor

from tritoncaps import _checks
from tritoncaps._operators.squash import squash as _registered
from tritoncaps._tracing import one_node

Form = Literal["quadratic", "exponential"]


@one_node
def squash(s: Tensor, dim: int = -1, *, form: Form = "quadratic") -> Tensor:
    """Scale vectors to a length of at most 1 and keep their direction.

    With n = |s|, "quadratic" is v = n²/(1+n²) · s/n and "exponential" is v = (1−e⁻ⁿ) · s/n. Short
    vectors vanish under the first and pass almost unchanged under the second.

    Args:
        s: vectors along the axis `dim`, any shape.
        dim: the axis of the vectors' components.
        form: "quadratic" (Sabour 2017) or "exponential" (Mazzia 2021).

    Returns:
        A tensor with the shape and dtype of `s`.

    Raises:
        TypeError: `s` is not a floating-point tensor, or `dim` is not an int.
        ValueError: `s` has no axis `dim`, or `form` is unknown.

    Note:
        Value and gradient are finite from 0 to the largest float32. At 0 the value is 0. The
        gradient there is 0 ("quadratic") or the identity ("exponential").

        In float32 and float64 no v is longer than 1, however it is rounded, and
        `torch.linalg.vector_norm` finds none that is, up to 64 components. For this, the factor
        that sets the length stops at 1 − 4ε. In float32, where ε = 2⁻²³, it does so from |s| ≈ 1448
        ("quadratic") or 14.6 ("exponential") on. In a 16-bit type, rounding the components may take
        the length past 1: to at most 1 + 2⁻¹¹ in float16 and 1 + 2⁻⁸ in bfloat16.

    Example:
        >>> import torch
        >>> poses = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> squash(poses).norm(dim=-1)
        tensor([0.9615, 0.0000])

    Sabour, Frosst, Hinton: Dynamic Routing Between Capsules (2017), equation 1.
    Mazzia, Salvetti, Chiaberge: Efficient-CapsNet (2021), equation 4.
    """
    _checks.check_floating("squash", "s", s)
    _checks.check_dim("squash", dim, s.ndim)
    _checks.check_choice("squash", "form", form, ("quadratic", "exponential"))
    return _registered.forward(s.movedim(dim, -1), form).movedim(-1, dim)
