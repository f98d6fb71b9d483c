"""A pytest plugin: tests that mostly run torch's compilers and exporters are not traced.

Tracing doubles their time, and other tests reach the same lines. `squash` stays: it is quick, and
goes through every check of the table.
"""

import re
import sys
from collections.abc import Iterator

import pytest

SLOW = re.compile(
    r"tests/export/|test_kernels_compile|compile|registration|export|transforms|forward_mode|"
    r"higher_derivatives|sample_gradients|operator\[gradients|operator\[vmap"
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
