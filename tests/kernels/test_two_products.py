"""The form of a forward pass with two products, where test_exact.py does not reach.

The interpreter gives that file one run of output capsules, one chunk of the batch and few blocks.
Here it is told that the target is an NVIDIA GPU, with a shape that one product does not serve.
"""

import pytest
import torch

from tritoncaps._operators import INTERPRETED

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 to interpret", allow_module_level=True)

from kernel_cases import Allocations, assert_exact, counted_launches, draw, exact, run

from tritoncaps import testing
from tritoncaps.kernels import _launch, _one_product, _two_products

PASS = "routing_pass"
# 34 output capsules are two runs, 3 blocks of input capsules.
SIZES = {"B": 2, "I": 17, "P": 3, "J": 34, "D": 2}


@pytest.fixture
def on_nvidia(monkeypatch):
    if INTERPRETED:
        for module in (_one_product, _two_products):
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
    """The logits take a tenth of what û would, or those of 64 rows, whichever is more."""
    call = draw(PASS, device, {"B": 70, "I": 2, "P": 2, "J": 2, "D": 3}, optional=("prior",))
    with Allocations() as allocations:
        actual = forward(call)
    allocations.assert_bands_untouched()
    block_i = _two_products.two_products_launch(
        2, 2, 2, 3, torch.float64, _launch.target_of(call["u"])
    )[0]["BLOCK_I"]
    assert (2, 64 * block_i) in allocations.shapes
    assert (2, 70 * block_i) not in allocations.shapes
    expected = exact(PASS, call)
    assert_exact(actual, {key: expected[key] for key in actual})
