"""The networks of the training step: `CapsNet` as most people write it, and the losses."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import train_images
from benchmarks.oracle import WrongResultError
from benchmarks.rivals.fused_dynamic_routing import squash
from tritoncaps import ops
from tritoncaps.models import CapsNet


class EinsumCapsNet(nn.Module):
    """CapsNet for MNIST in plain PyTorch: einsum, û in memory, autograd.

    The same network as `tritoncaps.models.CapsNet`, parameter by parameter.
    """

    def __init__(self, iterations: int = 3, channels: int = 256, capsule_types: int = 32) -> None:
        super().__init__()
        self.iterations, self.capsule_types = iterations, capsule_types
        self.conv = nn.Conv2d(1, channels, kernel_size=9)
        self.primary = nn.Conv2d(channels, capsule_types * 8, kernel_size=9, stride=2)
        self.weight = nn.Parameter(0.1 * torch.randn(capsule_types * 6 * 6, 8, 10, 16))
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
        poses = maps.unflatten(1, (self.capsule_types, 8))
        poses = poses.permute(0, 3, 4, 1, 2).flatten(1, 3)  # (B, 1152, 8)
        v = self.route(squash(poses))
        mask = F.one_hot(target, 10).unsqueeze(-1)
        return v.norm(dim=-1), self.decoder((v * mask).flatten(1))

    def route(self, u: Tensor) -> Tensor:
        """Route by agreement, (B, 1152, 8) → (B, 10, 16)."""
        u_hat = torch.einsum("bip,ipjd->bijd", u, self.weight)
        b = u_hat.new_zeros(u_hat.shape[:3])
        for iteration in range(self.iterations):
            c = b.softmax(dim=-1)
            v = squash(torch.einsum("bij,bijd->bjd", c, u_hat))
            if iteration < self.iterations - 1:
                b = b + torch.einsum("bijd,bjd->bij", u_hat, v)
        return v

    def copy_weights(self, model: CapsNet) -> None:
        """Copy the parameters of a `tritoncaps.models.CapsNet`."""
        names = {"primary.conv": "primary", "routing.weight": "weight", "decoder.layers": "decoder"}
        state = {}
        for name, tensor in model.state_dict().items():
            for theirs, own in names.items():
                name = name.replace(theirs, own)
            state[name] = tensor
        self.load_state_dict(state)


def einsum_loss(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Margin loss plus 0.0005 times the squared error, averaged over the batch."""
    lengths, reconstruction = model(images, target)
    # Under autocast the network returns 16-bit results. The loss is computed in float32.
    lengths, reconstruction = lengths.to(images.dtype), reconstruction.to(images.dtype)
    present = F.one_hot(target, 10)
    margin = present * F.relu(0.9 - lengths) ** 2 + 0.5 * (1 - present) * F.relu(lengths - 0.1) ** 2
    squared_error = ((reconstruction - images.flatten(1)) ** 2).sum(dim=1)
    return (margin.sum(dim=1) + 0.0005 * squared_error).mean()


def tritoncaps_loss(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Compute the same loss with the operators of tritoncaps."""
    output = model(images, target)
    reconstruction = output.reconstruction.to(images.dtype)
    squared_error = F.mse_loss(reconstruction, images, reduction="sum") / len(images)
    return ops.margin_loss(output.activations, target) + 0.0005 * squared_error


def check_networks() -> None:
    """Compare the einsum port with `CapsNet` in float64 on the CPU: same loss, same gradients.

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
            raise WrongResultError(
                f"check_networks: {name} of the einsum port: {theirs:.12g}, CapsNet's: {own:.12g}"
            )


def _sum_of_squares(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.square().sum()
