"""The passes that form every prediction vector once, and the contraction after the backward ones.

It serves float32 and 16-bit types on NVIDIA GPUs. The interpreter runs it here, because the target
is said to be one. Its results are float32 or less, so the rule for them is that of every operator:
an error of at most twice that of plain torch in the same dtype.
"""

import pytest
import torch

from tritoncaps._operators import INTERPRETED

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 to interpret", allow_module_level=True)

from kernel_cases import Allocations, assert_same_bits, counted_launches, draw, exact, run

from tritoncaps import testing
from tritoncaps.kernels import _launch, _one_product, _vote_gradient

LOOP, PASS = "fused_dynamic_routing", "routing_pass"
SIZES = {"B": 9, "I": 3, "P": 3, "J": 5, "D": 6}


@pytest.fixture(autouse=True)
def on_nvidia(monkeypatch):
    if INTERPRETED:
        for module in (_one_product, _vote_gradient):
            monkeypatch.setattr(module, "target_of", lambda _: _launch.Target("sm90", 232448))


def forward(name, call, *, with_gradients=False, **options):
    """The results of the launchers, which must take this form."""
    with counted_launches() as launched:
        results = run(name, call, with_gradients=with_gradients, **options)
    assert "_one_product_kernel" in launched
    if with_gradients and call["weight"].numel():
        assert "_vote_gradient_kernel" in launched
    return results


def check(name, device, sizes=SIZES, *, dtype=torch.float32, optional=(), **options):
    call = draw(name, device, sizes, dtype=dtype, optional=optional)
    plain, exactly = exact(name, call, dtype=dtype, **options), exact(name, call, **options)
    results = forward(name, call, with_gradients=True, **options)
    for key, result in results.items():
        if key in exactly:
            assert result.dtype == dtype
            testing.assert_agrees(key, result, plain[key], exactly[key])


@pytest.mark.parametrize(
    ("optional", "iterations", "sizes", "options"),
    [  # None is every input
        ((), 3, {"B": 3, "J": 10, "D": 16, "P": 8}, {}),
        (("prior",), 1, {}, {"output": "s", "leaky": True}),
        (("prior",), 2, {"J": 2}, {"with_coupling": False, "gradient": "last"}),
        (("pose_bias",), 1, {"J": 1, "I": 1}, {"leaky": True}),
        (("pose_bias",), 2, {"J": 14, "D": 2, "I": 1}, {"output": "s", "leaky": True}),
        (None, 3, {"B": 1, "P": 9}, {"leaky": True}),
        ((), 1, {"I": 0}, {}),
        (("prior",), 2, {"P": 0, "D": 1, "I": 1}, {}),
    ],
    ids=str,
)
def test_every_mode_of_a_loop(device, optional, iterations, sizes, options):
    check(LOOP, device, SIZES | sizes, optional=optional, iterations=iterations, **options)


@pytest.mark.parametrize(
    ("optional", "options"),
    [
        ((), {"leaky": True}),
        (("prior",), {"leaky": True, "with_coupling": False}),
        (("bias",), {"with_coupling": False}),
        (("prior", "bias"), {}),
    ],
    ids=str,
)
def test_every_mode_of_a_pass(device, optional, options):
    check(PASS, device, optional=optional, **options)


@pytest.mark.parametrize("P", [3, 16])
def test_16_bit_columns_are_multiplied_as_they_are(device, P):
    sizes = SIZES | {"B": 2, "P": P}
    check(LOOP, device, sizes, dtype=torch.float16, optional=None, iterations=2)


def test_one_tf32_product_of_rounded_weights(device):
    call = draw(PASS, device, dtype=torch.float32, sizes=SIZES | {"B": 2})
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        actual = forward(PASS, call)
    finally:
        torch.set_float32_matmul_precision(before)
    bits = call["weight"].view(torch.int32)
    rounded = ((bits + 0x1000) & -0x2000).view(torch.float32)
    assert not torch.equal(rounded, call["weight"])
    expected = exact(PASS, call | {"weight": rounded})
    # The matrix unit reads 11 bits of the low part of u too.
    for key in ("s", "coupling"):
        torch.testing.assert_close(actual[key], expected[key].float(), rtol=1e-5, atol=1e-6)


def test_any_tiling_of_a_table(device, monkeypatch):
    """Several capsules per split, the last of which has fewer, and several groups."""
    name = f"one_product {_one_product.target_of(torch.empty(0, device=device)).architecture}"
    entry = {"GROUPS": 2, "num_warps": 2, "MAX_SPLITS": 2}
    groups = {"GROUPS": 2, "num_warps": 2}
    shape = "float32 I5 P3 J5 D6"
    contraction = name.replace("one_product", "vote_gradient")
    table = {f"{name} {shape}": entry, f"{contraction} {shape}": groups}
    monkeypatch.setattr(_launch, "_table", table)
    call = draw(PASS, device, SIZES | {"I": 5, "B": 17}, dtype=torch.float32, optional=())
    with Allocations() as allocations:
        results = forward(PASS, call, with_gradients=True)
    allocations.assert_bands_untouched()
    assert (2, 17, 5, 6) in allocations.shapes, "the slots of two splits"
    assert (2, 5, 3, 5, 6) in allocations.shapes, "those of dW, of two shares of the batch"
    plain, exactly = exact(PASS, call, dtype=torch.float32), exact(PASS, call)
    for key, result in results.items():
        testing.assert_agrees(key, result, plain[key], exactly[key])


def test_launches_and_memory(device):
    """A launch that prepares, then a pass and its sum for every iteration; û is not stored."""
    call = draw(LOOP, device, SIZES | {"I": 7, "B": 2}, dtype=torch.float32, optional=())
    with Allocations() as allocations, counted_launches() as launched:
        run(LOOP, call, iterations=2)
    assert launched == [
        *["_prepare_kernel", *["_one_product_kernel", "_squash_slots_kernel"] * 2],
        *["_prepare_kernel", "_pull_back_kernel", "_one_product_bwd_kernel", "_pull_back_kernel"],
        *["_pack_kernel", "_vote_gradient_kernel"],
    ]
    assert allocations.products == 0
    # Tensors have 16 batch rows at least. Even so, none is as large as û.
    assert max(size.numel() for size in allocations.shapes) < 16 * 7 * 5 * 6
    allocations.assert_bands_untouched()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_batch_rows_do_not_depend_on_the_batch(device):
    """Not even without a prior: the first sums come from these kernels, too."""
    call = draw(LOOP, device, SIZES | {"B": 10, "I": 2}, dtype=torch.float32, optional=())
    call["u"][3] = float("nan")
    whole = forward(LOOP, call, iterations=2)
    assert whole["v"].isnan().any(dim=2).any(dim=1).tolist() == [b == 3 for b in range(10)]
    for rows in (slice(1, 3), slice(8, 10)):
        part = forward(LOOP, call | {"u": call["u"][rows]}, iterations=2)
        assert torch.equal(part["v"], whole["v"][rows])
        assert torch.equal(part["coupling"], whole["coupling"][rows])
        assert torch.equal(part["sums"], whole["sums"][:, rows])


def test_layout_changes_no_bit(device):
    call = draw(PASS, device, SIZES | {"B": 2}, dtype=torch.float32)
    layouts = (*testing.LAYOUTS, *testing.LAYOUTS)
    views = {
        key: testing.with_layout(tensor, layout)
        for (key, tensor), layout in zip(call.items(), layouts, strict=False)
    }
    copies = {key: view.contiguous().clone() for key, view in views.items()}
    assert_same_bits(forward(PASS, views), forward(PASS, copies))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_prior_that_is_not_finite(device):
    """The lowest number is a logit like any other. Minus infinity forbids a pair."""
    call = draw(LOOP, device, SIZES | {"B": 1}, dtype=torch.float32, optional=("prior",))
    call["prior"][0] = torch.finfo(torch.float32).min
    call["prior"][1] = float("-inf")
    call["prior"][2, 1:] = float("-inf")
    coupling = forward(LOOP, call, iterations=2, leaky=True)["coupling"][0]
    assert not coupling[:2].any() and not coupling[2, 1:].any() and coupling[2, 0] > 0
    call["prior"] = call["prior"][:1].expand(3, 5)
    coupling = forward(LOOP, call, iterations=2)["coupling"]
    torch.testing.assert_close(coupling, torch.full_like(coupling, 1 / 5))


def test_large_agreement_stays_finite(device):
    call = draw(LOOP, device, SIZES | {"B": 1, "I": 2}, dtype=torch.float32)
    call["u"] *= 1e4
    for result in forward(LOOP, call).values():
        assert torch.isfinite(result).all()


@pytest.mark.parametrize(("architecture", "served"), [("sm80", True), ("gfx942", False)])
def test_what_the_form_serves(architecture, served):
    def launch(P=8, J=12, D=16, dtype=torch.float32, I=1152):
        target = _launch.Target(architecture, 65536)
        return _one_product.one_product_launch(I, P, J, D, dtype, target)

    assert (launch() is not None) == served
    assert (launch(dtype=torch.bfloat16, P=1, J=1, D=1) is not None) == served
    for refused in (
        {"dtype": torch.float64},
        {"P": 17, "J": 1},
        {"P": 16},
        {"J": 13},
        {"D": 17},
        {"J": 21, "D": 1},
    ):
        assert launch(**refused) is None
    if served:
        assert [launch(I=I)[1:] for I in (1152, 1153, 10, 0)] == [
            (64, 18),
            (61, 19),
            (10, 1),
            (1, 1),
        ]
        assert [launch(I=I)[0]["GROUPS"] for I in (1152, 64, 10)] == [4, 2, 1]
