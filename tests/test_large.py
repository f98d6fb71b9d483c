"""Sizes at which an index, a sum or a temporary could grow too large.

Memory stays small: on a CPU, tensors whose elements lie far apart are views of a sparse file, of
which only the touched pages exist.
"""

import os
import subprocess
import sys

import pytest
import torch
from agreement import assert_agrees, gradients, round_once
from interpreter import runs_the_interpreter
from live_bytes import LiveBytes
from torch import Tensor

from benchmarks.cases import Case, Shape
from benchmarks.memory import formula_bytes
from tritoncaps import _operators, _torch_path, ops, reference
from tritoncaps._operators import INTERPRETED
from tritoncaps._torch_path import _slices

CPU = torch.device("cpu")

# Far apart ----------------------------------------------------------------------------------------

# Along one axis after the other, the elements of every tensor of a call are moved so far apart that
# the third lies past 2^31, and then with a stride that is itself past it. Interpreted, a loop over
# a 64-bit range counts in Python's int, and a tensor is as wide as the stride it is multiplied by:
# there the first stride is for the batch alone, whose offsets do not come from a loop.
FAR_APART = """
import importlib, sys, torch
from torch.testing import assert_close
near_stride, far_stride = 2**30 + 4096, 2**31 + 4096
path, module, device = sys.argv[1:]
backend = importlib.import_module(module)
if device == "cpu":
    storage = torch.from_file(path, shared=True, size=3 * far_stride, dtype=torch.float16)
else:
    storage = torch.empty(3 * far_stride, dtype=torch.float16, device=device)
is_interpreted = module == "tritoncaps.kernels" and device == "cpu"

def far(tensor, axis, stride, offset):
    moved = tensor.movedim(axis, 0).contiguous()
    view = storage[offset:].as_strided(moved.shape, (stride, *moved.stride()[1:]))
    return view.copy_(moved).movedim(0, axis)

def all_results(name, inputs):
    forward, backward = (getattr(backend, f"{name}_{way}") for way in ("fwd", "bwd"))
    inputs = dict(inputs)
    grads = [inputs.pop(key) for key in ("grad", "grad_coupling") if key in inputs]
    if "routing" not in name:
        return [forward(*inputs.values()), backward(*grads, *inputs.values())]
    v, coupling, sums = forward(*inputs.values(), 2, True)
    return [v, coupling, sums, backward(*grads, *inputs.values(), sums, True)]

def check(name, **inputs):
    expected = torch.utils._pytree.tree_leaves(all_results(name, inputs))
    assert all(torch.isfinite(tensor).all() for tensor in expected)
    for stride in (near_stride, far_stride):
        for axis in range(4):
            apart = dict(inputs)
            for number, (key, tensor) in enumerate(inputs.items()):
                of_batch = axis == 0 and key not in ("weight", "prior")
                if axis < tensor.ndim and (of_batch or stride == far_stride or not is_interpreted):
                    apart[key] = far(tensor, axis, stride, 128 * number)
            if all(apart[key] is tensor for key, tensor in inputs.items()):
                continue
            results = torch.utils._pytree.tree_leaves(all_results(name, apart))
            assert len(results) == len(expected) >= 2
            for result, near in zip(results, expected, strict=True):
                assert_close(result, near)

def some(*shape):
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 37 % 64 - 32) / 32).half().view(shape).to(device)

more = {"prior": some(3, 3), "grad": some(3, 3, 3), "grad_coupling": some(3, 3, 3)}
linear = {"u": some(3, 3, 3), "weight": some(3, 3, 3, 3)}
check("fused_dynamic_routing", **linear, **more)
if module == "tritoncaps._torch_path":  # its other way, for large batches
    backend.fused_dynamic_routing.group_size = lambda *args, **kwargs: 0
    check("fused_dynamic_routing", **linear, **more)
check("prediction_vectors", **linear, grad=some(3, 3, 3, 3))
check("dynamic_routing", u_hat=some(3, 3, 3, 3), **more)
check("squash", s=some(3, 3), grad=some(3, 3) + 1)
print("the same")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a file there is not sparse by itself")
@pytest.mark.parametrize(
    ("backend", "on"),
    [
        ("_torch_path", "cpu"),
        pytest.param("kernels", "cpu", marks=runs_the_interpreter),
        ("kernels", "cuda"),
    ],
)
def test_offsets_past_two_to_the_31_elements(backend, on, tmp_path):
    """In a process of its own: an offset that wraps around ends it with a segmentation fault."""
    if backend == "kernels":
        pytest.importorskip("triton", reason="the kernels are written in Triton")
    if on == "cuda" and (not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 16e9):
        pytest.skip("needs a CUDA device with 16 GB free")
    path = tmp_path / "sparse"
    if on == "cpu":
        with path.open("wb") as file:
            file.truncate(2 * 3 * (2**31 + 4096))
    is_interpreted = backend == "kernels" and on == "cpu"
    result = subprocess.run(
        [sys.executable, "-c", FAR_APART, str(path), f"tritoncaps.{backend}", on],
        env={**os.environ, "TRITON_INTERPRET": str(int(is_interpreted))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "the same" in result.stdout


# Many capsules ------------------------------------------------------------------------------------


def capsules(B: int, I: int, P: int, J: int, D: int, seed: int = 0) -> list[Tensor]:
    """u, weight and prior in float32, whose votes are short and agree by half.

    Votes of no common direction would cancel, and a sum of a hundred thousand of them keep three
    digits fewer than its terms have, in whatever order they are added.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, I, P), (I, P, J, D), (P, J, D), (I, J))
    u, weight, common, prior = (torch.randn(shape, generator=generator) for shape in shapes)
    return [u / 2 + 1, (weight + common) * (0.5 / (P * D) ** 0.5), prior]


def route(module, options=None):
    def call(u: Tensor, weight: Tensor, prior: Tensor) -> Tensor:
        return module.fused_dynamic_routing(u, weight, prior=prior, **(options or {}))

    return call


# Interpreted, a program of a hundred thousand capsules takes minutes.
MANY = (
    [(3, 60, 2, 3, 2), (2, 3, 2, 40, 2)]
    if INTERPRETED
    else [(5, 100_000, 2, 3, 2), (2, 100_000, 2, 3, 2), (5, 50, 2, 1000, 4), (2, 400, 2, 500, 3)]
)


@pytest.mark.parametrize("sizes", MANY, ids=str)
def test_routing_of_many_capsules_agrees(device, sizes):
    """Forward and backward by the 2x rule; sums over so many terms lose no more than plain ones."""
    inputs = [tensor.to(device) for tensor in capsules(*sizes)]
    tensors = (inputs, inputs, [t.double() for t in inputs], [round_once(t, 1) for t in inputs])
    modules = (ops, reference, reference, reference)
    runs = [gradients(route(m), t, seed=2) for m, t in zip(modules, tensors, strict=True)]
    names = ("v", "grad_u", "grad_weight", "grad_prior")
    for name, *results in zip(names, *([*out, *grads] for out, grads in runs), strict=True):
        assert_agrees(name, *results)


@pytest.mark.parametrize("B", [2, 5])
def test_weighted_sums_add_up_over_the_input_capsules(device, B):
    """Of one iteration, s of all input capsules is s of one half plus s of the other."""
    I = 500 if INTERPRETED else 100_000
    u, weight, prior = (t.to(device).double() for t in capsules(B, I, 2, 3, 2))
    half = I // 2 + 7
    sums = [
        _operators.fused_dynamic_routing(u[:, part], weight[part], prior[part], 1, True, False)[2]
        for part in (slice(0, half), slice(half, I), slice(0, I))
    ]
    torch.testing.assert_close(sums[0] + sums[1], sums[2], rtol=1e-10, atol=1e-12)


# Memory -------------------------------------------------------------------------------------------

CHUNK = 1 << 18


@pytest.fixture
def small_chunks(monkeypatch):
    """Slices of a known size, beside which everything that grows is large."""
    sizes = {2: CHUNK // torch.get_num_threads(), 3: 8 * CHUNK // 3}
    monkeypatch.setattr(_slices, "cache_bytes", sizes.__getitem__)


def peaks_of_torch_path(case: Case) -> dict[str, int]:
    """Peak of the forward and of both, the forward's results included."""
    tensors = case.arguments(CPU)
    u, weight = tensors["u"], tensors["weight"]
    with LiveBytes() as forward:
        _, _, sums = _torch_path.fused_dynamic_routing_fwd(u, weight, None, case.iterations, False)
    with LiveBytes() as backward:
        grad_v = case.output_gradients(CPU)["v"]
        _torch_path.fused_dynamic_routing_bwd(grad_v, None, u, weight, None, sums, True)
    return {"forward": forward.peak, "both": backward.peak + sums.numel() * sums.itemsize}


# Of 32 images the last two shapes take some at a time, and of three all; the others take a chunk,
# most of them.
SHAPES = [
    Shape(100, 8, 10, 16),
    Shape(400, 8, 10, 16),
    Shape(100, 8, 40, 16),
    Shape(25, 16, 10, 16),
    Shape(200, 16, 10, 16),  # 16 images, which the cache does not hold
]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("iterations", [3, 10])
@pytest.mark.parametrize("B", [32, 3], ids=["B32", "B3"])
@pytest.mark.parametrize("phase", ["forward", "both"])
def test_peak_is_what_the_formula_says(B, phase, iterations):
    """Of the tensors on the torch path; docs/memory.md has peaks of whole processes beside it."""
    for shape in SHAPES:
        case = Case("fused_dynamic_routing", shape, B, iterations=iterations)
        peak = peaks_of_torch_path(case)[phase]
        formula = formula_bytes(case, "torch path", phase, CPU)
        assert 0.75 * formula <= peak <= 1.25 * formula, (str(case), peak, formula)


@pytest.mark.usefixtures("small_chunks")
def test_temporaries_do_not_grow_with_the_prediction_vectors():
    """From I to 4 I, û grows by 12 MB; the peak by u forward, and by gradients in the backward."""
    few, many = (Case("fused_dynamic_routing", Shape(I, 8, 40, 16), 32) for I in (50, 200))
    before, after = peaks_of_torch_path(few), peaks_of_torch_path(many)
    u_hat = 4 * 32 * 150 * 40 * 16
    u, weight = 4 * 32 * 150 * 8, 4 * 150 * 8 * 40 * 16
    assert after["forward"] - before["forward"] <= u + CHUNK
    assert after["both"] - before["both"] <= weight + 3 * u + CHUNK
    assert u_hat > 2 * (weight + 3 * u + CHUNK)


@pytest.mark.usefixtures("small_chunks")
def test_temporaries_of_some_images_do_not_grow_with_the_batch():
    """From B to 4 B, û grows by 3 MB; the peak by what is of the size of u or v."""
    few, many = (Case("fused_dynamic_routing", Shape(25, 16, 10, 16), B) for B in (64, 256))
    before, after = peaks_of_torch_path(few), peaks_of_torch_path(many)
    u_hat, u, v = 4 * 192 * 25 * 10 * 16, 4 * 192 * 25 * 16, 4 * 192 * 10 * 16
    assert after["forward"] - before["forward"] <= 5 * v
    assert after["both"] - before["both"] <= u + 9 * v
    assert u_hat > 2 * (u + 9 * v)


def peak_of_dynamic_routing(B: int, iterations: int, full: bool, dtype: torch.dtype) -> int:
    """Peak of the backward over what it returns."""
    u_hat, grad_v = torch.randn(B, 100, 10, 16).to(dtype), torch.randn(B, 10, 16).to(dtype)
    _, _, sums = _torch_path.dynamic_routing_fwd(u_hat, None, iterations, False)
    with LiveBytes() as backward:
        _torch_path.dynamic_routing_bwd(grad_v, None, u_hat, None, sums, full)
    return backward.peak - u_hat.numel() * u_hat.itemsize


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporaries_of_dynamic_routing_fit_the_cache(dtype):
    """Whatever the batch; with more iterations, fewer images at once."""
    cache = 2 * CHUNK  # a group's share of level 3, and a chunk
    of_an_image = 4 * 10 * 16 * (3 * 4 + 4)
    for B in (8, 64):
        for iterations in (1, 3, 10):
            for full in (True, False):
                peak = peak_of_dynamic_routing(B, iterations, full, dtype)
                saved = 3 * iterations * 4 * B * 10 * 16
                assert peak <= cache + saved + B * of_an_image, (B, iterations, full, peak)
