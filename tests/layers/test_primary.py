"""Primary capsules in one, two and three dimensions: their number, order and first weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritoncaps import PrimaryCapsules, reference
from tritoncaps.models import CapsNet

DIMS = pytest.mark.parametrize("spatial_dims", [1, 2, 3])


@st.composite
def convolutions(draw):
    """Draw arguments of the convolution, and the size of its features."""
    spatial_dims = draw(st.integers(1, 3))

    def per_axis(smallest, largest):
        number = st.integers(smallest, largest)
        return draw(number | st.tuples(*[number] * spatial_dims))

    padding = draw(st.sampled_from(["number", "valid", "same"]))
    arguments = {
        "spatial_dims": spatial_dims,
        # torch warns that "same" copies the features for an even kernel.
        "kernel_size": draw(st.sampled_from([1, 3])) if padding == "same" else per_axis(1, 4),
        "stride": 1 if padding == "same" else per_axis(1, 3),
        "padding": per_axis(0, 2) if padding == "number" else padding,
    }
    return arguments, [draw(st.integers(0, 7)) for _ in range(spatial_dims)]


@given(convolutions())
def test_the_number_of_capsules_is_known_beforehand(drawn):
    arguments, size = drawn
    layer = PrimaryCapsules(1, capsule_types=3, dim=2, **arguments)
    features = torch.rand(1, 1, *size)
    count = layer.num_capsules(*size)
    if count == 0:
        with pytest.raises(ValueError, match="smaller than the kernel"):
            layer(features)
    else:
        assert layer(features).shape == (1, count, 2)


@DIMS
def test_capsules_are_ordered_by_position_then_type(spatial_dims, device):
    torch.manual_seed(0)
    layer = PrimaryCapsules(2, 3, dim=4, kernel_size=2, stride=1, spatial_dims=spatial_dims)
    layer = layer.to(device)
    features = torch.rand(1, 2, *(4, 5, 3)[:spatial_dims], device=device)
    maps = layer.conv(features)[0]  # (3 types × 4 components, positions of each axis)
    expected = [
        reference.squash(group)
        for position in maps.flatten(1).unbind(1)
        for group in position.split(4)
    ]
    torch.testing.assert_close(layer(features)[0], torch.stack(expected))


def test_padding_and_strides_of_each_axis_are_the_convolutions():
    layer = PrimaryCapsules(1, 2, kernel_size=(5, 3), stride=(2, 1), padding=(2, 0))
    assert (layer.conv.kernel_size, layer.conv.stride) == ((5, 3), (2, 1))
    assert layer.conv.padding == (2, 0)


def test_parameters_are_made_where_and_as_asked():
    layer = PrimaryCapsules(2, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def primary(spatial_dims):
    return PrimaryCapsules(30, 8, dim=8, kernel_size=3, spatial_dims=spatial_dims, device="meta")


FILLED = {
    **{f"{n}d": (lambda n=n: primary(n), 1.0) for n in (1, 2, 3)},
    "before a ReLU": (lambda: CapsNet(in_channels=3).to("meta").conv, math.sqrt(2)),
}


@pytest.mark.parametrize(("build", "gain"), FILLED.values(), ids=FILLED)
def test_weights_made_later_keep_the_scale(build, gain):
    """Whoever fills a model made on "meta" resets every module in turn, the outer ones first."""
    torch.manual_seed(0)
    layer = build().to_empty(device="cpu")
    for module in layer.modules():
        module.reset_parameters()
    conv = getattr(layer, "conv", layer)
    fan = conv.weight[0].numel()
    assert conv.weight.std().item() * math.sqrt(fan) == pytest.approx(gain, rel=0.05)
    assert conv.weight.mean().abs().item() < 0.1 / math.sqrt(fan)
    assert not conv.bias.any()


def test_a_seed_gives_the_weights_it_has_always_given():
    """torch's own draws come first."""
    torch.manual_seed(0)
    layer = PrimaryCapsules(2, 3, dim=4, kernel_size=3)
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(2, 12, 3)
    torch.nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
    assert torch.equal(layer.conv.weight, conv.weight)
