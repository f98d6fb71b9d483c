"""What the launchers read, write and start: layouts, guard bands, batch rows, launches, devices."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritoncaps._operators import INTERPRETED

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 to interpret", allow_module_level=True)

from interpreter import multiply_row_by_row
from kernel_cases import (
    EVERY,
    ROUTINGS,
    Allocations,
    assert_same_bits,
    counted_launches,
    draw,
    run,
)

from tritoncaps import kernels, testing


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(ROUTINGS),
    layouts=st.lists(st.sampled_from(testing.LAYOUTS), min_size=7, max_size=7),
    iterations=st.integers(1, 3),
    gradient=st.sampled_from(["full", "last"]),
)
def test_layout_changes_no_bit(device, name, layouts, iterations, gradient):
    """Strided inputs and gradients, with NaN between the values, give the contiguous bits."""
    call = draw(name, device, {"B": 3, "I": 7, "P": 2, "J": 3, "D": 5}, dtype=torch.float32)
    views = {
        key: testing.with_layout(tensor, layout)
        for (key, tensor), layout in zip(call.items(), layouts, strict=False)
    }
    copies = {key: view.contiguous().clone() for key, view in views.items()}
    options = {"iterations": iterations, "gradient": gradient}
    actual = run(name, views, **options)
    assert all(result.is_contiguous() for result in actual.values())
    assert_same_bits(actual, run(name, copies, **options))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("form", ["quadratic", "exponential"])
def test_layout_changes_no_bit_of_squash(device, form, layout):
    s, grad = (testing.with_layout(testing.normal(5, 7, seed=n).to(device), layout) for n in (0, 1))
    copies = s.contiguous().clone(), grad.contiguous().clone()
    assert torch.equal(kernels.squash_fwd(s, form), kernels.squash_fwd(copies[0], form))
    bits = kernels.squash_bwd(copies[1], copies[0], form)
    assert torch.equal(kernels.squash_bwd(grad, s, form), bits)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layout_changes_no_bit_of_prediction_vectors(device, layout):
    call = draw("prediction_vectors", device)
    views = {key: testing.with_layout(tensor, layout) for key, tensor in call.items()}
    copies = {key: view.contiguous().clone() for key, view in views.items()}
    assert_same_bits(run("prediction_vectors", views), run("prediction_vectors", copies))


@pytest.mark.parametrize("name", EVERY)
def test_equal_bits_from_run_to_run(device, name):
    call = draw(name, device, dtype=torch.float32)
    assert_same_bits(run(name, call), run(name, call))


# The interpreter uses numpy's maximum, which warns about a row of NaN and returns NaN.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "optional"),
    [
        ("dynamic_routing", ()),
        ("dynamic_routing", ("prior", "pose_bias")),
        ("fused_dynamic_routing", ()),
        ("fused_dynamic_routing", ("prior", "pose_bias")),
        ("routing_pass", ()),
        ("routing_pass", ("prior", "bias")),
    ],
)
def test_batch_rows_do_not_depend_on_the_batch(device, name, optional, monkeypatch):
    """A slice of the batch, or a single row, gives the bits of the batch. NaN stays in its row."""
    if INTERPRETED:
        multiply_row_by_row(monkeypatch)
    sizes = {"B": 19, "I": 9, "P": 3, "J": 4, "D": 5}
    call = draw(name, device, sizes, dtype=torch.float32, optional=optional)
    call["u_hat" if name == "dynamic_routing" else "u"][3] = float("nan")
    with_batch = {key for key, axes in testing.OPERATORS[name].axes.items() if axes[0] == "B"}
    with_batch |= {"grad", "grad_coupling"}
    whole = run(name, call)
    for rows in (slice(0, 2), slice(14, 18), slice(18, 19)):
        part = run(name, {k: x[rows] if k in with_batch else x for k, x in call.items()})
        for key, result in part.items():
            if key == "sums":
                assert torch.equal(result, whole[key][:, rows]), key
            elif key.removeprefix("d_") not in {"weight", "prior", "bias", "pose_bias"}:
                assert torch.equal(result, whole[key][rows]), key


@pytest.mark.parametrize("gradient", ["full", "last"])
@pytest.mark.parametrize("optional", [(), None], ids=["", "all"])
@pytest.mark.parametrize("name", EVERY)
def test_a_tensor_is_written_completely_and_nothing_outside_it(device, name, optional, gradient):
    sizes = {"B": 3, "I": 11, "P": 2, "J": 3, "D": 7}
    call = draw(name, device, sizes, optional=optional)
    before = {key: tensor.clone() for key, tensor in call.items()}
    expected = run(name, call, gradient=gradient)
    with Allocations() as allocations:
        results = run(name, call, gradient=gradient)
    allocations.assert_bands_untouched()
    assert all(torch.isfinite(result).all() for result in results.values())
    assert_same_bits(results, expected)
    assert_same_bits(call, before)


def assert_no_u_hat(allocations, I, D, weight):
    """No tensor has both I and D in it, other than the weight's gradient."""
    for size in allocations.shapes:
        over_i_and_d = any(n and n % I == 0 for n in size) and any(n and n % D == 0 for n in size)
        assert not over_i_and_d or size == weight.shape
    assert weight.shape in allocations.shapes


@pytest.mark.parametrize("with_prior", [False, True], ids=["", "prior"])
@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_fused_routing_launches_few_kernels_and_stores_no_u_hat(device, iterations, with_prior):
    I, D = 11, 7
    call = draw("fused_dynamic_routing", device, {"B": 2, "I": I, "P": 3, "J": 5, "D": D})
    u, weight, bias = call["u"], call["weight"], call["pose_bias"]
    prior = call["prior"] if with_prior else None
    with Allocations() as allocations:
        with counted_launches() as forward:
            _, _, sums = kernels.fused_dynamic_routing_fwd(
                u, weight, prior, bias, iterations, False, "v", False
            )
        with counted_launches() as backward:
            kernels.fused_dynamic_routing_bwd(
                call["grad"], None, u, weight, prior, bias, sums, False, "full", "v"
            )
    # Without a prior the first pass has no logits.
    assert allocations.products == 0
    assert len(forward) == 1 + 4 * iterations - 2 * (not with_prior)
    assert backward == ["_pull_back_kernel", "_pass_bwd_kernel"] * iterations + [
        "_weight_gradient_kernel"
    ]
    assert_no_u_hat(allocations, I, D, weight)


def test_a_pass_launches_few_kernels_and_stores_no_u_hat(device):
    I, D = 11, 7
    call = draw("routing_pass", device, {"B": 2, "I": I, "P": 3, "J": 5, "D": D})
    inputs = [call[key] for key in ("u", "weight", "pose", "prior", "bias")]
    with Allocations() as allocations:
        with counted_launches() as forward:
            kernels.routing_pass_fwd(*inputs, False, True)
        with counted_launches() as backward:
            kernels.routing_pass_bwd(call["grad"], call["grad_coupling"], *inputs, False)
    logits = ["_logits_kernel", "_softmax_kernel"]
    assert forward == ["_blocks_kernel", *logits, "_weighted_sum_kernel", "_sum_slots_kernel"]
    assert backward == ["_pass_bwd_kernel", "_sum_slots_kernel", "_weight_gradient_kernel"]
    assert allocations.products == 0
    assert_no_u_hat(allocations, I, D, call["weight"])


@pytest.mark.parametrize("name", EVERY)
def test_every_launch_is_made_on_the_tensors_device(device, monkeypatch, name):
    """Triton launches on the current device, whatever device the tensors are on."""
    entered = []

    class Guard:
        def __init__(self, tensor):
            self.device = tensor.device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            entered.append(None)

    call = draw(name, device)
    monkeypatch.setattr(f"tritoncaps.kernels.{name}.device_of", Guard)
    kernel_type = type(kernels.squash._squash_fwd_kernel)
    launch = kernel_type.run

    def guarded(kernel, *args, **kwargs):
        assert entered and entered[-1] == call["grad"].device, f"{kernel.fn.__name__} has no guard"
        return launch(kernel, *args, **kwargs)

    monkeypatch.setattr(kernel_type, "run", guarded)
    run(name, call)
    assert entered and entered[-1] is None
