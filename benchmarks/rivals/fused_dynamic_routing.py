"""The broadcast form and, on a device with kernels, the torch path of tritoncaps."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.rivals import dynamic_routing, prediction_vectors
from tritoncaps import _torch_path


def broadcast(u: Tensor, weight: Tensor, iterations: int, **_: Any) -> Tensor:
    """Route with broadcast products, as most implementations do."""
    u_hat = prediction_vectors.broadcast(u, weight)
    b = torch.zeros_like(u_hat[..., :1])  # (B, I, J, 1)
    for iteration in range(iterations):
        c = b.softmax(dim=2)
        v = squash((c * u_hat).sum(dim=1, keepdim=True))  # (B, 1, J, D)
        if iteration < iterations - 1:
            b = b + (u_hat * v).sum(dim=-1, keepdim=True)
    return v.squeeze(1)


def squash(s: Tensor) -> Tensor:
    """Squash as most implementations do."""
    length = s.norm(dim=-1, keepdim=True)
    return length / (1 + length**2) * s


def torch_path(u: Tensor, weight: Tensor, iterations: int, **_: Any) -> Tensor:
    """Route by the torch path of tritoncaps where `tritoncaps.ops` would run the kernels."""
    return _TorchPath.apply(u, weight, iterations)


class _TorchPath(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, iterations: int) -> Tensor:
        v, _, sums = _torch_path.fused_dynamic_routing_fwd(
            u, weight, None, None, iterations, False, "v", False
        )
        ctx.save_for_backward(u, weight, sums)
        return v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, sums = ctx.saved_tensors
        grad_u, grad_weight, *_ = _torch_path.fused_dynamic_routing_bwd(
            grads[0], None, u, weight, None, None, sums, False, "full", "v"
        )
        return grad_u, grad_weight, None


RIVALS = {"broadcast": broadcast, "torch path": torch_path}


def flops(case: Case, phase: str) -> int:
    """Count a routing without û in memory, which recomputes û in each iteration."""
    (I, P, J, D), r = case.shape, case.iterations
    product = 2 * case.B * I * J * D
    project = P * product  # û = W u; du or dW takes as much
    loop = dynamic_routing.flops(case, phase)
    if phase == "forward":
        # The sum of the first iteration is part of the product that gives û.
        return r * project + loop - product
    # û is computed once for each iteration but the first and once for dû. Then come du and dW.
    return (r + 2) * project + loop
