"""EM routing in C++: every variant is right, for all sizes and numbers of threads."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tritoncaps import _native, _torch_path
from tritoncaps.testing import (
    OPERATORS,
    assert_agrees,
    cases,
    compare,
    compare_inputs,
    draw_inputs,
    normal,
)

pytestmark = pytest.mark.usefixtures("native_variant")

CPU = torch.device("cpu")
MB = 1 << 20
DTYPES = (torch.float32, torch.bfloat16)
EM = OPERATORS["em_routing"]
RESULTS = ("v", "logits", "assignment", "mass", "mean", "variance")
GRADIENTS = ("dposes", "dactivations", "dweight", "dbeta_u", "dbeta_a")
SHARED = ("dweight", "dbeta_u", "dbeta_a")  # gradients that are sums over the rows
STATES = ("mass", "mean", "variance")  # which have an axis of iterations before the rows


def sizes_of(B, I, R=4, P=4, J=5, Q=4):
    return {"B": B, "I": I, "R": R, "P": P, "J": J, "Q": Q}


@dataclass
class Call:
    """The registered operator, forward and backward."""

    sizes: dict[str, int]
    dtype: torch.dtype = torch.float32
    iterations: int = 3
    grid: list[int] = field(default_factory=list)
    gradient: str = "full"
    of_assignment: bool = True  # whether the assignment has a gradient

    def inputs(self):
        drawn = draw_inputs(EM, self.sizes, dtype=self.dtype)
        return {name: drawn[name] for name in drawn if name != "offset"}

    def results(self, inputs, path=_native, first=0):
        """Every result and gradient, by name. `inputs` are the rows of a batch from `first` on."""
        options = (self.iterations, [0.1] * self.iterations, 1e-4, self.grid, self.gradient)
        results = path.em_routing_fwd(*inputs.values(), *options, True)
        # A row has the same numbers in every part of the batch.
        rows = slice(first, first + len(inputs["poses"]))
        cotangents = [normal(4400, *x.shape[1:], seed=1).float().to(x) for x in results[:3]]
        v, logits, assignment = (x[rows] for x in cotangents)
        grads = path.em_routing_bwd(
            *(v, logits, assignment if self.of_assignment else None),
            *(*inputs.values(), *results[3:], *options),
        )
        return dict(zip(RESULTS + GRADIENTS, (*results, *grads), strict=True))


def rows_of(name, result, rows):
    """Some rows of a result."""
    return result[:, rows] if name in STATES else result[rows]


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_agrees(data):
    """Values and gradients obey the 2x rule, for odd sizes, all options and any strides."""
    compare(EM, data.draw(cases(EM, DTYPES)), CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("stride", "padding", "gradient"), [(1, 0, "full"), (2, 1, "last")])
def test_competition_across_positions_agrees(stride, padding, gradient, dtype):
    operator = OPERATORS["conv_em_routing"]
    sizes = {"B": 2, "C": 3, "H": 5, "W": 6, "K": 3, "P": 3, "J": 5, "R": 2, "Q": 3}
    inputs = draw_inputs(operator, sizes, dtype=dtype)
    options = {"stride": stride, "padding": padding, "gradient": gradient}
    compare_inputs(operator, inputs, operator.defaults | options | {"return_assignment": True})


OPTIONS = EM.defaults | {"iterations": 3, "return_logits": True, "return_assignment": True}


@pytest.mark.parametrize("mean", [0.0, 5.0, 30.0, 1000.0])
def test_means_far_from_zero(mean):
    """The votes lie that many standard deviations from 0. Their variance keeps its digits."""
    inputs = draw_inputs(EM, sizes_of(9, 40), dtype=torch.float32)
    inputs["offset"] += mean
    compare_inputs(EM, inputs, OPTIONS)


def test_one_input_and_identical_votes():
    """Their variance is 0, so only `min_variance` is left of it."""
    inputs = draw_inputs(EM, sizes_of(9, 1), dtype=torch.float32, optional=())
    compare_inputs(EM, inputs, OPTIONS)
    repeated = {
        "poses": inputs["poses"].expand(-1, 11, -1, -1),
        "activations": inputs["activations"].expand(-1, 11),
        "weight": inputs["weight"].expand(11, -1, -1, -1),
    }
    compare_inputs(EM, inputs | repeated, OPTIONS)


@pytest.mark.parametrize("grid", [[], [2, 3, 2, 1]], ids=["rows", "grid"])
def test_inputs_without_activation_add_nothing(grid):
    """Nothing at all to any result or gradient of the others.

    Those have the same bits. On a grid they move to other blocks, so there the 2x rule holds. The
    call without the added capsules takes the place of plain torch.
    """
    places = 4 if grid else 1  # each gets more types of capsules
    call = Call(sizes_of(12, 20), grid=grid, of_assignment=False)
    inputs = call.inputs()
    more = {
        "poses": normal(12, places * 3, 4, 4, dtype=torch.float32),
        "activations": torch.zeros(12, places * 3),
        "weight": normal(places * 3, 4, 5, 4, dtype=torch.float32),
    }
    axes = {"poses": 1, "activations": 1, "weight": 0, "assignment": 1}
    axes |= {f"d{name}": axis for name, axis in axes.items()}

    def by_place(name, x):
        return x.unflatten(axes[name], (places, -1))

    both = {
        name: torch.cat([by_place(name, x) for x in (inputs[name], added)], axes[name] + 1)
        for name, added in more.items()
    }
    both = inputs | {name: x.flatten(axes[name], axes[name] + 1) for name, x in both.items()}
    expected, results = call.results(inputs), call.results(both)
    exact = call.results({name: x.double() for name, x in inputs.items()}, _torch_path)
    assert results["dactivations"].shape == (12, 20 + places * 3)
    for name, result in results.items():
        if name in axes:  # of the capsules that were there before
            types = 20 // places
            result = by_place(name, result).narrow(axes[name] + 1, 0, types)
            result = result.flatten(axes[name], axes[name] + 1)
        if grid:
            assert_agrees(name, result, expected[name], exact[name])
        else:
            assert_close(result, expected[name], rtol=0, atol=0, msg=f"{name} differs")


@pytest.mark.parametrize("grid", [[], [2, 3, 2, 1]], ids=["rows", "grid"])
def test_without_mass_all_is_zero(grid):
    call = Call(sizes_of(12, 20), grid=grid)
    inputs = call.inputs()
    inputs["activations"][:6] = 0
    results = call.results(inputs)
    assert all(rows_of(x, results[x], slice(6)).eq(0).all() for x in ("v", *STATES))
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "grid"),
    [(sizes_of(300, 37, P=5, Q=3), []), (sizes_of(16 * 9, 18), [3, 3, 3, 2])],
    ids=["rows", "grid"],
)
def test_bits_do_not_depend_on_the_threads(set_threads, sizes, grid, dtype):
    call = Call(sizes, dtype, grid=grid)
    inputs = call.inputs()
    by_threads = []
    for threads in (1, 1, 2, 3):
        set_threads(threads)
        by_threads.append(call.results(inputs))
    for results in by_threads[1:]:
        for name, expected in by_threads[0].items():
            assert_close(results[name], expected, rtol=0, atol=0, msg=f"{name} differs")


def test_many_rounds_of_images(set_threads):
    """A call with a grid takes as many images at a time as fit the cache. No image notices."""
    set_threads(2)
    call = Call(sizes_of(4400, 9, R=5, P=1, J=20, Q=5), iterations=2, grid=[2, 2, 3, 1])
    inputs = call.inputs()
    results = call.results(inputs)
    for first in (0, 2000, 4380):  # five images of the first rounds, the middle ones, the last
        few = slice(first, first + 5 * 4)
        some = {n: x[few] if n in ("poses", "activations") else x for n, x in inputs.items()}
        for name, expected in call.results(some, first=first).items():
            if name not in SHARED:
                actual = rows_of(name, results[name], few)
                assert_close(actual, expected, rtol=0, atol=0, msg=f"{name} from row {first}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("grid", [[], [2, 2, 2, 1]], ids=["rows", "grid"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_one_image_spoils_no_other(value, grid, iterations):
    """Results and gradients of other images keep their bits. Without a grid, an image is a row."""
    call = Call(sizes_of(12, 12, P=3), iterations=iterations, grid=grid)
    inputs = call.inputs()
    expected = call.results(inputs)
    inputs["poses"][5, 2, 1] = value
    actual = call.results(inputs)
    image = range(4, 8) if grid else (5,)
    others = [row for row in range(12) if row not in image]
    # After one iteration, neither the assignment nor what only it decides depends on the poses.
    constant = {"assignment", "mass", "dbeta_u", "dbeta_a"} if iterations == 1 else set()
    for name, result in actual.items():
        if name in SHARED:
            assert result.isfinite().all() == (name in constant), name
            continue
        assert rows_of(name, result, 5).isfinite().all() == (name in constant), name
        rest, same = rows_of(name, result, others), rows_of(name, expected[name], others)
        assert_close(rest, same, rtol=0, atol=0, msg=f"{name} of another image differs")


@pytest.mark.parametrize("grid", [[], [2, 2, 1, 1]], ids=["rows", "grid"])
def test_empty_batch(grid):
    call = Call(sizes_of(0, 3), grid=grid)
    inputs = call.inputs()
    assert_close(call.results(inputs), call.results(inputs, _torch_path))


@pytest.mark.parametrize("grid", [[], [6, 6, 3, 2]], ids=["rows", "grid"])
def test_memory_does_not_grow_with_the_votes(set_threads, peak_memory, grid):
    """The votes would take 170 MB. Plain autograd needs ten times that."""
    set_threads(2)
    call = Call(sizes_of(64 * 36, 72, J=16), iterations=2, grid=grid)
    inputs = call.inputs()
    options = (2, [0.1, 0.1], 1e-4, grid, "full")

    def step():
        results = _native.em_routing_fwd(*inputs.values(), *options, False)
        v, logits, _, *states = results
        grads = _native.em_routing_bwd(v, logits, None, *inputs.values(), *states, *options)
        return (*results, *grads)

    results, grown = peak_memory(step)
    assert grown < sum(x.nbytes for x in results) + 32 * MB
