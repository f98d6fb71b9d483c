"""Triton's interpreter: whether it works here, and how it loses no time."""

import functools

import numpy as np
import pytest

try:
    import triton
except ModuleNotFoundError:
    _HAS_FAULT = False
else:
    _NUMPY = tuple(int(part) for part in np.__version__.split(".")[:2])
    _HAS_FAULT = triton.__version__.startswith("3.6.") and _NUMPY >= (2, 4)

runs_the_interpreter = pytest.mark.skipif(
    _HAS_FAULT, reason="Triton 3.6 interprets kernels only with numpy below 2.4"
)


def patch_once():
    """Let the interpreter replace the functions of triton.language once for each function.

    Otherwise it does so in every launch and in every call of a helper, and restores them after the
    launch. That takes almost half of its time, and no test here needs them restored.
    """
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = functools.cache(interpreter._patch_lang)
        interpreter._LangPatchScope.restore = lambda scope: None


def multiply_row_by_row(patch):
    """Let the interpreter multiply one row at a time, until the patch is undone.

    numpy's products depend on a row's place in a tile. Those of a matrix unit do not.
    """
    import numpy

    product = numpy.matmul

    def matmul(a, b, **options):
        return product(a[..., :, None, :], b[..., None, :, :], **options)[..., 0, :]

    patch.setattr(numpy, "matmul", matmul)
