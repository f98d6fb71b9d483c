"""Every error a user can cause in the operators, layers and models: its kind and its words."""

import re

import pytest
import torch

from tritoncaps import (
    CapsuleLoss,
    MarginLoss,
    PrimaryCapsules,
    ReconstructionDecoder,
    RoutedCapsules,
    ops,
)
from tritoncaps.losses import reconstruction_error
from tritoncaps.models import CapsNet, DeepCapsNet, create_model

U, WEIGHT = torch.ones(2, 6, 8), torch.ones(6, 8, 10, 16)
U_HAT, PRIOR = torch.ones(2, 6, 10, 16), torch.zeros(6, 10)
LENGTHS, TARGET = torch.ones(2, 10), torch.tensor([3, 9])


def call(function, *args, **kwargs):
    return lambda: function(*args, **kwargs)


CASES = {
    # wrong axes: both numbers, and all shapes
    "axes": (
        call(ops.fused_dynamic_routing, U, torch.ones(8, 8, 10, 16)),
        ValueError,
        "fused_dynamic_routing: weight has I=8 but u has I=6 (u: (2, 6, 8), weight: (8, 8, 10, 16))",
    ),
    "axes-P": (
        call(ops.prediction_vectors, U, torch.ones(6, 7, 10, 16)),
        ValueError,
        "prediction_vectors: weight has P=7 but u has P=8",
    ),
    "axes-prior": (
        call(ops.dynamic_routing, U_HAT, prior=torch.zeros(6, 9)),
        ValueError,
        "dynamic_routing: prior has J=9 but u_hat has J=10",
    ),
    "rank": (
        call(ops.fused_dynamic_routing, torch.ones(2, 6, 4, 2), WEIGHT),
        ValueError,
        "fused_dynamic_routing: u must have 3 axes (B, I, P), got 4 (u: (2, 6, 4, 2))",
    ),
    "rank-weight": (
        call(ops.prediction_vectors, U, torch.ones(6, 8, 160)),
        ValueError,
        "prediction_vectors: weight must have 4 axes (I, P, J, D), got 3",
    ),
    "rank-u_hat": (
        call(ops.dynamic_routing, U),
        ValueError,
        "dynamic_routing: u_hat must have 4 axes (B, I, J, D), got 3",
    ),
    "empty-axis": (
        call(ops.fused_dynamic_routing, U[:, :0], WEIGHT[:0]),
        ValueError,
        "fused_dynamic_routing: u has I=0 but needs I >= 1 (u: (2, 0, 8))",
    ),
    # kinds, dtypes, devices
    "not-a-tensor": (
        call(ops.fused_dynamic_routing, [1.0], WEIGHT),
        TypeError,
        "fused_dynamic_routing: u must be a torch.Tensor, got list",
    ),
    "integers": (
        call(ops.fused_dynamic_routing, U.long(), WEIGHT),
        TypeError,
        "fused_dynamic_routing: u must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "dtypes": (
        call(ops.fused_dynamic_routing, U.double(), WEIGHT),
        TypeError,
        "fused_dynamic_routing: weight is torch.float32 but u is torch.float64",
    ),
    "dtypes-half": (
        call(ops.fused_dynamic_routing, U.bfloat16(), WEIGHT),
        TypeError,
        "or run under torch.autocast",
    ),
    "dtypes-prior": (
        call(ops.dynamic_routing, U_HAT, prior=PRIOR.half()),
        TypeError,
        "dynamic_routing: prior is torch.float16 but u_hat is torch.float32",
    ),
    "sparse": (
        call(ops.fused_dynamic_routing, U.to_sparse(), WEIGHT),
        TypeError,
        "fused_dynamic_routing: u must be dense (torch.strided), got torch.sparse_coo",
    ),
    "devices": (
        call(ops.fused_dynamic_routing, U, WEIGHT.to("meta")),
        ValueError,
        "fused_dynamic_routing: weight is on meta but u is on cpu",
    ),
    # options
    "iterations-0": (
        call(ops.fused_dynamic_routing, U, WEIGHT, 0),
        ValueError,
        "fused_dynamic_routing: iterations must be >= 1, got 0",
    ),
    "iterations-float": (
        call(ops.dynamic_routing, U_HAT, 3.0),
        TypeError,
        "dynamic_routing: iterations must be an int, got float",
    ),
    "iterations-bool": (
        call(ops.dynamic_routing, U_HAT, True),
        TypeError,
        "dynamic_routing: iterations must be an int, got bool",
    ),
    # The loop would run for years, and the sums fit into no memory.
    "iterations-huge": (
        call(ops.fused_dynamic_routing, U, WEIGHT, 2**31),
        ValueError,
        "fused_dynamic_routing: iterations must be <= 2147483647, got 2147483648",
    ),
    "gradient-tensor": (
        call(ops.fused_dynamic_routing, U, WEIGHT, gradient=torch.ones(2)),
        ValueError,
        'fused_dynamic_routing: gradient must be "full" or "last", got a Tensor',
    ),
    "return-coupling": (
        call(ops.dynamic_routing, U_HAT, return_coupling=1),
        TypeError,
        "dynamic_routing: return_coupling must be a bool, got int",
    ),
    "gradient": (
        call(ops.fused_dynamic_routing, U, WEIGHT, gradient="none"),
        ValueError,
        'fused_dynamic_routing: gradient must be "full" or "last", got \'none\'',
    ),
    # squash
    "squash-dim": (
        call(ops.squash, U, dim=3),
        ValueError,
        "squash: dim=3 is out of range for a tensor with 3 axes",
    ),
    "squash-integers": (
        call(ops.squash, torch.ones(3, dtype=torch.int32)),
        TypeError,
        "squash: s must be float16, bfloat16, float32 or float64, got torch.int32",
    ),
    "squash-dim-kind": (
        call(ops.squash, U, dim=1.0),
        TypeError,
        "squash: dim must be an int, got float",
    ),
    # margin loss
    "loss-no-class": (
        call(ops.margin_loss, torch.ones(2, 0), TARGET),
        ValueError,
        "margin_loss: activations has K=0 but needs K >= 1",
    ),
    "loss-reduction-module": (
        call(MarginLoss, reduction="max"),
        ValueError,
        "MarginLoss: reduction must be",
    ),
    "loss-rank": (
        call(ops.margin_loss, torch.ones(10), TARGET),
        ValueError,
        "margin_loss: activations must have 2 axes (B, K), got 1",
    ),
    "loss-target-kind": (
        call(ops.margin_loss, LENGTHS, [3, 9]),
        TypeError,
        "margin_loss: target must be a torch.Tensor, got list",
    ),
    "loss-target-rank": (
        call(ops.margin_loss, LENGTHS, torch.zeros(2, 10, 1)),
        ValueError,
        "margin_loss: target must have 1 axis (B) or 2 (B, K), got 3 (target: (2, 10, 1))",
    ),
    "loss-target-batch": (
        call(ops.margin_loss, LENGTHS, torch.tensor([1, 2, 3])),
        ValueError,
        "margin_loss: target has B=3, expected B=2",
    ),
    "loss-target-dtype": (
        call(ops.margin_loss, LENGTHS, torch.tensor([1.0, 2.0])),
        TypeError,
        "margin_loss: target with class indices must be torch.int64, got torch.float32",
    ),
    "loss-target-range": (
        call(ops.margin_loss, LENGTHS, torch.tensor([0, 10])),
        ValueError,
        "margin_loss: target holds class indices from 0 to 10, they must lie in 0 .. 9",
    ),
    "loss-target-negative": (
        call(ops.margin_loss, LENGTHS, torch.tensor([-1, 9])),
        ValueError,
        "margin_loss: target holds class indices from -1 to 9",
    ),
    "loss-target-device": (
        call(ops.margin_loss, LENGTHS, TARGET.to("meta")),
        ValueError,
        "margin_loss: target is on meta, expected cpu",
    ),
    "loss-multi-hot-shape": (
        call(ops.margin_loss, LENGTHS, torch.zeros(2, 9)),
        ValueError,
        "margin_loss: multi-hot target is (2, 9) but activations is (2, 10)",
    ),
    "loss-multi-hot-range": (
        call(ops.margin_loss, LENGTHS, torch.full((2, 10), 2)),
        ValueError,
        "margin_loss: target holds multi-hot values from 2 to 2, they must lie in 0 .. 1",
    ),
    "loss-multi-hot-device": (
        call(ops.margin_loss, LENGTHS, LENGTHS.to("meta")),
        ValueError,
        "margin_loss: target is on meta, expected cpu",
    ),
    "loss-multi-hot-dtype": (
        call(ops.margin_loss, LENGTHS, torch.zeros(2, 10, dtype=torch.complex64)),
        TypeError,
        "margin_loss: multi-hot target must be a dense tensor of bool, an integer or a "
        "floating-point type, got torch.complex64, torch.strided",
    ),
    "loss-multi-hot-sparse": (
        call(ops.margin_loss, LENGTHS, torch.zeros(2, 10).to_sparse()),
        TypeError,
        "got torch.float32, torch.sparse_coo",
    ),
    "loss-target-sparse": (
        call(ops.margin_loss, LENGTHS, TARGET.to_sparse()),
        TypeError,
        "margin_loss: target must be dense (torch.strided), got torch.sparse_coo",
    ),
    "loss-m_pos": (
        call(ops.margin_loss, LENGTHS, TARGET, m_pos="0.9"),
        TypeError,
        "margin_loss: m_pos must be a number, got str",
    ),
    "loss-m_neg": (
        call(ops.margin_loss, LENGTHS, TARGET, m_neg=None),
        TypeError,
        "margin_loss: m_neg must be a number, got NoneType",
    ),
    "loss-down_weight": (
        call(ops.margin_loss, LENGTHS, TARGET, down_weight=-(2**63)),
        ValueError,
        "margin_loss: down_weight must be within ±2**63, got -9223372036854775808",
    ),
    "loss-number-module": (
        call(MarginLoss, down_weight=True),
        TypeError,
        "MarginLoss: down_weight must be a number, got bool",
    ),
    "loss-reconstruction-weight": (
        call(CapsuleLoss, [0.5]),
        TypeError,
        "CapsuleLoss: reconstruction_weight must be a number, got list",
    ),
    "loss-reduction": (
        call(ops.margin_loss, LENGTHS, TARGET, reduction="max"),
        ValueError,
        'margin_loss: reduction must be "mean" or "sum" or "none", got \'max\'',
    ),
    "reconstruction-shapes": (
        call(CapsuleLoss(), LENGTHS, TARGET, torch.ones(2, 1, 5, 5), torch.ones(2, 1, 6, 5)),
        ValueError,
        "reconstruction_error: reconstruction is (2, 1, 5, 5) but images is (2, 1, 6, 5)",
    ),
    "reconstruction-error": (
        call(reconstruction_error, torch.ones(2, 1, 5, 5), torch.ones(1, 1, 5, 5)),
        ValueError,
        "reconstruction is (2, 1, 5, 5) but images is (1, 1, 5, 5)",
    ),
    # layers
    "primary-size": (
        call(PrimaryCapsules, 4, dim=0),
        ValueError,
        "PrimaryCapsules: dim must be >= 1, got 0",
    ),
    "primary-features": (
        call(PrimaryCapsules(4, kernel_size=3), torch.ones(2, 5, 9, 9)),
        ValueError,
        "PrimaryCapsules: features must be (B, 4, H, W), got (2, 5, 9, 9)",
    ),
    "primary-too-small": (
        call(PrimaryCapsules(4, kernel_size=9), torch.ones(2, 4, 8, 20)),
        ValueError,
        "PrimaryCapsules: features of 8x20 are smaller than the kernel, 9x9",
    ),
    "routed-size": (
        call(RoutedCapsules, 6, 8, 10.0, 16),
        TypeError,
        "RoutedCapsules: out_capsules must be an int, got float",
    ),
    "routed-gradient": (
        call(RoutedCapsules, 6, 8, 10, 16, gradient="first"),
        ValueError,
        'RoutedCapsules: gradient must be "full" or "last", got \'first\'',
    ),
    "routed-input-length": (
        call(RoutedCapsules, 6, 8, 10, 16, input_length=0.0),
        ValueError,
        "RoutedCapsules: input_length must be > 0, got 0.0",
    ),
    "routed-input-length-kind": (
        call(RoutedCapsules, 6, 8, 10, 16, input_length="1"),
        TypeError,
        "RoutedCapsules: input_length must be a number, got str",
    ),
    "routed-learned-prior": (
        call(RoutedCapsules, 6, 8, 10, 16, learned_prior=None),
        TypeError,
        "RoutedCapsules: learned_prior must be a bool, got NoneType",
    ),
    "decoder-image-kind": (
        call(ReconstructionDecoder, 10, 16, 28),
        TypeError,
        "ReconstructionDecoder: image_shape must be (channels, height, width), got 28",
    ),
    "decoder-image": (
        call(ReconstructionDecoder, 10, 16, (28, 28)),
        ValueError,
        "ReconstructionDecoder: image_shape must be (channels, height, width), got (28, 28)",
    ),
    "decoder-poses": (
        call(ReconstructionDecoder(10, 16, (1, 5, 5)), torch.ones(2, 10, 8)),
        ValueError,
        "ReconstructionDecoder: poses must be (B, 10, 16), got (2, 10, 8)",
    ),
    "decoder-target": (
        call(ReconstructionDecoder(10, 16, (1, 5, 5)), torch.ones(2, 10, 16), torch.tensor([1])),
        ValueError,
        "ReconstructionDecoder: target has B=1, expected B=2",
    ),
    "decoder-target-rank": (
        call(ReconstructionDecoder(10, 16, (1, 5, 5)), torch.ones(2, 10, 16), LENGTHS),
        ValueError,
        "ReconstructionDecoder: target must have 1 axis (B), got 2 (target: (2, 10))",
    ),
    "decoder-hidden": (
        call(ReconstructionDecoder, 10, 16, (1, 5, 5), hidden=512),
        TypeError,
        "ReconstructionDecoder: hidden must be two ints, got 512",
    ),
    "primary-kind": (
        call(PrimaryCapsules(3), [1.0]),
        TypeError,
        "PrimaryCapsules: features must be a torch.Tensor, got list",
    ),
    # models
    "capsnet-size-kind": (
        call(CapsNet, image_size=28.0),
        TypeError,
        "CapsNet: image_size must be an int or (height, width), got 28.0",
    ),
    "deep-size-length": (
        call(DeepCapsNet, image_size=(28,)),
        TypeError,
        "DeepCapsNet: image_size must be an int or (height, width), got (28,)",
    ),
    "deep-channels": (
        call(DeepCapsNet, channels=4),
        TypeError,
        "DeepCapsNet: channels must be two ints, got 4",
    ),
    "model-kind": (
        call(CapsNet(channels=2, capsule_types=1), [1.0]),
        TypeError,
        "CapsNet: images must be a torch.Tensor, got list",
    ),
    "capsnet-image": (
        call(CapsNet, image_size=(28, 16)),
        ValueError,
        "CapsNet: image_size=(28, 16) leaves no primary capsule, both sides must be at least 17",
    ),
    "deep-image": (
        call(DeepCapsNet, image_size=16),
        ValueError,
        "DeepCapsNet: image_size=(16, 16) leaves no primary capsule",
    ),
    "model-images": (
        call(CapsNet(channels=2, capsule_types=1), torch.ones(2, 3, 28, 28)),
        ValueError,
        "CapsNet: images must be (B, 1, 28, 28), got (2, 3, 28, 28)",
    ),
    "capsnet-size": (
        call(CapsNet, in_channels=0),
        ValueError,
        "CapsNet: in_channels must be >= 1, got 0",
    ),
    "deep-size": (
        call(DeepCapsNet, secondary_iterations=2.0),
        TypeError,
        "DeepCapsNet: secondary_iterations must be an int, got float",
    ),
    "capsnet-gradient": (
        call(CapsNet, gradient=None),
        ValueError,
        'CapsNet: gradient must be "full" or "last", got None',
    ),
    "deep-reconstruction": (
        call(DeepCapsNet, reconstruction="no"),
        TypeError,
        "DeepCapsNet: reconstruction must be a bool, got str",
    ),
    "model-name-kind": (
        call(create_model, []),
        TypeError,
        "create_model: name must be a str, got list",
    ),
    "model-name": (
        call(create_model, "deepcapsnet"),
        ValueError,
        "create_model: no model is named 'deepcapsnet', there are capsnet, deep_capsnet; "
        "did you mean 'deep_capsnet'?",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_error_names_function_argument_and_numbers(case):
    function, kind, words = CASES[case]
    with pytest.raises(kind, match=re.escape(words)):
        function()


def test_messages_do_not_print_torch_size():
    for function, kind, _ in CASES.values():
        with pytest.raises(kind) as error:
            function()
        assert "torch.Size" not in str(error.value)
        assert "\n" not in str(error.value)
