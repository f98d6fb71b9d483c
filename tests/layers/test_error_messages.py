"""The errors that a user can cause in operators, layers and models: their type and exact words.

A message that operators share has one row here. The error check in `tritoncaps.testing` shows that
each operator raises it for each argument.
"""

import re

import pytest
import torch

from tritoncaps import (
    CapsuleHead,
    CapsuleLoss,
    Capsules,
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
ROUTED = RoutedCapsules(6, 8, 10, 16)
LENGTHS, TARGET = torch.ones(2, 10), torch.tensor([3, 9])


def mixed_head():
    """A new head with the primary capsules of one that has more types."""
    head = CapsuleHead(8, 3, capsule_types=16, feature_size=4)
    head.primary = CapsuleHead(8, 5, feature_size=4).primary
    return head


CASES = {
    # wrong axes: both numbers, and all shapes
    "axes": (
        lambda: ops.fused_dynamic_routing(U, torch.ones(8, 8, 10, 16)),
        ValueError,
        "fused_dynamic_routing: weight has I=8 but u has I=6 "
        "(u: (2, 6, 8), weight: (8, 8, 10, 16))",
    ),
    "rank": (
        lambda: ops.fused_dynamic_routing(torch.ones(2, 6, 4, 2), WEIGHT),
        ValueError,
        "fused_dynamic_routing: u must have 3 axes (B, I, P), got 4 (u: (2, 6, 4, 2))",
    ),
    "empty-axis": (
        lambda: ops.fused_dynamic_routing(U[:, :0], WEIGHT[:0]),
        ValueError,
        "fused_dynamic_routing: u has I=0 but needs I >= 1 (u: (2, 0, 8))",
    ),
    # kinds, dtypes, devices
    "not-a-tensor": (
        lambda: ops.fused_dynamic_routing([1.0], WEIGHT),
        TypeError,
        "fused_dynamic_routing: u must be a torch.Tensor, got list",
    ),
    "integers": (
        lambda: ops.fused_dynamic_routing(U.long(), WEIGHT),
        TypeError,
        "fused_dynamic_routing: u must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "dtypes": (
        lambda: ops.fused_dynamic_routing(U.double(), WEIGHT),
        TypeError,
        "fused_dynamic_routing: weight is torch.float32 but u is torch.float64",
    ),
    "dtypes-half": (
        lambda: ops.fused_dynamic_routing(U.bfloat16(), WEIGHT),
        TypeError,
        "or run under torch.autocast",
    ),
    "sparse": (
        lambda: ops.fused_dynamic_routing(U.to_sparse(), WEIGHT),
        TypeError,
        "fused_dynamic_routing: u must be dense (torch.strided), got torch.sparse_coo",
    ),
    "devices": (
        lambda: ops.fused_dynamic_routing(U, WEIGHT.to("meta")),
        ValueError,
        "fused_dynamic_routing: weight is on meta but u is on cpu",
    ),
    "axes-pose": (
        lambda: ops.routing_pass(U, WEIGHT, torch.ones(3, 10, 16)),
        ValueError,
        "routing_pass: pose has B=3 but u has B=2 "
        "(u: (2, 6, 8), weight: (6, 8, 10, 16), pose: (3, 10, 16))",
    ),
    # options
    "iterations-0": (
        lambda: ops.fused_dynamic_routing(U, WEIGHT, 0),
        ValueError,
        "fused_dynamic_routing: iterations must be >= 1, got 0",
    ),
    "iterations-float": (
        lambda: ops.dynamic_routing(U_HAT, 3.0),
        TypeError,
        "dynamic_routing: iterations must be an int, got float",
    ),
    # The loop would run for years, and no memory could hold its sums.
    "iterations-huge": (
        lambda: ops.fused_dynamic_routing(U, WEIGHT, 2**31),
        ValueError,
        "fused_dynamic_routing: iterations must be <= 2147483647, got 2147483648",
    ),
    "gradient-tensor": (
        lambda: ops.fused_dynamic_routing(U, WEIGHT, gradient=torch.ones(2)),
        ValueError,
        'fused_dynamic_routing: gradient must be "full" or "last", got a Tensor',
    ),
    "return-coupling": (
        lambda: ops.dynamic_routing(U_HAT, return_coupling=1),
        TypeError,
        "dynamic_routing: return_coupling must be a bool, got int",
    ),
    "gradient": (
        lambda: ops.fused_dynamic_routing(U, WEIGHT, gradient="none"),
        ValueError,
        'fused_dynamic_routing: gradient must be "full" or "last", got \'none\'',
    ),
    # squash
    "squash-dim": (
        lambda: ops.squash(U, dim=3),
        ValueError,
        "squash: dim=3 is out of range for a tensor with 3 axes",
    ),
    "squash-integers": (
        lambda: ops.squash(torch.ones(3, dtype=torch.int32)),
        TypeError,
        "squash: s must be float16, bfloat16, float32 or float64, got torch.int32",
    ),
    "squash-dim-kind": (
        lambda: ops.squash(U, dim=1.0),
        TypeError,
        "squash: dim must be an int, got float",
    ),
    "squash-form": (
        lambda: ops.squash(U, form="cubic"),
        ValueError,
        'squash: form must be "quadratic" or "exponential", got \'cubic\'',
    ),
    # margin loss
    "loss-no-class": (
        lambda: ops.margin_loss(torch.ones(2, 0), TARGET),
        ValueError,
        "margin_loss: activations has K=0 but needs K >= 1",
    ),
    "loss-reduction-module": (
        lambda: MarginLoss(reduction="max"),
        ValueError,
        "MarginLoss: reduction must be",
    ),
    "loss-rank": (
        lambda: ops.margin_loss(torch.ones(10), TARGET),
        ValueError,
        "margin_loss: activations must have 2 axes (B, K), got 1",
    ),
    "loss-target-kind": (
        lambda: ops.margin_loss(LENGTHS, [3, 9]),
        TypeError,
        "margin_loss: target must be a torch.Tensor, got list; use torch.as_tensor(target)",
    ),
    "loss-target-number": (
        lambda: ops.margin_loss(LENGTHS[:1], 3),
        TypeError,
        "margin_loss: target must be a torch.Tensor, got int; use torch.as_tensor(target)",
    ),
    "loss-target-array": (
        lambda: ops.margin_loss(LENGTHS, TARGET.numpy()),
        TypeError,
        "margin_loss: target must be a torch.Tensor, got ndarray; use torch.as_tensor(target)",
    ),
    "loss-target-none": (
        lambda: ops.margin_loss(LENGTHS, None),
        TypeError,
        "margin_loss: target must be a torch.Tensor, got NoneType",
    ),
    "loss-target-single": (
        lambda: ops.margin_loss(LENGTHS[:1], torch.tensor(3)),
        ValueError,
        "margin_loss: target must have 1 axis (B) or 2 (B, K), got 0 (target: ()); "
        "for a single image use target.unsqueeze(0)",
    ),
    "loss-target-rank": (
        lambda: ops.margin_loss(LENGTHS, torch.zeros(2, 10, 1)),
        ValueError,
        "margin_loss: target must have 1 axis (B) or 2 (B, K), got 3 (target: (2, 10, 1)); "
        "use target.squeeze(-1)",
    ),
    "loss-target-batch": (
        lambda: ops.margin_loss(LENGTHS, torch.tensor([1, 2, 3])),
        ValueError,
        "margin_loss: target has B=3 but activations has B=2 (target: (3,), activations: (2, 10)); "
        "give one class index for each image",
    ),
    "loss-activations-transposed": (
        lambda: ops.margin_loss(LENGTHS.T, TARGET),
        ValueError,
        "margin_loss: target has B=2 but activations has B=10 (target: (2,), activations: (10, 2))"
        "; if activations is (K, B), use activations.transpose(0, 1)",
    ),
    "loss-target-one-image": (
        lambda: ops.margin_loss(LENGTHS[:1], torch.zeros(10)),
        ValueError,
        "margin_loss: target has B=10 but activations has B=1 (target: (10,), activations: (1, 10))"
        "; for the multi-hot target of one image, use target.unsqueeze(0)",
    ),
    "loss-target-dtype": (
        lambda: ops.margin_loss(LENGTHS, torch.tensor([1.0, 2.0])),
        TypeError,
        "margin_loss: target with class indices must be torch.int64, got torch.float32; "
        "use target.long()",
    ),
    "loss-target-int32": (
        lambda: ops.margin_loss(LENGTHS, TARGET.int()),
        TypeError,
        "margin_loss: target with class indices must be torch.int64, got torch.int32; "
        "use target.long()",
    ),
    "loss-target-uint8": (
        lambda: ops.margin_loss(LENGTHS, TARGET.byte()),
        TypeError,
        "got torch.uint8; use target.long()",
    ),
    "loss-one-class-bool": (
        lambda: ops.margin_loss(LENGTHS[:, :1], TARGET > 5),
        TypeError,
        "margin_loss: target with class indices must be torch.int64, got torch.bool; "
        "for a single class, use the multi-hot target.unsqueeze(1)",
    ),
    "loss-one-class-index": (
        lambda: ops.margin_loss(LENGTHS[:, :1], torch.tensor([0, 1])),
        ValueError,
        "margin_loss: target holds class indices from 0 to 1, they must lie in 0 .. 0; "
        "for a single class, use the multi-hot target.unsqueeze(1)",
    ),
    "loss-target-range": (
        lambda: ops.margin_loss(LENGTHS, torch.tensor([0, 10])),
        ValueError,
        "margin_loss: target holds class indices from 0 to 10, they must lie in 0 .. 9; "
        "count classes from 0, or build the model for 11",
    ),
    "loss-target-negative": (
        lambda: ops.margin_loss(LENGTHS, torch.tensor([-1, 9])),
        ValueError,
        "margin_loss: target holds class indices from -1 to 9, they must lie in 0 .. 9; "
        "for an image of no class, use a multi-hot target with a row of zeros",
    ),
    "loss-target-device": (
        lambda: ops.margin_loss(LENGTHS, TARGET.to("meta")),
        ValueError,
        'margin_loss: target is on meta but activations is on cpu; use target.to("cpu")',
    ),
    "loss-multi-hot-shape": (
        lambda: ops.margin_loss(LENGTHS, torch.zeros(2, 9)),
        ValueError,
        "margin_loss: multi-hot target is (2, 9) but activations is (2, 10); "
        "use F.one_hot(labels, 10) to make it, or F.one_hot(labels, 10).amax(dim=1) "
        "if an image has several labels",
    ),
    "loss-multi-hot-batch": (
        lambda: ops.margin_loss(LENGTHS, torch.zeros(3, 10)),
        ValueError,
        "margin_loss: multi-hot target is (3, 10) but activations is (2, 10); it must be (2, 10)",
    ),
    "loss-column": (
        lambda: ops.margin_loss(LENGTHS, TARGET[:, None]),
        ValueError,
        "margin_loss: multi-hot target is (2, 1) but activations is (2, 10); "
        "for class indices use target.squeeze(1)",
    ),
    "loss-column-float": (
        lambda: ops.margin_loss(LENGTHS, TARGET[:, None].float()),
        ValueError,
        "for class indices use target.squeeze(1).long()",
    ),
    "loss-row": (
        lambda: ops.margin_loss(LENGTHS, TARGET[None]),
        ValueError,
        "margin_loss: multi-hot target is (1, 2) but activations is (2, 10); "
        "for class indices use target.squeeze(0)",
    ),
    "loss-multi-hot-transposed": (
        lambda: ops.margin_loss(LENGTHS.T, torch.zeros(2, 10)),
        ValueError,
        "margin_loss: multi-hot target is (2, 10) but activations is (10, 2); "
        "both must start with B: transpose one of them",
    ),
    "loss-multi-hot-range": (
        lambda: ops.margin_loss(LENGTHS, torch.full((2, 10), 2)),
        ValueError,
        "margin_loss: target holds multi-hot values from 2 to 2, they must lie in 0 .. 1; "
        "use target.clamp(0, 1)",
    ),
    "loss-batch-of-pictures": (
        lambda: CapsuleLoss()(LENGTHS, TARGET, torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)),
        ValueError,
        "CapsuleLoss: reconstruction has B=1 but activations has B=2; "
        "give one picture for each image",
    ),
    "decoder-activations": (
        lambda: ReconstructionDecoder(3, 4, (1, 5, 5))(
            Capsules(torch.ones(2, 3, 4), torch.ones(2, 5))
        ),
        ValueError,
        "ReconstructionDecoder: activations must be (2, 3), one for each pose, got (2, 5)",
    ),
    "head-other-types": (
        lambda: mixed_head()(torch.ones(1, 8, 4, 4)),
        ValueError,
        "CapsuleHead: primary has capsule_types=32 but routing has in_capsules=16; build the new "
        "head with the capsule_types of the primary capsules that it keeps",
    ),
    "number-nan": (
        lambda: MarginLoss(m_pos=float("nan")),
        ValueError,
        "MarginLoss: m_pos must be a number, got nan",
    ),
    "target-nan": (
        lambda: ops.margin_loss(LENGTHS, torch.full((2, 10), float("nan"))),
        ValueError,
        "margin_loss: target holds multi-hot values from nan to nan, they must lie in 0 .. 1",
    ),
    "loss-multi-hot-device": (
        lambda: ops.margin_loss(LENGTHS, LENGTHS.to("meta")),
        ValueError,
        'margin_loss: target is on meta but activations is on cpu; use target.to("cpu")',
    ),
    "loss-multi-hot-dtype": (
        lambda: ops.margin_loss(LENGTHS, torch.zeros(2, 10, dtype=torch.complex64)),
        TypeError,
        "margin_loss: multi-hot target must be bool, an integer or a floating-point type, "
        "got torch.complex64; use target.float()",
    ),
    "loss-multi-hot-sparse": (
        lambda: ops.margin_loss(LENGTHS, torch.zeros(2, 10).to_sparse()),
        TypeError,
        "margin_loss: target must be dense (torch.strided), got torch.sparse_coo; "
        "use target.to_dense()",
    ),
    "loss-target-sparse": (
        lambda: ops.margin_loss(LENGTHS, TARGET.to_sparse()),
        TypeError,
        "margin_loss: target must be dense (torch.strided), got torch.sparse_coo",
    ),
    "loss-class-weight-kind": (
        lambda: MarginLoss(class_weight=[1.0, 2.0]),
        TypeError,
        "MarginLoss: class_weight must be a torch.Tensor or None, got list; "
        "use torch.tensor([...])",
    ),
    "loss-class-weight-rank": (
        lambda: CapsuleLoss(class_weight=torch.ones(1, 10)),
        ValueError,
        "CapsuleLoss: class_weight must have 1 axis (K), got 2 (class_weight: (1, 10))",
    ),
    "loss-class-weight-size": (
        lambda: ops.margin_loss(LENGTHS, TARGET, class_weight=torch.ones(9)),
        ValueError,
        "margin_loss: class_weight has K=9 but activations has K=10 "
        "(activations: (2, 10), class_weight: (9,))",
    ),
    "loss-class-weight-device": (
        lambda: ops.margin_loss(LENGTHS, TARGET, class_weight=torch.ones(10, device="meta")),
        ValueError,
        "margin_loss: class_weight is on meta but activations is on cpu; "
        'move it, or the loss module, with .to("cpu")',
    ),
    "loss-m_pos": (
        lambda: ops.margin_loss(LENGTHS, TARGET, m_pos="0.9"),
        TypeError,
        "margin_loss: m_pos must be a number, got str",
    ),
    "loss-m_neg": (
        lambda: ops.margin_loss(LENGTHS, TARGET, m_neg=None),
        TypeError,
        "margin_loss: m_neg must be a number, got NoneType",
    ),
    "loss-down_weight": (
        lambda: ops.margin_loss(LENGTHS, TARGET, down_weight=-(2**63)),
        ValueError,
        "margin_loss: down_weight must be within ±2**63, got -9223372036854775808",
    ),
    "loss-m_neg-negative": (
        lambda: ops.margin_loss(LENGTHS, TARGET, m_neg=-0.1),
        ValueError,
        "margin_loss: m_neg must be >= 0 and finite, got -0.1",
    ),
    "loss-class-weight-negative": (
        lambda: MarginLoss(class_weight=torch.tensor([1.0, -2.0])),
        ValueError,
        "MarginLoss: class_weight holds factors from -2.0 to 1.0, they must be >= 0 and finite",
    ),
    "loss-reconstruction-weight-negative": (
        lambda: CapsuleLoss(-0.5),
        ValueError,
        "CapsuleLoss: reconstruction_weight must be >= 0 and finite, got -0.5",
    ),
    "loss-number-module": (
        lambda: MarginLoss(down_weight=True),
        TypeError,
        "MarginLoss: down_weight must be a number, got bool",
    ),
    "loss-reconstruction-weight": (
        lambda: CapsuleLoss([0.5]),
        TypeError,
        "CapsuleLoss: reconstruction_weight must be a number, got list",
    ),
    "loss-reduction": (
        lambda: ops.margin_loss(LENGTHS, TARGET, reduction="max"),
        ValueError,
        'margin_loss: reduction must be "mean" or "sum" or "none", got \'max\'',
    ),
    "reconstruction-shapes": (
        lambda: CapsuleLoss()(LENGTHS, TARGET, torch.ones(2, 1, 5, 5), torch.ones(2, 1, 6, 5)),
        ValueError,
        "reconstruction_error: reconstruction is (2, 1, 5, 5) but images is (2, 1, 6, 5)",
    ),
    "reconstruction-bytes": (
        lambda: CapsuleLoss()(
            LENGTHS, TARGET, torch.ones(2, 1, 5, 5), torch.ones(2, 1, 5, 5).byte()
        ),
        TypeError,
        "reconstruction_error: images must be float16, bfloat16, float32 or float64, "
        "got torch.uint8",
    ),
    "reconstruction-error": (
        lambda: reconstruction_error(torch.ones(2, 1, 5, 5), torch.ones(1, 1, 5, 5)),
        ValueError,
        "reconstruction is (2, 1, 5, 5) but images is (1, 1, 5, 5)",
    ),
    # layers
    "primary-size": (
        lambda: PrimaryCapsules(4, dim=0),
        ValueError,
        "PrimaryCapsules: dim must be >= 1, got 0",
    ),
    "primary-features": (
        lambda: PrimaryCapsules(4, kernel_size=3)(torch.ones(2, 5, 9, 9)),
        ValueError,
        "PrimaryCapsules: features must be (B, 4, H, W), got (2, 5, 9, 9)",
    ),
    "primary-dtype": (
        lambda: PrimaryCapsules(4, kernel_size=3)(torch.ones(2, 4, 9, 9, dtype=torch.float64)),
        TypeError,
        "PrimaryCapsules: features is torch.float64 but the weights are torch.float32; "
        "use features.to(torch.float32)",
    ),
    "primary-too-small": (
        lambda: PrimaryCapsules(4, kernel_size=9)(torch.ones(2, 4, 8, 20)),
        ValueError,
        "PrimaryCapsules: features of 8x20 with padding=0 are smaller than the kernel, 9x9",
    ),
    "primary-dims": (
        lambda: PrimaryCapsules(4, spatial_dims=4),
        ValueError,
        "PrimaryCapsules: spatial_dims must be 1, 2 or 3, got 4",
    ),
    "primary-features-1d": (
        lambda: PrimaryCapsules(4, kernel_size=3, spatial_dims=1)(torch.ones(2, 4, 9, 9)),
        ValueError,
        "PrimaryCapsules: features must be (B, 4, L), got (2, 4, 9, 9)",
    ),
    "primary-kernel": (
        lambda: PrimaryCapsules(4, kernel_size=(3, 3), spatial_dims=3),
        ValueError,
        "PrimaryCapsules: kernel_size must be an int or 3 ints, got (3, 3)",
    ),
    "primary-stride": (
        lambda: PrimaryCapsules(4, stride=(1, 0)),
        ValueError,
        "PrimaryCapsules: stride must be >= 1, got 0",
    ),
    "primary-padding": (
        lambda: PrimaryCapsules(4, padding=-1),
        ValueError,
        "PrimaryCapsules: padding must be >= 0, got -1",
    ),
    "primary-padding-word": (
        lambda: PrimaryCapsules(4, padding="full"),
        ValueError,
        'PrimaryCapsules: padding must be "same" or "valid", got \'full\'',
    ),
    "primary-padding-same": (
        lambda: PrimaryCapsules(4, padding="same"),
        ValueError,
        'PrimaryCapsules: padding="same" needs stride=1, got 2; '
        "with a stride, give the padding as a number",
    ),
    "primary-count": (
        lambda: PrimaryCapsules(4).num_capsules(20),
        ValueError,
        "PrimaryCapsules: num_capsules needs H, W, got (20,)",
    ),
    "routed-size": (
        lambda: RoutedCapsules(6, 8, 10.0, 16),
        TypeError,
        "RoutedCapsules: out_capsules must be an int, got float",
    ),
    "routed-gradient": (
        lambda: RoutedCapsules(6, 8, 10, 16, gradient="first"),
        ValueError,
        'RoutedCapsules: gradient must be "full" or "last", got \'first\'',
    ),
    "routed-learned-prior": (
        lambda: RoutedCapsules(6, 8, 10, 16, learned_prior=None),
        TypeError,
        "RoutedCapsules: learned_prior must be a bool, got NoneType",
    ),
    "routed-positions": (
        lambda: RoutedCapsules(6, 8, 10, 16, positions=0),
        ValueError,
        "RoutedCapsules: positions must be >= 1, got 0",
    ),
    "routed-part-of-a-position": (
        lambda: RoutedCapsules(4, 8, 10, 16, positions=2)(U),
        ValueError,
        "RoutedCapsules: u has I=6 but needs a multiple of in_capsules=4, the capsules at each "
        "position (u: (2, 6, 8))",
    ),
    "routed-no-position": (
        lambda: RoutedCapsules(3, 8, 10, 16, positions=2)(U[:, :0]),
        ValueError,
        "RoutedCapsules: u has I=0 but needs a multiple of in_capsules=3",
    ),
    "routed-shared-rank": (
        lambda: RoutedCapsules(3, 8, 10, 16, positions=2)(U[0]),
        ValueError,
        "RoutedCapsules: u must have 3 axes (B, I, P), got 2 (u: (6, 8))",
    ),
    "routed-leaky": (
        lambda: RoutedCapsules(6, 8, 10, 16, leaky=1),
        TypeError,
        "RoutedCapsules: leaky must be a bool, got int",
    ),
    "routed-mask-dtype": (
        lambda: ROUTED(U, torch.ones(2, 6)),
        TypeError,
        "RoutedCapsules: mask must be a bool tensor, False where a capsule is padding, "
        "got torch.float32",
    ),
    "routed-mask-kind": (
        lambda: ROUTED(U, [True] * 6),
        TypeError,
        "RoutedCapsules: mask must be a bool tensor, False where a capsule is padding, got list",
    ),
    "routed-mask-shape": (
        lambda: ROUTED(U, torch.ones(6, dtype=torch.bool)),
        ValueError,
        "RoutedCapsules: mask must be (B, I) = (2, 6), got (6,)",
    ),
    "routed-mask-device": (
        lambda: ROUTED(U, torch.ones(2, 6, dtype=torch.bool, device="meta")),
        ValueError,
        "RoutedCapsules: mask is on meta but u is on cpu",
    ),
    "decoder-image-kind": (
        lambda: ReconstructionDecoder(10, 16, 28),
        TypeError,
        "ReconstructionDecoder: image_shape must be (channels, height, width), "
        "or the like of other dimensions, got 28",
    ),
    "decoder-image": (
        lambda: ReconstructionDecoder(10, 16, (28,)),
        ValueError,
        "ReconstructionDecoder: image_shape must be (channels, height, width), "
        "or the like of other dimensions, got (28,)",
    ),
    "decoder-poses": (
        lambda: ReconstructionDecoder(10, 16, (1, 5, 5))(torch.ones(2, 10, 8)),
        ValueError,
        "ReconstructionDecoder: poses must be (B, 10, 16), got (2, 10, 8)",
    ),
    "decoder-dtype": (
        lambda: ReconstructionDecoder(10, 16, (1, 5, 5))(torch.ones(2, 10, 16).half()),
        TypeError,
        "ReconstructionDecoder: poses is torch.float16 but the weights are torch.float32; "
        "use poses.to(torch.float32)",
    ),
    "decoder-target": (
        lambda: ReconstructionDecoder(10, 16, (1, 5, 5))(torch.ones(2, 10, 16), torch.tensor([1])),
        ValueError,
        "ReconstructionDecoder: target has B=1 but poses has B=2 "
        "(target: (1,), poses: (2, 10, 16)); give one class index for each image",
    ),
    "decoder-target-column": (
        lambda: CapsNet(channels=2, capsule_types=1)(torch.ones(2, 1, 28, 28), TARGET[:, None]),
        ValueError,
        "ReconstructionDecoder: multi-hot target is (2, 1) but poses is (2, 10, 16); "
        "for class indices use target.squeeze(1)",
    ),
    "decoder-hidden": (
        lambda: ReconstructionDecoder(10, 16, (1, 5, 5), hidden=512),
        TypeError,
        "ReconstructionDecoder: hidden must be two ints, got 512",
    ),
    "primary-kind": (
        lambda: PrimaryCapsules(3)([1.0]),
        TypeError,
        "PrimaryCapsules: features must be a torch.Tensor, got list",
    ),
    "head-classes": (
        lambda: CapsuleHead(4, 0),
        ValueError,
        "CapsuleHead: num_classes must be >= 1, got 0",
    ),
    "head-size-kind": (
        lambda: CapsuleHead(4, 10, feature_size=(7, 7, 7)),
        TypeError,
        "CapsuleHead: feature_size must be an int or (height, width), got (7, 7, 7)",
    ),
    "head-size": (
        lambda: CapsuleHead(4, 10, kernel_size=9),
        ValueError,
        "CapsuleHead: feature_size=7 leaves no primary capsule, kernel_size=9 is larger",
    ),
    "head-shared": (
        lambda: CapsuleHead(4, 10, shared_weights=7),
        TypeError,
        "CapsuleHead: shared_weights must be a bool, got int",
    ),
    # models
    "capsnet-size-kind": (
        lambda: CapsNet(image_size=28.0),
        TypeError,
        "CapsNet: image_size must be an int or (height, width), got 28.0",
    ),
    "deep-size-length": (
        lambda: DeepCapsNet(image_size=(28,)),
        TypeError,
        "DeepCapsNet: image_size must be an int or (height, width), got (28,)",
    ),
    "deep-channels": (
        lambda: DeepCapsNet(channels=4),
        TypeError,
        "DeepCapsNet: channels must be two ints, got 4",
    ),
    "model-kind": (
        lambda: CapsNet(channels=2, capsule_types=1)([1.0]),
        TypeError,
        "CapsNet: images must be a torch.Tensor, got list",
    ),
    "capsnet-image": (
        lambda: CapsNet(image_size=(28, 16)),
        ValueError,
        "CapsNet: image_size=(28, 16) is too small for the convolutions, "
        "both sides must be at least 17; enlarge or pad the images",
    ),
    "deep-image": (
        lambda: DeepCapsNet(image_size=16),
        ValueError,
        "DeepCapsNet: image_size=(16, 16) is too small for the convolutions, "
        "both sides must be at least 17; enlarge or pad the images",
    ),
    "model-images": (
        lambda: CapsNet(channels=2, capsule_types=1)(torch.ones(2, 3, 28, 28)),
        ValueError,
        "CapsNet: images must be (B, 1, 28, 28), got (2, 3, 28, 28)",
    ),
    "model-dtype": (
        lambda: CapsNet(channels=2, capsule_types=1)(torch.ones(2, 1, 28, 28, dtype=torch.float64)),
        TypeError,
        "CapsNet: images is torch.float64 but the weights are torch.float32",
    ),
    "capsnet-size": (
        lambda: CapsNet(in_channels=0),
        ValueError,
        "CapsNet: in_channels must be >= 1, got 0",
    ),
    "deep-size": (
        lambda: DeepCapsNet(secondary_iterations=2.0),
        TypeError,
        "DeepCapsNet: secondary_iterations must be an int, got float",
    ),
    "capsnet-gradient": (
        lambda: CapsNet(gradient=None),
        ValueError,
        'CapsNet: gradient must be "full" or "last", got None',
    ),
    "capsnet-pose-bias": (
        lambda: CapsNet(pose_bias="yes"),
        TypeError,
        "CapsNet: pose_bias must be a bool, got str",
    ),
    "capsnet-stride": (
        lambda: CapsNet(stride=0),
        ValueError,
        "CapsNet: stride must be >= 1, got 0",
    ),
    "deep-reconstruction": (
        lambda: DeepCapsNet(reconstruction="no"),
        TypeError,
        "DeepCapsNet: reconstruction must be a bool, got str",
    ),
    "model-name-kind": (
        lambda: create_model([]),
        TypeError,
        "create_model: name must be a str, got list",
    ),
    "model-name": (
        lambda: create_model("deepcapsnet"),
        ValueError,
        "create_model: no model is named 'deepcapsnet', there are capsnet, conv_capsnet, "
        "deep_capsnet, efficient_capsnet, inverted_capsnet, matrix_capsnet, scae; "
        "did you mean 'deep_capsnet'?",
    ),
}


@pytest.mark.parametrize(("call", "kind", "words"), CASES.values(), ids=CASES)
def test_message(call, kind, words):
    with pytest.raises(kind, match=re.escape(words)) as error:
        call()
    assert "torch.Size" not in str(error.value)
    assert "\n" not in str(error.value)
