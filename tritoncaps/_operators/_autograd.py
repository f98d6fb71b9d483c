"""The derivatives of an operator, under `.backward()` and under every transform of `torch.func`.

torch has rules of its own, `torch.library.register_autograd`. They serve `.backward()` alone:
`torch.func.grad` refuses them, and forward mode silently returns zeros. They are also slow, which
shows where a call is small. `set_autograd` replaces them by one rule for each way.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._C._functorch import TransformType, get_interpreter_stack
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction
except ImportError:
    # A torch that has moved them: `.backward()` works, and torch refuses the transforms itself.
    KNOWS_TORCH = False
else:
    KNOWS_TORCH = True
    # Where a forward runs: ROCm has the key of CUDA.
    _DEVICES = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def in_forward_mode() -> bool:
    """Whether a forward-mode derivative is being computed, by `torch.func` or without it."""
    if not KNOWS_TORCH:
        return False
    levels = get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(
        level.key() == TransformType.Jvp for level in levels
    )


def set_autograd(
    operator: Any,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    with_tangents: Callable[..., Any],
) -> None:
    """Make an operator differentiable.

    Args:
        operator: what `torch.library.custom_op` returned.
        setup_context: keeps what the backward needs, as for `register_autograd`.
        backward: the formula of reverse mode, as for `register_autograd`.
        with_tangents: called in place of the operator if an argument has a forward-mode tangent. It
            consists of operations that torch can differentiate.
    """
    operator.register_autograd(backward, setup_context=setup_context)
    if not KNOWS_TORCH:
        return
    overload, forward = operator._opoverload, operator._init_fn

    def call(keyset: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            below = keyset & torch._C._after_ADInplaceOrView_keyset
            # Nothing is left between here and the forward, as in most calls: no tracing, no mode.
            if below.highestPriorityTypeId() in _DEVICES:
                return forward(*args)
            return overload.redispatch(below, *args)

    class Plain(torch.autograd.Function):
        """The operator outside of all transforms."""

        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            result = call(keyset, args)
            setup_context(ctx, args, result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (None, *backward(ctx, *grads))

    class Level(_SingleLevelFunction):
        """The operator at one level of nested transforms. The call inside goes to the next."""

        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            # torch switches both modes off in here, but the next level needs them.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return Plain.forward(ctx, keyset, *args)

        backward = Plain.backward

    def differentiable(keyset: Any, *args: Any) -> Any:
        is_plain = not torch._C._are_functorch_transforms_active()
        if forward_ad._current_level >= 0 or not is_plain:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            if in_forward_mode() and any(has_tangent(tensor) for tensor in tensors):
                return with_tangents(*args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return call(keyset, args)
        if is_plain:
            return Plain.apply(keyset, *args)
        with enable_single_level_autograd_function():
            return Level.apply(keyset, *args)  # type: ignore[attr-defined]

    with warnings.catch_warnings():
        # Older versions of torch announce the override that is asked for.
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        operator._lib.impl(
            operator._name, differentiable, "Autograd", with_keyset=True, allow_override=True
        )


def has_tangent(tensor: Tensor) -> bool:
    """Whether a tensor is a dual number of plain forward mode or of the innermost `jvp`."""
    # There is only level 0. A compiled `jvp` enters it without telling `forward_ad`.
    return forward_ad.unpack_dual(tensor, level=0).tangent is not None
