"""Targets: their checks, and what losses and decoders make of them."""

import math

import torch
from torch import Tensor

from tritoncaps._checks import FLOATING, check_axes, check_tensor, shape_of

# What a multi-hot target may be: 0, 1, or a share between them.
_MULTI_HOT = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATING,
)  # fmt: skip


def present_classes(target: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return how present each class is, (B, K), given class indices (B,) or multi-hot (B, K).

    `F.one_hot` reads the indices on the host, which `torch.func` does not allow. The comparison
    reads nothing. An index that is no class marks no class: all of them are absent.
    """
    if target.ndim == 1:
        target = target.unsqueeze(1) == torch.arange(num_classes, device=target.device)
    return target.to(dtype)


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
