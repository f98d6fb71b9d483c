"""The gate: a result is compared with the reference in float64 before anything is timed."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.rivals import Rival
from tritoncaps._operators import _dispatch
from tritoncaps.testing import assert_agrees

# The largest error of the eager form, as a share of the largest value. With a larger error,
# nothing can be judged by it.
_LIMIT = {
    torch.float64: 1e-10,
    torch.float32: 1e-3,
    torch.float16: 0.05,
    torch.bfloat16: 0.2,
}
# The reference is evaluated for a few images at a time, whose û has this many bytes.
_SLICE_BYTES = 1 << 28


class WrongResultError(Exception):
    """A result is further from the exact one than rounding explains."""


class FallbackError(RuntimeError):
    """A kernel refused a shape, and the operator fell back to the torch path."""


def gradients(
    function: Rival, arguments: Mapping[str, Tensor], grads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Call a rival. Return its outputs, and the gradients of its inputs as "grad_<input>".

    Args:
        function: the rival.
        arguments: its tensors by name.
        grads: the gradients of the outputs, by the names of the outputs.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    outputs = dict(zip(grads, function(**leaves), strict=True))
    used = [name for name, output in outputs.items() if output.requires_grad]
    found = torch.autograd.grad(
        [outputs[name] for name in used],
        list(leaves.values()),
        [grads[name] for name in used],
        materialize_grads=True,
    )
    results = {name: output.detach() for name, output in outputs.items()}
    return results | {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}


class Oracle:
    """The exact results of a case, computed once, and the 2x rule (`testing.assert_agrees`)."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.arguments = case.arguments(device)
        self.grads = case.output_gradients(device)
        self._exact = self._evaluate(case, torch.float64)
        self._eager = self._evaluate(case, case.dtype)
        for name in self._exact:
            error = self.relative_error(name)
            if not error <= _LIMIT[case.dtype]:
                raise WrongResultError(
                    f"{case}: the eager form is off in {name} by {error:.3g} of the largest value, "
                    f"more than {_LIMIT[case.dtype]:.3g}"
                )

    def _evaluate(self, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
        """Evaluate the reference in a dtype, by slices of the batch, because û may be large."""
        function = case.operator.bound(case.options, case.operator.reference)
        rows = max(1, _SLICE_BYTES // (8 * case.votes))
        parts: list[dict[str, Tensor]] = []
        for start in range(0, case.B, rows):
            cut = slice(start, start + rows)
            arguments = {
                name: (tensor if name in case.shared else tensor[cut]).to(dtype)
                for name, tensor in self.arguments.items()
            }
            grads = {name: grad[cut].to(dtype) for name, grad in self.grads.items()}
            parts.append(gradients(function, arguments, grads))
        of_shared = {f"grad_{name}" for name in case.shared}
        return {
            # Each image adds to the gradients of the inputs that all images share.
            name: sum((p[name].double() for p in parts[1:]), parts[0][name].double()).to(dtype)
            if name in of_shared
            else torch.cat([p[name] for p in parts])
            for name in parts[0]
        }

    def relative_error(self, name: str, result: Tensor | None = None) -> float:
        """The largest error of a result (the eager one if None) divided by the largest value."""
        exact = self._exact[name]
        error = _largest((self._eager[name] if result is None else result).double() - exact)
        scale = _largest(exact)
        if error == 0:
            return 0.0
        return error / scale if scale else math.inf

    def check(self, function: Rival) -> dict[str, float]:
        """Apply the rule to a rival's results with and without autograd, and to its gradients.

        Returns:
            The relative error of each.

        Raises:
            WrongResultError: one of them is off, or not finite.
            FallbackError: the operator left its kernel.
        """
        with _no_other_path():
            results = gradients(function, self.arguments, self.grads)
            with torch.no_grad():
                alone = dict(zip(self.grads, function(**self.arguments), strict=True))
        for name, result in alone.items():
            self._judge(f"{name} without autograd", name, result)
        for name, result in results.items():
            self._judge(name, name, result)
        return {name: self.relative_error(name, result) for name, result in results.items()}

    def _judge(self, title: str, name: str, result: Tensor) -> None:
        try:
            assert_agrees(title, result, self._eager[name], self._exact[name])
        except AssertionError as error:
            raise WrongResultError(str(error)) from None


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


@contextmanager
def _no_other_path() -> Iterator[None]:
    """Turn the warning about a fallback to the torch path into an error."""

    def refuse(message: str) -> None:
        raise FallbackError(message)

    with mock.patch.object(_dispatch, "_warn_once", refuse):
        yield
