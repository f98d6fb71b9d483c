"""The measuring stick of the numerical tests, and the strategies that draw their cases.

The 2x rule: against the reference in float64, an operator may be wrong by at most twice what the
same mathematics in plain torch, in the operator's own dtype, is wrong by, or twice what rounding
its inputs once changes, plus a few roundings of the result's scale. The second term is the
problem's own sensitivity: routing amplifies a rounding, and the plain form, which adds up in
another order, may have been lucky. The rule has no tolerance to tune, and NaN never passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tritoncaps import _operators

# Bits of a rounding of the result's scale that the rule grants, for results so small or so exact
# that the plain form happens to be right to the last bit.
SLACK_ROUNDINGS = 8

# float16 and bfloat16 need real hardware: the interpreter adds up the bit patterns of bfloat16.
HALF_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (
    (torch.float32, torch.float64)
    if _operators.INTERPRETED
    else (torch.float32, torch.float64, *HALF_DTYPES)
)


def assert_agrees(
    name: str, actual: Tensor, plain: Tensor, exact: Tensor, rounded: Tensor | None = None
) -> None:
    """Apply the 2x rule to `actual`: `plain` in its dtype, `exact` and `rounded` in float64."""
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    exact = exact.to(actual.device)
    scale = exact.abs().max().item()
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item()
    if rounded is not None:
        allowed = max(allowed, 2 * (rounded.to(exact) - exact).abs().max().item())
    if actual.dtype == torch.float64:  # as precise as the measuring stick itself
        allowed = 1e-10 * scale
    allowed += SLACK_ROUNDINGS * torch.finfo(actual.dtype).eps * scale
    # Results below the smallest normal number are rounded by steps of a fixed size.
    allowed += torch.finfo(actual.dtype).tiny
    assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e} at scale {scale:.3e}"


def gradients(
    function: Callable[..., Any], inputs: list[Tensor], seed: int, layout: str = "contiguous"
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and input gradients of `function`, for one fixed random cotangent an output.

    `layout` is the memory layout in which autograd hands the cotangents to the function.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(seed)
    differentiable, cotangents = [], []
    for output in outputs:
        if not output.requires_grad:  # a coupling that depends on nothing
            continue
        differentiable.append(output)
        drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        # Rounded to 16 bits, so that the cotangent is the same number in every dtype.
        cotangents.append(with_layout(drawn.bfloat16().to(output), layout))
    grads = torch.autograd.grad(differentiable, leaves, cotangents, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return [output.detach() for output in outputs], filled


def round_once(tensor: Tensor, seed: int) -> Tensor:
    """Move each value by one rounding of its dtype, up or down, in float64."""
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, tensor.shape, generator=generator).to(tensor.device) - 1
    return tensor.double() * (1 + signs * torch.finfo(tensor.dtype).eps)


def compare(
    function: Callable[..., Any],
    oracle: Callable[..., Any],
    inputs: list[Tensor],
    case_seed: int,
    grad_layout: str,
    names: list[str],
) -> list[Tensor]:
    """Apply the 2x rule to the outputs and gradients of `function`, and return them.

    `oracle` is the reference of the function.
    """

    def run(call: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
        outputs, grads = gradients(call, tensors, case_seed, grad_layout)
        return outputs + grads

    actuals = run(function, inputs)
    results = zip(
        names,
        actuals,
        run(oracle, inputs),
        run(oracle, [tensor.double() for tensor in inputs]),
        run(oracle, [round_once(tensor, case_seed) for tensor in inputs]),
        strict=True,
    )
    for name, actual, plain, exact, rounded in results:
        assert actual.dtype == inputs[0].dtype, name
        assert_agrees(name, actual, plain, exact, rounded)
    return actuals


LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout (for "expanded" those of the first batch row).

    To be called on the device of the test: what moves to another loses its layout.
    """
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([tensor, torch.full_like(tensor, float("nan"))], dim=-1)[..., 0]
    if layout == "offset":
        padded = torch.cat([tensor.new_full((3,), float("nan")), tensor.reshape(-1)])
        return padded[3:].view(tensor.shape)
    if layout == "expanded" and tensor.shape[0] > 0:
        return tensor[:1].expand(tensor.shape)
    return tensor


@dataclass(frozen=True)
class RoutingCase:
    """One drawn call of a routing operator."""

    B: int
    I: int
    P: int
    J: int
    D: int
    iterations: int
    gradient: str
    has_prior: bool
    dtype: torch.dtype
    scale: float
    layout: str
    grad_layout: str
    seed: int

    def random(self, *shape: int) -> Tensor:
        """Normal values that the case's dtype holds exactly."""
        generator = torch.Generator().manual_seed(self.seed + len(shape))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def capsules(self, device: torch.device) -> list[Tensor]:
        """u and weight [, prior]; the weight so that votes have about the length of `scale`."""
        u = self.random(self.B, self.I, self.P)
        weight = self.random(self.I, self.P, self.J, self.D) * (self.scale / self.P**0.5)
        return [
            with_layout(u.to(device), self.layout),
            with_layout(weight.to(device), self._layout_of_shared),
            *self._prior(device),
        ]

    def votes(self, device: torch.device) -> list[Tensor]:
        """u_hat [, prior]."""
        u_hat = self.random(self.B, self.I, self.J, self.D) * self.scale
        return [with_layout(u_hat.to(device), self.layout), *self._prior(device)]

    def _prior(self, device: torch.device) -> list[Tensor]:
        if not self.has_prior:
            return []
        return [with_layout(self.random(self.I, self.J).to(device), self._layout_of_shared)]

    @property
    def _layout_of_shared(self) -> str:
        """That of what has no batch to expand."""
        return "strided" if self.layout == "expanded" else self.layout


def routed(
    function: Callable[..., Any], case: RoutingCase, with_coupling: bool
) -> Callable[..., Any]:
    """`function` with the options of `case`, and the prior as its last positional input."""

    def call(*inputs: Tensor) -> Any:
        prior = inputs[-1] if case.has_prior else None
        tensors = inputs[:-1] if case.has_prior else inputs
        return function(
            *tensors,
            case.iterations,
            prior=prior,
            gradient=case.gradient,
            return_coupling=with_coupling,
        )

    return call


def sizes(largest: int) -> st.SearchStrategy[int]:
    """Sizes of an axis: often 1, a power of two, or one beside it."""
    edges = sorted({1, *(size for e in range(1, 8) for size in (2**e - 1, 2**e, 2**e + 1))})
    return st.sampled_from([e for e in edges if e <= largest]) | st.integers(1, largest)


def routing_cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> st.SearchStrategy[RoutingCase]:
    """Calls of a routing operator; small, as the interpreter takes a millisecond a program."""
    small = _operators.INTERPRETED
    return st.builds(
        RoutingCase,
        B=sizes(5 if small else 33),
        I=sizes(33 if small else 129),
        P=sizes(9),
        J=sizes(9 if small else 17),
        D=sizes(9 if small else 17),
        iterations=st.integers(1, 4),
        gradient=st.sampled_from(["full", "last"]),
        has_prior=st.booleans(),
        dtype=st.sampled_from(dtypes),
        scale=st.sampled_from([0.1, 1.0]),
        layout=st.sampled_from(LAYOUTS),
        grad_layout=st.sampled_from(LAYOUTS),
        seed=st.integers(0, 2**16),
    )
