"""How the torch path slices its work: every way gives the same, and the rule chooses well."""

import warnings
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tritoncaps import ops
from tritoncaps._operators import INTERPRETED
from tritoncaps._torch_path import _slices, dynamic_routing, fused_dynamic_routing, squash
from tritoncaps.testing import CHECKS, OPERATORS, cases, compare, draw_inputs

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the operators run the kernels"),
    pytest.mark.usefixtures("plain_torch"),
]

CPU = torch.device("cpu")
MB = 1 << 20
ROUTINGS = [
    row for row in OPERATORS.values() if row.registered is not None and "coupling?" in row.outputs
]


@contextmanager
def caches(level_2, level_3):
    """Set the sizes in bytes of the threads' level-2 caches together, and of level 3."""
    level_2_of_each = -(-level_2 // torch.get_num_threads())
    sizes = {2: level_2_of_each, 3: level_3}
    with mock.patch.object(_slices, "cache_bytes", sizes.__getitem__):
        yield


# The images at a time, if the batch has as many. 0 means a chunk of input capsules at a time. A
# single pass has no such choice: it takes the images that the cache holds.
WAYS = {"all images": 1 << 20, "two images": 2, "one image": 1, "chunks": 0}


@contextmanager
def sliced(way, chunk=2000):
    """Make the routings slice their work one way, with chunks of so many bytes."""

    def size_of(inputs, *args, **options):
        return min(WAYS[way], max(1, len(inputs)))

    with ExitStack() as stack:
        stack.enter_context(caches(chunk, 4 * chunk))
        stack.enter_context(mock.patch.object(fused_dynamic_routing, "group_size", size_of))
        if way != "chunks":
            stack.enter_context(mock.patch.object(dynamic_routing, "group_size", size_of))
        yield


ways = st.sampled_from(list(WAYS))
chunks = st.sampled_from([1, 2000, 50_000])


@pytest.mark.parametrize("operator", ROUTINGS, ids=str)
@given(data=st.data(), way=ways, chunk=chunks)
def test_a_routing_agrees_however_it_is_sliced(operator, data, way, chunk):
    case = data.draw(cases(operator))
    with sliced(way, chunk):
        results = compare(operator, case, CPU)
    gradients = [result for name, result in results.items() if name.startswith("gradient")]
    assert all(result.is_contiguous() for result in gradients)


@pytest.mark.parametrize("cache", [1, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prediction_vectors_in_chunks(cache, dtype):
    operator = OPERATORS["prediction_vectors"]
    inputs = draw_inputs(operator, dtype=dtype, layout="transposed")
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    with caches(cache, cache):
        actual = operator.function(**inputs)
    assert_close(actual, operator.reference(**exact).to(dtype))


# Ways that a small batch does not take by itself.
SLICED = [("fused_dynamic_routing", way) for way in WAYS if way != "all images"]
SLICED += [("dynamic_routing", "two images"), ("dynamic_routing", "one image")]
SLICED += [("routing_pass", "one image")]


@pytest.mark.parametrize(("operator", "way"), SLICED)
def test_registration_is_right_however_it_is_sliced(operator, way):
    """Results have the strides that their fakes promise the compiler."""
    with sliced(way):
        CHECKS["registration"](OPERATORS[operator], CPU)


@pytest.mark.parametrize("way", WAYS)
def test_compiles_with_inductor_however_it_is_sliced(way):
    """Inductor asserts the strides of every result that it uses."""
    torch._dynamo.reset()
    inputs = draw_inputs(OPERATORS["fused_dynamic_routing"], optional=())
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def whole(u, weight):
        return ops.fused_dynamic_routing(u.sin(), weight.cos()).square().sum()

    with warnings.catch_warnings(), sliced(way):
        warnings.simplefilter("ignore")  # inductor uses deprecated functions
        compiled = torch.compile(whole, fullgraph=True)
        results = [torch.autograd.grad(f(*leaves), leaves) for f in (compiled, whole)]
    assert_close(*results)


@pytest.mark.parametrize("operator", ROUTINGS, ids=str)
@given(data=st.data(), way=ways)
def test_nan_stays_in_its_image_however_it_is_sliced(operator, data, way):
    case = data.draw(cases(operator, (torch.float32,)))
    inputs = {name: x.contiguous().clone() for name, x in case.inputs(operator).items()}
    first = next(iter(inputs))
    with sliced(way):
        expected = operator.call(inputs, case.options)[0]
        inputs[first][0] = float("nan")
        actual = operator.call(inputs, case.options)[0]
    assert actual[0].isnan().all()
    assert_close(actual[1:], expected[1:])


LENGTHS = [0.0, 1e-38, 1e-30, 1e-10, 1.0, 1e10, 1e25, 3e38, float("inf")]


@pytest.mark.parametrize("form", ["quadratic", "exponential"])
@pytest.mark.parametrize("length", LENGTHS)
def test_squash_where_float32_is_summed_in_itself(monkeypatch, length, form):
    """As on a device without float64."""
    s = length * torch.tensor([[0.6, 0.0, -0.8], [-0.6, 0.8, 0.0]]).nan_to_num()
    grad_v = torch.tensor([[1.0, -2.0, 3.0], [0.5, 1.0, 2.0]])
    expected = [squash.squash_fwd(s, form), squash.squash_bwd(grad_v, s, form)]
    monkeypatch.setattr(squash, "_SUM_IN_FLOAT64", set())
    actual = [squash.squash_fwd(s, form), squash.squash_bwd(grad_v, s, form)]
    assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=1e-36)
    assert all(result.isnan().all() == (length == float("inf")) for result in actual)


# The rule -----------------------------------------------------------------------------------------

# (B, I, P, J, D, iterations), then the images at a time, forward and backward, with caches of 2 and
# 32 MB.
RULE = {
    "MNIST": ((64, 1152, 8, 10, 16, 3), 11, 0),
    "MNIST, one iteration": ((64, 1152, 8, 10, 16, 1), 0, 0),
    "MNIST, two iterations": ((64, 1152, 8, 10, 16, 2), 11, 0),
    "MNIST, five iterations": ((64, 1152, 8, 10, 16, 5), 11, 10),
    "MNIST, half as many capsules": ((64, 576, 8, 10, 16, 3), 11, 0),
    "MNIST, a few images": ((12, 1152, 8, 10, 16, 3), 12, 6),
    "MNIST, one image": ((1, 1152, 8, 10, 16, 3), 1, 1),
    "MNIST, no image": ((0, 1152, 8, 10, 16, 3), 1, 1),
    "MNIST, one image, one iteration": ((1, 1152, 8, 10, 16, 1), 1, 1),
    "the second routing, one iteration": ((64, 10, 16, 10, 16, 1), 0, 0),
    "the second routing": ((64, 10, 16, 10, 16, 3), 64, 64),
    "poses of 16": ((64, 1152, 16, 10, 16, 3), 13, 11),
    "poses of 16, two iterations": ((64, 1152, 16, 10, 16, 2), 13, 0),
    "poses of 16, fewer capsules": ((64, 288, 16, 10, 16, 3), 22, 22),
    "poses of 16, more capsules": ((64, 4608, 16, 10, 16, 3), 16, 16),
    "poses of 16, more capsules, two iterations": ((64, 4608, 16, 10, 16, 2), 0, 0),
    "poses of 16 to 32": ((64, 1152, 16, 10, 32, 3), 8, 0),
    "poses of 32": ((64, 1152, 32, 10, 32, 3), 8, 7),
    "poses of 8 to 32": ((64, 1152, 8, 10, 32, 3), 0, 0),
    "poses of 8 to 32, five iterations": ((64, 1152, 8, 10, 32, 5), 8, 0),
    "poses of 2": ((64, 1152, 2, 10, 16, 3), 0, 0),
    "100 classes": ((64, 1152, 8, 100, 16, 3), 0, 0),
    "1000 classes, two images": ((2, 1152, 8, 1000, 16, 3), 2, 2),
    "1000 classes, eight images": ((8, 1152, 8, 1000, 16, 3), 4, 4),
    "1000 classes, nine images": ((9, 1152, 8, 1000, 16, 3), 0, 0),
    "1000 classes, poses of 1": ((8, 1152, 1, 1000, 16, 3), 0, 0),
}


@pytest.mark.parametrize(("sizes", "forward", "backward"), RULE.values(), ids=RULE.keys())
def test_how_many_images_at_once(sizes, forward, backward):
    B, *weight_shape, iterations = sizes
    with caches(2 * MB, 32 * MB):
        for is_backward, expected in ((False, forward), (True, backward)):
            u = torch.empty(B, 0)
            assert (
                fused_dynamic_routing.group_size(u, weight_shape, iterations, is_backward)
                == expected
            )


@given(st.tuples(*[st.integers(1, most) for most in (300, 3000, 32, 300, 64, 20)]), st.booleans())
def test_a_group_is_no_larger_than_the_caches_or_the_weight(sizes, backward):
    B, *weight_shape, iterations = sizes
    I, P, J, D = weight_shape
    with caches(2 * MB, 32 * MB):
        size = fused_dynamic_routing.group_size(
            torch.empty(B, 0), weight_shape, iterations, backward
        )
    assert 0 <= size <= B
    assert 4 * size * I * J * D <= max(12 * MB, 4 * I * P * J * D)


def test_many_iterations_make_a_group_smaller():
    """The backward keeps the couplings of every iteration."""
    with caches(2 * MB, 32 * MB):
        u, u_hat = torch.empty(16, 0), torch.empty(16, 1152, 10, 16)
        few, many = (
            fused_dynamic_routing.group_size(u, (1152, 8, 10, 16), r, True) for r in (3, 20)
        )
        assert (few, many) == (8, 4)
        few, many = (dynamic_routing.group_size(u_hat, r, True) for r in (3, 20))
        assert (few, many) == (8, 4)


def test_a_small_level_3_cache_leaves_large_images_to_the_chunks():
    with caches(MB, 4 * MB):
        u = torch.empty(64, 0)
        assert fused_dynamic_routing.group_size(u, (1152, 8, 10, 16), 3, backward=False) == 0


def test_dynamic_routing_takes_what_fits_and_at_least_one_image():
    def size(*shape):
        return dynamic_routing.group_size(torch.empty(shape), 3, backward=False)

    with caches(MB, 4 * MB):
        assert size(64, 100, 10, 16) == 16  # of 21 that fit, in four groups
        assert size(5, 100, 10, 16) == 5
        assert size(3, 1000, 100, 16) == 1
        assert size(0, 1000, 100, 16) == 1


# The caches ---------------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Read the caches of a machine whose system lists these, (level, type, size)."""

    def read_level(level, *listed):
        for number, entries in enumerate(listed):
            folder = tmp_path / f"index{number}"
            folder.mkdir()
            for name, text in zip(("level", "type", "size"), entries, strict=True):
                (folder / name).write_text(text + "\n")
        monkeypatch.setattr(_slices, "_CACHES", tmp_path)
        return _slices.cache_bytes.__wrapped__(level)

    return read_level


LISTED = (("1", "Data", "32K"), ("2", "Unified", "1024K"), ("3", "Unified", "32768K"))


@pytest.mark.parametrize(("level", "expected"), [(2, MB), (3, 32 * MB)])
def test_cache_sizes_come_from_the_system(read, level, expected):
    assert read(level, *LISTED) == expected


UNKNOWN = [(("2", "Unified", text), ("3", "Unified", text)) for text in ("", "?", "0K")]


@pytest.mark.parametrize(("level", "expected"), [(2, MB), (3, 8 * MB)])
@pytest.mark.parametrize("listed", [(), LISTED[:1], *UNKNOWN])
def test_cache_sizes_that_the_system_does_not_know(read, level, expected, listed):
    assert read(level, *listed) == expected


def test_chunks_grow_with_the_threads(monkeypatch):
    monkeypatch.setattr(_slices, "cache_bytes", {2: 1000, 3: 5000}.__getitem__)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert _slices.chunk_bytes(torch.device("cpu")) == 3000
    assert _slices.group_bytes(torch.device("cpu")) == 1875
    assert _slices.chunk_bytes(torch.device("meta")) == _slices.group_bytes(torch.device("meta"))
