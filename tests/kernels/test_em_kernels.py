"""The kernels of EM routing: what the checks of the operator table do not see.

Interpreted, a small call fits one program. So calls of several blocks are tested here, and what a
call of the launchers shows: memory, bits, and the digits of a variance.
"""

import pytest
import torch

from tritoncaps._operators import INTERPRETED

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 to interpret", allow_module_level=True)

from kernel_cases import Allocations, assert_exact, assert_same_bits

from tritoncaps import kernels, testing
from tritoncaps.kernels import UnsupportedShape
from tritoncaps.reference import _em_routing as reference

SIZES = {"B": 3, "I": 5, "R": 2, "P": 3, "J": 4, "Q": 2}
INPUTS = {
    "poses": "BIRP",
    "activations": "BI",
    "weight": "IPJQ",
    "beta_u": "J",
    "beta_a": "J",
}
GRADS = {"v": "BJRQ", "logits": "BJ", "assignment": "BIJ"}
AXES = INPUTS | {f"grad_{name}": axes for name, axes in GRADS.items()}
FLOOR = 1e-3


def draw(device, sizes=SIZES, *, dtype=torch.float64):
    """Inputs, and the gradients of the results, by name."""
    call = {}
    for seed, (name, axes) in enumerate(AXES.items()):
        x = testing.normal(*(sizes[axis] for axis in axes), seed=seed, dtype=dtype)
        call[name] = (x.sigmoid() if name == "activations" else x).to(device)
    return call


def rates(iterations):
    return [0.4 * t for t in range(1, iterations + 1)]


def run(call, iterations, grid=(), gradient="full"):
    """Results of both launchers by name, as `kernel_cases.run` does it."""
    inputs = [call[name] for name in INPUTS]
    options = (iterations, rates(iterations), FLOOR, list(grid), gradient)
    found = kernels.em_routing_fwd(*inputs, *options, True)
    grads = [call[f"grad_{name}"] for name in GRADS]
    gradients = kernels.em_routing_bwd(*grads, *inputs, *found[3:], *options)
    names = (*GRADS, "mass", "mean", "variance", *(f"d_{name}" for name in INPUTS))
    return dict(zip(names, (*found, *gradients), strict=True))


def exact(call, iterations, grid=(), gradient="full"):
    """The reference's results and gradients in float64."""
    leaves = {name: call[name].double().requires_grad_() for name in INPUTS}
    outputs = reference.route(
        reference.matrix_votes(leaves["poses"], leaves["weight"]),
        *(leaves[name] for name in ("activations", "beta_u", "beta_a")),
        rates(iterations), FLOOR, grid, gradient,
    )  # fmt: skip
    results = dict(zip(GRADS, outputs, strict=True))
    wanted = [results[name] for name in GRADS if results[name].requires_grad]
    grads = [call[f"grad_{name}"].double() for name in GRADS if results[name].requires_grad]
    found = torch.autograd.grad(wanted, list(leaves.values()), grads)
    results = {name: result.detach() for name, result in results.items()}
    return results | {f"d_{name}": grad for name, grad in zip(leaves, found, strict=True)}


@pytest.mark.parametrize(
    ("grid", "gradient"),
    [
        ((), "full"),
        ((), "last"),
        ((2, 3, 3, 2), "full"),
        ((1, 2, 2, 3), "last"),  # no input capsule is shared
    ],
    ids=str,
)
def test_every_mode_is_exact_after_four_iterations(device, grid, gradient):
    sizes = SIZES
    if grid:
        sizes = SIZES | {"B": 2 * grid[0] * grid[1], "I": 2 * grid[2] ** 2}
    call = draw(device, sizes)
    call["activations"][0] = 0  # no mass: no mean and no variance
    assert_exact(run(call, 4, grid, gradient), exact(call, 4, grid, gradient))


@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 65, "I": 17, "R": 1, "P": 1, "J": 9, "Q": 1},  # B, I and J: a block and one more
        {"B": 1, "I": 1, "R": 3, "P": 16, "J": 1, "Q": 5},  # the most that a thread holds
    ],
    ids=str,
)
def test_shapes_of_several_blocks(device, sizes):
    call = draw(device, sizes)
    assert_exact(run(call, 2), exact(call, 2))


@pytest.mark.parametrize("axis", "BIRPQ")
def test_an_empty_axis(device, axis):
    call = draw(device, {"B": 2, "I": 2, "R": 2, "P": 2, "J": 2, "Q": 2} | {axis: 0})
    assert_exact(run(call, 2), exact(call, 2))


def test_no_votes_are_stored_and_every_tensor_is_written(device):
    """Memory that is full of NaN at first changes no bit of a result."""
    sizes = {"B": 3, "I": 11, "R": 2, "P": 3, "J": 7, "Q": 5}
    call = draw(device, sizes, dtype=torch.float32)
    expected = run(call, 2)
    with Allocations() as allocations:
        results = run(call, 2)
    allocations.assert_bands_untouched()
    assert_same_bits(results, expected)
    weight = call["weight"].numel()
    for shape in allocations.shapes:
        over = {axis for axis in "IRJQ" if any(n and n % sizes[axis] == 0 for n in shape)}
        is_votes = {"I", "J"} <= over and (over & {"Q"} or shape[-1:] == (sizes["R"],))
        assert not is_votes or shape.numel() == weight, shape


def test_batch_rows_do_not_depend_on_the_batch(device):
    call = draw(device, SIZES | {"B": 66}, dtype=torch.float32)
    call["poses"][3] = float("nan")
    whole = run(call, 2)
    rows = slice(62, 66)
    part = run({k: x[rows] if AXES[k].startswith("B") else x for k, x in call.items()}, 2)
    for key in ("v", "logits", "assignment", "d_poses", "d_activations"):
        assert torch.equal(part[key], whole[key][rows]), key
        assert whole[key].isnan().flatten(1).any(1).nonzero().tolist() == [[3]], key


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layout_changes_no_bit(device, layout):
    call = draw(device, dtype=torch.float32)
    views = {key: testing.with_layout(tensor, layout) for key, tensor in call.items()}
    copies = {key: view.contiguous().clone() for key, view in views.items()}
    assert_same_bits(run(views, 2), run(copies, 2))


def test_a_variance_far_from_zero_keeps_its_digits(device):
    """The squares of the votes are 90,000 times the variance: float32 would keep two digits."""
    sizes = SIZES | {"I": 64, "P": 1, "J": 1}
    call = draw(device, sizes)
    call["poses"] = 30 + 0.1 * call["poses"]
    call["weight"] = torch.ones_like(call["weight"])
    inputs = [call[name] for name in INPUTS]
    options = (1, [1.0], 1e-6, [], "full", False)
    expected = kernels.em_routing_fwd(*inputs, *options)[5]
    found = kernels.em_routing_fwd(*(x.float() for x in inputs), *options)[5]
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("sizes", [{"R": 5, "Q": 5}, {"P": 17}], ids=str)
def test_a_shape_that_does_not_fit_a_thread_is_refused(device, sizes):
    call = draw(device, SIZES | sizes)
    with pytest.raises(
        UnsupportedShape, match=r"votes of R=\d × Q=\d with P=\d+; a thread holds 32"
    ):
        run(call, 1)
