"""Tracing by torch.fx, whose proxies stand for values that nothing is known about yet.

A call of one of our functions becomes one node of the graph, and its checks run when the graph
does. The checks of a classifier's modules let a proxy pass. An option that Python must decide on
has its default in the graph, unless the tracer's `concrete_args` gives it another value.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import einops
import torch
from torch import Tensor
from torch.fx import Proxy

Function = TypeVar("Function", bound=Callable[..., Any])
Value = TypeVar("Value")


def is_proxy(value: object) -> bool:
    """Whether the value is a tracer's proxy."""
    return isinstance(value, Proxy)


def one_node(function: Function) -> Function:
    """Let a call with proxies record itself, as torch's own functions do."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()):
            # A tuple may be a `Capsules`.
            for item in arg if isinstance(arg, tuple) else (arg,):
                if isinstance(item, Proxy):
                    return item.tracer.create_proxy("call_function", call, args, kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def concrete(name: str, value: Value, default: Value) -> Value:
    """The default in place of a proxy. The graph then refuses every other value."""
    if isinstance(value, Proxy):
        torch._assert(value == default, f"{name} must be {default!r}, as in the traced call")
        return default
    return value


@one_node
def rearrange(tensor: Tensor, pattern: str, **sizes: int) -> Tensor:
    """`einops.rearrange`, which cannot read a proxy."""
    return einops.rearrange(tensor, pattern, **sizes)
