"""Every kernel compiles for every target, without a GPU.

A kernel must fit into shared memory and keep its values in registers. float64 may spill: it serves
to check gradients. HYPOTHESIS_PROFILE=nightly compiles all named shapes on every target, and every
mode, a thousand launches. Otherwise it is the largest tilings and every pair of modes.
"""

import importlib
import inspect
import os
import pkgutil
import re
from itertools import product
from pathlib import Path

import pytest
import torch

from tritoncaps._operators import INTERPRETED

if INTERPRETED:
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
pytest.importorskip("triton", reason="there is no Triton for this platform")

from triton.runtime.jit import JITFunction

from tools.gpu_model.compiling import compilers, footprints
from tools.gpu_model.launches import (
    MATRICES,
    SHAPES,
    TARGETS,
    Matrices,
    Start,
    record_call,
    record_launches,
    record_matrices,
)
from tritoncaps import kernels
from tritoncaps.testing import OPERATORS

MODULES = [
    importlib.import_module(f"{kernels.__name__}.{module.name}")
    for module in pkgutil.iter_modules(kernels.__path__)
]
FP32 = torch.float32
IS_NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
# The largest tilings, and the few input capsules of a second stage.
LARGE = ("MNIST", "1000 classes")
# Poses that only the backward in two sweeps takes on NVIDIA. Known to take 8 bytes of stack: D = 32
# on sm80, and P = 32 with Triton 3.6 on sm90.
LONG = {"sm80": (1152, 32, 10, 16), "sm90": (1152, 8, 10, 32)}
CHOSEN = tuple(SHAPES) if IS_NIGHTLY else (*LARGE, "second stage")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Compile each launch once, and without a cache that earlier versions may have filled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with compilers() as pool:
            yield pool


def launches(target_name, dtypes, *, shapes=tuple(SHAPES), **options):
    """Distinct launches for the shapes, the dtypes and one target."""
    _, target = TARGETS[target_name]
    every_shape = {**SHAPES, "long poses": LONG.get(target_name)}
    found = {}
    for shape in shapes:
        for dtype in dtypes:
            found |= dict.fromkeys(record_launches(every_shape[shape], dtype, target, **options))
    return list(found)


def assert_compiles(target_name, found, pool):
    gpu, target = TARGETS[target_name]
    for launch, cost in footprints(found, gpu, pool):
        what = f"{launch.name} on {target_name}: {cost}, {launch}"
        if "*fp64" not in dict(launch.signature).values():
            assert cost.stack == 0, f"spills: {what}"
        assert cost.shared_memory <= target.shared_memory, what
        assert 0 < cost.registers <= 512, what


@pytest.mark.parametrize("target_name", TARGETS)
def test_named_shapes_compile(pool, target_name):
    assert_compiles(target_name, launches(target_name, [FP32], shapes=CHOSEN), pool)


@pytest.mark.parametrize(
    ("target_name", "dtype", "shapes"),
    [
        ("sm90", torch.float64, ["MNIST"]),
        ("sm90", torch.bfloat16, LARGE),
        ("gfx942", torch.bfloat16, ["MNIST"]),
        # float64 on AMD only serves to check gradients, so once a night is enough.
        *([("gfx942", torch.float64, ["MNIST"])] if IS_NIGHTLY else []),
    ],
    ids=str,
)
def test_other_precisions_compile(pool, target_name, dtype, shapes):
    assert_compiles(target_name, launches(target_name, [dtype], shapes=shapes), pool)


def test_large_shapes_compile_with_one_tf32_product(pool):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = launches("sm90", [FP32], shapes=LARGE)
    finally:
        torch.set_float32_matmul_precision(before)
    one_tf32 = ("PRECISION", "tf32"), ("SPLIT", False)
    is_tf32 = [launch for launch in found if not set(one_tf32).isdisjoint(launch.constants)]
    assert {launch.name for launch in is_tf32} > {
        "_one_product_kernel",
        "_logits_kernel",
        "_weighted_sum_kernel",
        "_one_product_bwd_kernel",
        "_vote_gradient_kernel",
    }
    assert_compiles("sm90", is_tf32, pool)


# "authors" are the options that the authors' code has besides.
# Everything, which takes the most registers, and nothing.
EXTREMES = [(3, True, True, True, True, "full"), (3, False, False, False, False, "full")]
MODES = [  # iterations, prior, coupling, bias, authors, gradient: every pair of values
    *EXTREMES,
    (3, True, True, False, False, "last"),
    (2, False, False, True, True, "last"),
    (2, True, True, False, False, "full"),
    (1, False, True, False, True, "last"),
    (1, True, False, True, False, "full"),
]
if IS_NIGHTLY:
    MODES = list(product((3, 1, 2), *[(False, True)] * 4, ("full", "last")))


def in_modes(target_name, modes):
    """The launches of the MNIST shape in every mode of a table.

    The other forms of a pass, which the MNIST shape does not take, come from other shapes.
    """
    forms = {
        "100 classes": {
            "_blocks_kernel", "_logits_kernel", "_softmax_kernel", "_weighted_sum_kernel",
        },
        "long poses": {"_pass_bwd_kernel", "_weight_gradient_kernel"},
    }  # fmt: skip
    found = {}
    for iterations, prior, coupling, bias, authors, gradient in modes:
        for shape in ("MNIST", *forms):
            of_mode = launches(
                target_name,
                [FP32],
                shapes=[shape],
                iterations=iterations,
                optional=["prior"] * prior + ["bias"] * bias + ["pose_bias"] * authors,
                with_coupling=coupling,
                gradient=gradient,
                leaky=authors,
                output="s" if authors else "v",
            )
            found |= {
                launch: None
                for launch in of_mode
                if shape == "MNIST" or launch.name in forms[shape]
            }
    return list(found)


# The two kinds of NVIDIA GPU that differ in where a product keeps its operands. The named shapes
# cover the other targets.
@pytest.mark.parametrize(
    ("target_name", "modes"),
    [
        pytest.param("sm90", MODES, id="sm90-modes"),
        pytest.param("sm90", EXTREMES, id="sm90-extremes"),
        pytest.param("sm80", EXTREMES, id="sm80-extremes"),
        *([pytest.param("sm80", MODES, id="sm80-modes")] if IS_NIGHTLY else []),
    ],
)
def test_modes_compile(pool, target_name, modes):
    assert_compiles(target_name, in_modes(target_name, modes), pool)


def of_matrices(target_name, shapes, dtype=FP32, **options):
    """The distinct launches of EM routing for shapes by name, or `Matrices`."""
    target = TARGETS[target_name][1]
    recordings = [record_matrices(MATRICES.get(s, s), dtype, target, **options) for s in shapes]
    steps = [step for one in recordings for step in (*one.forward, *one.backward)]
    return list(dict.fromkeys(step.launch for step in steps if isinstance(step, Start)))


# A kernel of EM routing depends on the size of a matrix and on the grid, but on little else.
ONE_GRID, ONE_LAYER = ("big-conv2",), ("big-class",)


# float32 is compiled in modes, below.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("target_name", TARGETS if IS_NIGHTLY else ["sm90"])
def test_matrices_of_other_precisions_compile(pool, target_name, dtype):
    assert_compiles(target_name, of_matrices(target_name, ONE_GRID, dtype), pool)


@pytest.mark.skipif(not IS_NIGHTLY, reason="one of them is compiled in modes, the others at night")
@pytest.mark.parametrize("target_name", TARGETS)
def test_named_matrices_compile(pool, target_name):
    assert_compiles(target_name, of_matrices(target_name, MATRICES), pool)


MATRIX_EXTREMES = [(3, True, True, True, "full"), (3, False, False, False, "full")]
MATRIX_MODES = [  # iterations, grid, assignment, gradient of the logits, gradient
    *MATRIX_EXTREMES,
    (3, True, True, False, "last"),
    (3, False, True, True, "last"),
    (1, True, False, True, "full"),
    (1, False, True, False, "full"),
    (1, True, False, False, "last"),
]
if IS_NIGHTLY:
    MATRIX_MODES = list(product((3, 1, 2), *[(False, True)] * 3, ("full", "last")))


@pytest.mark.parametrize(
    ("target_name", "modes"),
    [
        pytest.param("sm90", MATRIX_MODES, id="sm90-modes"),
        *(pytest.param(name, MATRIX_EXTREMES, id=f"{name}-extremes") for name in TARGETS),
    ],
)
def test_modes_of_matrices_compile(pool, target_name, modes):
    found = {}
    for iterations, has_grid, assignment, logits, gradient in modes:
        of_mode = of_matrices(
            target_name,
            ONE_GRID if has_grid else ONE_LAYER,
            iterations=iterations,
            gradient=gradient,
            return_assignment=assignment,
            unused=() if logits else ("logits",),
        )
        found |= dict.fromkeys(of_mode)
    assert_compiles(target_name, list(found), pool)


def of_patches(target_name, J, dtype=FP32):
    """The launches of a convolution with routing by agreement."""
    sizes = {"B": 8, "H": 16, "W": 16, "C": 32, "P": 8, "K": 3, "J": J, "D": 16}
    operator = OPERATORS["conv_dynamic_routing"]
    recording = record_call(
        operator, sizes, dtype, TARGETS[target_name][1], operator.optional, operator.defaults
    )
    steps = (*recording.forward, *recording.backward)
    return list(dict.fromkeys(step.launch for step in steps if isinstance(step, Start)))


@pytest.mark.parametrize("target_name", TARGETS if IS_NIGHTLY else ["sm90"])
def test_the_kernels_that_read_patches_compile(pool, target_name):
    """With few output capsules `_prepare_kernel` reads them, with many `_blocks_kernel`."""
    found = [*of_patches(target_name, 10), *of_patches(target_name, 100)]
    reads = {launch.name: launch for launch in found if dict(launch.constants).get("KERNEL")}
    assert reads.keys() == {"_prepare_kernel", "_blocks_kernel", "_add_kernel"}
    assert_compiles(target_name, list(reads.values()), pool)


def test_extents_of_one_compile(pool):
    """Triton turns an argument of 1 into a constant, which not every tensor operation accepts."""
    _, target = TARGETS["sm90"]
    found = record_launches(
        (1, 1, 1, 1),
        FP32,
        target,
        batch=1,
        optional=("prior", "bias", "pose_bias"),
        with_coupling=True,
        leaky=True,
    )
    assert_compiles("sm90", found, pool)
    one = Matrices(1, 1, 1, (1, 1, 1, 1), R=1, P=1, Q=1)
    assert_compiles("sm90", of_matrices("sm90", [one], return_assignment=True), pool)


def test_no_jit_function_is_forgotten():
    """Every kernel is launched by some launcher, and every helper is called by another."""
    sources = {module: Path(inspect.getfile(module)).read_text() for module in MODULES}
    found = [*in_modes("sm90", MODES), *of_matrices("sm90", MATRICES)]
    launched = {launch.name for launch in found}
    functions = {
        (module, name)
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
    }
    assert {name for _, name in functions if name.endswith("_kernel")} == launched
    for module, name in functions:
        # A private helper serves only its own module, the others serve any.
        callers = [sources[module]] if name.startswith("_") else sources.values()
        calls = sum(len(re.findall(rf"(?<!def )\b{name}[\(\[]", text)) for text in callers)
        assert calls > 0, f"{module.__name__}.{name} is never called"
