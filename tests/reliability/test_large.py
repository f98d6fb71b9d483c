"""Sizes at which an index, a sum or a temporary could grow too large.

Memory stays small. On a CPU, tensors whose elements are far apart are views of a sparse file, in
which only the touched pages exist.
"""

import os
import subprocess
import sys

import pytest
import torch
from interpreter import runs_the_interpreter
from live_bytes import LiveBytes

from benchmarks.cases import Case, Shape
from benchmarks.memory import formula_bytes
from tritoncaps import _torch_path
from tritoncaps._operators import INTERPRETED
from tritoncaps._torch_path import _slices
from tritoncaps.testing import OPERATORS, compare_inputs, draw_inputs, normal

CPU = torch.device("cpu")

# Far apart ----------------------------------------------------------------------------------------

# Along one axis after the other, the elements of every tensor of a call are moved far apart. With
# the first stride, the third element is past 2^31. The second stride is itself past 2^31. In the
# interpreter, a loop over a 64-bit range counts in Python's int, and a tensor is as wide as the
# stride it is multiplied by. So there, the first stride is used only for the batch, whose offsets
# do not come from a loop.
FAR_APART = """
import sys, torch
from torch.testing import assert_close
from tritoncaps._operators import INTERPRETED
from tritoncaps.testing import OPERATORS, SIZES, draw_inputs, normal

near_stride, far_stride = 2**30 + 4096, 2**31 + 4096
path, device = sys.argv[1:]
if device == "cpu":
    storage = torch.from_file(path, shared=True, size=3 * far_stride, dtype=torch.float16)
else:
    storage = torch.empty(3 * far_stride, dtype=torch.float16, device=device)

def far(tensor, axis, stride, offset):
    moved = tensor.movedim(axis, 0).contiguous()
    view = storage[offset:].as_strided(moved.shape, (stride, *moved.stride()[1:]))
    return view.copy_(moved).movedim(0, axis)

def results_of(operator, options, inputs, grads):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.values()]
    results = operator.call(dict(zip(inputs, leaves)), options)
    return [*results, *torch.autograd.grad(results, leaves, grads)]

def check(operator, options):
    inputs = draw_inputs(operator, dict.fromkeys(SIZES, 3), dtype=torch.float16, device=device)
    results = operator.call(inputs, options)
    grads = [normal(*result.shape, seed=n).to(result) for n, result in enumerate(results)]
    expected = results_of(operator, options, inputs, grads)
    assert all(torch.isfinite(tensor).all() for tensor in expected)
    named = [*((tensor, operator.axes[name]) for name, tensor in inputs.items()),
             *((grad, "B") for grad in grads)]
    for stride in (near_stride, far_stride):
        for axis in range(4):
            apart = [
                far(tensor, axis, stride, 512 * number)
                if axis < tensor.ndim and (
                    stride == far_stride or not INTERPRETED or (axis == 0 and "B" in axes)
                )
                else tensor
                for number, (tensor, axes) in enumerate(named)
            ]
            if all(moved is tensor for moved, (tensor, _) in zip(apart, named)):
                continue
            moved = dict(zip(inputs, apart))
            found = results_of(operator, options, moved, apart[len(inputs):])
            assert len(found) == len(expected) >= 2
            for result, near in zip(found, expected, strict=True):
                assert_close(result, near)
    print(operator)

for operator in OPERATORS.values():
    usual = {name: True if name.startswith("return_") else values[0]
             for name, values in operator.options.items()}
    for form in operator.options.get("form", [None]):
        check(operator, usual if form is None else usual | {"form": form})
print("the same")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a file there is not sparse by itself")
@pytest.mark.parametrize(
    ("on", "interpret"),
    [
        pytest.param("cpu", "0", id="torch-path"),
        pytest.param("cpu", "1", id="kernels-interpreted", marks=runs_the_interpreter),
        pytest.param("cuda", "0", id="kernels"),
    ],
)
def test_offsets_past_two_to_the_31_elements(on, interpret, tmp_path):
    """In its own process, because an offset that wraps around ends in a segmentation fault."""
    if interpret == "1" or on == "cuda":
        pytest.importorskip("triton", reason="the kernels are written in Triton")
    if on == "cuda" and (not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 16e9):
        pytest.skip("needs a CUDA device with 16 GB free")
    path = tmp_path / "sparse"
    if on == "cpu":
        with path.open("wb") as file:
            file.truncate(2 * 3 * (2**31 + 4096))
    # A shape that falls back to the torch path would warn.
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", FAR_APART, str(path), on],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "the same" in result.stdout
    assert set(OPERATORS) <= set(result.stdout.split())


# Many capsules ------------------------------------------------------------------------------------

FUSED = [
    operator
    for operator in OPERATORS.values()
    if operator.registered is not None
    and {"weight", "prior"} <= operator.axes.keys()
    and operator.axes["u"] == "B I P"
    and "coupling?" in operator.outputs
]


def agreeing_inputs(operator, B, I, P, J, D, dtype=torch.float32, device="cpu"):
    """Inputs whose prediction vectors are short and half agree.

    Without a common direction they would cancel. A sum of a hundred thousand would then have three
    digits fewer than its terms, in whatever order they are added.
    """
    sizes = {"B": B, "I": I, "P": P, "J": J, "D": D}
    inputs = draw_inputs(operator, sizes, scale=0.5 * D**-0.5, optional=("prior",))
    inputs["u"] = inputs["u"] / 2 + 1
    inputs["weight"] += normal(P, J, D) * (0.5 / (P * D) ** 0.5)
    return {name: tensor.to(dtype).to(device) for name, tensor in inputs.items()}


# In the interpreter, a program with a hundred thousand capsules takes minutes.
MANY = (
    [(3, 60, 2, 3, 2), (2, 3, 2, 40, 2)]
    if INTERPRETED
    else [(5, 100_000, 2, 3, 2), (2, 100_000, 2, 3, 2), (5, 50, 2, 1000, 4), (2, 400, 2, 500, 3)]
)


@pytest.mark.parametrize("operator", FUSED, ids=str)
@pytest.mark.parametrize("sizes", MANY, ids=str)
def test_routing_of_many_capsules_agrees(device, sizes, operator):
    """Sums over so many terms lose no more digits than plain ones, forward and backward."""
    inputs = agreeing_inputs(operator, *sizes, device=device)
    compare_inputs(operator, inputs, operator.defaults, seed=2)


@pytest.mark.parametrize("operator", FUSED, ids=str)
@pytest.mark.parametrize("B", [2, 5])
def test_weighted_sums_add_up_over_the_input_capsules(device, B, operator):
    """In a single pass, s of all input capsules is s of one half plus s of the other half."""
    I = 500 if INTERPRETED else 100_000
    inputs = agreeing_inputs(operator, B, I, 2, 3, 2, torch.float64, device)
    half = I // 2 + 7
    sums = []
    for part in (slice(0, half), slice(half, I), slice(0, I)):
        u, weight, prior = inputs["u"][:, part], inputs["weight"][part], inputs["prior"][part]
        if operator.name == "routing_pass":
            sums.append(operator.function(u, weight, inputs["pose"], prior=prior))
        else:  # the last output of the registered operator is s of each iteration
            given = (u, weight, prior, None, 1, False, "v", False, "full")
            sums.append(operator.registered.forward(*given)[-1])
    torch.testing.assert_close(sums[0] + sums[1], sums[2], rtol=1e-10, atol=1e-12)


# Memory -------------------------------------------------------------------------------------------

SLICE = 1 << 18


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of a known size, so small that everything that grows is large beside them."""
    monkeypatch.setattr(_slices, "slice_bytes", lambda device: SLICE)


def fused_peaks(B, I, P, J, D, iterations=3):
    """Peaks of the fused routing: of the forward, and of forward and backward with the results."""
    inputs = draw_inputs(
        OPERATORS["fused_dynamic_routing"],
        {"B": B, "I": I, "P": P, "J": J, "D": D},
        dtype=torch.float32,
        optional=(),
    )
    u, weight = inputs.values()
    with LiveBytes() as forward:
        _, _, sums = _torch_path.fused_dynamic_routing_fwd(
            u, weight, None, None, iterations, False, "v", False
        )
    grad_v = normal(B, J, D, dtype=torch.float32)
    with LiveBytes() as backward:
        _torch_path.fused_dynamic_routing_bwd(
            grad_v, None, u, weight, None, None, sums, False, "full", "v"
        )
    return {"forward": forward.peak, "both": backward.peak + sums.nbytes}


# Of 32 images, a slice holds a few input capsules or one, and of three images many.
SHAPES = [
    Shape(100, 8, 10, 16),
    Shape(400, 8, 10, 16),
    Shape(100, 8, 40, 16),
    Shape(25, 16, 10, 16),
    Shape(200, 16, 10, 16),
]


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("iterations", [3, 10])
@pytest.mark.parametrize("B", [32, 3], ids=["B32", "B3"])
@pytest.mark.parametrize("phase", ["forward", "both"])
def test_peak_is_what_the_formula_says(B, phase, iterations):
    """For tensors on the torch path. docs/memory.md compares it with peaks of whole processes."""
    for shape in SHAPES:
        case = Case("fused_dynamic_routing", shape, B, iterations=iterations)
        peak = fused_peaks(B, *shape, iterations)[phase]
        formula = formula_bytes(case, "torch path", phase, CPU)
        assert 0.75 * formula <= peak <= 1.25 * formula, (str(case), peak, formula)


@pytest.mark.usefixtures("small_slices")
def test_temporaries_do_not_grow_with_the_prediction_vectors():
    """From I to 4 I, û grows by 12 MB. The peak grows by u, and in the backward by gradients."""
    before, after = (fused_peaks(32, I, 8, 40, 16) for I in (50, 200))
    u_hat = 4 * 32 * 150 * 40 * 16
    u, weight = 4 * 32 * 150 * 8, 4 * 150 * 8 * 40 * 16
    assert after["forward"] - before["forward"] <= u + SLICE
    assert after["both"] - before["both"] <= weight + 3 * u + SLICE
    assert u_hat > 2 * (weight + 3 * u + SLICE)


@pytest.mark.usefixtures("small_slices")
def test_temporaries_do_not_grow_with_the_batch():
    """From B to 4 B, û grows by 3 MB. The peak grows only by tensors of the size of u or v."""
    before, after = (fused_peaks(B, 25, 16, 10, 16) for B in (64, 256))
    u_hat, u, v = 4 * 192 * 25 * 10 * 16, 4 * 192 * 25 * 16, 4 * 192 * 10 * 16
    assert after["forward"] - before["forward"] <= 5 * v
    assert after["both"] - before["both"] <= u + 9 * v
    assert u_hat > 2 * (u + 9 * v)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("I", [100, 400])
@pytest.mark.parametrize("B", [8, 64])
def test_temporaries_of_a_pass_are_a_slice(B, I, dtype):
    """Beyond results and gradients: what the cache holds or one capsule, and float32 copies."""
    P, J, D = 8, 10, 16
    operator = OPERATORS["routing_pass"]
    sizes = {"B": B, "I": I, "P": P, "J": J, "D": D}
    inputs = draw_inputs(operator, sizes, dtype=dtype)
    with LiveBytes() as forward:
        results = _torch_path.routing_pass_fwd(*inputs.values(), False, True)
    grads = [torch.ones_like(result) for result in results]
    with LiveBytes() as backward:
        gradients = _torch_path.routing_pass_bwd(*grads, *inputs.values(), False)
    # Sums are float32. For a bfloat16 weight, they are a second copy of its gradient.
    copies = sum(4 * x.numel() for x in inputs.values()) if dtype == torch.bfloat16 else 0
    sums = 4 * inputs["weight"].numel() if dtype == torch.bfloat16 else 0
    pairs = 4 * 4 * I * J  # prior and bias, and the sums of their gradients
    capsule = 4 * B * J * (D + 3)
    poses = 4 * 4 * B * J * D
    own = sum(result.nbytes for result in results)
    assert forward.peak <= own + copies + max(SLICE, capsule) + pairs + poses
    own = sum(gradient.nbytes for gradient in gradients)
    bound = own + copies + sums + 2 * max(SLICE, capsule) + pairs + poses
    assert backward.peak <= bound
    u_hat = 4 * B * I * J * D
    assert B == 8 or u_hat > 2 * (bound - own - copies - sums)


def peak_of_dynamic_routing(B, iterations, gradient, dtype):
    """The peak of the backward beyond what it returns."""
    sizes = {"B": B, "I": 100, "J": 10, "D": 16}
    inputs = draw_inputs(OPERATORS["dynamic_routing"], sizes, dtype=dtype, optional=())
    u_hat, grad_v = inputs["u_hat"], normal(B, 10, 16, dtype=dtype)
    _, _, sums = _torch_path.dynamic_routing_fwd(u_hat, None, None, iterations, False, "v", False)
    with LiveBytes() as backward:
        _torch_path.dynamic_routing_bwd(grad_v, None, u_hat, None, None, sums, False, gradient, "v")
    return backward.peak - u_hat.nbytes


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporaries_of_dynamic_routing_fit_the_cache(dtype):
    """Whatever the batch size. More iterations mean fewer input capsules at a time."""
    cache = 2 * SLICE
    of_an_image = 4 * 10 * 16 * (3 * 4 + 4)
    for B in (8, 64):
        for iterations in (1, 3, 10):
            for gradient in ("full", "last"):
                peak = peak_of_dynamic_routing(B, iterations, gradient, dtype)
                saved = 3 * iterations * 4 * B * 10 * 16
                assert peak <= cache + saved + B * of_an_image, (B, iterations, gradient, peak)
