"""Convolutions that train in groups of images on a CPU: they are torch's, and know when to be."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tritoncaps.layers._convolution import LinearConv2d

CHANNELS, MAPS = 64, 256
USUAL = {"kernel_size": (5, 6), "stride": (2, 1), "padding": (1, 0)}


class SpatialAxes(TorchDispatchMode):
    """Notes the number of spatial axes of each convolution."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.found.append(len(args[3]))  # of the strides
        return func(*args, **(kwargs or {}))


def trains_in_groups(conv, features):
    with SpatialAxes() as axes:
        conv(features)
    (number,) = axes.found
    return number == 3


def make(B=16, channels=CHANNELS, maps=MAPS, width=9, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    conv = LinearConv2d(channels, maps, **(USUAL | changes), dtype=dtype)
    return conv, torch.randn(B, channels, 7, width, dtype=dtype)


def torchs_own(conv, dtype=None):
    def convolve(features):
        weight, bias = conv.weight.to(dtype), conv.bias.to(dtype)
        return F.conv2d(features, weight, bias, conv.stride, conv.padding)

    return convolve


def results(convolve, conv, features):
    """The maps, and the gradients of features, weight and bias."""
    features = features.clone().requires_grad_()
    maps = convolve(features)
    grad = torch.linspace(-1, 1, maps.numel(), dtype=maps.dtype).view(maps.shape)
    return [maps, *torch.autograd.grad(maps, [features, *conv.parameters()], grad)]


@pytest.mark.parametrize("B", [16, 48])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_groups_change_no_result(B, layout):
    conv, features = make(B)
    conv = conv.to(memory_format=layout)
    features = features.contiguous(memory_format=layout)
    assert trains_in_groups(conv, features)
    exact = results(torchs_own(conv, torch.float64), conv, features.double())
    for ours, truth in zip(results(conv, conv, features), exact, strict=True):
        torch.testing.assert_close(
            ours.double(), truth.double(), rtol=0, atol=1e-5 * truth.abs().max().item()
        )


def test_second_derivatives():
    conv, features = make()

    def twice(convolve):
        x = features.clone().requires_grad_()
        (first,) = torch.autograd.grad(convolve(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), [x, conv.weight])

    for ours, theirs in zip(twice(conv), twice(torchs_own(conv)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize(
    "changes",
    [
        {"B": 8},
        {"B": 17},
        {"B": 0},
        {"width": 14},
        {"kernel_size": 4},
        {"channels": 32},
        {"maps": 128},
        {"dtype": torch.float64},
        {"dilation": (1, 2), "kernel_size": 5},
        {"padding_mode": "circular"},
        {"padding": "same", "stride": 1, "kernel_size": 5},
        {"groups": 2},
    ],
    ids=str,
)
def test_others_are_convolved_as_they_are(changes):
    assert not trains_in_groups(*make(**changes))


def test_inference_is_torchs_own():
    conv, features = make()
    with torch.no_grad():
        assert not trains_in_groups(conv, features)
    assert not trains_in_groups(conv.requires_grad_(False), features)


def test_bfloat16_is_torchs_own():
    conv, features = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert not trains_in_groups(conv, features)


def test_an_image_without_a_batch():
    conv, features = make()
    torch.testing.assert_close(conv(features[0]), conv(features)[0])


# Newer versions of torch announce the end of `torch.jit`.
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_traces_take_every_batch():
    """A trace keeps the branch that it saw, so it must not keep that of groups."""
    conv, features = make()
    dynamic = {"input": {0: torch.export.Dim("B", min=1)}}
    traces = [
        torch.fx.symbolic_trace(conv),
        torch.jit.trace(conv, features),
        torch.export.export(conv, (features,), dynamic_shapes=dynamic).module(),
    ]
    for trace in traces:
        for some in (features, features[:3]):
            torch.testing.assert_close(trace(some), conv(some))
