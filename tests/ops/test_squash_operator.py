"""Squash: any shape and axis, and any length from 0 to the largest number."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritoncaps import ops, reference
from tritoncaps.testing import (
    DTYPES,
    LAYOUTS,
    Case,
    Operator,
    assert_agrees,
    compare,
    gradients,
    normal,
)

FORMS = ["quadratic", "exponential"]
SLOPE_AT_ZERO = {"quadratic": 0.0, "exponential": 1.0}
LENGTHS = [0.0, 1e-45, 1e-38, 1e-30, 1e-20, 1e-10, 1e-3, 1.0, 1e3, 1e10, 1e19, 1e20, 1e25, 3e38]

every_form = pytest.mark.parametrize("form", FORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dim=st.integers(0, 3),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 100.0]),
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_axis_agrees(device, shape, dim, form, grad_layout, scale, **case):
    options = {"dim": dim % len(shape), "form": form}

    def rounded_reference(s, **options):
        # In 16 or 32 bits its square underflows or overflows. It is evaluated in float64 and
        # rounded, so the operator may be off by no more than roundings.
        return reference.squash(s.double(), **options).to(s.dtype)

    # The derivative along s is e⁻ⁿ, or about 2/n³. The reference computes it as a difference of
    # terms of size 1/n, and loses it to cancellation where n is large. The next test covers that.
    largest = min(scale, {"exponential": 1.0, "quadratic": 100.0}[form])
    axes = "BXYZ"[: len(shape)]
    operator = Operator(
        ops.squash,
        rounded_reference,
        inputs={"s": " ".join(axes)},
        outputs={"v": " ".join(axes)},
        domain={"s": lambda s: s * largest},
    )
    sizes = dict(zip(axes, shape, strict=True))
    compare(operator, Case(sizes, options, grad_layout=grad_layout, **case), device)


@every_form
@pytest.mark.parametrize("length", LENGTHS)
def test_value_and_gradient_are_right_at_any_length(device, length, form):
    """Both are finite and relatively accurate, even where the square of the length is not."""
    s = torch.tensor([[0.6, 0.0, -0.8]], dtype=torch.float64) * length
    s = s.float().to(device)
    results = []
    for squash, leaf in ((ops.squash, s.clone()), (reference.squash, s.double())):
        v = squash(leaf.requires_grad_(), form=form)
        (grad,) = torch.autograd.grad(v, leaf, torch.ones_like(v))
        results.append((v.detach(), grad))
    for name, actual, exact in zip(("v", "gradient"), *results, strict=True):
        assert_agrees(name, actual, exact.float(), exact)


@every_form
@every_dtype
def test_gradient_at_zero(device, form, dtype):
    """A dead capsule gets no gradient through "quadratic", and all of it through "exponential"."""
    s = torch.zeros(2, 8, dtype=dtype, device=device)
    (v,), grads = gradients(partial(ops.squash, form=form), {"s": s})
    assert not v.any()
    identity = gradients(lambda s: s * 1, {"s": s})[1]["s"]
    assert torch.equal(grads["s"], identity * SLOPE_AT_ZERO[form])


# The interpreter computes the length with NumPy, which warns that it overflows.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@every_form
@every_dtype
def test_the_largest_components(device, dtype, form):
    """Their length overflows the dtype, but their squash does not."""
    s = torch.full((2, 8), torch.finfo(dtype).max, dtype=dtype, device=device)
    for squash in (ops.squash, reference.squash):
        (v,), grads = gradients(partial(squash, form=form), {"s": s})
        torch.testing.assert_close(v, torch.full_like(v, 8**-0.5))
        assert torch.isfinite(grads["s"]).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@every_form
@pytest.mark.parametrize("component", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("beside", [0.0, 1.0, 1e30])
def test_one_bad_component_spoils_its_vector(device, beside, component, form):
    """The length is unknown, so all components must be NaN."""
    s = torch.tensor([[component, beside], [1.0, beside]], device=device)
    (v,), grads = gradients(partial(ops.squash, form=form), {"s": s})
    for result in (v, grads["s"]):
        assert result[0].isnan().all()
        assert result[1].isfinite().all()


@every_form
@pytest.mark.parametrize("shape", [(2, 0), (0,), (0, 0, 3), (3,), (0, 5)], ids=str)
def test_shapes_without_elements_and_without_batch(device, shape, form):
    s = torch.ones(shape, device=device)
    (v,), grads = gradients(partial(ops.squash, form=form), {"s": s})
    assert v.shape == grads["s"].shape == shape


@every_form
@every_dtype
def test_direction_stays_and_length_is_below_one(device, dtype, form):
    # Up to the largest length whose squash does not round to 1 in the dtype.
    roundings = torch.finfo(dtype).eps
    largest = {
        "quadratic": 0.5 * roundings**-0.5,
        "exponential": -0.5 * torch.tensor(roundings).log(),
    }
    end = torch.as_tensor(largest[form], dtype=torch.float64).log10().item()
    lengths = torch.logspace(-1, end, 50, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(1, 7, dtype=torch.float64))
    s = (lengths[:, None] * direction).to(dtype).to(device)
    v = ops.squash(s, form=form).double()
    norms = v.norm(dim=-1)
    assert (norms < 1).all()
    assert (norms.diff() > -2 * roundings).all(), "a longer input must give a longer output"
    cosine = torch.nn.functional.cosine_similarity(v, s.double())
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=4 * roundings, atol=0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    D=st.integers(1, 64),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-38, 37) | st.integers(1, 6),
    positive=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_no_vector_is_longer_than_one(device, D, form, dtype, exponent, positive, seed):
    """Also on the reference, and as users measure it. 16-bit components are rounded once more."""
    directions = normal(64, D, seed=seed)
    directions = torch.nn.functional.normalize(directions.abs() if positive else directions)
    lengths = torch.logspace(exponent, exponent + 1, 64, dtype=torch.float64)
    largest = torch.finfo(dtype).max
    s = (lengths[:, None] * directions).clamp(-largest, largest).to(dtype).to(device)
    allowed = 1 + torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 1
    assert (ops.squash(s, form=form).double().norm(dim=-1) <= allowed).all()
    if dtype.itemsize > 2:
        for squash in (ops.squash, reference.squash):
            v = squash(s, form=form)
            assert (v.double().norm(dim=-1) <= 1).all()
            assert (torch.linalg.vector_norm(v, dim=-1) <= 1).all()


@every_dtype
def test_short_vectors_pass_almost_unchanged_under_exponential(device, dtype):
    """1 − e⁻ⁿ is n − n²/2 + …. Computed as a difference, it would lose every digit."""
    lengths = torch.tensor([1e-7, 1e-5, 1e-3], dtype=torch.float64)
    s = (lengths[:, None] * torch.tensor([0.6, 0.0, -0.8])).to(dtype).to(device)
    v = ops.squash(s, form="exponential")
    n = s.double().norm(dim=-1, keepdim=True)
    exact = s.double() * (1 - n / 2 + n**2 / 6 - n**3 / 24 + n**4 / 120)
    # float16 has steps of 2⁻²⁴ among its smallest numbers.
    step = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    torch.testing.assert_close(v.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=step)
