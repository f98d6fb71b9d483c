"""Which formula gives a derivative, its precision, and torch's other tools around derivatives."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from tritoncaps import ops, reference
from tritoncaps._operators import _autograd
from tritoncaps._operators._register import register
from tritoncaps.testing import OPERATORS, draw_inputs

ROW = OPERATORS["fused_dynamic_routing"]
SIZES = {"B": 2, "I": 5, "P": 3, "J": 4, "D": 3}
# When torch enters forward mode, it calls its own deprecated functions.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")


def inputs(device, dtype=torch.float64):
    return tuple(draw_inputs(ROW, SIZES, dtype=dtype, device=device, optional=()).values())


def loss(u, weight):
    return ops.fused_dynamic_routing(u, weight, iterations=2).square().sum()


def slopes(u, weight, **how):
    leaves = [tensor.detach().requires_grad_() for tensor in (u, weight)]
    return leaves, torch.autograd.grad(loss(*leaves), leaves, **how)


def penalty(u, weight):
    """The gradients of a gradient penalty."""
    leaves, grads = slopes(u, weight, create_graph=True)
    return torch.autograd.grad(sum(grad.float().square().sum() for grad in grads), leaves)


def test_first_derivatives_come_from_the_backward_in_every_way(device):
    """They have the same bits, though the reference's would differ by roundings."""
    _, expected = slopes(*inputs(device))
    _, recorded = slopes(*inputs(device), create_graph=True)
    with forward_ad.dual_level():  # nothing has a tangent
        _, beside = slopes(*inputs(device))
    for found in (recorded, beside, grad(loss, (0, 1))(*inputs(device))):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    graph = make_fx(lambda *x: grad(loss)(*x))(*inputs(device)).graph
    called = [str(node.target) for node in graph.nodes if "tritoncaps" in str(node.target)]
    assert called == [f"tritoncaps.{ROW}.default", f"tritoncaps.{ROW}_backward.default"]


TRANSFORMS = {
    "per-sample gradients": vmap(grad(lambda u, w: loss(u[None], w)), in_dims=(0, None)),
    "hessian-vector product": lambda u, w: jvp(lambda u: grad(loss)(u, w), (u,), (u.cos(),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_compile_as_one_graph(device, transform):
    torch._dynamo.reset()
    compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs(device)), transform(*inputs(device)))


@pytest.mark.parametrize("form", ["quadratic", "exponential"])
@pytest.mark.parametrize("length", [0.0, 1e-42, 1e-30, 1e-3, 1e20, 1e38])
def test_second_derivatives_of_squash_are_finite(device, form, length):
    s = torch.tensor([length, length, 0.0], device=device, requires_grad=True)
    (slope,) = torch.autograd.grad(ops.squash(s, form=form).sum(), s, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), s)
    assert torch.isfinite(second).all()
    assert torch.isfinite(hessian(lambda s: ops.squash(s, form=form).sum())(s.detach())).all()


def test_penalties_of_dead_capsules_are_finite(device):
    u, weight = inputs(device)
    for dead in (torch.zeros_like(u), u * torch.tensor([0.0, 1.0]).to(u)[:, None, None]):
        assert all(torch.isfinite(x).all() for x in penalty(dead, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_penalties_of_16_bit_inputs_are_computed_in_float32(device, dtype):
    tensors = inputs(device, dtype)
    exact = penalty(*(tensor.double() for tensor in tensors))
    for found, expected in zip(penalty(*tensors), exact, strict=True):
        assert found.dtype == dtype
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < 2 * torch.finfo(dtype).eps


def test_autocast_lowers_nothing(device):
    tensors = inputs(device, torch.float32)

    def found():
        second = jvp(grad(loss), tensors, tensors)[1]
        return [
            *penalty(*tensors),
            jvp(loss, tensors, tensors)[1],
            second,
            *hessian(loss)(*tensors),
        ]

    expected = found()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        torch.testing.assert_close(found(), expected)


def test_a_penalty_may_be_checkpointed(device):
    """A penalty inside a checkpoint has the gradients that it has outside."""

    def inner(u, weight):
        (slope,) = torch.autograd.grad(loss(u, weight), u, create_graph=True)
        return slope.square().sum()

    results = []
    for call in (inner, lambda *x: checkpoint(inner, *x, use_reentrant=False)):
        leaves = [tensor.requires_grad_() for tensor in inputs(device)]
        results.append(torch.autograd.grad(call(*leaves), leaves))
    torch.testing.assert_close(*results)


def test_a_backward_called_by_hand_refuses_tangents(device):
    s = torch.ones(2, 3, device=device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(s, s)
        with pytest.raises(NotImplementedError, match="squash_backward: an argument"):
            torch.ops.tritoncaps.squash_backward(s, dual, "quadratic")


def test_a_torch_with_other_internals_has_plain_gradients(device, monkeypatch):
    """Only the transforms of `torch.func` and forward mode need them."""
    monkeypatch.setattr(_autograd, "KNOWS_TORCH", False)

    def forward(s: torch.Tensor) -> torch.Tensor:
        return reference.squash(s)

    def backward(grad_v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(s)

    plain = register(
        "plain_squash",
        forward,
        backward,
        reference=reference.squash,
        inputs={"s": "... D"},
        outputs={"v": "... D"},
    )
    s = torch.rand(3, 4, device=device, requires_grad=True)
    plain.forward(s).sum().backward()
    assert torch.equal(s.grad, torch.ones_like(s))
    with pytest.raises(RuntimeError, match="setup_context"):
        grad(lambda s: plain.forward(s).sum())(s.detach())
