"""The operator table: each operator is declared once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tritoncaps import ops, reference
from tritoncaps._operators.conv_dynamic_routing import conv_dynamic_routing
from tritoncaps._operators.conv_em_routing import conv_em_routing
from tritoncaps._operators.dynamic_routing import dynamic_routing
from tritoncaps._operators.em_routing import em_routing
from tritoncaps._operators.fused_dynamic_routing import fused_dynamic_routing
from tritoncaps._operators.prediction_vectors import prediction_vectors
from tritoncaps._operators.routing_pass import routing_pass
from tritoncaps._operators.squash import squash

# One small size for each axis. Those of vectors all differ, so that mixing up two axes shows. Grids
# and matrices have some of the same sizes, to stay small. Drawn cases have others.
SIZES: Mapping[str, int] = {
    **{"B": 3, "I": 9, "P": 4, "J": 5, "D": 6},
    **{"R": 2, "Q": 3, "H": 4, "W": 5, "C": 3, "K": 2},
}


@dataclass(frozen=True)
class Operator:
    """One row of the table.

    Args:
        function: what a user calls, with the inputs and the options by name.
        reference: the same in plain torch, with the same arguments. In float64 it counts as exact.
        inputs: the axes of each tensor, {"u": "B I P", "prior?": "I J"}. An input whose name ends
            in "?" may be left out. If there is a batch, "B" comes first.
        outputs: the axes of each result. A result whose name ends in "?", such as "coupling?", is
            returned if an option is true, here `return_coupling`.
        options: the values that tests draw for each other argument. The first is the usual one.
        name: the name in messages. The default is the name of `function`.
        registered: the operators registered with torch, forward and backward, or None for a
            function composed of torch's own operators.
        domain: by input name, a function that maps normal numbers to valid values of the input.
        smallest: by axis, the smallest size that `cases` draws, if it is not 1. Where less leaves
            a gradient of nothing but cancelled roundings, no two forms agree on its digits.
        largest: by axis, the largest size that `cases` draws, where more is slow or does not fit.
        sensitive: by option or axis, values with which results magnify roundings so much that luck
            decides which of two forms is the more accurate. `cases` draws them in float64 alone.
        own_sizes: by axis, the small size in place of that in `SIZES`, where the letter means
            something else.
        sizes: by axis of a result that no input has, its size. It is a function of the sizes of
            the other axes and the options of a call.
        is_elementwise: whether any number of axes may stand before the last one, as for a squash;
            `inputs` are then those of the tests.
    """

    function: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    name: str = ""
    registered: Any = None
    domain: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    smallest: Mapping[str, int] = field(default_factory=dict)
    largest: Mapping[str, int] = field(default_factory=dict)
    sensitive: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    own_sizes: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, Callable[[Mapping[str, int], Mapping[str, Any]], int]] = field(
        default_factory=dict
    )
    is_elementwise: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.function.__name__)

    def __str__(self) -> str:
        return self.name

    @property
    def axes(self) -> dict[str, str]:
        """The axes of every input, by name without the "?"."""
        return {name.removesuffix("?"): axes for name, axes in self.inputs.items()}

    @property
    def optional(self) -> list[str]:
        """The inputs that may be left out."""
        return [name.removesuffix("?") for name in self.inputs if name.endswith("?")]

    @property
    def defaults(self) -> dict[str, Any]:
        """The usual value of each option."""
        return {name: values[0] for name, values in self.options.items()}

    @property
    def small_sizes(self) -> dict[str, int]:
        """A small size for each axis."""
        return {**SIZES, **self.own_sizes}

    def sensitive_names(self, sizes: Mapping[str, int], options: Mapping[str, Any]) -> list[str]:
        """The axes and options of a call whose values are listed as `sensitive`."""
        given = {**sizes, **options}
        return [name for name, values in self.sensitive.items() if given.get(name) in values]

    def output_names(self, options: Mapping[str, Any]) -> list[str]:
        """The names of what a call with these options returns."""
        names = ((name.removesuffix("?"), name.endswith("?")) for name in self.outputs)
        return [name for name, asked in names if not asked or options.get(f"return_{name}")]

    def output_shapes(
        self, inputs: Mapping[str, Tensor], options: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        """The shape of each result of a call."""
        sizes = {
            axis: size
            for name, tensor in inputs.items()
            for axis, size in zip(self.axes[name].split(), tensor.shape, strict=True)
        }
        return self.result_shapes(sizes, options)

    def result_shapes(
        self, sizes: Mapping[str, int], options: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        """The shape of each result of a call, from the sizes of the inputs' axes."""
        axes = {name.removesuffix("?"): of for name, of in self.outputs.items()}
        sizes = {**sizes, **{axis: size(sizes, options) for axis, size in self.sizes.items()}}
        return {
            name: tuple(sizes[axis] for axis in axes[name].split())
            for name in self.output_names(options)
        }

    def call(
        self,
        inputs: Mapping[str, Tensor],
        options: Mapping[str, Any],
        function: Callable[..., Any] | None = None,
    ) -> tuple[Tensor, ...]:
        """Call the function, or another with the same arguments. Always return a tuple."""
        result = (function or self.function)(**inputs, **options)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def bound(
        self, options: Mapping[str, Any], function: Callable[..., Any] | None = None
    ) -> Callable[..., tuple[Tensor, ...]]:
        """The operator with these options, as a function of its inputs by name."""

        def call(**inputs: Tensor) -> tuple[Tensor, ...]:
            return self.call(inputs, options, function)

        return call


def _with_target(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss as a function of only the activations. Image b shows class b mod K."""

    def call(activations: Tensor, **options: Any) -> Any:
        if not isinstance(activations, Tensor) or activations.ndim != 2:
            return loss(activations, torch.zeros(1, dtype=torch.int64), **options)
        B, K = activations.shape
        target = torch.arange(B, device=activations.device) % max(K, 1)
        return loss(activations, target, **options)

    return call


def _positions(axis: str) -> Callable[[Mapping[str, int], Mapping[str, Any]], int]:
    """The number of positions of a kernel along an axis of a grid."""

    def count(sizes: Mapping[str, int], options: Mapping[str, Any]) -> int:
        return (sizes[axis] + 2 * options["padding"] - sizes["K"]) // options["stride"] + 1

    return count


_GRID_SIZES = {"H'": _positions("H"), "W'": _positions("W")}
_CLASSES = {"K": 7}  # elsewhere K is the size of a kernel
_ROUTING_OPTIONS = {
    "iterations": (3, 1, 2, 4),
    "leaky": (False, True),
    "output": ("v", "s"),
    "gradient": ("full", "last"),
    "return_coupling": (False, True),
}
_ROUTING_OUTPUTS = {"v": "B J D", "coupling?": "B I J"}

# A second E-step and a saturated activation amplify roundings without bound. The gradients of a
# single β are single numbers.
_EM_SENSITIVE = {"iterations": (3,), "temperature": (0.5,), "J": (1,)}
_EM_OPTIONS = {
    "iterations": (2, 1, 3),
    "temperature": (None, 0.5),
    "min_variance": (1e-4,),
    "gradient": ("full", "last"),
    "return_logits": (False, True),
    "return_assignment": (False, True),
}

_ROWS = (
    Operator(
        ops.squash,
        reference.squash,
        inputs={"s": "B J D"},
        outputs={"v": "B J D"},
        options={"form": ("quadratic", "exponential")},
        registered=squash,
        is_elementwise=True,
    ),
    Operator(
        ops.prediction_vectors,
        reference.prediction_vectors,
        inputs=prediction_vectors.inputs,
        outputs=prediction_vectors.outputs,
        registered=prediction_vectors,
    ),
    Operator(
        ops.routing_pass,
        reference.routing_pass,
        inputs=routing_pass.inputs,
        outputs=routing_pass.outputs,
        options={"leaky": (False, True), "return_coupling": (False, True)},
        registered=routing_pass,
    ),
    Operator(
        ops.dynamic_routing,
        reference.dynamic_routing,
        inputs=dynamic_routing.inputs,
        outputs=_ROUTING_OUTPUTS,
        options=_ROUTING_OPTIONS,
        registered=dynamic_routing,
    ),
    Operator(
        ops.fused_dynamic_routing,
        reference.fused_dynamic_routing,
        inputs=fused_dynamic_routing.inputs,
        outputs=_ROUTING_OUTPUTS,
        options=_ROUTING_OPTIONS,
        registered=fused_dynamic_routing,
    ),
    Operator(
        ops.conv_dynamic_routing,
        reference.conv_dynamic_routing,
        inputs=conv_dynamic_routing.inputs,
        outputs={"v": "B H' W' J D", "coupling?": "B H' W' K K C J"},
        registered=conv_dynamic_routing,
        options={"stride": (2, 1), "padding": (0, 1), "votes": ("patch",), **_ROUTING_OPTIONS},
        # A kernel fits into the grid, and each patch holds more than padding.
        smallest={"H": 3, "W": 3, "K": 2},
        largest={"H": 5, "W": 5, "C": 4, "K": 3, "P": 9, "J": 9, "D": 9},
        sizes=_GRID_SIZES,
    ),
    Operator(
        ops.attention_routing,
        reference.attention_routing,
        inputs={"u": "B I P", "weight": "I P J D", "bias?": "I J"},
        outputs={"s": "B J D", "coupling?": "B I J"},
        options={"return_coupling": (False, True)},
    ),
    Operator(
        ops.inverted_attention_routing,
        reference.inverted_attention_routing,
        inputs={
            "u": "B I P",
            "weight": "I P J D",
            "pose?": "B J D",
            "norm_weight?": "D",
            "norm_bias?": "D",
        },
        outputs=_ROUTING_OUTPUTS,
        options={"iterations": (2, 1, 3), "return_coupling": (False, True)},
        # Of one prediction vector, the coupling changes only the length, and the normalisation
        # takes it off again. That of two components is ±1. The gradients of both are 0, but for
        # the term that is added to the variance.
        smallest={"I": 2, "D": 3},
    ),
    Operator(
        ops.em_routing,
        reference.em_routing,
        inputs={**em_routing.inputs, "offset?": "I R Q"},
        outputs={"v": "B J R Q", "a": "B J", "logits?": "B J", "assignment?": "B I J"},
        options=_EM_OPTIONS,
        registered=em_routing,
        domain={"activations": torch.sigmoid},
        sensitive=_EM_SENSITIVE,
    ),
    Operator(
        ops.conv_em_routing,
        reference.conv_em_routing,
        inputs=conv_em_routing.inputs,
        registered=conv_em_routing,
        outputs={
            "v": "B H' W' J R Q",
            "a": "B H' W' J",
            "logits?": "B H' W' J",
            "assignment?": "B H' W' K K C J",
        },
        options={
            **_EM_OPTIONS,
            "iterations": (2, 1),
            "stride": (1, 2),
            "padding": (0, 1),
            "competition": ("children", "position"),
        },
        domain={"activations": torch.sigmoid},
        smallest={"H": 3, "W": 3, "K": 2},
        sensitive=_EM_SENSITIVE,
        largest={"B": 3, "H": 5, "W": 6, "C": 3, "K": 3, "J": 5},
        sizes=_GRID_SIZES,
    ),
    Operator(
        ops.capsule_mixture_log_prob,
        reference.capsule_mixture_log_prob,
        inputs={
            "x": "B I D",
            "votes": "B I J D",
            "scales": "B I J",
            "mixing_logits": "B I J",
            "presence?": "B I",
        },
        outputs={"log_prob": "B", "posterior?": "B I J"},
        options={
            "normalize": (True, False),
            "dummy_logit": (-2 * math.log(10), 0.0),
            "dummy_log_prob": (-2 * math.log(10),),
            "return_posterior": (False, True),
        },
        domain={"scales": lambda x: x.sigmoid() + 0.5, "presence": torch.sigmoid},
    ),
    Operator(
        _with_target(ops.margin_loss),
        _with_target(reference.margin_loss),
        inputs={"activations": "B K"},
        outputs={"loss": "B"},
        options={"reduction": ("none",)},
        name="margin_loss",
        own_sizes=_CLASSES,
        domain={"activations": torch.sigmoid},
    ),
    Operator(
        _with_target(ops.spread_loss),
        _with_target(reference.spread_loss),
        inputs={"activations": "B K"},
        outputs={"loss": "B"},
        options={"reduction": ("none",)},
        name="spread_loss",
        own_sizes=_CLASSES,
        domain={"activations": torch.sigmoid},
        smallest={"K": 2},  # the only class spreads from none
    ),
)

OPERATORS: dict[str, Operator] = {row.name: row for row in _ROWS}
