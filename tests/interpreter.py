"""Whether Triton's interpreter works here."""

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
