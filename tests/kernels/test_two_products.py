"""The passes with two products, where test_exact.py does not reach.

The interpreter gives that file one run of output capsules, one chunk of the batch and few blocks.
Its backward takes two sweeps. Here the target is said to be an NVIDIA GPU, with a shape that one
product does not serve.
"""

import pytest
import torch

from tritoncaps._operators import INTERPRETED

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 to interpret", allow_module_level=True)

from kernel_cases import Allocations, assert_exact, counted_launches, draw, exact, run

from tritoncaps import testing
from tritoncaps.kernels import (
    _launch,
    _one_product,
    _two_products,
    _two_products_backward,
    _vote_gradient,
)

LOOP, PASS = "fused_dynamic_routing", "routing_pass"
# 34 output capsules are two runs, 3 blocks of input capsules.
SIZES = {"B": 2, "I": 17, "P": 3, "J": 34, "D": 2}


@pytest.fixture
def on_nvidia(monkeypatch):
    if INTERPRETED:
        modules = (_one_product, _two_products, _two_products_backward, _vote_gradient)
        for module in modules:
            monkeypatch.setattr(module, "target_of", lambda _: _launch.Target("sm90", 232448))


def forward(call, **options):
    """The results of the launcher, which must take this form."""
    with counted_launches() as launched:
        results = run(PASS, call, with_gradients=False, **options)
    assert "_weighted_sum_kernel" in launched
    return results


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.usefixtures("on_nvidia")
def test_products_of_tf32(device, precision):
    """Three TF32 products are as good as float32. One is what torch allows with "high"."""
    call = draw(PASS, device, SIZES, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        actual = forward(call, leaky=True)
    finally:
        torch.set_float32_matmul_precision(before)
    plain, exactly = (
        exact(PASS, call, leaky=True, dtype=torch.float32),
        exact(PASS, call, leaky=True),
    )
    for key, result in actual.items():
        if precision == "highest":
            testing.assert_agrees(key, result, plain[key], exactly[key])
        else:
            torch.testing.assert_close(result, exactly[key].float(), rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("on_nvidia")
def test_float16_agrees(device):
    call = draw(PASS, device, SIZES, dtype=torch.float16)
    plain, exactly = exact(PASS, call, dtype=torch.float16), exact(PASS, call)
    for key, result in forward(call).items():
        assert result.dtype == torch.float16
        testing.assert_agrees(key, result, plain[key], exactly[key])


def test_few_components_take_a_chunk_of_the_batch_at_a_time(device):
    """The logits take an eighth of what û would, or are those of 64 rows."""
    call = draw(PASS, device, {"B": 70, "I": 2, "P": 2, "J": 2, "D": 3}, optional=("prior",))
    with Allocations() as allocations:
        actual = forward(call)
    allocations.assert_bands_untouched()
    block_i = _two_products.two_products_launch(
        2, 2, 2, 3, torch.float64, _launch.target_of(call["u"])
    )[0]["BLOCK_I"]
    assert (1, 2, 64 * block_i) in allocations.shapes
    assert (1, 2, 70 * block_i) not in allocations.shapes
    expected = exact(PASS, call)
    assert_exact(actual, {key: expected[key] for key in actual})


# Backward -----------------------------------------------------------------------------------------

# 14 output capsules are four runs with the table below, 9 input capsules are two blocks.
FEW = {"B": 3, "I": 9, "P": 3, "J": 14, "D": 14}


@pytest.fixture
def with_short_runs(monkeypatch, on_nvidia, device):
    architecture = _two_products.target_of(torch.empty(0, device=device)).architecture
    table = {
        f"logits {architecture} {dtype} I9 P3 J14 D14": {"MAX_RUN": 4}
        for dtype in ("float32", "float16")
    }
    monkeypatch.setattr(_launch, "_table", table)


def check_gradients(name, device, sizes=FEW, *, dtype=torch.float32, optional=(), **options):
    call = draw(name, device, sizes, dtype=dtype, optional=optional)
    plain, exactly = exact(name, call, dtype=dtype, **options), exact(name, call, **options)
    with Allocations() as allocations, counted_launches() as launched:
        results = run(name, call, **options)
    allocations.assert_bands_untouched()
    assert "_vote_gradient_kernel" in launched and "_pass_bwd_kernel" not in launched
    for key, result in results.items():
        if key in exactly:
            assert result.dtype == dtype
            testing.assert_agrees(key, result, plain[key], exactly[key])
    return allocations


@pytest.mark.parametrize(
    ("name", "optional", "options"),
    [
        (LOOP, (), {"iterations": 3, "with_coupling": False}),
        (LOOP, ("prior",), {"iterations": 2, "leaky": True}),
        (LOOP, ("prior",), {"iterations": 2, "gradient": "last", "with_coupling": False}),
        (PASS, ("prior", "bias"), {"leaky": True}),
        (PASS, (), {"with_coupling": False}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("with_short_runs")
def test_every_gradient(device, name, optional, options):
    check_gradients(name, device, optional=optional, **options)


@pytest.mark.usefixtures("with_short_runs")
def test_gradients_of_16_bits(device):
    check_gradients(PASS, device, dtype=torch.float16, optional=("prior",))


@pytest.mark.usefixtures("on_nvidia")
def test_programs_share_a_long_batch(device, monkeypatch):
    """Five batch steps are three splits, whose slots take no more memory than u."""
    monkeypatch.setattr(_vote_gradient, "_FEWEST_PROGRAMS", 1)
    monkeypatch.setattr(_vote_gradient, "_FEWEST_STEPS", 1)
    sizes = {"B": 70, "I": 3, "P": 3, "J": 2, "D": 11}
    options = {"leaky": True, "with_coupling": False}
    allocations = check_gradients(PASS, device, sizes, optional=("prior", "bias"), **options)
    assert (3, 3, 3, 2, 11) in allocations.shapes


@pytest.mark.usefixtures("on_nvidia")
def test_the_backward_takes_chunks_of_the_batch(device):
    """The logits and dc together are limited."""
    sizes = {"B": 70, "I": 1, "P": 3, "J": 22, "D": 2}
    allocations = check_gradients(PASS, device, sizes, with_coupling=False)
    assert (2, 22, 64 * 8) in allocations.shapes


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.usefixtures("with_short_runs")
def test_nan_stays_in_its_image_and_a_prior_may_forbid_pairs(device):
    call = draw(PASS, device, FEW, dtype=torch.float32, optional=("prior",))
    call["prior"][:, 1:9] = float("-inf")  # the second run too, as a whole
    clean = run(PASS, call, with_coupling=False)
    assert all(torch.isfinite(result).all() for result in clean.values())
    assert not clean["d_prior"][:, 1:9].any()
    call["u"][1] = float("nan")
    spoilt = run(PASS, call, with_coupling=False)
    for key in ("d_u", "d_pose"):
        assert spoilt[key].isnan().flatten(1).any(1).tolist() == [False, True, False]
        assert torch.equal(spoilt[key][::2], clean[key][::2])
