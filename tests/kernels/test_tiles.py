"""The products of a tile: rounding to TF32, three TF32 products, NaN."""

import pytest
import torch

from tritoncaps._operators import INTERPRETED

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 to interpret", allow_module_level=True)

import triton
import triton.language as tl

from tritoncaps.kernels._tiles import dot, round_to_tf32, tf32_operand


def random(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@triton.jit
def _tf32x3_kernel(a_ptr, b_ptr, product_ptr, high_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    tl.store(high_ptr + offsets, round_to_tf32(a))
    tl.store(product_ptr + offsets, dot(a, b, "tf32x3"))


def test_three_tf32_products_make_float32(device):
    a, b = (random(32, 32, dtype=torch.float32, seed=seed).to(device) for seed in (0, 1))
    product, high = torch.empty_like(a), torch.empty_like(a)
    _tf32x3_kernel[(1,)](a, b, product, high, N=32)
    assert (high.view(torch.int32) & 0x1FFF == 0).all(), "the bits that TF32 lacks are zero"
    assert ((a - high).abs() <= 2.0**-11 * a.abs()).all(), "and the others are rounded to nearest"
    exact = a.double() @ b.double()
    scale = (a.double().abs() @ b.double().abs()).max()
    assert (product - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * scale


@triton.jit
def _product_kernel(a_ptr, b_ptr, product_ptr, PRECISION: tl.constexpr, N: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    tl.store(product_ptr + offsets, dot(a, b, PRECISION))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001])
@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee"])
def test_rounding_never_turns_nan_into_a_number(device, precision, bits):
    """An NVIDIA GPU writes NaN as all ones. Adding to these bits, as rounding does, overflows."""
    a, b = (random(16, 16, dtype=torch.float32, seed=seed).to(device) for seed in (0, 1))
    for operand, lost in ((a, (3, slice(None))), (b, (slice(None), 3))):
        product = torch.empty_like(a)
        kept = operand[3, 3].clone()
        operand.view(torch.int32)[3, 3] = bits
        _product_kernel[(1,)](a, b, product, precision, N=16)
        assert product[lost].isnan().all()
        operand[3, 3] = kept


@triton.jit
def _operand_kernel(x_ptr, operand_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(operand_ptr + offsets, tf32_operand(tl.load(x_ptr + offsets)))


def test_a_tf32_multiplier_reads_nan_as_nan(device):
    """It does not read the 13 lowest bits, which may hold all ones of a NaN."""
    x = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32, device=device)
    operand = torch.empty_like(x)
    _operand_kernel[(1,)](x.view(torch.float32), operand.view(torch.float32), N=4)
    assert (operand & -0x2000).view(torch.float32).isnan().all()
