"""Checks of the arguments of the public functions, and their error messages.

A message names the function, the argument and both numbers. TypeError means a wrong type or dtype,
ValueError a wrong shape, device or range. No check reads the elements of a tensor on an
accelerator, so none waits for the device, and all can be traced.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Anything larger is a mistake, and torch's own error would not name the argument.
_LARGEST = 2**31 - 1


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, which prints without `torch.Size`."""
    return tuple(tensor.shape)


def shown(value: object) -> str:
    """A value as a message shows it. A tensor could fill a page, so only its type is named."""
    return f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)


def check_floating(function: str, name: str, value: Tensor) -> None:
    """A floating-point tensor of any shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{function}: {name} must be float16, bfloat16, float32 or float64, got {value.dtype}"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{function}: {name} must be dense (torch.strided), got {value.layout}")


def check_tensor(function: str, name: str, value: Tensor, axes: str) -> None:
    """A floating-point tensor with the axes named in `axes`, such as "B I P"."""
    check_floating(function, name, value)
    rank = len(axes.split())
    if value.ndim != rank:
        raise ValueError(
            f"{function}: {name} must have {rank} {'axis' if rank == 1 else 'axes'} "
            f"({axes.replace(' ', ', ')}), "
            f"got {value.ndim} ({name}: {shape_of(value)})"
        )


def check_inputs(function: str, axes: Mapping[str, str], **given: Any) -> None:
    """Everything that an operator requires of its tensors.

    `axes` declares them: {"u": "B I P", "prior?": "I J"}. A tensor may be None if its name ends
    in "?".
    """
    tensors = []
    for declared, named in axes.items():
        name = declared.removesuffix("?")
        tensor = given[name]
        if tensor is None and declared != name:
            continue
        check_tensor(function, name, tensor, named)
        check_not_empty(function, name, tensor, named)
        tensors.append((name, tensor, named))
    check_axes(function, tensors)
    check_same_kind(function, [(name, tensor) for name, tensor, _ in tensors])


def check_routing_options(
    function: str,
    iterations: object,
    leaky: object,
    gradient: object,
    output: object,
    return_coupling: object,
) -> None:
    """The options of the routings by agreement."""
    check_size(function, "iterations", iterations)
    check_flag(function, "leaky", leaky)
    check_choice(function, "gradient", gradient, ("full", "last"))
    check_choice(function, "output", output, ("v", "s"))
    check_flag(function, "return_coupling", return_coupling)


def check_em_options(
    function: str,
    iterations: Any,
    temperature: Any,
    min_variance: Any,
    gradient: object,
    return_logits: object = False,
    return_assignment: object = False,
) -> None:
    """The options of the routings by expectation-maximisation."""
    check_size(function, "iterations", iterations)
    check_choice(function, "gradient", gradient, ("full", "last"))
    check_not_negative(function, "min_variance", min_variance)
    if min_variance == 0:
        raise ValueError(
            f"{function}: min_variance must be > 0, got {min_variance}; an output capsule with one "
            f"input capsule has variance 0, which has no logarithm"
        )
    check_flag(function, "return_logits", return_logits)
    check_flag(function, "return_assignment", return_assignment)
    if temperature is None:
        return
    is_schedule = isinstance(temperature, (tuple, list))
    if is_schedule and len(temperature) != iterations:
        raise ValueError(
            f"{function}: temperature must be a number, or one for each iteration, "
            f"iterations={iterations}, got {len(temperature)}"
        )
    for number in temperature if is_schedule else [temperature]:
        check_not_negative(function, "temperature", number)


def check_axes(function: str, tensors: Sequence[tuple[str, Tensor, str]]) -> None:
    """Axes of the same name have the same size; `tensors` holds (name, tensor, axes)."""
    first: dict[str, int] = {}
    for name, tensor, axes in tensors:
        for axis, size in zip(axes.split(), tensor.shape, strict=True):
            expected = first.setdefault(axis, size)
            if size != expected:
                other = next(n for n, _, others in tensors if axis in others.split())
                shapes = ", ".join(f"{n}: {shape_of(t)}" for n, t, _ in tensors)
                elsewhere = "also" if other == name else f"{other} has"
                raise ValueError(
                    f"{function}: {name} has {axis}={size} but {elsewhere} {axis}={expected} "
                    f"({shapes})"
                )


def check_not_empty(function: str, name: str, tensor: Tensor, axes: str) -> None:
    """Only the batch may be empty: a softmax over no output capsule has no value."""
    if 0 not in tensor.shape:
        return
    for axis, size in zip(axes.split(), tensor.shape, strict=True):
        if size == 0 and axis != "B":
            raise ValueError(
                f"{function}: {name} has {axis}=0 but needs {axis} >= 1 "
                f"({name}: {shape_of(tensor)})"
            )


def check_same_kind(function: str, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """All on one device and in one dtype. Under autocast, 16-bit types count as float32."""
    first_name, first = tensors[0]
    for name, tensor in tensors[1:]:
        if tensor.device != first.device:
            raise ValueError(
                f"{function}: {name} is on {tensor.device} but {first_name} is on {first.device}"
            )
        if tensor.dtype != first.dtype and routed_dtype(tensor) != routed_dtype(first):
            raise TypeError(
                f"{function}: {name} is {tensor.dtype} but {first_name} is {first.dtype}; "
                f"convert one of them, or run under torch.autocast, which routes in float32"
            )


def check_layer_dtype(function: str, name: str, value: Tensor, layer: Any) -> None:
    """The input of a convolution or linear layer has the dtype of its weight.

    A weight in storage that no layer computes in, as after quantisation, is left to the layer.
    """
    weight = layer.weight
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATING:
        return
    if routed_dtype(value) != routed_dtype(weight):
        raise TypeError(
            f"{function}: {name} is {value.dtype} but the weights are {weight.dtype}; "
            f"use {name}.to({weight.dtype})"
        )


def routed_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that an operator sees: autocast raises 16-bit types to float32."""
    device_type = tensor.device.type
    if (
        tensor.dtype in (torch.float16, torch.bfloat16)
        and torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
    ):
        return torch.float32
    return tensor.dtype


def check_number(function: str, name: str, value: object) -> None:
    """An int or a float. An int must fit into torch's 64 bits."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")
    if value != value:
        raise ValueError(f"{function}: {name} must be a number, got nan")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{function}: {name} must be within ±2**63, got {value}")


def check_finite(function: str, name: str, value: Any) -> None:
    """A finite number, such as a parameter's initial value."""
    check_number(function, name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{function}: {name} must be finite, got {value}")


def check_not_negative(function: str, name: str, value: Any) -> None:
    """A finite number of at least 0, such as the weight of a loss."""
    check_number(function, name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{function}: {name} must be >= 0 and finite, got {value}")


def check_positive(function: str, name: str, value: Any) -> None:
    """A finite number above 0, such as a length that is divided by."""
    check_number(function, name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{function}: {name} must be > 0 and finite, got {value}")


def check_margins(function: str, m_pos: object, m_neg: object, down_weight: object) -> None:
    """The three numbers of the margin loss."""
    check_not_negative(function, "m_pos", m_pos)
    check_not_negative(function, "m_neg", m_neg)
    check_not_negative(function, "down_weight", down_weight)


def check_flag(function: str, name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be a bool, got {type(value).__name__}")


def check_choice(function: str, name: str, value: object, choices: Sequence[str]) -> None:
    """One of a few words."""
    # Comparing a tensor with a word would raise an error of its own.
    if not isinstance(value, str) or value not in choices:
        expected = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{function}: {name} must be {expected}, got {shown(value)}")


def check_size(function: str, name: str, value: object, smallest: int = 1) -> None:
    """An int, at least 1, such as a number of capsules."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be an int, got {type(value).__name__}")
    if value < smallest:
        raise ValueError(f"{function}: {name} must be >= {smallest}, got {value}")
    if value > _LARGEST:
        raise ValueError(f"{function}: {name} must be <= {_LARGEST}, got {value}")


def check_per_axis(function: str, name: str, value: object, count: int, smallest: int = 1) -> None:
    """An int, or one int for each of `count` axes of an image."""
    if not isinstance(value, (tuple, list)):
        value = (value,) * count
    if len(value) != count:
        raise ValueError(f"{function}: {name} must be an int or {count} ints, got {value!r}")
    for size in value:
        check_size(function, name, size, smallest)


def check_pair(function: str, name: str, value: object, expected: str) -> None:
    """Two ints, each at least 1."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{function}: {name} must be {expected}, got {shown(value)}")
    for size in value:
        check_size(function, name, size)


def check_mask(function: str, mask: Tensor, u: Tensor) -> None:
    """A bool for each input capsule of u, on its device."""
    check_tensor(function, "u", u, "B I P")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{function}: mask must be a bool tensor, False where a capsule is padding, got {got}"
        )
    if mask.shape != u.shape[:2]:
        raise ValueError(
            f"{function}: mask must be (B, I) = {shape_of(u)[:2]}, got {shape_of(mask)}"
        )
    if mask.device != u.device:
        raise ValueError(f"{function}: mask is on {mask.device} but u is on {u.device}")


def count_positions(function: str, u: Tensor, types: int) -> int:
    """The number of positions that the capsules of u fill, `types` capsules each."""
    check_tensor(function, "u", u, "B I P")
    if u.shape[1] == 0 or u.shape[1] % types:
        raise ValueError(
            f"{function}: u has I={u.shape[1]} but needs a multiple of in_capsules={types}, "
            f"the capsules at each position (u: {shape_of(u)})"
        )
    return u.shape[1] // types


def check_dim(function: str, dim: object, ndim: int) -> None:
    """The number of an axis that the tensor has."""
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"{function}: dim must be an int, got {type(dim).__name__}")
    if not -ndim <= dim < ndim:
        raise ValueError(f"{function}: dim={dim} is out of range for a tensor with {ndim} axes")
