"""Models: the papers' parameters and layers, names, any images, one bad image, autocast."""

import re
from functools import partial

import pytest
import torch

from tritoncaps import CapsuleLoss, ops
from tritoncaps.models import CapsNet, DeepCapsNet, create_model, list_models

every_model = pytest.mark.parametrize("name", list_models(classifiers=True))
# Networks with class capsules whose length is the activation, and a decoder.
with_decoder = pytest.mark.parametrize(
    "name", ["capsnet", "conv_capsnet", "deep_capsnet", "efficient_capsnet"]
)
# Networks with routing by agreement.
ROUTINGS = {"capsnet": ["routing"], "deep_capsnet": ["primary_routing", "secondary_routing"]}
dynamic = pytest.mark.parametrize("name", ROUTINGS)


@pytest.mark.parametrize(
    ("name", "parameters"), [("capsnet", 8_215_568), ("deep_capsnet", 7_869_200)]
)
def test_models_have_the_parameters_of_table_1(name, parameters):
    model = create_model(name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


def test_models_have_the_layers_of_table_1():
    capsnet, deep = CapsNet(), DeepCapsNet()
    assert capsnet.conv.weight.shape == (256, 1, 9, 9)
    assert capsnet.primary.conv.weight.shape == (256, 256, 9, 9)
    assert capsnet.routing.weight.shape == (1152, 8, 10, 16)
    assert deep.conv1.weight.shape == (512, 1, 9, 9)
    assert deep.conv2.weight.shape == (256, 512, 5, 5)
    assert deep.primary.conv.weight.shape == (256, 256, 5, 5)
    assert deep.primary_routing.weight.shape == (1152, 8, 10, 16)
    assert deep.secondary_routing.weight.shape == (10, 16, 10, 16)
    assert [capsnet.primary.conv.stride, deep.primary.conv.stride] == [(2, 2), (2, 2)]
    assert (capsnet.routing.iterations, deep.secondary_routing.iterations) == (3, 3)


def test_models_are_known_by_name():
    names = ["capsnet", "conv_capsnet", "deep_capsnet", "efficient_capsnet", "inverted_capsnet"]
    names.append("matrix_capsnet")
    assert list_models(classifiers=True) == names
    names.append("scae")
    assert list_models() == names
    model = create_model("deep_capsnet", hidden_capsules=12, hidden_dim=8, primary_iterations=1)
    assert isinstance(model, DeepCapsNet)
    assert model.primary_routing.weight.shape == (1152, 8, 12, 8)
    assert model.primary_routing.iterations == 1
    with pytest.raises(TypeError):
        create_model("capsnet", hidden_capsules=12)


IMAGES = {
    "MNIST": {"in_channels": 1, "image_size": 28, "num_classes": 10},
    "wide, in colour": {"in_channels": 3, "image_size": (32, 40), "num_classes": 4},
    "the smallest, one class": {"in_channels": 2, "image_size": 17, "num_classes": 1},
}


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@with_decoder
def test_models_take_any_images(device, small_model, name, images):
    model = small_model(name, class_dim=12, **images).to(device)
    K = images["num_classes"]
    batch = torch.rand(3, *model.image_shape, device=device)
    target = torch.zeros(3, dtype=torch.int64, device=device)
    activations, poses, reconstruction, _, _ = model(batch, target)
    assert activations.shape == (3, K)
    assert poses.shape == (3, K, 12)
    assert reconstruction.shape == batch.shape
    torch.testing.assert_close(activations, poses.norm(dim=-1))
    assert ((activations >= 0) & (activations < 1)).all()
    CapsuleLoss()(activations, target, reconstruction, batch).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
    assert model.eval()(batch[:0]).activations.shape == (0, K)


@with_decoder
def test_model_without_decoder(small_model, name):
    images, target = torch.rand(2, 1, 28, 28), torch.tensor([1, 2])
    output = small_model(name, reconstruction=False)(images)
    assert output.reconstruction is None
    loss = CapsuleLoss()(output.activations, target, output.reconstruction, images)
    torch.testing.assert_close(loss, ops.margin_loss(output.activations, target))


@dynamic
def test_a_call_returns_the_coupling_of_each_routing(small_model, name):
    model, images = small_model(name).eval(), torch.rand(2, 1, 28, 28)
    output = model(images, return_coupling=True)
    couplings = output.coupling if isinstance(output.coupling, tuple) else (output.coupling,)
    for coupling, routing in zip(couplings, ROUTINGS[name], strict=True):
        layer = model.get_submodule(routing)
        assert coupling.shape == (2, layer.in_capsules, layer.out_capsules)
        torch.testing.assert_close(coupling.sum(2), torch.ones(coupling.shape[:2]))
    assert torch.equal(output.poses, model(images).poses)
    assert model(images).coupling is None


@dynamic
def test_a_call_sets_the_iterations(small_model, name):
    iterations = (
        {"iterations": 1}
        if name == "capsnet"
        else {"primary_iterations": 1, "secondary_iterations": 1}
    )
    images = torch.rand(2, 1, 28, 28)
    expected = small_model(name, **iterations)(images)
    assert torch.equal(small_model(name)(images, iterations=1).poses, expected.poses)


@dynamic
def test_options_reach_the_routings(small_model, name):
    options = {"learned_prior": True, "pose_bias": True, "leaky": True}
    model = small_model(name, **options)
    for routing in ROUTINGS[name]:
        layer = model.get_submodule(routing)
        assert layer.prior.shape == layer.weight.shape[::2]
        assert layer.pose_bias.shape == layer.weight.shape[2:]
        assert layer.leaky
    model(torch.rand(2, 1, 28, 28)).activations.sum().backward()
    assert model.get_submodule(ROUTINGS[name][0]).prior.grad.any()


@pytest.mark.parametrize(
    ("name", "weights"), [("capsnet", 32 * 8 * 160), ("deep_capsnet", 32 * 8 * 160)]
)
def test_weights_shared_by_position(small_model, name, weights):
    with torch.device("meta"):
        plain, shared = create_model(name), create_model(name, shared_weights=True)
    first = shared.get_submodule(ROUTINGS[name][0])
    assert (first.weight.numel(), first.positions) == (weights, 36)
    assert plain.get_submodule(ROUTINGS[name][0]).weight.numel() == 36 * weights
    model = small_model(name, shared_weights=True, image_size=20)
    model(torch.rand(2, 1, 20, 20)).activations.sum().backward()


# The kernel of the primary capsules has 9 rows in one network and 5 in the other.
@pytest.mark.parametrize(
    ("stride", "padding", "smallest"),
    [(1, 0, (17, 17)), (3, 0, (33, 33)), (2, 1, (21, 21)), (2, 3, (13, 17)), (1, 6, (9, 13))],
)
@dynamic
def test_the_smallest_image_leaves_a_position(small_model, name, stride, padding, smallest):
    side = smallest[list(ROUTINGS).index(name)]
    model = small_model(name, image_size=(side, side + 1), stride=stride, padding=padding)
    assert model(torch.rand(1, 1, side, side + 1)).poses.shape == (1, 10, 16)
    with pytest.raises(ValueError, match=f"both sides must be at least {side}"):
        small_model(name, image_size=(side + 1, side - 1), stride=stride, padding=padding)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            (7, 3, False),
            "CapsNet: image_size=(224, 224) needs 310 M parameters in the routing of 346,112 "
            "capsules and 154 M parameters in the decoder, more than 100 M; use a larger stride "
            "for the routing, reconstruction=False for the decoder, or "
            "tritoncaps.layers.CapsuleHead on a backbone",
        ),
        ((3, 1, False), "capsules and 51 M parameters in the decoder, more than 100 M; use a"),
        ((7, 3, True), "needs 310 M numbers, copied from shared ones in each call, in the"),
    ],
    ids=["7 classes, in colour", "3 classes", "shared weights"],
)
def test_a_very_large_network_warns(arguments, words):
    classes, channels, shared = arguments
    build = partial(CapsNet, classes, channels, 224, shared_weights=shared)
    with torch.device("meta"), pytest.warns(UserWarning, match=re.escape(words)):
        build()
    with torch.device("meta"), pytest.warns(UserWarning) as warned:
        build(reconstruction=False)
    assert "decoder" not in str(warned[0].message)
    with torch.device("meta"):
        build(stride=4, reconstruction=False)  # the remedies that it names


@every_model
def test_a_module_resets_to_its_own_initialisation(name):
    """After `to_empty`, module by module in either order, as FSDP does it."""

    def spread(model):
        # Of a thousand numbers, the spread itself is not known to 5 %.
        weights = {name: value for name, value in model.named_parameters() if value.ndim > 1}
        return {name: value.std() for name, value in weights.items() if value.numel() > 4000}

    expected = spread(create_model(name))
    for modules in (list, lambda found: reversed(list(found))):
        with torch.device("meta"):
            model = create_model(name)
        model.to_empty(device="cpu")
        for module in modules(model.modules()):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        torch.testing.assert_close(spread(model), expected, rtol=0.05, atol=0)


@with_decoder
def test_a_multi_hot_target_draws_all_present_classes(small_model, name):
    model, images = small_model(name), torch.rand(2, 1, 28, 28)
    target = torch.zeros(2, 10)
    target[0, [3, 7]] = target[1, 4] = 1
    output = model(images, target)
    torch.testing.assert_close(output.reconstruction, model.decoder(output.poses, target))


@every_model
def test_a_bad_image_stays_alone(device, small_model, name):
    model = small_model(name, image_size=20, num_classes=3).to(device).eval()
    images = torch.rand(3, 1, 20, 20, device=device)
    spoilt = images.clone()
    spoilt[1, 0, 5, 5] = float("nan")
    with torch.no_grad():
        for result, expected in zip(model(spoilt), model(images), strict=True):
            if expected is None:
                continue
            assert result[1].isnan().any()
            assert torch.equal(result[::2], expected[::2])


@every_model
def test_models_run_under_autocast_and_route_in_float32(device, small_model, name):
    model = small_model(name).to(device)
    images = torch.rand(2, 1, 28, 28, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = model(images)
    assert output.poses.dtype == torch.float32
    torch.testing.assert_close(output.activations, model(images).activations, rtol=0.1, atol=0.05)
    output.activations.sum().backward()


def test_state_dict_round_trip(device, small_model):
    first = small_model("deep_capsnet").to(device).eval()
    second = small_model("deep_capsnet", seed=1).to(device).eval()
    images = torch.rand(2, 1, 28, 28, device=device)
    assert not torch.equal(first(images).activations, second(images).activations)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images).activations, second(images).activations)
