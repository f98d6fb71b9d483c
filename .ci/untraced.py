"""A pytest plugin: tests that mostly run torch's compilers and exporters are not traced.

Tracing doubles their time, and other tests reach the same lines. `squash` stays: it is quick, and
goes through every check of the table.
"""

import re
import sys
from collections.abc import Iterator

import pytest

CHECKS = (
    "registration|compile|export|transforms|forward_mode|higher_derivatives|sample_gradients|"
    "gradients|vmap"
)
SLOW = re.compile(
    rf"test_kernels_compile|test_operator\[({CHECKS})-|::test_\w*(compile|exported)|"
    "test_a_file_is_its_model|test_formulas_replace_the_operator"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Take away the tracer of coverage during a slow test."""
    if "squash" in item.nodeid or not SLOW.search(item.nodeid):
        return (yield)
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)
