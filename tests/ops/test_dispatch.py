"""How a call finds its backend, and how torch handles several operators together."""

import warnings

import pytest
import torch

from tritoncaps import ops, reference
from tritoncaps._operators import _dispatch
from tritoncaps.testing import OPERATORS, draw_inputs


def test_a_missing_triton_means_no_kernels_and_other_missing_modules_are_errors(monkeypatch):
    def missing(name):
        def import_module(module):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return import_module

    find = _dispatch.kernels.__wrapped__
    monkeypatch.setattr(_dispatch, "import_module", missing("triton"))
    assert find() is None
    monkeypatch.setattr(_dispatch, "import_module", missing("tritoncaps.kernels.squash"))
    with pytest.raises(ModuleNotFoundError, match=r"tritoncaps\.kernels\.squash"):
        find()


def test_a_refused_shape_takes_the_torch_path_with_one_warning(monkeypatch):
    class Kernels:
        REFUSALS = (LookupError,)

        @staticmethod
        def squash_fwd(s, form):
            raise LookupError("D=3 is too much for this test")

    monkeypatch.setattr(_dispatch, "INTERPRETED", True)
    monkeypatch.setattr(_dispatch, "kernels", lambda: Kernels)
    monkeypatch.setattr(_dispatch, "_warned", {})
    s = torch.ones(2, 3)
    with pytest.warns(UserWarning, match="squash_fwd runs without its Triton kernel: D=3"):
        v = ops.squash(s)
    torch.testing.assert_close(v, reference.squash(s))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.squash(s)


def test_transforms_over_an_empty_axis_return_empty_results(device):
    u = torch.rand(2, 6, 4, device=device)
    weight = torch.rand(6, 4, 3, 5, device=device)
    predict = torch.func.vmap(ops.prediction_vectors, in_dims=(None, 4))
    assert predict(u, weight.new_empty(6, 4, 3, 5, 0)).shape == (0, 2, 6, 3, 5)
    jacobian = torch.func.jacrev(ops.prediction_vectors, argnums=(0, 1))
    du, dweight = jacobian(u[:0], weight)
    assert du.shape == (0, 6, 3, 5, 0, 6, 4)
    assert dweight.shape == (0, 6, 3, 5, 6, 4, 3, 5)


def whole(u, weight, prior, pose):
    """Every operator, one after the other."""
    v, coupling = ops.fused_dynamic_routing(u, weight, prior=prior, return_coupling=True)
    w = ops.dynamic_routing(ops.prediction_vectors(u, weight), iterations=2, gradient="last")
    s = ops.routing_pass(u, weight, pose + w, bias=prior)
    activations = ops.squash(ops.squash(s, form="exponential") + v).norm(dim=-1)
    target = torch.zeros(len(u), dtype=torch.int64, device=u.device)
    return ops.margin_loss(activations, target) + coupling.square().mean()


def test_all_operators_compile_into_one_graph_with_inductor(device):
    """The batch is dynamic. Inductor asserts the strides of every result that it uses."""
    torch._dynamo.reset()
    compiled = torch.compile(whole, fullgraph=True, dynamic=True)
    for batch in (3, 5):
        sizes = {"B": batch, "I": 9, "P": 4, "J": 5, "D": 6}
        inputs = draw_inputs(OPERATORS["routing_pass"], sizes, device=device, optional=("prior",))
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        results = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor uses deprecated functions
            for function in (compiled, whole):
                loss = function(**leaves)
                results.append([loss, *torch.autograd.grad(loss, list(leaves.values()))])
        torch.testing.assert_close(*results)
