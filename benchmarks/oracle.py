"""The gate: nothing is timed before its result has been compared with the reference in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.cases import SHARED, Case, train_images
from benchmarks.rivals import EinsumCapsNet, Rival, einsum_loss, tritoncaps_loss
from tritoncaps import _operators, reference
from tritoncaps.models import CapsNet

# An eager form whose own error is beyond this share of the largest value measures nothing.
_LIMIT = {
    torch.float64: 1e-10,
    torch.float32: 1e-3,
    torch.float16: 0.05,
    torch.bfloat16: 0.2,
}
# The float64 reference is evaluated over so many bytes of û at a time.
_SLICE_BYTES = 1 << 28


class WrongResultError(Exception):
    """A result that is further from the truth than rounding explains."""


class FallbackError(RuntimeError):
    """An operator went to the torch path, because its kernel refused."""


def gradients(function: Rival, arguments: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Call a rival; returns "out" and the gradient of each floating-point argument."""
    leaves = {
        name: tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in arguments.items()
    }
    out = function(**leaves)
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    grads = torch.autograd.grad(out, [leaves[name] for name in names], grad)
    return {"out": out.detach(), **{f"grad_{n}": g for n, g in zip(names, grads, strict=True)}}


class Oracle:
    """The truth of a case, computed once, and how far from it a result may be.

    Flash-attention's rule: a result may be off by twice the error of the eager reference in the
    same precision, plus a few units in the last place of the largest value.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.arguments = case.arguments(device)
        self.grad = case.output_gradient(device)
        self._expected = self._evaluate(case, torch.float64)
        eager = self._evaluate(case, case.dtype)
        self._allowed = {}
        for name, expected in self._expected.items():
            scale, error = _largest(expected), _largest(eager[name] - expected)
            limit = _LIMIT[case.dtype] * scale
            if not error <= limit:
                raise WrongResultError(f"{case}: the eager reference itself is off in {name}")
            budget = 2 * error + 8 * torch.finfo(case.dtype).eps * scale
            # In float64 the eager reference is the truth, and shows no error to go by.
            self._allowed[name] = limit if case.dtype == torch.float64 else budget

    def _evaluate(self, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
        """Evaluate the eager reference in a dtype, over slices of the batch: û may be large."""
        I, _, J, D = case.shape
        rows = max(1, _SLICE_BYTES // (8 * I * J * D))
        function = partial(getattr(reference, case.op), **case.options)
        parts: list[dict[str, Tensor]] = []
        for start in range(0, case.B, rows):
            cut = slice(start, start + rows)
            arguments = {
                name: tensor if name in SHARED else tensor[cut]
                for name, tensor in self.arguments.items()
            }
            arguments = {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in arguments.items()
            }
            part = gradients(function, arguments, self.grad[cut].to(dtype))
            parts.append({name: tensor.double() for name, tensor in part.items()})
        return {
            # Every image adds to the gradient of what they share.
            name: sum((part[name] for part in parts[1:]), parts[0][name])
            if name.removeprefix("grad_") in SHARED
            else torch.cat([part[name] for part in parts])
            for name in parts[0]
        }

    def check(self, function: Rival) -> dict[str, float]:
        """Compare a rival's result, its gradients, and its result without gradients.

        Returns:
            The error of each tensor, as a share of what is allowed.

        Raises:
            WrongResultError: one of them is off, or not finite.
        """
        with _no_other_path():
            results = gradients(function, self.arguments, self.grad)
            with torch.no_grad():
                results["out without gradients"] = function(**self.arguments)
        shares = {}
        for name, result in results.items():
            source = "out" if name.startswith("out") else name
            expected, allowed = self._expected[source], self._allowed[source]
            if result.shape != expected.shape:
                raise WrongResultError(
                    f"{name} has the shape {tuple(result.shape)}, not {tuple(expected.shape)}"
                )
            error = _largest(result.double() - expected)
            if not error <= allowed:  # NaN is never within
                raise WrongResultError(f"{name} is off by {error:.3g}, allowed are {allowed:.3g}")
            shares[name] = error / allowed if allowed else 0.0
        return shares


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


@contextmanager
def _no_other_path() -> Iterator[None]:
    """Make it an error when an operator falls back from its kernel to the torch path."""

    def refuse(message: str) -> None:
        raise FallbackError(message)

    with mock.patch.object(_operators, "_say_once", refuse):
        yield


def check_networks() -> None:
    """Compare the einsum port with `CapsNet` in float64 on the CPU: one loss, one gradient.

    Raises:
        WrongResultError: they are not the same network.
    """
    torch.manual_seed(0)
    model = CapsNet().double()
    port = EinsumCapsNet().double()
    port.copy_weights(model)
    images, target = train_images(2, torch.device("cpu"))
    losses: list[Tensor] = []
    totals: list[Tensor] = []
    for network, loss_of in ((port, einsum_loss), (model, tritoncaps_loss)):
        loss = loss_of(network, images.double(), target)
        torch.autograd.backward(loss)
        losses.append(loss.detach())
        totals.append(torch.stack([_sum_of_squares(p) for p in network.parameters()]).sum())
    for name, (theirs, own) in {"loss": losses, "squared gradients": totals}.items():
        if not abs(theirs - own) <= 1e-9 * abs(own):
            raise WrongResultError(f"the einsum port's {name}: {theirs:.12g}, CapsNet's {own:.12g}")


def _sum_of_squares(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.square().sum()
