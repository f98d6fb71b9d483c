"""Checks of the arguments of the public functions, and all of their error messages.

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
# What a multi-hot target may be: 0, 1, or a share between them.
_MULTI_HOT = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATING,
)  # fmt: skip
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


def check_axes(function: str, tensors: Sequence[tuple[str, Tensor, str]]) -> None:
    """Axes of the same name have the same size; `tensors` holds (name, tensor, axes)."""
    first: dict[str, tuple[str, int]] = {}
    for name, tensor, axes in tensors:
        for axis, size in zip(axes.split(), tensor.shape, strict=True):
            other, expected = first.setdefault(axis, (name, size))
            if size != expected:
                shapes = ", ".join(f"{n}: {shape_of(t)}" for n, t, _ in tensors)
                raise ValueError(
                    f"{function}: {name} has {axis}={size} but {other} has {axis}={expected} "
                    f"({shapes})"
                )


def check_not_empty(function: str, name: str, tensor: Tensor, axes: str) -> None:
    """Only the batch may be empty: a softmax over no output capsule has no value."""
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
        if routed_dtype(tensor) != routed_dtype(first):
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


def check_not_negative(function: str, name: str, value: Any) -> None:
    """A finite number of at least 0, such as the weight of a loss."""
    check_number(function, name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{function}: {name} must be >= 0 and finite, got {value}")


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


def check_target(function: str, target: Tensor, name: str, tensor: Tensor) -> None:
    """Class indices (B,) in [0, K), or multi-hot (B, K) with values in [0, 1].

    B and K are the first two axes of `tensor`, which the messages call `name`.

    Values are read only on a CPU. On an accelerator the read would make every step wait. There, an
    index out of range is not noticed: `present_classes` takes it for an image without any class.
    """
    if not isinstance(target, Tensor):
        remedy = ""
        if isinstance(target, (int, float, list)) or hasattr(target, "__array__"):
            remedy = "; use torch.as_tensor(target)"
        raise TypeError(
            f"{function}: target must be a torch.Tensor, got {type(target).__name__}{remedy}"
        )
    if target.ndim not in (1, 2):
        remedy = ""
        if target.ndim == 0:
            remedy = "; for a single image use target.unsqueeze(0)"
        elif target.shape[-1] == 1:
            remedy = "; use target.squeeze(-1)"
        raise ValueError(
            f"{function}: target must have 1 axis (B) or 2 (B, K), got {target.ndim} "
            f"(target: {shape_of(target)}){remedy}"
        )
    if target.device != tensor.device:
        raise ValueError(
            f"{function}: target is on {target.device} but {name} is on {tensor.device}; "
            f'use target.to("{tensor.device}")'
        )
    if target.layout != torch.strided:
        raise TypeError(
            f"{function}: target must be dense (torch.strided), got {target.layout}; "
            f"use target.to_dense()"
        )
    check = _check_class_indices if target.ndim == 1 else _check_multi_hot
    check(function, target, name, tensor)


def _check_class_indices(function: str, target: Tensor, name: str, tensor: Tensor) -> None:
    B, K = tensor.shape[:2]
    size = target.shape[0]
    if size != B:
        remedy = "give one class index for each image"
        if size == K:
            remedy = (
                "for the multi-hot target of one image, use target.unsqueeze(0)"
                if B == 1
                else f"if {name} is (K, B), use {name}.transpose(0, 1)"
            )
        raise ValueError(
            f"{function}: target has B={size} but {name} has B={B} "
            f"(target: {shape_of(target)}, {name}: {shape_of(tensor)}); {remedy}"
        )
    # One class is either present or absent, which an index cannot say.
    only = "; for a single class, use the multi-hot target.unsqueeze(1)" if K == 1 else ""
    if target.dtype != torch.int64:
        remedy = only or "; use target.long()"
        raise TypeError(
            f"{function}: target with class indices must be torch.int64, got {target.dtype}"
            f"{remedy if target.dtype in _MULTI_HOT else ''}"
        )
    low, high = _range(target)
    if low < 0 or high >= K:
        if low < 0:
            remedy = "; for an image of no class, use a multi-hot target with a row of zeros"
        else:
            remedy = only or f"; count classes from 0, or build the model for {high + 1}"
        raise ValueError(
            f"{function}: target holds class indices from {low} to {high}, "
            f"they must lie in 0 .. {K - 1}{remedy}"
        )


def _check_multi_hot(function: str, target: Tensor, name: str, tensor: Tensor) -> None:
    B, K = tensor.shape[:2]
    if target.shape != (B, K):
        raise ValueError(
            f"{function}: multi-hot target is {shape_of(target)} but {name} is {shape_of(tensor)}; "
            f"{_remedy_for_shape(target, B, K)}"
        )
    if target.dtype not in _MULTI_HOT:
        raise TypeError(
            f"{function}: multi-hot target must be bool, an integer or a floating-point type, "
            f"got {target.dtype}; use target.float()"
        )
    # Mixing images and smoothing labels round.
    floating = target.is_floating_point()
    tolerance = max(1e-6, 4 * torch.finfo(target.dtype).eps) if floating else 0
    low, high = _range(target)
    if not (low >= -tolerance and high <= 1 + tolerance):  # also NaN
        raise ValueError(
            f"{function}: target holds multi-hot values from {low} to {high}, "
            f"they must lie in 0 .. 1; use target.clamp(0, 1)"
        )


def _remedy_for_shape(target: Tensor, B: int, K: int) -> str:
    """What to do with a target of two axes that is not (B, K)."""
    shape = shape_of(target)
    to_index = "" if target.dtype == torch.int64 else ".long()"
    if shape == (K, B):
        return "both must start with B: transpose one of them"
    if shape == (B, 1):
        return f"for class indices use target.squeeze(1){to_index}"
    if shape == (1, B):
        return f"for class indices use target.squeeze(0){to_index}"
    if shape[0] == B:
        return (
            f"use F.one_hot(labels, {K}) to make it, or F.one_hot(labels, {K}).amax(dim=1) "
            f"if an image has several labels"
        )
    return f"it must be ({B}, {K})"


def _range(tensor: Tensor) -> tuple[float, float]:
    """The smallest and largest value, or (0, 0) where they cannot be read."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or torch.compiler.is_compiling():
        return 0, 0
    try:
        return tensor.min().item(), tensor.max().item()
    except RuntimeError:  # under vmap, or for a fake tensor, there is no value to read
        return 0, 0


def check_class_weight(
    function: str, class_weight: Tensor | None, activations: Tensor | None = None
) -> None:
    """None, or a factor for each class: (K,), floating-point, ≥ 0, beside the activations."""
    if class_weight is None:
        return
    if not isinstance(class_weight, Tensor):
        raise TypeError(
            f"{function}: class_weight must be a torch.Tensor or None, "
            f"got {type(class_weight).__name__}; use torch.tensor([...])"
        )
    check_tensor(function, "class_weight", class_weight, "K")
    low, high = _range(class_weight)
    if not 0 <= low <= high < math.inf:  # also NaN
        raise ValueError(
            f"{function}: class_weight holds factors from {low} to {high}, "
            f"they must be >= 0 and finite"
        )
    if activations is None:
        return
    tensors = [("class_weight", class_weight, "K"), ("activations", activations, "B K")]
    check_axes(function, tensors[::-1])
    if class_weight.device != activations.device:
        raise ValueError(
            f"{function}: class_weight is on {class_weight.device} but activations is on "
            f'{activations.device}; move it, or the loss module, with .to("{activations.device}")'
        )
