"""Property tests of the operators and their gradients against the reference in float64.

The same file tests every backend: the torch path on a CPU, the kernels interpreted on a CPU with
TRITON_INTERPRET=1, and the kernels compiled where there is a GPU.
"""

from functools import partial

import pytest
import torch
from agreement import (
    DTYPES,
    LAYOUTS,
    RoutingCase,
    assert_agrees,
    compare,
    gradients,
    routed,
    routing_cases,
    sizes,
    with_layout,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tritoncaps import CapsuleLoss, ops, reference

# The device fixture is the same for every example.
same_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@same_fixture
@given(
    shape=st.lists(sizes(9), min_size=1, max_size=4),
    dim=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e3]),
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**16),
)
def test_squash_agrees(device, shape, dim, dtype, scale, layout, grad_layout, seed):
    dim %= len(shape)
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 1/64 up to 2, which all dtypes hold exactly.
    drawn = torch.randint(-128, 129, shape, generator=generator) / 64
    values = (drawn * min(scale, torch.finfo(dtype).max / 8)).to(device, dtype)
    s = with_layout(values, layout)
    # The plain form fails where the square under- or overflows, so it is evaluated in float64 and
    # rounded: the operator has no more than roundings to itself.
    exact_form = partial(reference.squash, dim=dim)

    def rounded_reference(values):
        return exact_form(values.double()).to(values.dtype)

    compare(
        partial(ops.squash, dim=dim), rounded_reference, [s], seed, grad_layout, ["v", "grad_s"]
    )


@same_fixture
@given(case=routing_cases())
def test_prediction_vectors_agree(device, case):
    compare(
        ops.prediction_vectors,
        reference.prediction_vectors,
        case.capsules(device)[:2],
        case.seed,
        case.grad_layout,
        ["u_hat", "grad_u", "grad_weight"],
    )


MNIST_LIKE = RoutingCase(
    2, 37, 8, 10, 16, 3, "full", False, torch.float32, 1.0, "contiguous", "contiguous", 1
)


@same_fixture
@example(case=MNIST_LIKE)
@given(case=routing_cases())
def test_dynamic_routing_agrees(device, case):
    names = ["v", "grad_u_hat", "grad_prior"][: 2 + case.has_prior]
    function, oracle = (routed(m.dynamic_routing, case, False) for m in (ops, reference))
    compare(function, oracle, case.votes(device), case.seed, case.grad_layout, names)


@same_fixture
@example(case=MNIST_LIKE)
@given(case=routing_cases())
def test_fused_dynamic_routing_agrees(device, case):
    names = ["v", "grad_u", "grad_weight", "grad_prior"][: 3 + case.has_prior]
    function, oracle = (routed(m.fused_dynamic_routing, case, False) for m in (ops, reference))
    compare(function, oracle, case.capsules(device), case.seed, case.grad_layout, names)


@pytest.mark.parametrize("name", ["dynamic_routing", "fused_dynamic_routing"])
@same_fixture
@given(case=routing_cases((torch.float64,)))
def test_returned_coupling_agrees_and_is_differentiable(device, name, case):
    inputs = case.votes(device) if name == "dynamic_routing" else case.capsules(device)
    case_full = RoutingCase(**{**vars(case), "gradient": "full"})
    function, oracle = (routed(getattr(m, name), case_full, True) for m in (ops, reference))
    (v, c), grads = gradients(function, inputs, case.seed, case.grad_layout)
    (exact_v, exact_c), exact_grads = gradients(oracle, inputs, case.seed, case.grad_layout)
    torch.testing.assert_close(c.sum(dim=-1), torch.ones_like(c[..., 0]))
    for actual, exact in zip([v, c, *grads], [exact_v, exact_c, *exact_grads], strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["dynamic_routing", "fused_dynamic_routing"])
def test_coupling_is_a_constant_with_gradient_last(device, name):
    case = MNIST_LIKE
    inputs = case.votes(device) if name == "dynamic_routing" else case.capsules(device)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    v, c = getattr(ops, name)(*leaves, gradient="last", return_coupling=True)
    assert v.requires_grad
    assert not c.requires_grad


@pytest.mark.parametrize("gradient", ["full", "last"])
@pytest.mark.parametrize("name", ["dynamic_routing", "fused_dynamic_routing"])
def test_routing_is_repeated_bit_for_bit(device, name, gradient):
    case = RoutingCase(
        5, 67, 8, 10, 16, 3, gradient, True, torch.float32, 1.0, "contiguous", "contiguous", 3
    )
    inputs = case.votes(device) if name == "dynamic_routing" else case.capsules(device)
    function = routed(getattr(ops, name), case, False)
    first, second = (gradients(function, inputs, 0) for _ in range(2))
    for one, other in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(one, other)


@same_fixture
@given(case=routing_cases((torch.float64,)))
def test_order_of_input_capsules_does_not_matter(device, case):
    u, weight, *prior = case.capsules(device)
    order = torch.randperm(case.I, generator=torch.Generator().manual_seed(case.seed))
    function = routed(ops.fused_dynamic_routing, case, False)
    permuted = function(u[:, order], weight[order], *(p[order] for p in prior))
    torch.testing.assert_close(permuted, function(u, weight, *prior), rtol=1e-9, atol=1e-12)


@same_fixture
@given(case=routing_cases((torch.float64,)))
def test_order_of_output_capsules_is_carried_over(device, case):
    u, weight, *prior = case.capsules(device)
    order = torch.randperm(case.J, generator=torch.Generator().manual_seed(case.seed))
    function = routed(ops.fused_dynamic_routing, case, False)
    permuted = function(u, weight[:, :, order], *(p[:, order] for p in prior))
    expected = function(u, weight, *prior)[:, order]
    torch.testing.assert_close(permuted, expected, rtol=1e-9, atol=1e-12)


@same_fixture
@given(case=routing_cases((torch.float64,)))
def test_one_iteration_is_the_squashed_mean(device, case):
    u_hat = case.votes(device)[0]
    expected = reference.squash(u_hat.sum(dim=1) / case.J)
    torch.testing.assert_close(ops.dynamic_routing(u_hat, 1), expected, rtol=1e-9, atol=1e-12)


# Interpreted, a kernel computes with NumPy, which warns of the NaN that this test feeds it.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@same_fixture
@given(case=routing_cases((torch.float64,)))
def test_images_of_a_batch_do_not_mix(device, case):
    """Another image in the batch, even one of NaN, changes nothing."""
    u, weight, *prior = case.capsules(device)
    function = routed(ops.fused_dynamic_routing, case, False)
    expected = function(u, weight, *prior)
    spoilt = torch.cat([u, torch.full_like(u[:1], float("nan"))])
    result = function(spoilt, weight, *prior)
    torch.testing.assert_close(result[:-1], expected, rtol=1e-12, atol=1e-14)
    assert result[-1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", ["full", "last"])
def test_empty_batch_gives_zero_weight_gradients(device, gradient, dtype):
    u = torch.empty(0, 7, 4, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(7, 4, 5, 6, dtype=dtype, device=device, requires_grad=True)
    prior = torch.randn(7, 5, dtype=dtype, device=device, requires_grad=True)
    v, c = ops.fused_dynamic_routing(
        u, weight, prior=prior, gradient=gradient, return_coupling=True
    )
    assert v.shape == (0, 5, 6)
    assert c.shape == (0, 7, 5)
    v.sum().backward()
    assert u.grad.shape == u.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(prior.grad, torch.zeros_like(prior))

    weight.grad = None
    u_hat = ops.prediction_vectors(u, weight)
    assert u_hat.shape == (0, 7, 5, 6)
    ops.dynamic_routing(u_hat, gradient=gradient).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert ops.squash(torch.empty(0, 5, device=device)).shape == (0, 5)


SQUASH_LENGTHS = [0.0, 1e-38, 1e-30, 1e-10, 1e-3, 1.0, 1e3, 1e10, 1e19, 1e25, 3e38]


@pytest.mark.parametrize("length", SQUASH_LENGTHS)
def test_squash_is_finite_in_value_and_gradient(device, length):
    direction = torch.tensor([[0.6, 0.0, -0.8]], dtype=torch.float64)
    s = (direction * length).float().to(device).requires_grad_()
    v = ops.squash(s)
    (grad,) = torch.autograd.grad(v, s, torch.ones_like(v))
    assert torch.isfinite(v).all()
    assert torch.isfinite(grad).all()
    exact_s = (direction * length).float().double().requires_grad_()
    exact = reference.squash(exact_s)
    (exact_grad,) = torch.autograd.grad(exact, exact_s, torch.ones_like(exact))
    assert_agrees("v", v.detach(), exact.detach().float().to(device), exact.detach())
    assert_agrees("grad", grad, exact_grad.float().to(device), exact_grad)


# Interpreted, the length is NumPy's, which warns that it is infinite.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_squash_takes_the_largest_components(device, dtype):
    """Their length is beyond the dtype, their squash is not."""
    s = torch.full((2, 8), torch.finfo(dtype).max, dtype=dtype, device=device, requires_grad=True)
    v = ops.squash(s)
    torch.testing.assert_close(v, torch.full_like(v, 8**-0.5))
    (grad,) = torch.autograd.grad(v, s, torch.ones_like(v))
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("shape", [(2, 0), (0,), (0, 0, 3), (3,)])
def test_squash_keeps_any_shape(device, shape):
    s = torch.ones(shape, device=device, requires_grad=True)
    v = ops.squash(s)
    assert v.shape == shape
    v.sum().backward()
    assert s.grad.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_squash_keeps_direction_and_length_below_one(device, dtype):
    # To the largest length whose squash is below 1 in the dtype's own roundings.
    largest = 0.5 / torch.finfo(dtype).eps ** 0.5
    lengths = torch.logspace(-1, torch.tensor(largest).log10().item(), 50, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(1, 7, dtype=torch.float64))
    s = (lengths[:, None] * direction).to(dtype).to(device)
    v = ops.squash(s).double()
    norms = v.norm(dim=-1)
    assert (norms < 1).all()
    assert (norms.diff() > -2 * torch.finfo(dtype).eps).all(), "longer in, longer out"
    cosine = torch.nn.functional.cosine_similarity(v, s.double())
    roundings = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=roundings, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@same_fixture
@given(B=sizes(9), K=sizes(12), multi_hot=st.booleans(), seed=st.integers(0, 2**16))
def test_margin_loss_agrees(device, reduction, B, K, multi_hot, seed):
    generator = torch.Generator().manual_seed(seed)
    activations = torch.rand(B, K, generator=generator).to(device)
    if multi_hot:
        target = torch.randint(2, (B, K), generator=generator).to(device)
    else:
        target = torch.randint(K, (B,), generator=generator).to(device)
    options = {"m_pos": 0.8, "m_neg": 0.15, "down_weight": 0.4, "reduction": reduction}
    compare(
        lambda x: ops.margin_loss(x, target, **options),
        lambda x: reference.margin_loss(x, target, **options),
        [activations],
        seed,
        "contiguous",
        ["loss", "grad_lengths"],
    )


def test_margin_loss_of_an_empty_batch_is_zero(device):
    activations = torch.empty(0, 10, device=device, requires_grad=True)
    loss = ops.margin_loss(activations, torch.empty(0, dtype=torch.int64, device=device))
    loss.backward()
    assert loss.item() == 0


def test_capsule_loss_of_an_empty_batch_is_zero(device):
    images = torch.empty(0, 1, 4, 4, device=device, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=device)
    loss = CapsuleLoss()(torch.empty(0, 10, device=device), target, images, images.detach())
    loss.backward()
    assert loss.item() == 0


def test_capsule_loss_keeps_float64(device):
    images = torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=device)
    activations = torch.tensor([[0.9, 0.1]], dtype=torch.float64, device=device)
    target = torch.tensor([0], device=device)
    loss = CapsuleLoss(reconstruction_weight=1.0)(activations, target, images + 1 / 3, images)
    assert loss.item() == pytest.approx(1 / 9, rel=1e-15)
