"""Derivatives of whole models: torch.func, gradients of single images, penalties, curvature."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap

from tritoncaps import CapsuleLoss, ops, reference
from tritoncaps.models import list_models

# When torch enters forward mode, it calls its own deprecated functions.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
every_model = pytest.mark.parametrize("name", list_models(classifiers=True))


@pytest.fixture
def model(name, device, small_model):
    """A small network in float64, where two ways to a derivative agree closely.

    In evaluation, because a batch normalisation in training mixes the images.
    """
    dim = {} if name in ("inverted_capsnet", "matrix_capsnet") else {"class_dim": 4}
    model = small_model(name, image_size=17, num_classes=3, **dim)
    return model.double().to(device).eval()


@pytest.fixture
def images(device):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 1, 17, 17, generator=generator, dtype=torch.float64).to(device)


@pytest.fixture
def by_reference(monkeypatch):
    """Let the layers call the reference in place of the operators."""

    def switch():
        for operator in (
            "squash",
            "conv_dynamic_routing",
            "fused_dynamic_routing",
            "attention_routing",
            "inverted_attention_routing",
            "em_routing",
            "conv_em_routing",
        ):
            monkeypatch.setattr(ops, operator, getattr(reference, operator))

    return switch


def loss_of(model, parameters, images, target):
    output = functional_call(model, parameters, (images, target))
    return CapsuleLoss()(output.activations, target, output.reconstruction, images)


@every_model
def test_gradients_of_single_images_are_those_of_a_loop(model, images):
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    target = torch.arange(3, device=images.device)

    def loss(parameters, image, label):
        return loss_of(model, parameters, image[None], label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, target)
    for index in range(3):
        model.zero_grad()
        one = slice(index, index + 1)
        output = model(images[one], target[one])
        CapsuleLoss()(
            output.activations, target[one], output.reconstruction, images[one]
        ).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(each[name][index], parameter.grad, msg=name)


@every_model
def test_gradient_penalty_is_that_of_the_reference(model, images, by_reference):
    def penalty():
        x = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).activations.sum(), x, create_graph=True)
        parameters = [p for n, p in model.named_parameters() if not n.startswith("decoder")]
        loss = slope.square().sum()
        return loss.detach(), torch.autograd.grad(loss, parameters, materialize_grads=True)

    actual = penalty()
    by_reference()
    torch.testing.assert_close(actual, penalty())


@every_model
def test_curvature_is_that_of_the_reference(model, images, by_reference):
    """Hessian-vector products in every order of the modes, and a Hessian."""
    vector = images.flip(0)

    def curvature():
        def loss(x):
            return model(x).activations.square().sum()

        def loss_of_corner(corner):
            return loss(torch.cat([corner, images[..., 2:]], dim=-1))

        return {
            "forward over reverse": jvp(grad(loss), (images,), (vector,))[1],
            "reverse over reverse": vjp(grad(loss), images)[1](vector)[0],
            "reverse over forward": grad(lambda x: jvp(loss, (x,), (vector,))[1])(images),
            "hessian": hessian(loss_of_corner)(images[..., :2]),
        }

    actual = curvature()
    by_reference()
    expected = curvature()
    torch.testing.assert_close(actual, expected)
    for product in list(actual.values())[1:3]:
        torch.testing.assert_close(product, actual["forward over reverse"])
