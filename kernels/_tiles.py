"""Arithmetic on the tiles of a program, shared by several kernels."""

import torch
import triton
import triton.language as tl

# The lowest finite values. A running maximum starts here, below any logit. Unlike minus infinity,
# it does not lead to inf - inf with a logit of minus infinity.
_LOWEST_FLOAT32 = tl.constexpr(torch.finfo(torch.float32).min)
_LOWEST_FLOAT64 = tl.constexpr(torch.finfo(torch.float64).min)

# No squash is longer, so that rounding makes none longer than 1.
_LONGEST_FLOAT32 = tl.constexpr(1 - 4 * torch.finfo(torch.float32).eps)
_LONGEST_FLOAT64 = tl.constexpr(1 - 4 * torch.finfo(torch.float64).eps)


@triton.jit
def full_of_lowest(shape: tl.constexpr, dtype: tl.constexpr):
    """A tensor of the lowest finite value of its type, where a maximum starts."""
    if dtype == tl.float64:
        filled = tl.full(shape, _LOWEST_FLOAT64, dtype)
    else:
        filled = tl.full(shape, _LOWEST_FLOAT32, dtype)
    return filled


@triton.jit
def softmax_start(shape: tl.constexpr, dtype: tl.constexpr, LEAKY: tl.constexpr):
    """Running maximum and sum of a softmax before the first logit.

    If LEAKY, an orphan class comes first, whose logit is 0.
    """
    if LEAKY:
        top = tl.zeros(shape, dtype)
        mass = tl.full(shape, 1.0, dtype)
    else:
        top = full_of_lowest(shape, dtype)
        mass = tl.zeros(shape, dtype)
    return top, mass


@triton.jit
def classes(J, LEAKY: tl.constexpr):
    """How many classes share an input capsule: the output capsules, and an orphan if LEAKY."""
    return J + 1 if LEAKY else J


@triton.jit
def round_to_tf32(x):
    """Round float32 to the 11 significant bits that a TF32 multiplier reads."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def tf32_operand(x):
    """Round an operand of one TF32 product, and make every NaN visible to the multiplier.

    An NVIDIA GPU writes NaN as all ones, and rounding that up would give -0. The multiplier does
    not read 13 bits. A NaN whose ones are all in these would be infinity to it.
    """
    return tl.where(x == x, round_to_tf32(x), float("nan"))


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in the type of its operands.

    A TF32 multiplier drops the bits that it does not read, which would make every product too
    small. So "tf32" rounds the operands first.

    "tf32x3" forms float32 from three TF32 products. Split a = a₀ + a₁ with a₀ in TF32. Then a₁ fits
    too, except for its last bit. Only a₁ b₁, at most 2⁻²² of a b, is left out. The split is written
    out because it takes three instructions per value, a third of what Triton's own split takes.
    Where a is NaN, so is a₁, whatever a₀ is.
    """
    if PRECISION == "tf32x3":
        a_high = round_to_tf32(a)
        b_high = round_to_tf32(b)
        product = tl.dot(a - a_high, b_high, input_precision="tf32")
        product = tl.dot(a_high, b - b_high, acc=product, input_precision="tf32")
        product = tl.dot(a_high, b_high, acc=product, input_precision="tf32")
    elif PRECISION == "tf32":
        product = tl.dot(tf32_operand(a), tf32_operand(b), input_precision="tf32")
    else:
        product = tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)
    return product


@triton.jit
def _length_and_direction(s):
    """Length (ROWS, 1) and unit vector (ROWS, BLOCK_D) of each row. A zero row has direction 0.

    Rows are first divided by their largest component, so no square overflows or vanishes. The
    maximum ignores NaN, and the root carries it to the other components.
    """
    peak = tl.max(tl.abs(s), axis=1)[:, None]
    scaled = s / tl.where(peak > 0, peak, 1.0)
    root = tl.sqrt(tl.sum(scaled * scaled, axis=1))[:, None]
    root = tl.where(root == 0, 1.0, root)
    return peak * root, scaled / root


@triton.jit
def _at_most_one(length):
    """The length of a squash, limited so that rounding cannot take it past 1."""
    if length.dtype == tl.float64:
        limited = tl.minimum(length, _LONGEST_FLOAT64)
    else:
        limited = tl.minimum(length, _LONGEST_FLOAT32)
    return limited


@triton.jit
def squash_rows(s):
    """squash(s) = n² / (1 + n²) e of each row, n its length and e its direction.

    With m = max(n, 1) and k = min(n, 1) this is k² / (1/m² + k²) e. No square overflows. If n
    itself overflows, the result is still right.
    """
    length, direction = _length_and_direction(s)
    inverse = 1.0 / tl.maximum(length, 1.0)
    small = tl.minimum(length, 1.0)
    return _at_most_one(small * small / (inverse * inverse + small * small)) * direction


@triton.jit
def squash_rows_grad(s, dv):
    """Gradient of squash at each row s.

    Let e = s / n. The part of dv perpendicular to s is scaled by f = n / (1 + n²). The part along
    s, ρ = e·dv, is scaled by f + n f' = 2f / (1 + n²): ds = f ((dv - ρe) + 2 / (1 + n²) ρe). The
    two are kept separate, because one sum would lose the second to cancellation where n is large.
    With m and k as in `squash_rows`, 1 / (1 + n²) = (1/m)² / ((1/m)² + k²) and
    f = (1/m) k / ((1/m)² + k²).
    """
    length, direction = _length_and_direction(s)
    along = tl.sum(direction * dv, axis=1)[:, None] * direction
    inverse = 1.0 / tl.maximum(length, 1.0)
    small = tl.minimum(length, 1.0)
    scale = inverse / (inverse * inverse + small * small)
    return small * scale * ((dv - along) + 2.0 * inverse * scale * along)


@triton.jit
def _exponential_scale(length):
    """f = (1 - e⁻ⁿ) / n, which is 1 at n = 0.

    Below n = 1 the difference would lose digits. So f is summed as a series from its last term,
    f = 1 - n/2 (1 - n/3 (1 - …)). At n = 1 the first term left out is 1/20!, less than a float64
    rounding.
    """
    small = tl.minimum(length, 1.0)
    series = tl.full(length.shape, 1.0, length.dtype)
    for step in tl.static_range(18):
        series = 1.0 - small * (1.0 / (19 - step)) * series
    return tl.where(length < 1.0, series, (1.0 - tl.exp(-length)) / tl.maximum(length, 1.0))


@triton.jit
def squash_rows_exponential(s):
    """squash(s) = (1 - e⁻ⁿ) e = f s of each row, with f as in `_exponential_scale`.

    f s is exact where n underflows to 0, and (1 - e⁻ⁿ) e stays finite where n overflows.
    """
    length, direction = _length_and_direction(s)
    return tl.where(
        length < 1.0,
        _exponential_scale(length) * s,
        _at_most_one(1.0 - tl.exp(-length)) * direction,
    )


@triton.jit
def squash_rows_exponential_grad(s, dv):
    """Gradient of the exponential squash at each row s.

    The part of dv perpendicular to s is scaled by f. The part along s, ρ = e·dv, is scaled by
    f + n f' = e⁻ⁿ: ds = f (dv - ρe) + e⁻ⁿ ρe. At s = 0, where e = 0 and f = 1, this is dv.
    """
    length, direction = _length_and_direction(s)
    along = tl.sum(direction * dv, axis=1)[:, None] * direction
    return _exponential_scale(length) * (dv - along) + tl.exp(-length) * along


@triton.jit
def load_grad_coupling(
    ptrs, mask, steps_after, DTYPE: tl.constexpr, HAS_GRAD_COUPLING: tl.constexpr
):
    """The coupling's own gradient, which belongs to the last step. Zero in the others."""
    grad_coupling = tl.zeros(mask.shape, DTYPE)
    if HAS_GRAD_COUPLING:
        is_last = tl.zeros(mask.shape, tl.int32) == steps_after
        grad_coupling += tl.load(ptrs, mask & is_last, other=0.0).to(DTYPE)
    return grad_coupling
