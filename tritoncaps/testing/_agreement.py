"""The 2x rule, which decides whether a result is accurate enough.

Errors are measured against the reference in float64. Two errors set the allowance: that of the same
mathematics in plain torch, in the result's own dtype, and the change when the inputs are rounded
once more. A result may be off by twice the larger one, plus a few roundings at its scale. The
second error is the problem's own sensitivity. Routing amplifies roundings, and the plain form,
which adds up in another order, may have been lucky. The rule has no tolerance to tune, and NaN
never passes.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from tritoncaps.testing._cases import Case, with_layout
from tritoncaps.testing._table import Operator

# Roundings at the result's scale that the rule allows. Some results are so small or so simple that
# the plain form happens to be right to the last bit.
SLACK_ROUNDINGS = 8


def assert_agrees(
    name: str, actual: Tensor, plain: Tensor, exact: Tensor, rounded: Tensor | None = None
) -> None:
    """Apply the 2x rule.

    Args:
        name: the result's name, for the message.
        actual: the result.
        plain: the result of plain torch in the same dtype.
        exact: the exact result, in float64.
        rounded: the exact result for inputs that were rounded once more, in float64.

    Raises:
        AssertionError: the shape is wrong, a value is not finite, or the error is too large.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    exact = exact.to(actual.device)
    # Where a square of the plain form overflows, the exact result rounded once stands in for it.
    plain = torch.where(plain.isfinite(), plain, exact.to(plain.dtype))
    scale = exact.abs().max().item()
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item()
    if rounded is not None:
        allowed = max(allowed, 2 * (rounded.to(exact) - exact).abs().max().item())
    if actual.dtype == torch.float64:  # as precise as the reference itself
        allowed = 1e-10 * scale
    allowed += SLACK_ROUNDINGS * torch.finfo(actual.dtype).eps * scale
    # Below the smallest normal number, results are rounded in steps of a fixed size.
    allowed += torch.finfo(actual.dtype).tiny
    assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e} at scale {scale:.3e}"


def gradients(
    function: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    *,
    seed: int = 0,
    layout: str = "contiguous",
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Call a function with tensors by name; return its outputs and the gradients of its inputs.

    Each output gets a fixed random cotangent, the same numbers in every dtype. `layout` is the
    memory layout in which autograd hands it over.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    result = function(**leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    differentiable = [output for output in outputs if output.requires_grad]
    cotangents = []
    for number, output in enumerate(differentiable):
        generator = torch.Generator().manual_seed(seed + (number << 20))
        drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        # Rounded to 16 bits, which every dtype holds.
        cotangents.append(with_layout(drawn.bfloat16().to(output), layout))
    grads = torch.autograd.grad(
        differentiable, list(leaves.values()), cotangents, allow_unused=True
    )
    by_name = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return [output.detach() for output in outputs], by_name


def round_once(tensor: Tensor, seed: int = 0) -> Tensor:
    """Move each value by one rounding of its dtype, up or down, in float64."""
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, tensor.shape, generator=generator).to(tensor.device) - 1
    return tensor.double() * (1 + signs * torch.finfo(tensor.dtype).eps)


def evaluate(
    operator: Operator,
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    function: Callable[..., Any] | None = None,
    *,
    seed: int = 0,
    layout: str = "contiguous",
) -> dict[str, Tensor]:
    """Results and gradients of a call by name, such as "v" and "gradient of u".

    `function` replaces the operator's own. The other arguments are those of `gradients`.
    """
    outputs, grads = gradients(operator.bound(options, function), inputs, seed=seed, layout=layout)
    named = dict(zip(operator.output_names(options), outputs, strict=True))
    return named | {f"gradient of {name}": grad for name, grad in grads.items()}


def compare(
    operator: Operator, case: Case, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Apply the 2x rule to the results and gradients of a drawn call, and return them by name.

    Raises:
        AssertionError: a result or a gradient breaks the rule, or has the wrong dtype.
    """
    inputs = case.inputs(operator, device)
    return compare_inputs(operator, inputs, case.options, seed=case.seed, layout=case.grad_layout)


def compare_inputs(
    operator: Operator,
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    *,
    seed: int = 0,
    layout: str = "contiguous",
    unchecked: Collection[str] = (),
) -> dict[str, Tensor]:
    """Compare with inputs of your own. The results named in `unchecked` are not checked."""

    def run(tensors: Mapping[str, Tensor], function: Any = operator.reference) -> Any:
        return evaluate(operator, tensors, options, function, seed=seed, layout=layout)

    actual = run(inputs, operator.function)
    plain = run(inputs)
    exact = run({name: tensor.double() for name, tensor in inputs.items()})
    rounded = run({name: round_once(tensor, seed) for name, tensor in inputs.items()})
    dtype = next(iter(inputs.values())).dtype
    for name, result in actual.items():
        assert result.dtype == dtype, f"{operator}: {name} is {result.dtype}, expected {dtype}"
        if name not in unchecked:
            assert_agrees(f"{operator}: {name}", result, plain[name], exact[name], rounded[name])
    return actual
