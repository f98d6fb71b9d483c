"""Drawing the inputs of an operator: sizes, values, memory layouts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritoncaps._operators._dispatch import INTERPRETED
from tritoncaps.testing._table import Operator

if TYPE_CHECKING:
    from hypothesis import strategies as st

# Triton's interpreter adds the bit patterns of bfloat16, so 16-bit types need real hardware.
DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
if not INTERPRETED:
    DTYPES += (torch.float16, torch.bfloat16)

LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")

# The largest sizes that are drawn. The interpreter takes about a millisecond per program.
_LARGEST = {"B": 33, "I": 129, "P": 9, "J": 17, "D": 17, "R": 4, "Q": 5}
_LARGEST_INTERPRETED = {"B": 5, "I": 33, "P": 9, "J": 9, "D": 9, "R": 4, "Q": 5}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that depend only on the shape and the seed, not on the dtype."""
    generator = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def draw_inputs(
    operator: Operator,
    sizes: Mapping[str, int] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    scale: float = 1.0,
    layout: str = "contiguous",
    optional: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Draw the inputs of a call by name.

    A tensor without a batch that is contracted over P, such as a weight, is divided by √P, so that
    prediction vectors are about `scale` times as long as the input capsules.

    Args:
        operator: the operator to call.
        sizes: the size of each axis. None takes `operator.small_sizes`.
        dtype: the dtype of all tensors. Their values are exact in both float64 and this type.
        device: where to put the tensors.
        seed: chooses the values.
        scale: a factor for the prediction vectors.
        layout: one of `LAYOUTS`. "expanded" repeats the first image, and makes tensors without a
            batch strided.
        optional: the optional inputs to draw, by name. None draws all.
    """
    wanted = operator.optional if optional is None else optional
    sizes = operator.small_sizes if sizes is None else sizes
    inputs = {}
    for number, (name, axes) in enumerate(operator.axes.items()):
        if name in operator.optional and name not in wanted:
            continue
        named = axes.split()
        # Two inputs of one shape, such as prior and bias, must not hold the same numbers.
        tensor = normal(*(sizes[axis] for axis in named), seed=seed + (number << 20))
        if name in operator.domain:
            tensor = operator.domain[name](tensor)
        elif "B" not in named and "P" in named:
            tensor = tensor * (scale / max(sizes["P"], 1) ** 0.5)
        elif "I" in named and "D" in named:
            tensor = tensor * scale
        how = "strided" if layout == "expanded" and "B" not in named else layout
        inputs[name] = with_layout(tensor.to(dtype).to(device), how)
    return inputs


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """Return the same values in another memory layout. "expanded" repeats those of the first row.

    Call it on the tensor's final device: a copy to another device loses the layout.
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
class Case:
    """One drawn call of an operator."""

    sizes: Mapping[str, int]
    options: Mapping[str, Any]
    optional: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    scale: float = 1.0
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    seed: int = 0

    def inputs(self, operator: Operator, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Draw the tensors of the call."""
        return draw_inputs(
            operator,
            self.sizes,
            dtype=self.dtype,
            device=device,
            seed=self.seed,
            scale=self.scale,
            layout=self.layout,
            optional=self.optional,
        )


def cases(operator: Operator, dtypes: Sequence[torch.dtype] = DTYPES) -> st.SearchStrategy[Case]:
    """Draw calls of an operator with hypothesis: sizes, options, dtypes, layouts."""
    from hypothesis import strategies as st

    largest = _LARGEST_INTERPRETED if INTERPRETED else _LARGEST
    axes = sorted({axis for named in operator.axes.values() for axis in named.split()})

    def sizes(axis: str) -> st.SearchStrategy[int]:
        most = largest.get(axis, 17)
        return _sizes(operator.smallest.get(axis, 1), min(most, operator.largest.get(axis, most)))

    def some(names: Sequence[str]) -> st.SearchStrategy[tuple[str, ...]]:
        return st.tuples(*(st.booleans() for _ in names)).map(
            lambda kept: tuple(n for n, keep in zip(names, kept, strict=True) if keep)
        )

    drawn = st.builds(
        Case,
        sizes=st.fixed_dictionaries({axis: sizes(axis) for axis in axes}),
        options=st.fixed_dictionaries(
            {name: st.sampled_from(values) for name, values in operator.options.items()}
        ),
        optional=some(operator.optional),
        dtype=st.sampled_from(dtypes),
        scale=st.sampled_from([0.1, 1.0]),
        layout=st.sampled_from(LAYOUTS),
        grad_layout=st.sampled_from(LAYOUTS),
        seed=st.integers(0, 2**16),
    )
    return drawn.map(lambda case: _decidable(operator, case))


def _decidable(operator: Operator, case: Case) -> Case:
    """Replace values that are too sensitive for the precision of a case."""
    if case.dtype == torch.float64:
        return case
    options, sizes = dict(case.options), dict(case.sizes)
    for name in operator.sensitive_names(sizes, options):
        if name in sizes:
            sizes[name] = operator.small_sizes[name]
        else:
            values = operator.sensitive[name]
            options[name] = next(v for v in operator.options[name] if v not in values)
    return replace(case, sizes=sizes, options=options)


def _sizes(smallest: int, largest: int) -> st.SearchStrategy[int]:
    """Sizes of an axis: often 1, a power of two, or a neighbour of one."""
    from hypothesis import strategies as st

    edges = sorted({1, *(size for e in range(1, 8) for size in (2**e - 1, 2**e, 2**e + 1))})
    some = st.sampled_from([e for e in edges if smallest <= e <= largest])
    return some | st.integers(smallest, largest)
