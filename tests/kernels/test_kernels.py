"""The kernels' launchers against the reference in float64, interpreted on a CPU or on a GPU.

tests/test_ops.py draws the operators at random on every backend; here is what only the launchers
can show: that every mode is exact in float64, that nothing beside a tensor is touched, which
kernels run, and that no bit depends on layout or batch.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from agreement import LAYOUTS, assert_agrees, with_layout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritoncaps._operators import INTERPRETED

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 to interpret", allow_module_level=True)

import triton
import triton.language as tl
from kernel_cases import (
    ROUTINGS,
    Allocations,
    counted_launches,
    exact_routing,
    random,
    routing_inputs,
    run_routing,
)

from tritoncaps import kernels, reference
from tritoncaps.kernels import _launch
from tritoncaps.kernels._primitives import _round_to_tf32, _tf32_operand, dot

SHAPE = (3, 19, 3, 4, 5)  # B, I, P, J, D


def assert_exact(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Float64 results of `run_routing` against those of `exact_routing`."""
    v, coupling, _, *grads = actual
    for result, exact in zip([v, coupling, *grads], expected, strict=True):
        assert result.is_contiguous()
        torch.testing.assert_close(result, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_prior", [False, True], ids=["", "prior"])
@pytest.mark.parametrize("mode", ["full", "full-coupling", "last"])
@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ROUTINGS)
def test_every_mode_is_exact(device, name, iterations, mode, with_prior):
    inputs = routing_inputs(name, SHAPE, device)
    options = {
        "iterations": iterations,
        "full": mode != "last",
        "with_prior": with_prior,
        "with_coupling": True,
    }
    if mode == "full":
        inputs[-1].zero_()
    assert_exact(run_routing(name, inputs, **options), exact_routing(name, inputs, **options))


@pytest.mark.parametrize("axis", range(5), ids="BIPJD")
@pytest.mark.parametrize("extent", [0, 1])
@pytest.mark.parametrize("with_prior", [False, True], ids=["", "prior"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_axes_of_no_and_of_one_element(device, name, with_prior, extent, axis):
    shape = tuple(extent if n == axis else size for n, size in enumerate((2, 5, 3, 4, 3)))
    inputs = routing_inputs(name, shape, device)
    actual = run_routing(name, inputs, with_prior=with_prior)
    assert_exact(actual, exact_routing(name, inputs, with_prior=with_prior))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("dynamic_routing", (1, 2, 1, 300, 17)),
        ("dynamic_routing", (2, 150, 1, 3, 33)),
        ("fused_dynamic_routing", (1, 2, 33, 20, 17)),
        ("fused_dynamic_routing", (18, 150, 3, 3, 2)),
    ],
)
def test_shapes_of_several_blocks(device, name, shape):
    inputs = routing_inputs(name, shape, device)
    actual = run_routing(name, inputs, iterations=2)
    assert_exact(actual, exact_routing(name, inputs, iterations=2))


@pytest.mark.parametrize("name", ["squash", "prediction_vectors"])
def test_several_blocks_of_squash_and_prediction_vectors(device, name):
    """More rows, columns and components than a program holds, both ways."""
    shapes = {"squash": [(300, 5)], "prediction_vectors": [(33, 2, 34), (2, 34, 7, 5)]}[name]
    leaves = [random(*shape).to(device).requires_grad_() for shape in shapes]
    expected = getattr(reference, name)(*leaves)
    grad = random(*expected.shape, seed=1).to(device)
    exact = torch.autograd.grad(expected, leaves, grad)
    forward, backward = (getattr(kernels, f"{name}_{way}") for way in ("fwd", "bwd"))
    inputs = [leaf.detach() for leaf in leaves]
    grads = backward(grad, *inputs)
    results = [forward(*inputs), *(grads if isinstance(grads, tuple) else [grads])]
    for result, exactly in zip(results, [expected.detach(), *exact], strict=True):
        torch.testing.assert_close(result, exactly, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ROUTINGS)
def test_any_tiling_of_a_table_is_exact(device, name, tmp_path, monkeypatch):
    """Several tiles to a split, several splits, and the blocks of a measured table."""
    architecture = _launch.target_of(torch.empty(0, device=device)).architecture
    tiling = {"block_i": 4, "groups": 1, "num_warps": 1, "max_splits": 3, "block_rows": 2}
    table = {
        f"fused_dynamic_routing_fwd {architecture} float64 I53 P4 J3 D2": tiling,
        f"fused_dynamic_routing_bwd {architecture} float64 I53 P4 J3 D2": tiling
        | {"max_splits": 2},
        f"weight_gradient {architecture} float64 I53 P4 J3 D2": {"block_i": 8, "block_b": 16},
        f"dynamic_routing {architecture} float64 I53 J3 D2": {
            "block_i": 2,
            "block_j": 1,
            "max_splits": 3,
        },
    }
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))

    class Asked(dict):
        """A table that remembers what it was asked for."""

        def get(self, key, default):
            asked.add(key)
            return super().get(key, default)

    asked = set()
    monkeypatch.setattr(_launch, "_table", Asked())
    _launch.load_table(path)
    inputs = routing_inputs(name, (2 if name == "dynamic_routing" else 17, 53, 4, 3, 2), device)
    assert_exact(run_routing(name, inputs), exact_routing(name, inputs))
    is_dynamic = name == "dynamic_routing"
    assert asked == {key for key in table if is_dynamic == ("dynamic_routing" in key)}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"block_p": 2}, "sets 'block_p', but a table may set num_warps"),
        ({"blok_i": 2}, "sets 'blok_i'"),
        ({"block_i": 3}, "sets block_i=3, must be a power of two"),
        ({"max_splits": 0}, "sets max_splits=0, must be an int >= 1"),
        ({"num_warps": 4.0}, "sets num_warps=4.0"),
    ],
)
def test_a_table_that_would_give_wrong_results_is_refused(tmp_path, monkeypatch, fields, words):
    monkeypatch.setattr(_launch, "_table", {})
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"weight_gradient sm90 float32 I5 P4 J3 D2": fields}))
    with pytest.raises(ValueError, match=words):
        _launch.load_table(path)
    assert not _launch._table


@pytest.mark.parametrize("B", [3, 17])
@pytest.mark.parametrize("name", ROUTINGS)
def test_large_prior_stays_within_the_batch(device, name, B):
    """exp(prior) is beyond float32: a row past the end of the batch must not form it."""
    inputs = routing_inputs(name, (B, 5, 4, 3, 6), device, torch.float32)
    inputs[-3][0, 0] = 100.0
    exact = exact_routing(name, inputs)
    v, coupling, _, *grads = run_routing(name, inputs)
    for result, expected in zip([v, coupling, *grads], exact, strict=True):
        torch.testing.assert_close(result, expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROUTINGS)
def test_the_least_prior_is_a_logit_like_any_other(device, name, dtype):
    """A row of the value that masks are made of still sums to 1."""
    inputs = routing_inputs(name, SHAPE, device, dtype)
    inputs[-3][1] = torch.finfo(dtype).min
    _, coupling, *_ = run_routing(name, inputs)
    torch.testing.assert_close(coupling[:, 1], torch.full_like(coupling[:, 1], 1 / SHAPE[3]))


@pytest.mark.parametrize("name", ROUTINGS)
def test_prior_of_minus_infinity_forbids_a_pair(device, name):
    inputs = routing_inputs(name, SHAPE, device)
    inputs[-3][::2, 0] = float("-inf")
    inputs[-3][1, 1:] = float("-inf")
    actual = run_routing(name, inputs)
    assert (actual[1][:, ::2, 0] == 0).all()
    assert_exact(actual, exact_routing(name, inputs))


@pytest.mark.parametrize("name", ROUTINGS)
def test_large_agreement_stays_finite(device, name):
    inputs = routing_inputs(name, SHAPE, device, torch.float32)
    inputs[0] *= 1e4
    for result in run_routing(name, inputs):
        assert torch.isfinite(result).all()


@pytest.mark.parametrize("name", ROUTINGS)
def test_float16_agrees(device, name):
    """Sums are float32, so a half-precision result is at least as good as the einsum form's."""
    options = {"with_coupling": False}
    inputs = routing_inputs(name, SHAPE, device, torch.float16)
    v, _, sums, *grads = run_routing(name, inputs, **options)
    assert sums.dtype == torch.float32
    plain = exact_routing(name, inputs, dtype=torch.float16, **options)
    exact = exact_routing(name, inputs, **options)
    del plain[1], exact[1]  # the coupling
    for index, result in enumerate([v, *grads]):
        assert result.dtype == torch.float16
        assert_agrees(f"result {index}", result, plain[index], exact[index])


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(ROUTINGS),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=5, max_size=5),
    iterations=st.integers(1, 3),
    full=st.booleans(),
)
def test_layout_changes_no_bit(device, name, layouts, iterations, full):
    """Inputs and gradients of any strides, NaN beside their values, give contiguous ones' bits."""
    inputs = routing_inputs(name, (3, 7, 2, 3, 5), device, torch.float32)
    views = [with_layout(tensor, layout) for tensor, layout in zip(inputs, layouts, strict=False)]
    inputs = [view.contiguous().clone() for view in views]
    options = {"iterations": iterations, "full": full}
    expected = run_routing(name, inputs, **options)
    for result, bits in zip(run_routing(name, views, **options), expected, strict=True):
        assert torch.equal(result, bits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_no_bit_of_prediction_vectors_and_squash(device, layout):
    u, weight, grad = random(5, 7, 3), random(7, 3, 4, 5), random(5, 7, 4, 5)
    views = [with_layout(tensor.to(device), layout) for tensor in (u, weight, grad)]
    copies = [view.contiguous().clone() for view in views]
    results = []
    for u, weight, grad in (views, copies):
        votes = kernels.prediction_vectors_fwd(u, weight)
        results.append([votes, *kernels.prediction_vectors_bwd(grad, u, weight)])
        results[-1].append(kernels.squash_fwd(weight[0, 0]))
        results[-1].append(kernels.squash_bwd(weight[0, 1], weight[0, 0]))
    for result, bits in zip(*results, strict=True):
        assert result.is_contiguous()
        assert torch.equal(result, bits)


# The interpreter's maximum of a row of NaN is numpy's, which warns and returns NaN.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "with_prior"),
    [("dynamic_routing", False), ("dynamic_routing", True), ("fused_dynamic_routing", True)],
)
def test_batch_rows_do_not_depend_on_the_batch(device, name, with_prior):
    """A slice of the batch gives the bits of the batch, and a row of NaN stays alone.

    Without a prior the first sums of the fused routing come from the vendor's matrix product, whose
    order of additions may depend on the batch: there is no such promise there.
    """
    inputs = routing_inputs(name, (19, 9, 3, 4, 5), device, torch.float32)
    *shared, prior, grad_v, grad_coupling = inputs
    shared[0][3] = float("nan")
    whole = run_routing(name, inputs, with_prior=with_prior)
    for rows in (slice(0, 2), slice(14, 18), slice(18, 19)):
        sliced = [shared[0][rows], *shared[1:], prior, grad_v[rows], grad_coupling[rows]]
        part = run_routing(name, sliced, with_prior=with_prior)
        assert torch.equal(part[0], whole[0][rows])
        assert torch.equal(part[1], whole[1][rows])
        assert torch.equal(part[2], whole[2][:, rows])
        assert torch.equal(part[3], whole[3][rows])


@pytest.mark.parametrize("full", [True, False], ids=["full", "last"])
@pytest.mark.parametrize("with_prior", [False, True], ids=["", "prior"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_nothing_beside_a_tensor_is_written_and_all_of_it_is(device, name, with_prior, full):
    inputs = routing_inputs(name, (3, 11, 2, 3, 7), device)
    before = [tensor.clone() for tensor in inputs]
    expected = run_routing(name, inputs, with_prior=with_prior, full=full)
    with Allocations() as allocations:
        results = run_routing(name, inputs, with_prior=with_prior, full=full)
    allocations.assert_bands_untouched()
    for result, bits in zip(results, expected, strict=True):
        assert torch.equal(result, bits)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)


def test_nothing_beside_prediction_vectors_or_squash_is_written(device):
    u, weight = random(3, 5, 2).to(device), random(5, 2, 3, 7).to(device)
    with Allocations() as allocations:
        votes = kernels.prediction_vectors_fwd(u, weight)
        results = [votes, *kernels.prediction_vectors_bwd(votes, u, weight)]
        rows = votes.view(-1, 7)
        results += [kernels.squash_fwd(rows), kernels.squash_bwd(rows, rows)]
    allocations.assert_bands_untouched()
    for result in results:
        assert torch.isfinite(result).all()


@pytest.mark.parametrize("with_prior", [False, True], ids=["", "prior"])
@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_fused_routing_launches_few_kernels_and_stores_no_votes(device, iterations, with_prior):
    I, D = 11, 7
    inputs = routing_inputs("fused_dynamic_routing", (2, I, 3, 5, D), device)
    u, weight, prior, grad_v, _ = inputs
    prior = prior if with_prior else None
    with Allocations() as allocations:
        with counted_launches() as forward:
            _, _, sums = kernels.fused_dynamic_routing_fwd(u, weight, prior, iterations, False)
        with counted_launches() as backward:
            kernels.fused_dynamic_routing_bwd(grad_v, None, u, weight, prior, sums, True)
    # Without a prior the first pass is one product of the vendor's library.
    assert allocations.products == (0 if with_prior else 1)
    assert len(forward) == iterations + with_prior
    assert len(backward) == iterations + 1
    assert len(backward) <= 2 * iterations
    for size in allocations.shapes:
        over_i_and_d = any(n and n % I == 0 for n in size) and any(n and n % D == 0 for n in size)
        assert not over_i_and_d or size == weight.shape
    assert weight.shape in allocations.shapes


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        ("squash_fwd", [(2, 20000)]),
        ("prediction_vectors_fwd", [(1, 1, 1), (1, 1, 1, 2**23)]),
        ("dynamic_routing_fwd", [(1, 1, 1, 5000)]),
        ("fused_dynamic_routing_fwd", [(1, 1, 200), (1, 200, 1, 40)]),
    ],
)
def test_shape_that_fits_no_configuration_is_refused(device, function, shapes):
    tensors = [torch.zeros(1, device=device).expand(shape) for shape in shapes]
    rest = (None, 3, False) if "routing" in function else ()
    refused = pytest.raises(kernels.UnsupportedShape, match=r"at most|holds")
    with counted_launches() as launched, refused:
        getattr(kernels, function)(*tensors, *rest)
    assert not launched


@pytest.mark.parametrize("module", ["squash", "prediction_vectors", *ROUTINGS])
def test_every_launch_is_made_on_the_tensors_device(device, monkeypatch, module):
    """Triton launches on the current device, whichever the tensors are on."""
    entered = []

    class Guard:
        def __init__(self, tensor):
            self.device = tensor.device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            entered.append(None)

    monkeypatch.setattr(f"tritoncaps.kernels.{module}.device_of", Guard)
    kernel_type = type(kernels.squash._squash_fwd_kernel)
    launch = kernel_type.run

    def guarded(kernel, *args, **kwargs):
        assert entered and entered[-1] == u.device, f"{kernel.fn.__name__} has no guard"
        return launch(kernel, *args, **kwargs)

    monkeypatch.setattr(kernel_type, "run", guarded)
    u, weight, rows = (random(*s).to(device) for s in ((2, 3, 4), (3, 4, 5, 6), (2, 6)))
    if module == "squash":
        kernels.squash_bwd(kernels.squash_fwd(rows), rows)
    elif module == "prediction_vectors":
        kernels.prediction_vectors_bwd(kernels.prediction_vectors_fwd(u, weight), u, weight)
    else:
        run_routing(module, routing_inputs(module, SHAPE, device))
    assert entered and entered[-1] is None


@triton.jit
def _tf32x3_kernel(a_ptr, b_ptr, product_ptr, high_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    tl.store(high_ptr + offsets, _round_to_tf32(a))
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
def test_no_rounding_makes_a_number_of_nan(device, precision, bits):
    """Arithmetic on an NVIDIA GPU makes NaN of all ones, to which one cannot add as to a number."""
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
    tl.store(operand_ptr + offsets, _tf32_operand(tl.load(x_ptr + offsets)))


def test_what_a_tf32_multiplier_reads_of_nan_is_nan(device):
    """It does not read the 13 lowest bits, in which a NaN may have all its ones."""
    x = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32, device=device)
    operand = torch.empty_like(x)
    _operand_kernel[(1,)](x.view(torch.float32), operand.view(torch.float32), N=4)
    assert (operand & -0x2000).view(torch.float32).isnan().all()


@given(
    I=st.integers(1, 5000),
    P=st.integers(1, 64),
    J=st.integers(1, 2000),
    D=st.integers(1, 64),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    shared_memory=st.sampled_from([65536, 101376, 232448]),
)
def test_configurations_cover_the_capsules_and_fit(I, P, J, D, dtype, shared_memory):
    target = _launch.Target("sm90", shared_memory)
    width = 8 if dtype == torch.float64 else 4
    configs = [
        _launch.fused_dynamic_routing_config(I, P, J, D, dtype, target, backward=backward)
        for backward in (False, True)
    ]
    for config in configs:
        tile = config.groups * config.block_i * config.block_p * config.block_d
        assert config.block_p >= P
        assert config.block_d >= D
        assert config.block_i * config.block_p >= 16
        assert tile * width * max(config.num_stages - 1, 1) <= shared_memory
    configs.append(_launch.dynamic_routing_config(I, J, D, dtype, target))
    for config in configs:
        splits, tiles = config.divide(I)
        covered = config.groups * config.block_i * tiles
        assert splits <= config.max_splits
        assert (splits - 1) * covered < I <= splits * covered


@pytest.mark.parametrize(
    ("backend", "arch", "architecture"), [("cuda", 90, "sm90"), ("hip", "gfx942", "gfx942")]
)
def test_target_is_that_of_the_tensors_device(monkeypatch, backend, arch, architecture):
    """Not of the current one: the architecture and the shared memory are asked for by index."""
    current = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *error):
            current.pop()

    class Driver:
        class utils:  # noqa: N801
            @staticmethod
            def get_device_properties(index):
                return {"max_shared_mem": 1000 + index}

        @staticmethod
        def get_current_target():
            assert current == [3]
            return SimpleNamespace(backend=backend, arch=arch)

    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=Driver))
    monkeypatch.setattr(torch.cuda, "device", Device)
    tensor = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=3))
    _launch._cuda_target.cache_clear()
    try:
        assert _launch.target_of(tensor) == _launch.Target(architecture, 1003)
    finally:
        _launch._cuda_target.cache_clear()


@pytest.mark.parametrize(("num_warps", "registers"), [(4, 255), (8, 255), (16, 128), (32, 64)])
def test_all_registers_may_be_used_on_nvidia(num_warps, registers):
    config = _launch.Config(num_warps=num_warps, num_stages=2)
    options = {"num_warps": num_warps, "num_stages": 2}
    assert config.options(_launch.Target("gfx942", 65536)) == options
    expected = options | {"maxnreg": registers}
    assert config.options(_launch.Target("sm90", 232448)) == expected


def test_a_table_named_in_the_environment_is_loaded_with_the_kernels(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"weight_gradient sm90 float32 I5 P4 J3 D2": {"block_i": 8}}))
    code = "from tritoncaps.kernels import _launch; print(*_launch._table.values())"
    environment = {**os.environ, "TRITONCAPS_LAUNCH_TABLE": str(path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'block_i': 8}"


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, 64), (torch.float64, 32)])
def test_the_widest_votes_that_a_grid_covers(dtype, block):
    widest = 65535 * block
    assert _launch.prediction_vectors_config(8, widest, 1, dtype).block_n == block
    with pytest.raises(_launch.UnsupportedShape, match=f"J·D = {widest + 1} columns"):
        _launch.prediction_vectors_config(8, widest + 1, 1, dtype)


@pytest.mark.parametrize(("J", "block_j"), [(1, 1), (8, 8), (9, 2), (10, 4), (13, 16), (16, 16)])
def test_a_block_of_output_capsules_is_at_most_a_quarter_empty(J, block_j):
    target = _launch.Target("sm90", 232448)
    assert _launch.dynamic_routing_config(4, J, 16, torch.float32, target).block_j == block_j


def test_the_forward_alone_fetches_ahead_where_the_buffers_fit():
    def stages(shared_memory, backward):
        target = _launch.Target("sm90", shared_memory)
        return _launch.fused_dynamic_routing_config(
            1152, 8, 10, 16, torch.float32, target, backward=backward
        ).num_stages

    buffer = 8 * 512 * 4  # eight warps with 512 float32 each
    assert [stages(232448, backward) for backward in (False, True)] == [3, 1]
    assert [stages(size, False) for size in (4 * buffer, 4 * buffer - 1)] == [3, 1]


def test_precision_follows_torch():
    nvidia, amd = _launch.Target("sm90", 232448), _launch.Target("gfx942", 65536)
    assert _launch.dot_precision(torch.float64, nvidia) == "ieee"
    assert _launch.dot_precision(torch.float16, nvidia) == "tf32"
    assert _launch.dot_precision(torch.float32, amd) == "ieee"
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert _launch.dot_precision(torch.float32, nvidia) == expected
    finally:
        torch.set_float32_matmul_precision(before)
