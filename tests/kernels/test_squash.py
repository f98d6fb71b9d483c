"""Both forms of squash, value and gradient, at every length that a float can have."""

import math

import pytest
import torch

from tritoncaps._operators import INTERPRETED

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 to interpret", allow_module_level=True)

from kernel_cases import assert_exact, draw, exact, run

from tritoncaps import kernels

FORMS = ("quadratic", "exponential")


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_exact(device, form):
    call = draw("squash", device, {"B": 60, "I": 1, "P": 1, "J": 5, "D": 5})
    assert_exact(run("squash", call, form=form), exact("squash", call, form=form))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-300, -150, -40, -20, -8, -3, -1, 0, 1, 2, 5, 8, 30, 37, 300])
def test_exponential_is_accurate_at_every_length(device, dtype, exponent):
    """Rows have length 5, 3·10^exponent or close to 1. The error is a few roundings."""
    finfo = torch.finfo(dtype)
    lengths = [n for n in (3.0 * 10.0**exponent, 0.999, 1.0, 1.001, 5.0) if n < finfo.max]
    lengths = [n for n in lengths if n > finfo.tiny * 64]
    direction = torch.tensor([2 / 7, -3 / 7, 6 / 7], dtype=torch.float64)
    s = (torch.tensor(lengths, dtype=torch.float64)[:, None] * direction).to(dtype)
    across = torch.tensor([3.0, 2.0, 0.0], dtype=dtype).expand_as(s)
    v = kernels.squash_fwd(s.to(device), "exponential").cpu()
    ds = kernels.squash_bwd(across.to(device), s.to(device), "exponential").cpu()
    for row, value, grad in zip(s.tolist(), v.tolist(), ds.tolist(), strict=True):
        n = math.hypot(*row)
        f = -math.expm1(-n) / n
        rho = sum(x * y for x, y in zip(row, (3.0, 2.0, 0.0), strict=True)) / n
        expected = [
            f * (y - rho * x / n) + math.exp(-n) * rho * x / n
            for x, y in zip(row, (3.0, 2.0, 0.0), strict=True)
        ]
        assert value == pytest.approx([f * x for x in row], rel=16 * finfo.eps, abs=0)
        slack = 16 * finfo.eps * f * math.hypot(3.0, 2.0) + finfo.tiny
        assert grad == pytest.approx(expected, rel=0, abs=slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential_of_a_zero_row_is_zero_and_its_gradient_the_identity(device, dtype):
    s = torch.zeros(2, 3, dtype=dtype, device=device)
    grad = torch.tensor([[1.0, -2.0, 3.0], [0.0, 1e-30, 1e30]], dtype=dtype, device=device)
    assert torch.equal(kernels.squash_fwd(s, "exponential"), s)
    assert torch.equal(kernels.squash_bwd(grad, s, "exponential"), grad)


# A length beyond the largest float is infinity. This does no harm, but numpy warns about it.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_any_finite_row_gives_a_finite_result(device, form, dtype):
    finfo = torch.finfo(dtype)
    values = [0.0, finfo.smallest_normal / 64, finfo.tiny, 1e-20, 1.0, 1e20, finfo.max]
    s = torch.tensor([[a, b] for a in values for b in values], dtype=dtype, device=device)
    v = kernels.squash_fwd(s, form)
    assert torch.isfinite(v).all()
    assert torch.isfinite(kernels.squash_bwd(torch.ones_like(s), s, form)).all()
    assert (torch.linalg.vector_norm(v.double(), dim=1) <= 1).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_with_nan_or_infinity_is_nan_and_the_others_are_not(device, form, bad):
    s = torch.ones(3, 4, device=device)
    s[1, 2] = bad
    for result in (kernels.squash_fwd(s, form), kernels.squash_bwd(torch.ones_like(s), s, form)):
        assert result[1].isnan().all()
        assert torch.isfinite(result[[0, 2]]).all()
