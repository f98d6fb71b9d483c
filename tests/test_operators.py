"""The operators as citizens of torch: opcheck, compile, export, vmap, autocast, meta, FLOPs."""

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tritoncaps import _operators, ops, reference

B, I, P, J, D = 3, 9, 4, 5, 6


def random(*shape, seed=0, dtype=torch.float32, device="cpu", grad=True):
    generator = torch.Generator().manual_seed(seed + len(shape))
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn.to(device, dtype).requires_grad_(grad)


def samples(device, dtype=torch.float32):
    """Arguments of each registered operator with a gradient."""
    tensor = {"dtype": dtype, "device": device}
    u, weight = random(B, I, P, **tensor), random(I, P, J, D, **tensor)
    u_hat, prior = random(B, I, J, D, **tensor), random(I, J, **tensor)
    return [
        (_operators.squash, (random(B, J, D, **tensor),)),
        (_operators.prediction_vectors, (u, weight)),
        (_operators.dynamic_routing, (u_hat, None, 3, True, False)),
        (_operators.dynamic_routing, (u_hat, prior, 2, True, True)),
        (_operators.dynamic_routing, (u_hat, prior, 2, False, True)),
        (_operators.fused_dynamic_routing, (u, weight, None, 3, True, False)),
        (_operators.fused_dynamic_routing, (u, weight, prior, 2, True, True)),
        (_operators.fused_dynamic_routing, (u, weight, prior, 1, False, False)),
    ]


CASES = range(len(samples("cpu")))

# opcheck itself reads .grad of what need not be a leaf.
opcheck_warns = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@opcheck_warns
@pytest.mark.parametrize("case", CASES)
def test_opcheck(device, case):
    operator, arguments = samples(device)[case]
    opcheck(operator, arguments)


def test_opcheck_of_the_backward_operators(device):
    def plain(*shape):
        return random(*shape, device=device, grad=False)

    s = plain(B, J, D)
    opcheck(_operators.squash_backward, (s, s))
    u, weight, votes, v = plain(B, I, P), plain(I, P, J, D), plain(B, I, J, D), plain(B, J, D)
    opcheck(_operators.prediction_vectors_backward, (votes, u, weight))
    sums, prior, coupling = plain(3, B, J, D), plain(I, J), plain(B, I, J)
    for full in (True, False):
        for p, c in ((None, None), (prior, coupling)):
            opcheck(_operators.dynamic_routing_backward, (v, c, votes, p, sums, full))
            opcheck(_operators.fused_dynamic_routing_backward, (v, c, u, weight, p, sums, full))


def is_exact(case):
    """Not gradient="last", whose derivative is by intention not that of the function."""
    _, arguments = samples(torch.device("cpu"))[case]
    return not (len(arguments) > 3 and arguments[-2] is False)


@pytest.mark.parametrize("case", [case for case in CASES if is_exact(case)])
def test_gradcheck_in_float64(device, case):
    """Also with a result that reaches the operator's backward with other strides."""
    operator, arguments = samples(device, torch.float64)[case]

    def outputs(*tensors):
        result = operator(*tensors)
        return result if isinstance(result, torch.Tensor) else result[0]

    assert gradcheck(outputs, arguments, fast_mode=True)
    assert gradcheck(lambda *t: outputs(*t).transpose(0, 1), arguments, fast_mode=True)


@pytest.mark.parametrize("name", ["dynamic_routing", "fused_dynamic_routing"])
def test_gradcheck_of_the_coupling(device, name):
    tensor = {"dtype": torch.float64, "device": device}
    shapes = [(B, I, J, D)] if name == "dynamic_routing" else [(B, I, P), (I, P, J, D)]
    inputs = [random(*shape, **tensor) for shape in [*shapes, (I, J)]]

    def both(*tensors):
        return getattr(ops, name)(*tensors[:-1], prior=tensors[-1], return_coupling=True)

    assert gradcheck(both, inputs, fast_mode=True)


def test_second_derivative_is_refused_by_name(device):
    u, weight = random(B, I, P, device=device), random(I, P, J, D, device=device)
    (grad,) = torch.autograd.grad(ops.fused_dynamic_routing(u, weight).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match=r"tritoncaps\.fused_dynamic_routing_backward"):
        grad.sum().backward()


# Entering forward mode, torch 2.15 uses what it has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_forward_mode_is_refused_by_name(device):
    u, weight = random(B, I, P, device=device), random(I, P, J, D, device=device)
    calls = {
        "squash": (ops.squash, u),
        "prediction_vectors": (lambda u: ops.prediction_vectors(u, weight), u),
        "fused_dynamic_routing": (lambda u: ops.fused_dynamic_routing(u, weight), u),
        "dynamic_routing": (ops.dynamic_routing, random(B, I, J, D, device=device)),
    }
    for name, (function, x) in calls.items():
        with pytest.raises(NotImplementedError, match=f"{name}: .* forward-mode"):
            torch.func.jvp(function, (x.detach(),), (torch.ones_like(x),))


def test_vmap_over_no_slice_is_an_error(device):
    weight = random(0, I, P, J, D, device=device, grad=False)
    u = random(B, I, P, device=device, grad=False)
    with pytest.raises(ValueError, match="has 0 slices"):
        torch.func.vmap(ops.fused_dynamic_routing, in_dims=(None, 0))(u, weight)


def test_margin_loss_under_vmap_and_of_fake_tensors(device):
    activations = torch.rand(3, 10, device=device)
    target = torch.tensor([1, 0, 9], device=device)
    each = torch.func.vmap(lambda x, y: ops.margin_loss(x[None], y[None]))(activations, target)
    torch.testing.assert_close(each, ops.margin_loss(activations, target, reduction="none"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.margin_loss(torch.rand(3, 10), torch.zeros(3, dtype=torch.int64))
    assert fake.shape == ()


def whole(u, weight, prior):
    """Every operator, forward, in one function."""
    v, c = ops.fused_dynamic_routing(u, weight, prior=prior, return_coupling=True)
    u_hat = ops.prediction_vectors(u, weight)
    w = ops.dynamic_routing(u_hat, iterations=2, gradient="last")
    activations = torch.linalg.vector_norm(ops.squash(v + w), dim=-1)
    target = torch.zeros(len(u), dtype=torch.int64, device=u.device)
    return ops.margin_loss(activations, target) + c.square().mean()


def test_compiles_whole_with_a_dynamic_batch(device):
    torch._dynamo.reset()
    weight, prior = random(I, P, J, D, device=device), random(I, J, device=device)
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole, fullgraph=True, dynamic=True, backend=frames)
    counts = []
    for batch in (3, 5, 7):
        u = random(batch, I, P, seed=batch, device=device)
        results = []
        for function in (compiled, whole):
            loss = function(u, weight, prior)
            results.append([loss, *torch.autograd.grad(loss, (u, weight, prior))])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
        counts.append(frames.frame_count)
    assert counts[0] == counts[-1], "another batch size compiles nothing anew"


def test_compiles_with_inductor(device):
    torch._dynamo.reset()
    u, weight = random(B, I, P, device=device), random(I, P, J, D, device=device)
    compiled = torch.compile(ops.fused_dynamic_routing, fullgraph=True)
    with warnings.catch_warnings():
        # Inductor's own use of what its dependencies deprecate.
        warnings.simplefilter("ignore")
        results = [
            torch.autograd.grad(function(u, weight).square().sum(), (u, weight))
            for function in (compiled, ops.fused_dynamic_routing)
        ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_exports_with_a_dynamic_batch(device):
    class Routing(torch.nn.Module):
        def forward(self, u, weight):
            return ops.fused_dynamic_routing(u, weight)

    u, weight = (random(*s, device=device, grad=False) for s in ((B, I, P), (I, P, J, D)))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        Routing(), (u, weight), dynamic_shapes={"u": {0: batch}, "weight": None}
    )
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "tritoncaps.fused_dynamic_routing.default" in targets
    more = random(B + 2, I, P, seed=1, device=device, grad=False)
    torch.testing.assert_close(
        program.module()(more, weight), ops.fused_dynamic_routing(more, weight)
    )


@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (None, 0), (0, 2)])
def test_vmap_agrees_with_a_loop(device, in_dims):
    shapes = [(B, I, P), (I, P, J, D)]
    inputs = [
        random(*shape, device=device, grad=False)
        if dim is None
        else torch.stack([random(*shape, seed=n, device=device, grad=False) for n in (1, 2)], dim)
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]

    def slices(index):
        return [
            x if dim is None else x.select(dim, index)
            for x, dim in zip(inputs, in_dims, strict=True)
        ]

    def both(u, weight):
        v, c = ops.fused_dynamic_routing(u, weight, return_coupling=True)
        votes = ops.prediction_vectors(u, weight)
        return v, c, ops.dynamic_routing(votes), ops.squash(u)

    mapped = torch.func.vmap(both, in_dims=in_dims)(*inputs)
    for index in range(2):
        for actual, expected in zip(mapped, both(*slices(index)), strict=True):
            torch.testing.assert_close(actual[index], expected)


def test_vmap_without_coupling_and_of_the_gradients(device):
    weight = random(I, P, J, D, device=device)
    batches = torch.stack([random(B, I, P, seed=n, device=device, grad=False) for n in (1, 2)])
    v = torch.func.vmap(ops.fused_dynamic_routing, in_dims=(0, None))(batches, weight)
    v.square().sum().backward()
    expected = sum(
        torch.autograd.grad(ops.fused_dynamic_routing(u, weight).square().sum(), weight)[0]
        for u in batches
    )
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_routes_in_float32(device, dtype):
    u, weight = random(B, I, P, device=device), random(I, P, J, D, device=device)
    exact = ops.fused_dynamic_routing(u.to(dtype).float(), weight)
    with torch.autocast(device.type, dtype=dtype):
        v, c = ops.fused_dynamic_routing(u.to(dtype), weight, return_coupling=True)
        assert v.dtype == c.dtype == torch.float32
        assert ops.squash(u.to(dtype)).dtype == torch.float32
        assert ops.prediction_vectors(u.to(dtype), weight).dtype == torch.float32
        target = torch.zeros(B, dtype=torch.int64, device=device)
        activations = torch.rand(B, J, device=device, dtype=dtype)
        assert ops.margin_loss(activations, target).dtype == torch.float32
    # The products inside are not autocast either.
    torch.testing.assert_close(v, exact, rtol=0, atol=0)
    v.sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["fused_dynamic_routing", "dynamic_routing", "prediction_vectors"])
def test_backward_inside_autocast_is_that_outside(device, name):
    shapes = [(B, I, J, D)] if name == "dynamic_routing" else [(B, I, P), (I, P, J, D)]
    inputs = [random(*shape, device=device) for shape in shapes]
    grads = []
    for enabled in (False, True):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(getattr(ops, name)(*inputs).square().sum(), inputs))
    for actual, expected in zip(*grads, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["fused_dynamic_routing", "dynamic_routing"])
def test_loss_of_the_coupling_alone(device, name):
    shapes = [(B, I, J, D)] if name == "dynamic_routing" else [(B, I, P), (I, P, J, D)]
    inputs = [random(*shape, device=device) for shape in shapes]
    grads = []
    for module in (ops, reference):
        _, c = getattr(module, name)(*inputs, return_coupling=True)
        grads.append(torch.autograd.grad(c.square().sum(), inputs))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


def test_meta_tensors_give_shapes(device):
    u, weight = torch.empty(B, I, P, device="meta"), torch.empty(I, P, J, D, device="meta")
    v, c = ops.fused_dynamic_routing(u, weight, return_coupling=True)
    assert (v.shape, c.shape) == ((B, J, D), (B, I, J))
    assert v.device.type == "meta"
    assert ops.prediction_vectors(u, weight).shape == (B, I, J, D)
    assert ops.squash(u).shape == u.shape
    assert ops.dynamic_routing(torch.empty(B, I, J, D, device="meta")).shape == (B, J, D)
    assert ops.fused_dynamic_routing(u.half(), weight.half()).dtype == torch.float16


def test_flop_counter_counts_what_the_reference_does(device):
    u, weight = random(B, I, P, device=device), random(I, P, J, D, device=device)
    counts = []
    for module in (ops, reference):
        with FlopCounterMode(display=False) as counter:
            module.fused_dynamic_routing(u, weight, 3).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    with FlopCounterMode(display=False) as counter:
        ops.dynamic_routing(ops.prediction_vectors(u, weight), 3).sum().backward()
    assert counter.get_total_flops() == counts[1]


@pytest.mark.parametrize("with_prior", [False, True], ids=["", "prior"])
def test_flop_counter_of_the_last_iteration_alone(device, with_prior):
    """The forward's 2r − 1 products; then one that the coupling weighs, or, with all, 4 a pass."""
    u_hat = random(B, I, J, D, device=device)
    prior = random(I, J, device=device) if with_prior else None
    product = 2 * B * I * J * D
    for gradient, backward in (("last", 1), ("full", 10 if with_prior else 9)):
        with FlopCounterMode(display=False) as counter:
            ops.dynamic_routing(u_hat, 3, prior=prior, gradient=gradient).sum().backward()
        assert counter.get_total_flops() == (5 + backward) * product


def test_inputs_are_not_changed(device):
    tensors = [random(B, I, P, device=device), random(I, P, J, D, device=device)]
    copies = [t.detach().clone() for t in tensors]
    versions = [t._version for t in tensors]
    ops.fused_dynamic_routing(*tensors).sum().backward()
    assert [t._version for t in tensors] == versions
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_without_triton_there_are_no_kernels_and_any_other_gap_is_an_error(monkeypatch):
    def missing(name):
        def import_module(module):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return import_module

    find = _operators._kernels.__wrapped__
    monkeypatch.setattr(_operators, "import_module", missing("triton"))
    assert find() is None
    monkeypatch.setattr(_operators, "import_module", missing("tritoncaps.kernels.squash"))
    with pytest.raises(ModuleNotFoundError, match=r"tritoncaps\.kernels\.squash"):
        find()


def test_fallback_to_the_torch_path_is_said_once(monkeypatch):
    """A shape that no kernel configuration fits gets the torch path's result, and one warning."""

    class Kernels:
        REFUSALS = (LookupError,)

        @staticmethod
        def squash_fwd(s):
            raise LookupError("D=3 is too much for this test")

    monkeypatch.setattr(_operators, "INTERPRETED", True)
    monkeypatch.setattr(_operators, "_kernels", lambda: Kernels)
    monkeypatch.setattr(_operators, "_said", {})
    s = torch.ones(2, 3)
    with pytest.warns(UserWarning, match="squash_fwd runs without its Triton kernel: D=3"):
        v = ops.squash(s)
    torch.testing.assert_close(v, reference.squash(s))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.squash(s)
