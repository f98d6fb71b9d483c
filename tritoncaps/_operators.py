"""Registration of the capsule operators with torch, and the one rule that chooses the backend.

Each operator is opaque to the compiler: one node in a graph and one boundary per routing call,
whatever happens inside. It has a schema, a fake implementation (shapes and dtypes alone), an
autograd formula whose backward is an operator too, and an autocast rule (16-bit inputs are raised
to float32: agreement adds up products over iterations, and half precision loses them).

The backends `tritoncaps.kernels` and `tritoncaps._torch_path` hold functions of the same names and
signatures: `<op>_fwd` and `<op>_bwd`.
"""

import math
import os
import warnings
from contextlib import suppress
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tritoncaps import _torch_path
from tritoncaps._torch_path import accumulation_dtype

# Read once: Triton itself decides at import whether its kernels are interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "False")


@cache
def _kernels() -> ModuleType | None:
    """The Triton kernels, or None on a platform that has no Triton."""
    try:
        return import_module("tritoncaps.kernels")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return None
        raise


_said: dict[str, object] = {}


def _say_once(message: str) -> None:
    """Warn, but not again of the same: of threads that come at once, the first does."""
    token = object()
    if _said.setdefault(message, token) is token:
        try:
            warnings.warn(message, stacklevel=2)
        except Warning:  # a filter makes it an error, which it then is every time
            del _said[message]
            raise


def _run(function: str, tensor: Tensor, *args: Any) -> Any:
    """Call `function` of the backend for `tensor`'s device.

    The rule: Triton kernels for CUDA and ROCm tensors, and for CPU tensors when TRITON_INTERPRET=1
    asks for it; the torch path for every other device, where Triton is missing, and for a shape
    that no launch configuration fits, which is said once. Autocast is off inside: what it casts, it
    has cast at the operator's boundary, and a backward may run where the forward did not.
    """
    device_type = tensor.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _run(function, tensor, *args)
    wants_kernels = tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")
    kernels = _kernels() if wants_kernels else None
    if kernels is not None:
        try:
            return getattr(kernels, function)(*args)
        except kernels.REFUSALS as reason:
            _say_once(f"{function} runs without its Triton kernel: {reason}")
    return getattr(_torch_path, function)(*args)


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _set_autocast(operator: Any) -> None:
    for device_type in ("cpu", "cuda", "mps", "xpu"):
        if torch.amp.is_autocast_available(device_type):
            # Before torch 2.13 there were rules for "cpu" and "cuda" alone.
            with suppress(ValueError):
                operator.register_autocast(device_type, torch.float32)


# squash -------------------------------------------------------------------------------------------


@torch.library.custom_op("tritoncaps::squash", mutates_args=())
def squash(s: Tensor) -> Tensor:
    """Squash along the last axis, (..., D)."""
    return _run("squash_fwd", s, _as_rows(s)).view(s.shape)


@torch.library.custom_op("tritoncaps::squash_backward", mutates_args=())
def squash_backward(grad_v: Tensor, s: Tensor) -> Tensor:
    """Gradient of squash along the last axis, (..., D)."""
    return _run("squash_bwd", s, _as_rows(grad_v), _as_rows(s)).view(s.shape)


def _as_rows(s: Tensor) -> Tensor:
    """(..., D) → (N, D); not reshape(-1, D), since of D = 0 there may be any number."""
    return s.reshape(math.prod(s.shape[:-1]), s.shape[-1])


squash.register_fake(_contiguous_like)


@squash_backward.register_fake
def _(grad_v: Tensor, s: Tensor) -> Tensor:
    return _contiguous_like(s)


squash.register_autograd(
    lambda ctx, grad_v: squash_backward(grad_v, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
_set_autocast(squash)


# prediction vectors -------------------------------------------------------------------------------


@torch.library.custom_op("tritoncaps::prediction_vectors", mutates_args=())
def prediction_vectors(u: Tensor, weight: Tensor) -> Tensor:
    """û, (B, I, P), (I, P, J, D) → (B, I, J, D)."""
    return _run("prediction_vectors_fwd", u, u, weight)


@torch.library.custom_op("tritoncaps::prediction_vectors_backward", mutates_args=())
def prediction_vectors_backward(
    grad_u_hat: Tensor, u: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of u and of the weight."""
    return _run("prediction_vectors_bwd", u, grad_u_hat, u, weight)


@prediction_vectors.register_fake
def _(u: Tensor, weight: Tensor) -> Tensor:
    return u.new_empty(*u.shape[:2], *weight.shape[2:])


@prediction_vectors_backward.register_fake
def _(grad_u_hat: Tensor, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _contiguous_like(u), _contiguous_like(weight)


prediction_vectors.register_autograd(
    lambda ctx, grad_u_hat: prediction_vectors_backward(grad_u_hat, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
_set_autocast(prediction_vectors)


# dynamic routing ----------------------------------------------------------------------------------


@torch.library.custom_op("tritoncaps::dynamic_routing", mutates_args=())
def dynamic_routing(
    u_hat: Tensor, prior: Tensor | None, iterations: int, full: bool, return_coupling: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """v (B, J, D), the last coupling (B, I, J) or an empty tensor, every s⁽ᵗ⁾ (r, B, J, D)."""
    return _run("dynamic_routing_fwd", u_hat, u_hat, prior, iterations, return_coupling)


@torch.library.custom_op("tritoncaps::dynamic_routing_backward", mutates_args=())
def dynamic_routing_backward(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u_hat: Tensor,
    prior: Tensor | None,
    sums: Tensor,
    full: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of u_hat and of the prior (empty where there is none)."""
    grad_u_hat, grad_prior = _run(
        "dynamic_routing_bwd", u_hat, grad_v, grad_coupling, u_hat, prior, sums, full
    )
    return grad_u_hat, u_hat.new_empty(0) if grad_prior is None else grad_prior


def _fake_routing(
    like: Tensor, I: int, J: int, D: int, iterations: int, return_coupling: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B = like.shape[0]
    coupling = like.new_empty((B, I, J) if return_coupling else (0,))
    sums = like.new_empty((iterations, B, J, D), dtype=accumulation_dtype(like.dtype))
    return like.new_empty((B, J, D)), coupling, sums


@dynamic_routing.register_fake
def _(
    u_hat: Tensor, prior: Tensor | None, iterations: int, full: bool, return_coupling: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _, I, J, D = u_hat.shape
    return _fake_routing(u_hat, I, J, D, iterations, return_coupling)


@dynamic_routing_backward.register_fake
def _(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u_hat: Tensor,
    prior: Tensor | None,
    sums: Tensor,
    full: bool,
) -> tuple[Tensor, Tensor]:
    grad_prior = u_hat.new_empty(0) if prior is None else _contiguous_like(prior)
    return _contiguous_like(u_hat), grad_prior


def _grad_v_or_zeros(grad_v: Tensor | None, like: Tensor, sums: Tensor) -> Tensor:
    """Autograd gives None where the loss used the coupling alone."""
    return like.new_zeros(sums.shape[1:]) if grad_v is None else grad_v


def _save_dynamic_routing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u_hat, prior, _, full, return_coupling = inputs
    ctx.full, ctx.differentiate_coupling = full, full and return_coupling
    ctx.save_for_backward(u_hat, prior, output[2])
    ctx.set_materialize_grads(False)


def _dynamic_routing_gradient(
    ctx: Any, grad_v: Tensor | None, grad_coupling: Tensor | None, grad_sums: None
) -> tuple[Tensor | None, ...]:
    u_hat, prior, sums = ctx.saved_tensors
    grad_v = _grad_v_or_zeros(grad_v, u_hat, sums)
    grad_u_hat, grad_prior = dynamic_routing_backward(
        grad_v, grad_coupling if ctx.differentiate_coupling else None, u_hat, prior, sums, ctx.full
    )
    return grad_u_hat, None if prior is None else grad_prior, None, None, None


dynamic_routing.register_autograd(_dynamic_routing_gradient, setup_context=_save_dynamic_routing)
_set_autocast(dynamic_routing)


# capsule routing ----------------------------------------------------------------------------------


@torch.library.custom_op("tritoncaps::fused_dynamic_routing", mutates_args=())
def fused_dynamic_routing(
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    iterations: int,
    full: bool,
    return_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """v (B, J, D), the last coupling (B, I, J) or an empty tensor, every s⁽ᵗ⁾ (r, B, J, D)."""
    return _run("fused_dynamic_routing_fwd", u, u, weight, prior, iterations, return_coupling)


@torch.library.custom_op("tritoncaps::fused_dynamic_routing_backward", mutates_args=())
def fused_dynamic_routing_backward(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    sums: Tensor,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, of the weight and of the prior (empty where there is none)."""
    grad_u, grad_weight, grad_prior = _run(
        "fused_dynamic_routing_bwd", u, grad_v, grad_coupling, u, weight, prior, sums, full
    )
    return grad_u, grad_weight, u.new_empty(0) if grad_prior is None else grad_prior


@fused_dynamic_routing.register_fake
def _(
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    iterations: int,
    full: bool,
    return_coupling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    I, _, J, D = weight.shape
    return _fake_routing(u, I, J, D, iterations, return_coupling)


@fused_dynamic_routing_backward.register_fake
def _(
    grad_v: Tensor,
    grad_coupling: Tensor | None,
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    sums: Tensor,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_prior = u.new_empty(0) if prior is None else _contiguous_like(prior)
    return _contiguous_like(u), _contiguous_like(weight), grad_prior


def _save_fused_dynamic_routing(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    u, weight, prior, _, full, return_coupling = inputs
    ctx.full, ctx.differentiate_coupling = full, full and return_coupling
    ctx.save_for_backward(u, weight, prior, output[2])
    ctx.set_materialize_grads(False)


def _fused_dynamic_routing_gradient(
    ctx: Any, grad_v: Tensor | None, grad_coupling: Tensor | None, grad_sums: None
) -> tuple[Tensor | None, ...]:
    u, weight, prior, sums = ctx.saved_tensors
    grad_v = _grad_v_or_zeros(grad_v, u, sums)
    grad_u, grad_weight, grad_prior = fused_dynamic_routing_backward(
        grad_v,
        grad_coupling if ctx.differentiate_coupling else None,
        u,
        weight,
        prior,
        sums,
        ctx.full,
    )
    return grad_u, grad_weight, None if prior is None else grad_prior, None, None, None


fused_dynamic_routing.register_autograd(
    _fused_dynamic_routing_gradient, setup_context=_save_fused_dynamic_routing
)
_set_autocast(fused_dynamic_routing)
