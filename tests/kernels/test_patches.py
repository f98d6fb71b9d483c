"""Patches that are read where they lie in a grid, and their gradients."""

import pytest
import torch

from tritoncaps._operators import INTERPRETED

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 to interpret", allow_module_level=True)

from kernel_cases import Allocations

from tritoncaps import kernels
from tritoncaps._patches import add_patches, patches
from tritoncaps.kernels._em_tiles import in_lanes
from tritoncaps.kernels._launch import device_of
from tritoncaps.kernels._patches import Patches
from tritoncaps.testing import normal, with_layout

# (N, H, W, C), K, S: one capsule alone, a rest that no window reaches, windows apart.
GRIDS = [((1, 1, 1, 1), 1, 1), ((2, 4, 5, 3), 3, 1), ((2, 6, 4, 3), 3, 2), ((3, 5, 6, 2), 2, 3)]
grids = pytest.mark.parametrize(("shape", "k", "stride"), GRIDS, ids=str)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("matrix", [(), (2, 3), (4, 4)], ids=str)
@grids
def test_patches_are_put_in_lanes(device, shape, k, stride, matrix, layout):
    grid = with_layout(normal(*shape, *matrix).to(device), layout)
    found = Patches(grid, k, stride).in_lanes(32)
    order = (0, 2, 4, 1, 3) if matrix else (0, 2, 1)
    expected = in_lanes(patches(grid, k, stride), 32, *order)
    assert torch.equal(found.view(expected.shape), expected)


@grids
def test_a_copy_is_what_a_cpu_cuts(device, shape, k, stride):
    grid = normal(*shape, 3).to(device)
    found = Patches(grid, k, stride)
    assert found.shape == found.copy().shape
    assert torch.equal(found.copy(), patches(grid, k, stride))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inner", [(), (3,)], ids=str)
@grids
def test_gradients_are_added_up(device, shape, k, stride, inner, dtype):
    grid = normal(*shape, *inner, dtype=torch.float64).to(device)
    cut = Patches(grid.to(dtype), k, stride)
    # Whole numbers, whose sums have no rounding.
    grads = normal(*cut.shape, dtype=torch.float64).mul(4).round().to(device)
    expected = torch.zeros_like(grid)
    add_patches(grads, expected, k, stride)
    assert torch.equal(cut.add(grads.to(dtype)), expected.to(dtype))


@pytest.mark.parametrize("J", [3, 40])
def test_a_forward_copies_no_patches(device, J):
    """What a product reads is in an order of its own. Nothing has the shape of the patches."""
    u, weight = normal(2, 6, 6, 5, 3).to(device), normal(3, 3, 5, 3, J, 4).to(device)
    with Allocations() as allocations:
        kernels.conv_dynamic_routing_fwd(u, weight, None, None, 2, 1, False, "v", False)
    allocations.assert_bands_untouched()
    N, _, _, C, P = u.shape
    assert not {(N * 16, 9 * C, P), (N, 4, 4, 3, 3, C, P)} & {*map(tuple, allocations.shapes)}


def dynamic(u, weight):
    options = (2, False, "full", "v")
    v, coupling, sums = kernels.conv_dynamic_routing_fwd(
        u, weight, None, None, 3, 2, False, "v", True
    )
    grads = kernels.conv_dynamic_routing_bwd(v, coupling, u, weight, None, None, sums, *options)
    return [v, coupling, *grads[:2]]


def by_em(poses, weight):
    activations = poses[..., 0, 0].sigmoid()
    betas = (poses.new_ones(weight.shape[4]),) * 2
    rest = (2, [0.1, 0.2], 1e-3, 2, "children", "full")
    given = (poses, activations, weight, *betas)
    v, logits, assignment, *moments = kernels.conv_em_routing_fwd(*given, *rest, True)
    grads = kernels.conv_em_routing_bwd(v, logits, assignment, *given, *moments, *rest)
    return [v, logits, assignment, *grads]


# float64 with many output capsules goes through two sweeps, which copy the patches.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("route", "matrix", "J"), [(dynamic, (3,), 3), (dynamic, (3,), 40), (by_em, (2, 3), 3)]
)
def test_launches_write_what_is_theirs_and_read_nothing_else(device, route, matrix, J, dtype):
    """In memory full of NaN between guard bands, with a rest that no window reaches."""
    grid = normal(2, 6, 6, 2, *matrix, dtype=dtype).to(device)
    weight = normal(3, 3, 2, 3, J, 4, dtype=dtype).to(device)
    expected = route(grid, weight)
    with Allocations() as allocations:
        found = route(grid, weight)
    allocations.assert_bands_untouched()
    for result, plain in zip(found, expected, strict=True):
        assert torch.equal(result, plain)


def test_a_launch_is_on_the_device_of_the_grid(monkeypatch):
    """Patches stand for a tensor there too. No GPU is needed to see that."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device", entered.append)
    found = Patches(torch.zeros(1, 4, 4, 2, 3), 2, 1)
    found.is_cuda, found.device = True, torch.device("cuda:1")
    device_of(found)
    assert entered == [torch.device("cuda:1")]


def test_a_matrix_whose_rows_lie_far_apart_is_read(device):
    """Offsets of its rows need more than 32 bits. Only the touched pages of the memory exist."""
    stride = 2**30 + 4096
    storage = torch.empty(2 * stride + 8, dtype=torch.float16, device=device)
    grid = storage.as_strided((1, 2, 2, 1, 3, 1), (4, 2, 1, 1, stride, 1))
    grid.copy_(normal(1, 2, 2, 1, 3, 1).to(grid))
    expected = Patches(grid.contiguous(), 1, 1).in_lanes(32)
    assert torch.equal(Patches(grid, 1, 1).in_lanes(32), expected)
