"""Arbitrary arguments give a documented result or a documented error.

hypothesis draws cases from consecutive seeds for --fuzz-seconds, so the same cases come first on
every run. Their number is printed at the end. A case that crashes the process is left in the file
`case` of the test's temporary directory.

    pytest tests/reliability/test_fuzz.py --fuzz-seconds 120 --fuzz-seed 1000
"""

from dataclasses import replace

import torch
from hypothesis import strategies as st

from tritoncaps import (
    CapsuleHead,
    CapsuleLoss,
    Capsules,
    MarginLoss,
    PrimaryCapsules,
    ReconstructionDecoder,
    RoutedCapsules,
    ops,
    reference,
)
from tritoncaps.layers import (
    AttentionCapsules,
    ClassMatrixCapsules,
    ConvMatrixCapsules,
    ConvRoutedCapsules,
    InvertedAttentionCapsules,
    PrimaryMatrixCapsules,
)
from tritoncaps.losses import SpreadLoss
from tritoncaps.models import (
    CapsNet,
    ConvCapsNet,
    DeepCapsNet,
    EfficientCapsNet,
    InvertedCapsNet,
    MatrixCapsNet,
    create_model,
)
from tritoncaps.testing import LAYOUTS, OPERATORS, Call, Operator, check_call, fuzzed_calls
from tritoncaps.testing._fuzz import Array, spoilt

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCALES = (1.0, 0.0, 1e-20, 1e30, float("inf"), float("nan"))

# arguments ----------------------------------------------------------------------------------------


@st.composite
def squash_calls(draw):
    """Squash along any axis of any shape. The table has only the last of three axes."""
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple))
    arguments = {
        "s": draw(arrays(shape)),
        "dim": draw(st.integers(-len(shape), len(shape) - 1)),
        "form": draw(st.sampled_from(("quadratic", "exponential"))),
    }
    return draw(spoilt(Call("squash", arguments)))


@st.composite
def margin_loss_calls(draw):
    """Margin loss with every argument. In the table, the target is fixed."""
    B, K = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    activations = draw(arrays((B, K)))
    multi_hot = draw(st.booleans())
    dtype = draw(st.sampled_from((torch.bool, torch.uint8, torch.int64)))
    target = Array((B, K), dtype) if multi_hot else Array((B,), torch.int64, largest=K - 1)
    arguments = {
        "activations": activations,
        "target": replace(target, device=activations.device),
        "m_pos": draw(st.floats(0, 1)),
        "m_neg": draw(st.floats(0, 1)),
        "down_weight": draw(st.sampled_from((0, 0.5, 1))),
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
    }
    if draw(st.booleans()):
        weight = replace(draw(arrays((K,))), scale=0.0)  # a factor is not negative
        weight = replace(weight, device=activations.device, requires_grad=False)
        arguments["class_weight"] = weight
    return draw(spoilt(Call("margin_loss", arguments)))


@st.composite
def arrays(draw, shape):
    return Array(
        shape,
        dtype=draw(st.sampled_from(FLOATING)),
        device=draw(st.sampled_from(("cpu", "cpu", "cpu", "meta"))),
        layout=draw(st.sampled_from(LAYOUTS)),
        requires_grad=draw(st.booleans()),
        scale=draw(st.sampled_from(SCALES)),
    )


def loss_shapes(arguments):
    return [(len(arguments["activations"]),) if arguments["reduction"] == "none" else ()]


WHOLE_LOSS = Operator(
    ops.margin_loss, reference.margin_loss, {"activations": "B K", "target": "B"}, {"loss": "B"}
)


def check_operator(call):
    """Check a call of an operator with any of its arguments."""
    if call.name == "margin_loss" and "target" in call.arguments:
        check_call(WHOLE_LOSS, call, loss_shapes)
    else:
        check_call(OPERATORS[call.name], call)


def test_operators(fuzz):
    rows = [fuzzed_calls(operator) for operator in OPERATORS.values()]
    fuzz(st.one_of(*rows, squash_calls(), margin_loss_calls()), check_operator)


# The constructor and right arguments.
_ROUTED_BY_EM = {
    **{"iterations": 2, "pose": (2, 3), "scale": "mean", "temperature": 0.5},
    **{"min_variance": 1e-3, "identity": 0.5, "noise": 0.2, "beta_u": 0.1, "beta_a": -0.2},
    "gradient": "last",
}
MODULES = {
    "PrimaryCapsules": (
        PrimaryCapsules,
        {
            **{"in_channels": 2, "capsule_types": 3, "dim": 4, "kernel_size": 3, "stride": 2},
            **{"padding": 1, "spatial_dims": 2},
        },
    ),
    "RoutedCapsules": (
        RoutedCapsules,
        {
            **{"in_capsules": 3, "in_dim": 4, "out_capsules": 2, "out_dim": 5, "iterations": 2},
            **{"positions": 2, "pose_bias": True, "leaky": True},
            **{"gradient": "last", "learned_prior": True},
        },
    ),
    "ConvRoutedCapsules": (
        ConvRoutedCapsules,
        {
            **{"in_types": 2, "in_dim": 3, "out_types": 2, "out_dim": 4, "kernel_size": 2},
            **{"stride": 1, "padding": 1, "iterations": 2, "votes": "convolved"},
            **{"shared_kernel": True, "pose_bias": True, "leaky": True, "gradient": "last"},
            **{"learned_prior": True, "in_length": 0.5},
        },
    ),
    "AttentionCapsules": (
        AttentionCapsules,
        {"in_capsules": 3, "in_dim": 4, "out_capsules": 2, "out_dim": 5, "bias": True},
    ),
    "InvertedAttentionCapsules": (
        InvertedAttentionCapsules,
        {
            **{"in_capsules": 3, "in_dim": 4, "out_capsules": 2, "out_dim": 6, "iterations": 2},
            **{"rows": 2},
        },
    ),
    "CapsuleHead": (
        CapsuleHead,
        {
            **{"in_channels": 2, "num_classes": 3, "capsule_types": 2, "dim": 4, "class_dim": 5},
            **{"feature_size": 3, "shared_weights": True},
        },
    ),
    "ReconstructionDecoder": (
        ReconstructionDecoder,
        {"num_classes": 3, "dim": 2, "image_shape": (1, 4, 5), "hidden": (3, 4)},
    ),
    "MarginLoss": (
        MarginLoss,
        {"m_pos": 0.9, "m_neg": 0.1, "down_weight": 0.5, "reduction": "sum"},
    ),
    "CapsuleLoss": (
        CapsuleLoss,
        {
            **{"reconstruction_weight": 0.1, "m_pos": 0.9, "m_neg": 0.1, "down_weight": 0.5},
            **{"reduction": "none", "class_weight": None},
        },
    ),
    "CapsNet": (
        CapsNet,
        {
            **{"num_classes": 2, "in_channels": 1, "image_size": 18, "iterations": 1},
            **{"channels": 2, "capsule_types": 1, "class_dim": 3, "gradient": "full"},
            **{"stride": 1, "padding": 0, "shared_weights": True, "learned_prior": True},
            **{"pose_bias": True, "leaky": True, "reconstruction": False},
        },
    ),
    "DeepCapsNet": (
        DeepCapsNet,
        {
            **{"num_classes": 2, "in_channels": 1, "image_size": (17, 19), "channels": (2, 3)},
            **{"hidden_capsules": 2, "hidden_dim": 3, "primary_iterations": 1},
            **{"secondary_iterations": 2, "capsule_types": 1, "class_dim": 3},
            **{"stride": 1, "padding": 0, "shared_weights": True, "learned_prior": True},
            **{"pose_bias": True, "leaky": True, "gradient": "full", "reconstruction": False},
        },
    ),
    "ConvCapsNet": (
        ConvCapsNet,
        {
            **{"num_classes": 2, "in_channels": 1, "image_size": (13, 15), "channels": (2, 3)},
            **{"iterations": 1, "stride": 1, "capsule_types": 2, "class_dim": 3},
            **{"votes": "patch", "learned_prior": True, "pose_bias": True, "leaky": True},
            **{"gradient": "last", "reconstruction": False},
        },
    ),
    "EfficientCapsNet": (
        EfficientCapsNet,
        {
            **{"num_classes": 2, "in_channels": 1, "image_size": (17, 19), "stride": 2},
            **{"primary_capsules": 2, "class_dim": 3, "decoder_hidden": (3, 4)},
            **{"reconstruction": False},
        },
    ),
    "InvertedCapsNet": (
        InvertedCapsNet,
        {
            **{"num_classes": 2, "in_channels": 1, "image_size": (13, 15), "iterations": 2},
            **{"routing": "sequential", "channels": (2, 3), "blocks": (1, 2)},
            **{"capsule_types": 2},
        },
    ),
    "SpreadLoss": (SpreadLoss, {"margin": 0.5, "reduction": "sum"}),
    "PrimaryMatrixCapsules": (
        PrimaryMatrixCapsules,
        {
            **{"in_channels": 2, "capsule_types": 3, "pose": (2, 3)},
            **{"kernel_size": 1, "stride": 1, "padding": 0},
        },
    ),
    "ConvMatrixCapsules": (
        ConvMatrixCapsules,
        {
            **{"in_types": 2, "out_types": 3, "kernel_size": 2, "stride": 1, "padding": 0},
            **{"competition": "position", **_ROUTED_BY_EM},
        },
    ),
    "ClassMatrixCapsules": (
        ClassMatrixCapsules,
        {"in_types": 2, "num_classes": 3, "coordinates": True, **_ROUTED_BY_EM},
    ),
    "MatrixCapsNet": (
        MatrixCapsNet,
        {
            **{"num_classes": 2, "in_channels": 1, "image_size": (17, 18), "size": "big"},
            **{"channels": (2, 1, 2, 1), "competition": "children", "class_options": {}},
            **{name: value for name, value in _ROUTED_BY_EM.items() if name != "pose"},
        },
    ),
    "create_model": (create_model, {"name": "efficient_capsnet", "pretrained": False}),
}


def outcome(function, call, arguments):
    """Return what the call returns, or None after a documented error. Pass on other errors."""
    try:
        return function(**arguments)
    except (TypeError, ValueError) as error:
        if call.meant or not str(error).startswith(f"{call.name}: "):
            raise
        return None


@st.composite
def module_calls(draw):
    """Calls of the constructors."""
    name = draw(st.sampled_from(sorted(MODULES)))
    return draw(spoilt(Call(name, MODULES[name][1])))


def check_module(call):
    """Assert that a module keeps its arguments and runs on the inputs that it was built for."""
    arguments = call.build()
    if call.name == "create_model":
        assert isinstance(outcome(create_model, call, arguments), EfficientCapsNet | None)
        return
    module = outcome(MODULES[call.name][0], call, arguments)
    if module is None:
        return
    for name, value in arguments.items():
        if name not in ("bias", "pose_bias", "beta_u", "beta_a", "reconstruction"):
            kept = getattr(module, name, value)
            assert kept is value or kept == value or value != value
    a = arguments
    if call.name == "PrimaryCapsules":
        size = module.conv.kernel_size
        capsules = module(torch.ones(2, a["in_channels"], *size))
        assert capsules.shape == (2, module.num_capsules(*size), a["dim"])
    elif call.name in ("RoutedCapsules", "AttentionCapsules", "InvertedAttentionCapsules"):
        v = module(torch.ones(2, a["in_capsules"], a["in_dim"]))
        assert v.shape == (2, a["out_capsules"], a["out_dim"])
    elif call.name == "ConvRoutedCapsules":
        v = module(torch.ones(2, a["kernel_size"], a["kernel_size"], a["in_types"], a["in_dim"]))
        assert v.shape[-2:] == (a["out_types"], a["out_dim"])
    elif call.name == "CapsuleHead":
        poses, _ = module(torch.ones(2, a["in_channels"], 3, 3))
        assert poses.shape == (2, a["num_classes"], a["class_dim"])
    elif call.name == "ReconstructionDecoder":
        images = module(torch.ones(2, a["num_classes"], a["dim"]))
        assert images.shape == (2, *a["image_shape"])
    elif call.name == "PrimaryMatrixCapsules":
        side = max(1, a["kernel_size"] - 2 * a["padding"])
        grid = module(torch.ones(2, a["in_channels"], side, side))
        assert grid.poses.shape == (*grid.activations.shape, *a["pose"])
    elif call.name in ("ConvMatrixCapsules", "ClassMatrixCapsules"):
        shape = 2, 4, 4, a["in_types"]
        routed = module(Capsules(torch.ones(*shape, *a["pose"]), torch.ones(shape)))
        assert routed.poses.shape == (*routed.activations.shape, *a["pose"])
    elif call.name.endswith("CapsNet"):
        output = module(torch.ones(2, *module.image_shape))
        assert output.poses.shape == (2, a["num_classes"], a.get("class_dim", 16))
        assert (output.reconstruction is not None) == a.get("reconstruction", False)
    else:
        images = torch.ones(2, 1, 3, 3)
        pictures = (images, images) if call.name == "CapsuleLoss" else ()
        weight = getattr(module, "class_weight", None)
        K = 3 if weight is None else len(weight)
        loss = module(torch.ones(2, K), torch.zeros(2, dtype=torch.int64), *pictures)
        assert loss.shape == ((2,) if a["reduction"] == "none" else ())


def test_modules(fuzz):
    fuzz(module_calls(), check_module)
