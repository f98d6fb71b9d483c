"""The launchers agree with the reference in float64, interpreted on a CPU or run on a GPU.

tests/ops draws random calls of the operators on every backend. This file tests what only the
launchers can show: every mode is exact in float64, at edge shapes and with any tiling.
"""

import json

import pytest
import torch

from tritoncaps._operators import INTERPRETED

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 to interpret", allow_module_level=True)

from kernel_cases import EVERY, ROUTINGS, SIZES, assert_exact, counted_launches, draw, exact, run

from tritoncaps import kernels, testing
from tritoncaps.kernels import _launch

LOOPS = ("dynamic_routing", "fused_dynamic_routing")


def sized(B, I, P, J, D):
    return {"B": B, "I": I, "P": P, "J": J, "D": D}


def check(name, device, sizes=SIZES, *, optional=None, **options):
    call = draw(name, device, sizes, optional=optional)
    assert_exact(run(name, call, **options), exact(name, call, **options))


@pytest.mark.parametrize("optional", [(), ("prior",)], ids=["", "prior"])
@pytest.mark.parametrize("gradient", ["full", "last"])
@pytest.mark.parametrize("with_coupling", [False, True], ids=["", "coupling"])
@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
@pytest.mark.parametrize("name", LOOPS)
def test_every_mode_of_a_loop(device, name, iterations, with_coupling, gradient, optional):
    options = {"iterations": iterations, "gradient": gradient, "with_coupling": with_coupling}
    check(name, device, optional=optional, **options)


@pytest.mark.parametrize(
    ("optional", "iterations", "output", "leaky"),
    [  # every pair of values; None is every input
        ((), 1, "v", True),
        ((), 3, "s", False),
        (("prior",), 1, "s", False),
        (("prior",), 3, "v", True),
        (("pose_bias",), 1, "v", False),
        (("pose_bias",), 3, "s", True),
        (None, 1, "s", True),
        (None, 3, "v", False),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", LOOPS)
def test_every_option_of_a_loop(device, name, optional, iterations, output, leaky):
    check(name, device, optional=optional, iterations=iterations, output=output, leaky=leaky)


@pytest.mark.parametrize("name", LOOPS)
def test_pose_bias_with_the_gradient_of_the_last_iteration(device, name):
    check(name, device, gradient="last", leaky=True)
    check(name, device, gradient="last", output="s")


@pytest.mark.parametrize("optional", [(), ("prior",), ("bias",), ("prior", "bias")], ids=str)
@pytest.mark.parametrize("with_coupling", [False, True], ids=["", "coupling"])
@pytest.mark.parametrize("leaky", [False, True], ids=["", "leaky"])
def test_every_mode_of_a_pass(device, leaky, with_coupling, optional):
    check("routing_pass", device, optional=optional, with_coupling=with_coupling, leaky=leaky)


@pytest.mark.parametrize("axis", "BIPJD")
@pytest.mark.parametrize("extent", [0, 1])
@pytest.mark.parametrize("optional", [(), None], ids=["", "all"])
@pytest.mark.parametrize("name", EVERY)
def test_axes_of_no_and_of_one_element(device, name, optional, extent, axis):
    check(name, device, sized(2, 5, 3, 4, 3) | {axis: extent}, optional=optional)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("squash", sized(B=60, I=1, P=1, J=5, D=5)),
        ("prediction_vectors", sized(B=33, I=2, P=34, J=7, D=5)),
        ("prediction_vectors", sized(B=5, I=1, P=600, J=2, D=3)),
        ("dynamic_routing", sized(B=1, I=2, P=1, J=300, D=17)),
        ("dynamic_routing", sized(B=2, I=150, P=1, J=3, D=33)),
        ("fused_dynamic_routing", sized(B=1, I=2, P=33, J=20, D=17)),
        ("fused_dynamic_routing", sized(B=18, I=150, P=3, J=3, D=2)),
        ("routing_pass", sized(B=1, I=2, P=33, J=20, D=17)),
        ("routing_pass", sized(B=18, I=150, P=3, J=3, D=2)),
        ("routing_pass", sized(B=1, I=3, P=2, J=70, D=17)),
        ("routing_pass", sized(B=1, I=300, P=8, J=2, D=16)),
    ],
    ids=str,
)
def test_shapes_of_several_blocks(device, name, sizes):
    """More rows, columns, components or input capsules than a program holds."""
    check(name, device, sizes, iterations=2)


@pytest.mark.parametrize("name", ROUTINGS)
def test_any_tiling_of_a_table(device, name, tmp_path, monkeypatch):
    """Several tiles per split, several splits, and the blocks of a measured table."""
    architecture = _launch.target_of(torch.empty(0, device=device)).architecture
    tiling = {"BLOCK_I": 4, "GROUPS": 1, "num_warps": 1, "MAX_SPLITS": 3}
    fused = f"{architecture} float64 I21 P4 J3 D2"
    forward = {
        f"logits {fused}": {"GROUPS": 1, "num_warps": 1, "BLOCK_B": 16, "MAX_RUN": 2},
        f"weighted_sum {fused}": {"BLOCK_J": 2, "num_warps": 2, "BLOCK_B": 16, "MAX_SPLITS": 2},
    }
    loop = {f"fused_dynamic_routing_bwd {fused}": tiling}
    one_pass = {f"routing_pass_bwd {fused}": tiling | {"MAX_SPLITS": 2}}
    weight = {f"weight_gradient {fused}": {"BLOCK_I": 8, "BLOCK_B": 16}}
    given = {"BLOCK_I": 2, "BLOCK_J": 1, "MAX_SPLITS": 3}
    dynamic = {f"dynamic_routing {architecture} float64 I21 J3 D2": given}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(forward | loop | one_pass | weight | dynamic))

    class Asked(dict):
        """A table that remembers what it was asked for."""

        def get(self, key, default):
            asked.add(key)
            return super().get(key, default)

    asked = set()
    monkeypatch.setattr(_launch, "_table", Asked())
    _launch.load_table(path)
    check(name, device, sized(2 if name == "dynamic_routing" else 17, 21, 4, 3, 2))
    expected = {
        "dynamic_routing": dynamic,
        "routing_pass": forward | one_pass | weight,
        "fused_dynamic_routing": forward | loop | weight,
    }
    assert asked == expected[name].keys()


@pytest.mark.parametrize("B", [3, 17])
@pytest.mark.parametrize("name", ROUTINGS)
def test_large_prior_stays_within_the_batch(device, name, B):
    """exp(prior) overflows float32, so a row past the end of the batch must not compute it."""
    call = draw(name, device, sized(B, 5, 4, 3, 6), dtype=torch.float32)
    call["prior"][0, 0] = 100.0
    actual = run(name, call)
    for key, expected in exact(name, call).items():
        torch.testing.assert_close(actual[key], expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROUTINGS)
def test_the_lowest_prior_is_a_logit_like_any_other(device, name, dtype):
    """Masks use this value, but a row that is full of it still sums to 1."""
    call = draw(name, device, dtype=dtype, optional=("prior",))
    call["prior"][1] = torch.finfo(dtype).min
    coupling = run(name, call)["coupling"]
    torch.testing.assert_close(coupling[:, 1], torch.full_like(coupling[:, 1], 1 / SIZES["J"]))


@pytest.mark.parametrize("name", ROUTINGS)
def test_prior_of_minus_infinity_forbids_a_pair(device, name):
    call = draw(name, device, optional=("prior",))
    call["prior"][::2, 0] = float("-inf")
    call["prior"][1, 1:] = float("-inf")
    actual = run(name, call)
    assert (actual["coupling"][:, ::2, 0] == 0).all()
    assert_exact(actual, exact(name, call))


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_prior_that_forbids_every_pair_leaves_a_capsule_to_the_orphan(device, name):
    call = draw(name, device, optional=("prior",))
    call["prior"][1] = float("-inf")
    actual = run(name, call, leaky=True)
    assert not actual["coupling"][:, 1].any()
    assert_exact(actual, exact(name, call, leaky=True))


@pytest.mark.parametrize("name", ROUTINGS)
def test_large_agreement_stays_finite(device, name):
    call = draw(name, device, dtype=torch.float32)
    call["u_hat" if name == "dynamic_routing" else "u"] *= 1e4
    for result in run(name, call).values():
        assert torch.isfinite(result).all()


@pytest.mark.parametrize("name", ROUTINGS)
def test_float16_agrees(device, name):
    """Sums are float32, so a half-precision result is at least as good as that of einsum."""
    call = draw(name, device, dtype=torch.float16)
    actual = run(name, call, with_coupling=False)
    if "sums" in actual:
        assert actual["sums"].dtype == torch.float32
    plain = exact(name, call, with_coupling=False, dtype=torch.float16)
    for key, exactly in exact(name, call, with_coupling=False).items():
        assert actual[key].dtype == torch.float16
        testing.assert_agrees(key, actual[key], plain[key], exactly)


@pytest.mark.parametrize(
    ("function", "shapes", "rest"),
    [
        ("squash_fwd", [(2, 20000)], ("exponential",)),
        ("prediction_vectors_fwd", [(1, 1, 1), (1, 1, 1, 2**23)], ()),
        ("dynamic_routing_fwd", [(1, 1, 1, 5000)], (None, None, 3, False, "v", False)),
        (
            "fused_dynamic_routing_fwd",
            [(1, 1, 200), (1, 200, 1, 40)],
            (None, None, 3, False, "v", False),
        ),
        (
            "routing_pass_fwd",
            [(1, 1, 200), (1, 200, 1, 40), (1, 1, 40)],
            (None, None, False, False),
        ),
    ],
)
def test_shape_that_no_launch_fits_is_refused(device, function, shapes, rest):
    tensors = [torch.zeros(1, device=device).expand(shape) for shape in shapes]
    refused = pytest.raises(kernels.UnsupportedShape, match=r"at most|holds")
    with counted_launches() as launched, refused:
        getattr(kernels, function)(*tensors, *rest)
    assert not launched
