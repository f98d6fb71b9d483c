"""How the torch path slices its work: every way gives the same, and the rule chooses well."""

from unittest import mock

import pytest
import torch
from agreement import gradients
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tritoncaps import ops, reference
from tritoncaps._operators import INTERPRETED
from tritoncaps._torch_path import _slices, capsule_routing, dynamic_routing

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the operators run the kernels")

MB = 1 << 20


def caches(level_2: int, level_3: int):
    """Let the caches be so large, in bytes, with one thread."""
    sizes = {2: level_2 // torch.get_num_threads(), 3: level_3}
    return mock.patch.object(_slices, "cache_bytes", sizes.__getitem__)


@st.composite
def routings(draw):
    """Sizes of a routing, and its options."""
    sizes = [draw(st.integers(1, most)) for most in (6, 9, 4, 4, 4)]
    iterations = draw(st.integers(1, 4))
    options = {
        "gradient": draw(st.sampled_from(["full", "last"])),
        "return_coupling": draw(st.booleans()),
    }
    return sizes, iterations, draw(st.booleans()), options, draw(st.integers(0, 1000))


def agrees_with_the_reference(name: str, tensors, iterations: int, has_prior: bool, options, seed):
    prior = torch.randn(tensors[-1].shape, dtype=torch.float64)
    inputs = [*tensors[:-1], *([prior] if has_prior else [])]

    def call(module):
        def function(*leaves):
            *leaves, prior = leaves if has_prior else (*leaves, None)
            return getattr(module, name)(*leaves, iterations, prior=prior, **options)

        return function

    actual, expected = (gradients(call(module), inputs, seed) for module in (ops, reference))
    for results in zip(actual, expected, strict=True):
        for one, other in zip(*results, strict=True):
            assert_close(one, other, rtol=1e-9, atol=1e-11)


@given(routings(), st.integers(0, 7), st.sampled_from([1, 200, 10_000]))
def test_capsule_routing_whatever_is_sliced(routing, images, chunk):
    """By groups of any number of images, the last one smaller, and by chunks of input capsules."""
    (B, I, P, J, D), iterations, has_prior, options, seed = routing
    torch.manual_seed(seed)
    u = torch.randn(B, I, P, dtype=torch.float64)
    weight = torch.randn(I, P, J, D, dtype=torch.float64)
    size = mock.patch.object(capsule_routing, "group_size", return_value=min(images, B))
    with size as chosen, caches(chunk, 1):
        tensors = (u, weight, torch.empty(I, J))
        agrees_with_the_reference("capsule_routing", tensors, iterations, has_prior, options, seed)
    assert chosen.call_count == 2  # forward and backward


@given(routings(), st.sampled_from([1, 1000, 100_000]))
def test_dynamic_routing_whatever_is_sliced(routing, cache):
    (B, I, _, J, D), iterations, has_prior, options, seed = routing
    torch.manual_seed(seed)
    u_hat = torch.randn(B, I, J, D, dtype=torch.float64)
    with caches(cache, cache):
        tensors = (u_hat, torch.empty(I, J))
        agrees_with_the_reference("dynamic_routing", tensors, iterations, has_prior, options, seed)


@pytest.mark.parametrize("cache", [1, 1000])
def test_prediction_vectors_in_chunks(cache):
    u, weight = torch.randn(5, 7, 3), torch.randn(7, 3, 2, 4)
    with caches(cache, cache):
        actual = ops.prediction_vectors(u, weight)
    assert_close(actual, reference.prediction_vectors(u, weight))


# The rule -----------------------------------------------------------------------------------------

# B, I, P, J, D, then how many images at once, forward and backward, with caches of 2 and 32 MB.
RULE = {
    "MNIST": ((64, 1152, 8, 10, 16), 8, 0),
    "MNIST, a few images": ((12, 1152, 8, 10, 16), 8, 8),
    "MNIST, one image": ((1, 1152, 8, 10, 16), 1, 1),
    "MNIST, no image": ((0, 1152, 8, 10, 16), 1, 1),
    "the second routing": ((64, 10, 16, 10, 16), 64, 64),
    "poses of 16": ((64, 1152, 16, 10, 16), 11, 11),
    "poses of 2": ((64, 1152, 2, 10, 16), 0, 0),
    "100 classes": ((64, 1152, 8, 100, 16), 0, 0),
    "1000 classes, two images": ((2, 1152, 8, 1000, 16), 2, 2),
    "1000 classes, eight images": ((8, 1152, 8, 1000, 16), 4, 4),
}


@pytest.mark.parametrize(("sizes", "forward", "backward"), RULE.values(), ids=RULE.keys())
def test_how_many_images_at_once(sizes, forward, backward):
    B, *weight_shape = sizes
    with caches(2 * MB, 32 * MB):
        for is_backward, expected in ((False, forward), (True, backward)):
            u = torch.empty(B, 0)
            assert capsule_routing.group_size(u, weight_shape, is_backward) == expected


@given(st.tuples(*[st.integers(1, most) for most in (300, 3000, 32, 300, 64)]), st.booleans())
def test_a_group_is_no_larger_than_the_cache_or_the_weight(sizes, backward):
    """For poses of 8 numbers and more; of shorter ones 8 images are taken."""
    B, I, P, J, D = sizes
    with caches(2 * MB, 32 * MB):
        size = capsule_routing.group_size(torch.empty(B, 0), (I, P, J, D), backward)
    assert 0 <= size <= B
    assert 4 * size * I * J * D <= max(2 * MB, 4 * I * max(P, 8) * J * D)


def test_a_small_level_3_cache_leaves_large_images_to_the_chunks():
    with caches(MB, 4 * MB):
        assert capsule_routing.group_size(torch.empty(64, 0), (1152, 8, 10, 16), False) == 0


def test_dynamic_routing_takes_what_fits_and_at_least_one_image():
    with caches(MB, 4 * MB):
        assert dynamic_routing.images_at_once((64, 100, 10, 16), torch.empty(0)) == 16
        assert dynamic_routing.images_at_once((5, 100, 10, 16), torch.empty(0)) == 5
        assert dynamic_routing.images_at_once((64, 1000, 100, 16), torch.empty(0)) == 1
        assert dynamic_routing.images_at_once((0, 1000, 100, 16), torch.empty(0)) == 1


# The caches ---------------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Read the caches of a machine whose system lists these, (level, type, size)."""

    def read_level(level: int, *listed: tuple[str, str, str]) -> int:
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
def test_cache_sizes_are_the_systems(read, level, expected):
    assert read(level, *LISTED) == expected


@pytest.mark.parametrize(("level", "expected"), [(2, MB), (3, 8 * MB)])
@pytest.mark.parametrize("listed", [(), LISTED[:1], (("2", "Unified", ""), ("3", "Unified", "?"))])
def test_cache_sizes_that_the_system_does_not_tell(read, level, expected, listed):
    assert read(level, *listed) == expected


def test_chunks_grow_with_the_threads(monkeypatch):
    monkeypatch.setattr(_slices, "cache_bytes", {2: 1000, 3: 5000}.__getitem__)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert _slices.chunk_bytes(torch.device("cpu")) == 3000
    assert _slices.group_bytes(torch.device("cpu")) == 1250
    assert _slices.chunk_bytes(torch.device("meta")) == _slices.group_bytes(torch.device("meta"))
