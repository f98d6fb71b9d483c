"""Routing and squash in C++: every variant is right, whatever the threads and the sizes."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tritoncaps import _native, _torch_path
from tritoncaps._native import _call
from tritoncaps.testing import OPERATORS, cases, compare, compare_inputs, draw_inputs, normal

pytestmark = pytest.mark.usefixtures("native_variant")

CPU = torch.device("cpu")
MB = 1 << 20
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("fused_dynamic_routing", "dynamic_routing", "routing_pass")
ROUTINGS = [OPERATORS[name] for name in NAMES]


@dataclass
class Call:
    """The routings with all their options, forward and backward."""

    sizes: dict[str, int]
    dtype: torch.dtype = torch.float32
    iterations: int = 3
    leaky: bool = True
    gradient: str = "full"
    scale: float = 1.0

    def inputs(self):
        options = {"sizes": self.sizes, "dtype": self.dtype, "scale": self.scale}
        return {row.name: draw_inputs(row, **options) for row in ROUTINGS}

    def results(self, inputs, path=_native):
        """Every result and gradient of every routing, by name."""
        results = {}
        for name, tensors in inputs.items():
            of_one = self.results_of(name, tensors, path)
            results |= {f"{name}: {what}": result for what, result in of_one.items()}
        return results

    def results_of(self, name, inputs, path=_native):
        forward, backward = (getattr(path, f"{name}_{way}") for way in ("fwd", "bwd"))
        B, I, J, D = (self.sizes[axis] for axis in "BIJD")
        grad = normal(B, J, D, seed=1, dtype=self.dtype)
        grad_coupling = normal(B, I, J, seed=1, dtype=self.dtype)
        tensors = inputs.values()
        if name == "routing_pass":
            s, coupling = forward(*tensors, self.leaky, True)
            results = {"s": s, "coupling": coupling}
            grads = backward(grad, grad_coupling, *tensors, self.leaky)
        else:
            v, coupling, sums = forward(*tensors, self.iterations, self.leaky, "v", True)
            results = {"v": v, "coupling": coupling, "sums": sums}
            grad_coupling = grad_coupling if self.gradient == "full" else None
            options = (sums, self.leaky, self.gradient, "v")
            grads = backward(grad, grad_coupling, *tensors, *options)
        of_inputs = zip(inputs, grads, strict=True)
        return results | {f"d{key}": grad for key, grad in of_inputs}


def sizes_of(B, I, P, J, D):
    return {"B": B, "I": I, "P": P, "J": J, "D": D}


@pytest.mark.parametrize("operator", [*ROUTINGS, OPERATORS["squash"]], ids=str)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_agrees(operator, data):
    """Values and gradients obey the 2x rule, for odd sizes, all options and any strides."""
    compare(operator, data.draw(cases(operator, DTYPES)), CPU)


# Sizes beyond those that the tests of the table draw.
LARGE = {
    "several groups and rounds of images": sizes_of(13, 512, 2, 100, 4),
    "prediction vectors computed anew": sizes_of(5, 40, 2, 400, 17),
    "one image and many input capsules": sizes_of(1, 1152, 3, 10, 16),
    "poses of 64": sizes_of(9, 20, 64, 3, 64),
}


@pytest.mark.parametrize("sizes", LARGE.values(), ids=LARGE.keys())
@pytest.mark.parametrize("operator", ROUTINGS, ids=str)
def test_large_sizes(operator, sizes):
    inputs = draw_inputs(operator, sizes, dtype=torch.float32, scale=0.3)
    compare_inputs(operator, inputs, operator.defaults | {"return_coupling": True})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        sizes_of(1, 640, 8, 10, 16),  # the threads share an image
        sizes_of(5, 130, 8, 10, 20),  # and a group of images
        sizes_of(70, 100, 8, 10, 16),  # each has its own groups
        sizes_of(70, 10, 8, 10, 16),  # the same, and they share a block
        sizes_of(5, 40, 2, 400, 17),  # prediction vectors are computed anew
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_threads(set_threads, sizes, dtype):
    call = Call(sizes, dtype)
    inputs = call.inputs()
    set_threads(2)
    fewest = 2 * math.prod(sizes[axis] for axis in "BIJD")  # products, in any of the calls
    assert _call.workers(fewest) == 2
    by_threads = []
    for threads in (1, 1, 2, 3):
        set_threads(threads)
        by_threads.append(call.results(inputs))
    for results in by_threads[1:]:
        for name, expected in by_threads[0].items():
            assert_close(results[name], expected, rtol=0, atol=0, msg=f"{name} differs")


SHARED = ("dweight", "dprior", "dpose_bias", "dbias")  # gradients that are sums over the images


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("D", [3, 16])
def test_one_image_spoils_no_other(value, iterations, D):
    """Values and gradients of the other images keep their bits."""
    call = Call(sizes_of(9, 37, 3, 5, D), iterations=iterations)
    inputs = call.inputs()
    expected = call.results(inputs)
    for tensors in inputs.values():
        next(iter(tensors.values()))[4, 2, 1] = value  # u, or û
    actual = call.results(inputs)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    for name, result in actual.items():
        if name.endswith(SHARED):
            assert result.isnan().any(), name
            continue
        axis = 1 if name.endswith("sums") else 0
        constant = iterations == 1 and name.endswith("dynamic_routing: coupling")
        if not constant:
            assert not result.select(axis, 4).isfinite().all(), name
        index = torch.tensor(others)
        rest, same = result.index_select(axis, index), expected[name].index_select(axis, index)
        assert_close(rest, same, rtol=0, atol=0, msg=f"{name} of another image differs")


@pytest.mark.parametrize("D", [3, 16])
def test_an_infinite_weight_spoils_its_own_row(D):
    """A pass adds û_ij to s_j alone, so an infinity in W_ij leaves all but c_i and s_j finite."""
    sizes = sizes_of(3, 37, 4, 5, D)
    inputs = draw_inputs(OPERATORS["routing_pass"], sizes, dtype=torch.float32)
    inputs["pose"].zero_()[:, 0, 0] = 1  # no agreement with row 2
    inputs["weight"][36, 0, 2, 1] = float("inf")
    s, _ = _native.routing_pass_fwd(*inputs.values(), leaky=False, return_coupling=False)
    s_torch, _ = _torch_path.routing_pass_fwd(*inputs.values(), leaky=False, return_coupling=False)
    assert_close(s.isfinite(), s_torch.isfinite())


@pytest.mark.parametrize("length", [1e-42, 1e-38, 1e-30, 1.0, 1e19, 1e20, 1e25])
@pytest.mark.parametrize("iterations", [1, 2])
def test_extreme_lengths(length, iterations):
    """The squash and its gradient, where squares of the sums overflow or vanish in float32."""
    operator = OPERATORS["fused_dynamic_routing"]
    inputs = draw_inputs(operator, sizes_of(3, 20, 1, 4, 5), dtype=torch.float32)
    inputs["u"] *= length
    inputs["pose_bias"] *= length
    if length > 1:  # so that the agreements, û·v, stay in range
        inputs["prior"] *= 0
        iterations = 1
    options = operator.defaults | {"iterations": iterations}
    compare_inputs(operator, inputs, options)


@pytest.mark.parametrize("axis", "BP")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_axes(axis, dtype):
    call = Call(sizes_of(2, 3, 4, 5, 6) | {axis: 0}, dtype)
    inputs = call.inputs()
    assert_close(call.results(inputs), call.results(inputs, _torch_path))


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_prediction_vectors(set_threads, peak_memory, name):
    """They would take 189 MB, and each of their gradients as much."""
    set_threads(2)
    call = Call(sizes_of(256, 1152, 2, 10, 16), iterations=1)
    inputs = call.inputs()[name]
    results, grown = peak_memory(lambda: call.results_of(name, inputs))
    assert grown < sum(x.nbytes for x in results.values()) + 32 * MB
