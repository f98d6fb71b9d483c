"""What tritoncaps is measured against: the forms in which others write the same mathematics.

Every rival of an operator is a function of the operator's tensors by name. To add one, write it
here and name it in `op_rivals`; the oracle checks it before it is timed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import Case
from tritoncaps import _operators, _torch_path, ops, reference
from tritoncaps.models import CapsNet

Rival = Callable[..., Tensor]


def ours(device: torch.device) -> str:
    """Name the path that `tritoncaps.ops` takes on a device."""
    return "triton" if device.type == "cuda" or _operators.INTERPRETED else "torch path"


def rival_names(op: str, device: torch.device) -> list[str]:
    """List the rivals of an operator, tritoncaps last."""
    names = ["eager", "compile"]
    if op in _BROADCAST:
        names.append("broadcast")
    if op == "fused_dynamic_routing" and ours(device) != "torch path":
        names.append("torch path")
    return [*names, ours(device)]


def op_rival(name: str, case: Case, device: torch.device) -> Rival:
    """Build one rival of an operator."""
    if name == "eager":
        return partial(getattr(reference, case.op), **case.options)
    if name == "compile":
        return _compiled(getattr(reference, case.op), case.options)
    if name == "broadcast":
        return partial(_BROADCAST[case.op], **_sizes(case))
    if name == ours(device):
        return partial(getattr(ops, case.op), **case.options)
    return partial(_torch_path_fused_dynamic_routing, iterations=case.iterations)


def _sizes(case: Case) -> dict[str, object]:
    """The options that the rivals know, which differentiate through every iteration."""
    return {"iterations": case.iterations} if "routing" in case.op else {}


def _compiled(function: Rival, options: dict[str, object]) -> Rival:
    def call(**tensors: Tensor) -> Tensor:
        return function(**tensors, **options)

    # What was compiled for other shapes counts against a limit, beyond which torch gives up.
    torch.compiler.reset()
    return torch.compile(call, fullgraph=True, dynamic=False)


# The broadcast form -------------------------------------------------------------------------------
#
# Most implementations give every image its own view of the weight, one row vector times one matrix
# for each pair of capsules, and do the routing with broadcast products.


def _broadcast_prediction_vectors(u: Tensor, weight: Tensor) -> Tensor:
    matrices = weight.permute(0, 2, 1, 3)  # (I, J, P, D)
    return torch.matmul(u[:, :, None, None, :], matrices).squeeze(3)  # (B, I, J, D)


def _broadcast_fused_dynamic_routing(u: Tensor, weight: Tensor, iterations: int) -> Tensor:
    u_hat = _broadcast_prediction_vectors(u, weight)
    b = torch.zeros_like(u_hat[..., :1])  # (B, I, J, 1)
    for iteration in range(iterations):
        c = b.softmax(dim=2)
        v = _squash((c * u_hat).sum(dim=1, keepdim=True))  # (B, 1, J, D)
        if iteration < iterations - 1:
            b = b + (u_hat * v).sum(dim=-1, keepdim=True)
    return v.squeeze(1)


def _squash(s: Tensor) -> Tensor:
    length = s.norm(dim=-1, keepdim=True)
    return length / (1 + length**2) * s


_BROADCAST: dict[str, Rival] = {
    "prediction_vectors": _broadcast_prediction_vectors,
    "fused_dynamic_routing": _broadcast_fused_dynamic_routing,
}


# The torch path of tritoncaps on a device that has kernels ----------------------------------------


class _TorchPath(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, iterations: int) -> Tensor:
        v, _, sums = _torch_path.fused_dynamic_routing_fwd(u, weight, None, iterations, False)
        ctx.save_for_backward(u, weight, sums)
        return v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, sums = ctx.saved_tensors
        grad_u, grad_weight, _ = _torch_path.fused_dynamic_routing_bwd(
            grads[0], None, u, weight, None, sums, True
        )
        return grad_u, grad_weight, None


def _torch_path_fused_dynamic_routing(u: Tensor, weight: Tensor, iterations: int) -> Tensor:
    return _TorchPath.apply(u, weight, iterations)


# The whole network --------------------------------------------------------------------------------


class EinsumCapsNet(nn.Module):
    """CapsNet as most people write it in PyTorch, for MNIST: einsum, û in memory, autograd.

    The same network as `tritoncaps.models.CapsNet`, parameter by parameter.
    """

    def __init__(self, iterations: int = 3) -> None:
        super().__init__()
        self.iterations = iterations
        self.conv = nn.Conv2d(1, 256, kernel_size=9)
        self.primary = nn.Conv2d(256, 32 * 8, kernel_size=9, stride=2)
        self.weight = nn.Parameter(0.1 * torch.randn(32 * 6 * 6, 8, 10, 16))
        self.decoder = nn.Sequential(
            nn.Linear(10 * 16, 512),
            nn.ReLU(),
            nn.Linear(512, 1024),
            nn.ReLU(),
            nn.Linear(1024, 28 * 28),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lengths of the class capsules, (B, 10), and the reconstruction, (B, 784)."""
        maps = self.primary(F.relu(self.conv(images)))  # (B, 256, 6, 6)
        poses = maps.unflatten(1, (32, 8)).permute(0, 3, 4, 1, 2).flatten(1, 3)  # (B, 1152, 8)
        v = self.route(_squash(poses))
        mask = F.one_hot(target, 10).unsqueeze(-1)
        return v.norm(dim=-1), self.decoder((v * mask).flatten(1))

    def route(self, u: Tensor) -> Tensor:
        """Route by agreement, (B, 1152, 8) → (B, 10, 16)."""
        u_hat = torch.einsum("bip,ipjd->bijd", u, self.weight)
        b = u_hat.new_zeros(u_hat.shape[:3])
        for iteration in range(self.iterations):
            c = b.softmax(dim=-1)
            v = _squash(torch.einsum("bij,bijd->bjd", c, u_hat))
            if iteration < self.iterations - 1:
                b = b + torch.einsum("bijd,bjd->bij", u_hat, v)
        return v

    def copy_weights(self, model: CapsNet) -> None:
        """Take over the parameters of a `tritoncaps.models.CapsNet`."""
        names = {"primary.conv": "primary", "routing.weight": "weight", "decoder.layers": "decoder"}
        state = {}
        for name, tensor in model.state_dict().items():
            for theirs, own in names.items():
                name = name.replace(theirs, own)
            state[name] = tensor
        self.load_state_dict(state)


def einsum_loss(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Margin loss and 0.0005 of the squared error, a mean over the batch."""
    lengths, reconstruction = model(images, target)
    # Under autocast the network gives 16-bit results; the loss is computed in float32.
    lengths, reconstruction = lengths.to(images.dtype), reconstruction.to(images.dtype)
    present = F.one_hot(target, 10)
    margin = present * F.relu(0.9 - lengths) ** 2 + 0.5 * (1 - present) * F.relu(lengths - 0.1) ** 2
    squared_error = ((reconstruction - images.flatten(1)) ** 2).sum(dim=1)
    return (margin.sum(dim=1) + 0.0005 * squared_error).mean()


def tritoncaps_loss(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Compute the same loss with the operators of tritoncaps."""
    activations, _, reconstruction, _ = model(images, target)
    squared_error = F.mse_loss(reconstruction.to(images.dtype), images, reduction="sum") / len(
        images
    )
    return ops.margin_loss(activations, target) + 0.0005 * squared_error
