"""How do I get the gradient of every sample on its own?

With torch.func, as for any torch module. Differential privacy and influence functions need it.
"""

import torch
from torch.func import functional_call, grad, vmap

from tritoncaps import CapsuleLoss
from tritoncaps.models import CapsNet

torch.manual_seed(0)
model = CapsNet(channels=8, capsule_types=2)
loss_function = CapsuleLoss()
images, labels = torch.rand(4, 1, 28, 28), torch.tensor([3, 1, 4, 1])


def loss_of_one(parameters: dict, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Compute the loss of one sample, as a batch of one."""
    image, label = image.unsqueeze(0), label.unsqueeze(0)
    output = functional_call(model, parameters, (image, label))
    return loss_function(output.activations, label, output.reconstruction, image)


parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
each = vmap(grad(loss_of_one), in_dims=(None, 0, 0))(parameters, images, labels)
norms = sum(gradient.flatten(1).square().sum(dim=1) for gradient in each.values()).sqrt()
print("norms of the four gradients:", *(f"{norm:.3f}" for norm in norms))

output = model(images, labels)
loss_function(output.activations, labels, output.reconstruction, images).backward()
gap = max((each[n].mean(dim=0) - p.grad).abs().max() for n, p in model.named_parameters())
print(f"their mean is the gradient of the batch, to {gap:.0e}")
