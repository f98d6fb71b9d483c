"""torch.fx: traced models, feature extractors, and the checks that let a proxy pass."""

import copy
import pickle

import pytest
import torch
from exported import difference, tensors_of
from torch.fx import symbolic_trace

from tritoncaps import (
    Capsules,
    PrimaryCapsules,
    ReconstructionDecoder,
    RoutedCapsules,
    ops,
)
from tritoncaps.layers import CapsuleHead
from tritoncaps.models import CapsuleOutput, list_models
from tritoncaps.ops import fused_dynamic_routing, squash


@pytest.mark.parametrize("name", list_models(classifiers=True))
def test_a_traced_model_is_its_model(small_model, name):
    model = small_model(name).eval()
    traced = symbolic_trace(model)
    target = torch.tensor([3, 0, 9])
    copies = (copy.deepcopy(traced), symbolic_trace(traced), pickle.loads(pickle.dumps(traced)))
    for graph in (traced, *copies):
        for B in (1, 3):
            images = torch.rand(B, 1, 28, 28)
            for args in ((images,), (images, target[:B])):
                output = graph(*args)
                assert type(output) is CapsuleOutput
                assert difference(tensors_of(output), tensors_of(model(*args))) == 0
    traced(images).activations.sum().backward()
    assert all(p.grad is not None for n, p in traced.named_parameters() if "routing" in n)


@pytest.mark.parametrize("name", ["capsnet", "deep_capsnet"])
def test_an_option_of_a_call_is_fixed_by_the_trace(small_model, name):
    model, images = small_model(name), torch.rand(2, 1, 28, 28)
    with pytest.raises(AssertionError, match="return_coupling must be False, as in the traced"):
        symbolic_trace(model)(images, return_coupling=True)
    options = {"iterations": 1, "return_coupling": True}
    traced = symbolic_trace(model, concrete_args=options)
    actual, expected = traced(images, None, 1, True), model(images, **options)
    torch.testing.assert_close(actual.coupling, expected.coupling)
    torch.testing.assert_close(actual.poses, expected.poses)


LAYERS = {
    "primary": (PrimaryCapsules(3, 2, dim=4, kernel_size=3), torch.rand(2, 3, 9, 7)),
    "routed": (RoutedCapsules(6, 4, 3, 5, learned_prior=True), torch.rand(2, 6, 4)),
    "shared": (RoutedCapsules(3, 4, 3, 5, positions=2), torch.rand(2, 12, 4)),
    "head": (CapsuleHead(3, 2), torch.rand(2, 3, 7, 7)),
    "decoder": (ReconstructionDecoder(3, 4, (1, 2, 2), (5, 6)), torch.rand(2, 3, 4)),
    "decoder of capsules": (
        ReconstructionDecoder(3, 4, (1, 2, 2), (5, 6)),
        Capsules(torch.rand(2, 3, 4), torch.rand(2, 3)),
    ),
}


@pytest.mark.parametrize(("layer", "given"), LAYERS.values(), ids=LAYERS)
def test_a_layer_alone_can_be_traced(layer, given):
    traced = symbolic_trace(layer)
    assert difference(tensors_of(traced(given)), tensors_of(layer(given))) == 0
    assert difference(tensors_of(symbolic_trace(traced)(given)), tensors_of(layer(given))) == 0


class Own(torch.nn.Module):
    """A user's own module: functions by both of their names, a pair taken apart, a loss."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(6, 4, 3, 5))
        self.decoder = ReconstructionDecoder(3, 5, (1, 2, 2), (5, 6))

    def forward(self, u, target):
        v, coupling = fused_dynamic_routing(squash(u), self.weight, return_coupling=True)
        lengths = ops.squash(v, dim=1, form="exponential").norm(dim=-1)
        decoded = self.decoder(Capsules(v, lengths))
        return coupling, ops.margin_loss(lengths, target), decoded


def test_each_function_is_one_node_with_its_checks():
    module = Own()
    traced = symbolic_trace(module)
    u, target = torch.rand(2, 6, 4), torch.tensor([2, 0])
    torch.testing.assert_close(traced(u, target), module(u, target))
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called.count(squash) == 2
    assert called.count(fused_dynamic_routing) == called.count(ops.margin_loss) == 1
    with pytest.raises(ValueError, match="fused_dynamic_routing: weight has P=4 but u has P=3"):
        traced(u[..., :3], target)


@pytest.mark.parametrize("name", ["capsnet", "deep_capsnet", "efficient_capsnet"])
def test_torchvision_extracts_features(small_model, name):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, images = small_model(name).eval(), torch.rand(3, 1, 28, 28)
    wanted = []
    model.primary.register_forward_hook(lambda *call: wanted.append(call[-1]))
    reconstruction = model(images).reconstruction
    extractor = extraction.create_feature_extractor(model, ["primary", "decoder"])
    features = extractor(images)
    torch.testing.assert_close(features["primary"], wanted[0])
    torch.testing.assert_close(features["decoder"], reconstruction)
