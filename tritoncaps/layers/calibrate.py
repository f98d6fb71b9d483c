"""Scale the weights of capsule layers on a batch, so that a stack of any depth starts alive."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tritoncaps import _checks
from tritoncaps.layers.capsules import Capsules, capsule_lengths

# The lengths of competing outputs add up to at most this times the wanted mean length.
_MOST_OUTPUTS = 10
# How near to the wanted length is near enough, as a share of it.
_TOLERANCE = 0.01
_MOST_PASSES = 60
_LARGEST_STEP = 1e3
_DEAD = 1e-3


class Calibrated(NamedTuple):
    """What `calibrate` did to one layer: mean lengths before and after, factor of its weight."""

    name: str
    before: float
    after: float
    factor: float

    def __str__(self) -> str:
        """Return one line to print."""
        return (
            f"{self.name}: mean length {self.before:.3g} -> {self.after:.3g}, "
            f"weight times {self.factor:.3g}"
        )


class DeadLayer(NamedTuple):
    """A layer whose capsules are too short to learn."""

    name: str
    length: float


def calibrate(
    model: nn.Module, batch: Tensor | tuple[Any, ...], length: float = 0.5
) -> list[Calibrated]:
    """Scale the weights of a model's capsule layers until their outputs are `length` long.

    The squash squares short lengths, so capsules of 0.1 become 0.01 in the next layer. Long ones
    saturate. No rule for the weights is right at every depth, so this function measures, as LSUV
    does for plain layers. First layer to last, it scales the weight of each until the mean length
    of its outputs on this batch is `length`.

    Call it once, before training, where capsules are routed more than twice in series, or where the
    layers in front are not those of this package. `docs/initialisation.md` has the figures.

    Args:
        model: any module. Its capsule layers take part: `PrimaryCapsules`, `RoutedCapsules`, and
            every module with an attribute `calibrated_weight`, the name of a parameter. Its output
            is poses (..., D), `Capsules`, or a tuple that starts with one of them.
        batch: the argument of the model, or a tuple of its arguments. Some dozens of training
            images are enough.
        length: the mean length to reach, in (0, 1). A layer with more than 10 `out_capsules`
            reaches 10/`out_capsules` of it: its outputs compete, and cannot all be long.

    A frozen layer, whose weight has `requires_grad=False`, keeps it: its factor is 1.

    The model runs in the mode that it is in, train or eval. Nothing changes but the scaled weights:
    there are no gradients, and buffers (such as the statistics of batch normalisation) and torch's
    random state are put back. After an error the weights are the old ones. The same model, batch
    and random state give the same bits.

    Returns:
        A `Calibrated` for each layer, in the order in which they run.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `length` is not in (0, 1); the model has no capsule layer, or one that does not
            run or whose weight is no plain parameter; the outputs of a layer are not finite, or
            cannot get that long, as with a batch of zeros.

    Sources: Mishkin, Matas 2016 (LSUV, arXiv 1511.06422); Everett et al. 2023 (capsules that die in
    deep networks, arXiv 2305.11178).

    Example:
        >>> import torch
        >>> from tritoncaps.layers import RoutedCapsules, calibrate, capsule_lengths
        >>> _ = torch.manual_seed(0)
        >>> layers = [RoutedCapsules(10, 16, 10, 16) for _ in range(6)]
        >>> stack = torch.nn.Sequential(RoutedCapsules(128, 8, 10, 16), *layers)
        >>> u = torch.rand(32, 128, 8) / 3
        >>> print(f"{capsule_lengths(stack(u)).mean():.2f}")
        0.00
        >>> print(calibrate(stack, u)[-1].name)
        6
        >>> print(f"{capsule_lengths(stack(u)).mean():.2f}")
        0.50
    """
    _checks.check_number("calibrate", "length", length)
    if not 0 < length < 1:
        raise ValueError(f"calibrate: length must be in (0, 1), got {length}")
    probe = _Probe("calibrate", model, batch)
    before = probe.lengths()
    if not probe.layers:
        raise ValueError(
            f"calibrate: {type(model).__name__} has no capsule layer; one is RoutedCapsules, "
            "PrimaryCapsules or a module with the attribute calibrated_weight"
        )
    if idle := [name for name in probe.layers if name not in before]:
        raise ValueError(
            f"calibrate: model(batch) does not run {', '.join(idle)}; "
            "calibrate the part of the model that runs, or remove the rest"
        )
    weights = {name: probe.weight(name) for name in before}
    if shared := _shared(weights):
        raise ValueError(f"calibrate: {shared} share one weight; calibrate before you tie them")
    originals = {name: weight.detach().clone() for name, weight in weights.items()}

    def scale(name: str, factor: float) -> None:
        with torch.no_grad():
            weights[name].copy_(originals[name] * factor)

    factors = {}
    try:
        for name in before:
            if not weights[name].requires_grad:
                factors[name] = 1.0
                continue

            def measure(factor: float, name: str = name) -> float:
                scale(name, factor)
                return probe.lengths()[name]

            outputs = getattr(probe.layers[name], "out_capsules", 1)
            factors[name] = _search(name, measure, length * min(1.0, _MOST_OUTPUTS / outputs))
        after = probe.lengths()
    except BaseException:
        for name in before:
            scale(name, 1.0)
        raise
    return [Calibrated(name, before[name], after[name], factors[name]) for name in before]


def dead_layers(model: nn.Module, batch: Tensor | tuple[Any, ...]) -> list[DeadLayer]:
    """Return the capsule layers whose outputs on a batch have a mean length below 0.001.

    Such a stack does not learn: the next squash makes 1e-6 of 1e-3, and the gradient shrinks along.
    `calibrate` is the remedy. The model runs once, and nothing of it changes, as in `calibrate`.

    Args:
        model: any module. One without capsule layers has none that is dead.
        batch: the argument of the model, or a tuple of its arguments.

    Raises:
        TypeError: an argument has the wrong type.

    Example:
        >>> import torch
        >>> from tritoncaps.layers import RoutedCapsules, dead_layers
        >>> _ = torch.manual_seed(0)
        >>> stack = torch.nn.Sequential(*[RoutedCapsules(10, 16, 10, 16) for _ in range(2)])
        >>> [layer.name for layer in dead_layers(stack, 0.01 * torch.rand(4, 10, 16))]
        ['0', '1']
    """
    probe = _Probe("dead_layers", model, batch)
    return [DeadLayer(name, mean) for name, mean in probe.lengths().items() if not mean >= _DEAD]


def _shared(weights: Mapping[str, nn.Parameter]) -> str:
    """Return the names of layers that have the same weight, if there are any."""
    seen: dict[int, str] = {}
    for name, weight in weights.items():
        other = seen.setdefault(id(weight), name)
        if other != name:
            return f"{other} and {name}"
    return ""


def _search(name: str, measure: Callable[[float], float], length: float) -> float:
    """Return a factor of a layer's weight at which `measure`, its mean length, is `length`."""
    low, high = 0.0, math.inf
    shortest, longest, factor = math.inf, 0.0, 1.0
    for _ in range(_MOST_PASSES):
        mean = measure(factor)
        if not math.isfinite(mean):
            raise ValueError(
                f"calibrate: the outputs of {name} are not finite (mean length {mean}); "
                "check the batch and the layers before it"
            )
        shortest, longest = min(shortest, mean), max(longest, mean)
        if abs(mean - length) <= _TOLERANCE * length:
            return factor
        if mean == 0:
            raise ValueError(
                f"calibrate: {name} returns capsules of length 0 on this batch, and no weight "
                "makes them longer; its inputs are 0, or nearly: check the batch and the layers "
                "before it"
            )
        low, high = (factor, high) if mean < length else (low, factor)
        if high < math.inf and low > 0:
            factor = math.sqrt(low * high)
        else:
            # Short lengths grow with the square of the weight.
            step = math.sqrt(length / mean)
            factor *= min(max(step, 1.25), _LARGEST_STEP) if step > 1 else min(step, 0.8)
    found, remedy = f"longest found is {longest:.3g}", "give a smaller length"
    if shortest > length:
        found, remedy = f"shortest found is {shortest:.3g}", "give a larger length, or no bias"
    raise ValueError(
        f"calibrate: the outputs of {name} cannot have a mean length of {length:.3g} on this "
        f"batch, the {found}; {remedy}"
    )


class _Probe:
    """Runs a model on a batch and reads the mean lengths of its capsule layers."""

    def __init__(self, function: str, model: nn.Module, batch: Tensor | tuple[Any, ...]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{function}: model must be a module, got {type(model).__name__}")
        if not isinstance(batch, (Tensor, tuple)):
            raise TypeError(
                f"{function}: batch must be a tensor or a tuple of arguments, "
                f"got {type(batch).__name__}"
            )
        self.function, self.model = function, model
        # `Capsules` is a tuple too, but one argument.
        self.arguments = batch if type(batch) is tuple else (batch,)
        self.layers = {
            name or type(module).__name__: module
            for name, module in model.named_modules()
            if hasattr(module, "calibrated_weight")
        }

    def weight(self, name: str) -> nn.Parameter:
        """Return the parameter that scales a layer's prediction vectors or poses."""
        layer: Any = self.layers[name]
        try:
            return layer.get_parameter(layer.calibrated_weight)
        except AttributeError:
            raise ValueError(
                f"{self.function}: {layer.calibrated_weight} of {name} is not a plain parameter; "
                "calibrate before you parametrise, prune or quantise it"
            ) from None

    def lengths(self) -> dict[str, float]:
        """Run the model once; return mean lengths by layer, in the order of their first call.

        The length of a layer that is called several times is the mean over its calls.
        """
        if not self.layers:
            return {}
        found: dict[str, list[Tensor]] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, inputs, output: found.setdefault(name, []).append(_length(output))

        handles = [layer.register_forward_hook(keep(name)) for name, layer in self.layers.items()]
        # Weights that autocast has cast before would hide the new scale.
        torch.clear_autocast_cache()
        # Code that was compiled before would not call the hooks.
        is_compiled = "torch._dynamo" in sys.modules
        eager = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
        try:
            with torch.no_grad(), _unchanged(self.model), eager:
                self.model(*self.arguments)
        finally:
            for handle in handles:
                handle.remove()
        return {name: torch.stack(calls).mean().item() for name, calls in found.items()}


def _length(output: Any) -> Tensor:
    """Return the mean length of a layer's capsules: of poses, `Capsules`, or a tuple's first."""
    if isinstance(output, Capsules):
        return output.activations.float().mean()
    poses = output[0] if isinstance(output, tuple) else output
    return capsule_lengths(poses.float()).mean()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back the model's buffers and torch's random state."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    gpus = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(gpus, device_type="cuda"):
        try:
            yield
        finally:
            for module, name, buffer, saved in buffers:
                buffer.copy_(saved)
                setattr(module, name, buffer)
