"""Routing in patches, against a loop over the positions, and the patches themselves."""

import math

import pytest
import torch
from torch.nn import functional as F

from tritoncaps import ops, reference
from tritoncaps._patches import add_patches, output_size, pad, patches, patches_by_type
from tritoncaps.testing import CHECKS, OPERATORS, Operator, draw_inputs, evaluate, with_layout

PATCH = OPERATORS["conv_dynamic_routing"]
CONVOLVED = Operator(
    ops.conv_dynamic_routing,
    reference.conv_dynamic_routing,
    inputs={**PATCH.inputs, "prior?": "C J"},
    outputs={**PATCH.outputs, "coupling?": "B H' W' C J"},
    options={**PATCH.options, "votes": ("convolved",)},
    sizes=PATCH.sizes,
)
SIZES = {"B": 2, "H": 4, "W": 5, "C": 3, "P": 4, "J": 5, "D": 6}
EVERYTHING = {"leaky": True, "return_coupling": True}


def by_position(
    u, weight, *, stride=1, padding=0, prior=None, votes="patch", return_coupling=False, **options
):
    """Route one patch after the other, by the reference of one routing."""
    k, types = len(weight), u.shape[3]
    weight = weight.expand(k, k, types, *weight.shape[3:])
    grid = F.pad(u, (0, 0, 0, 0) + (padding,) * 4)
    if prior is not None:
        prior = prior.reshape(-1, prior.shape[-1])
    rows = []
    for y in range(0, grid.shape[1] - k + 1, stride):
        rows.append([])
        for x in range(0, grid.shape[2] - k + 1, stride):
            patch = grid[:, y : y + k, x : x + k]
            if votes == "patch":
                arguments = patch.flatten(1, 3), weight.flatten(0, 2)
            else:
                patch = patch.permute(0, 3, 1, 2, 4)
                arguments = patch.flatten(2, 4), weight.permute(2, 0, 1, 3, 4, 5).flatten(1, 3)
            v, c = reference.fused_dynamic_routing(
                *arguments, prior=prior, return_coupling=True, **options
            )
            c = c.unflatten(1, (k, k, types)) if votes == "patch" else c
            rows[-1].append((v, c))
    v, c = (torch.stack([torch.stack([p[n] for p in row], 1) for row in rows], 1) for n in (0, 1))
    return (v, c) if return_coupling else v


def check(operator, device, inputs, **options):
    """Compare values and gradients with the loop, to 1e-12."""
    options = {**operator.defaults, **EVERYTHING, **options}
    actual = evaluate(operator, inputs, options)
    expected = evaluate(operator, inputs, options, by_position)
    for name, result in actual.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("k, stride, padding", [(1, 1, 0), (2, 1, 1), (3, 2, 1), (3, 3, 0)])
@pytest.mark.parametrize("operator", [PATCH, CONVOLVED], ids=["patch", "convolved"])
def test_it_is_a_loop_over_positions(device, operator, k, stride, padding):
    inputs = draw_inputs(operator, {**SIZES, "K": k}, device=device)
    check(operator, device, inputs, stride=stride, padding=padding)


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_all_types_share_one_kernel(device, layout):
    """As a weight with one type, and as a view that repeats it, whatever the layout of u."""
    inputs = draw_inputs(CONVOLVED, {**SIZES, "K": 3}, device=device)
    inputs["u"] = with_layout(inputs["u"], layout)
    one = inputs["weight"][:, :, :1]
    check(CONVOLVED, device, {**inputs, "weight": one})
    check(CONVOLVED, device, {**inputs, "weight": one.expand_as(inputs["weight"])})
    assert torch.equal(
        ops.conv_dynamic_routing(inputs["u"], one, votes="convolved"),
        ops.conv_dynamic_routing(inputs["u"], one.expand_as(inputs["weight"]), votes="convolved"),
    )


# The table's row is that of "patch". What differs with "convolved" is before and after the routing.
@pytest.mark.parametrize("check", ["empty_batch", "autocast", "meta"])
def test_convolved_votes_pass_the_checks_of_the_table(device, check):
    CHECKS[check](CONVOLVED, device)


def test_a_kernel_larger_than_the_grid_is_an_error():
    u, weight = torch.rand(2, 3, 9, 2, 4), torch.rand(6, 6, 2, 4, 5, 6)
    with pytest.raises(
        ValueError, match=r"the kernel, 6x6, is larger than the grid, 3x9 with padding=1"
    ):
        ops.conv_dynamic_routing(u, weight, padding=1)
    assert ops.conv_dynamic_routing(u, weight, padding=2).shape == (2, 2, 8, 5, 6)


def test_the_prior_of_convolved_votes_has_no_positions():
    u, weight = torch.rand(2, 4, 4, 2, 4), torch.rand(3, 3, 1, 4, 5, 6)
    with pytest.raises(ValueError, match=r"prior must have 2 axes \(C, J\), got 4"):
        ops.conv_dynamic_routing(u, weight, votes="convolved", prior=torch.rand(3, 3, 2, 5))
    with pytest.raises(ValueError, match="prior has C=1 but u has C=2"):
        ops.conv_dynamic_routing(u, weight, votes="convolved", prior=torch.rand(1, 5))


def test_a_kernel_that_is_not_square_is_an_error():
    with pytest.raises(ValueError, match="weight has K=2 but also K=3"):
        ops.conv_dynamic_routing(torch.rand(2, 4, 4, 2, 4), torch.rand(3, 2, 2, 4, 5, 6))


@pytest.mark.parametrize("name", ["conv_dynamic_routing", "conv_em_routing"])
def test_the_patches_are_not_kept_for_the_backward(device, name):
    """They would be nine times as large as the grid."""
    operator = OPERATORS[name]
    sizes = {**operator.small_sizes, "H": 12, "W": 12, "C": 8, "P": 4, "R": 4, "K": 3, "J": 2}
    inputs = draw_inputs(operator, {**sizes, "D": 2, "Q": 1}, dtype=torch.float32, device=device)
    for tensor in inputs.values():
        tensor.requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        operator.call(inputs, {**operator.defaults, "stride": 1})
    grid = next(iter(inputs.values()))
    assert grid.untyped_storage().data_ptr() in kept
    assert sum(kept.values()) < 4 * grid.numel() * grid.element_size()


@pytest.mark.parametrize("k, stride", [(1, 1), (1, 2), (2, 3), (3, 1), (3, 2)])
@pytest.mark.parametrize("inner", [(), (4,), (2, 3)], ids=str)
def test_gradients_of_patches_are_added_up_as_autograd_does(k, stride, inner):
    grid = torch.zeros(2, 6, 7, 3, *inner, dtype=torch.float64, requires_grad=True)
    cut = patches(grid, k, stride)
    grads = torch.arange(cut.numel(), dtype=torch.float64).view(cut.shape)
    (expected,) = torch.autograd.grad(cut, grid, grads)
    found = torch.zeros_like(grid)
    add_patches(grads, found, k, stride)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("inner", [(), (4,), (2, 3)], ids=str)
def test_patches_are_ordered_by_image_row_column(inner):
    shape = (2, 5, 6, 3, *inner)
    grid = torch.arange(math.prod(shape)).view(shape)
    rows, columns = output_size("test", (5, 6), 3, 2, 1)
    padded = pad(grid, 1)
    assert padded.sum() == grid.sum()
    assert padded.shape[:3] == (2, 7, 8)
    found = patches(padded, 3, 2).unflatten(0, (2, rows, columns))
    for y in range(rows):
        for x in range(columns):
            patch = padded[:, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3]
            assert torch.equal(found[:, y, x], patch.flatten(1, 3))
    if len(inner) == 1:
        joined = patches_by_type(padded, 3, 2)
        assert torch.equal(joined[0], padded[0, :3, :3].permute(2, 0, 1, 3).flatten(1))
