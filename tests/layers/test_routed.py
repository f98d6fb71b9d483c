"""RoutedCapsules: shared weights, masks, coupling, options of a call, building and resetting."""

import pytest
import torch

from tritoncaps import RoutedCapsules

T, P, J, D = 3, 4, 5, 6


def build(**options):
    """A layer whose every parameter has drawn values."""
    torch.manual_seed(0)
    layer = RoutedCapsules(T, P, J, D, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def gradients(layer, result):
    return torch.autograd.grad(result.square().sum(), list(layer.parameters()))


class TestSharedWeights:
    @pytest.mark.parametrize("count", [1, 2, 7])
    def test_equal_the_same_weights_repeated(self, device, count):
        shared = build(positions=4, learned_prior=True).to(device)
        repeated = RoutedCapsules(count * T, P, J, D, learned_prior=True).to(device)
        with torch.no_grad():
            repeated.weight.copy_(shared.weight.repeat(count, 1, 1, 1))
            repeated.prior.copy_(shared.prior.repeat(count, 1))
        u = torch.randn(2, count * T, P, device=device)
        result, expected = shared(u), repeated(u)
        assert torch.equal(result, expected)
        for grad, grads in zip(
            gradients(shared, result), gradients(repeated, expected), strict=True
        ):
            torch.testing.assert_close(grad, grads.view(count, *grad.shape).sum(0))

    def test_one_matrix_routes_a_set(self, device):
        """A set has no order, and its size is free."""
        layer = RoutedCapsules(1, P, J, D, positions=8).to(device)
        for size in (1, 8, 20):
            u = torch.randn(2, size, P, device=device)
            torch.testing.assert_close(layer(u), layer(u.flip(1)))

    def test_export_with_a_free_number_of_positions(self):
        layer, u = build(positions=4), torch.randn(2, 4 * T, P)
        n = torch.export.Dim("n", min=2, max=64)
        exported = torch.export.export(layer, (u,), dynamic_shapes={"u": {1: T * n}}).module()
        for count in (2, 9):
            u = torch.randn(2, count * T, P)
            torch.testing.assert_close(exported(u), layer(u))


class TestMask:
    @pytest.mark.parametrize(
        "options", [{}, {"learned_prior": True}, {"pose_bias": True, "leaky": True}], ids=str
    )
    @pytest.mark.parametrize("padding", [0.0, 1.0, float("nan"), float("inf")])
    def test_masked_capsules_are_as_if_left_out(self, device, padding, options):
        layer = build(positions=1, **options).to(device)
        kept = [0, 1, 2, 6, 7, 8]
        u = torch.randn(2, 9, P, device=device)
        expected, coupling = layer(u[:, kept], return_coupling=True)
        grads = gradients(layer, expected)
        mask = torch.ones(2, 9, dtype=torch.bool, device=device)
        mask[:, 3:6] = False
        u[:, 3:6] = padding
        u.requires_grad_()
        result, masked_coupling = layer(u, mask, return_coupling=True)
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(masked_coupling[:, kept], coupling)
        assert (masked_coupling[:, 3:6] == 0).all()
        for grad, expected_grad in zip(gradients(layer, result), grads, strict=True):
            torch.testing.assert_close(grad, expected_grad)
        layer(u, mask).sum().backward()
        assert (u.grad[:, 3:6] == 0).all()

    def test_each_image_has_its_own(self, device):
        layer = build().to(device)
        u = torch.randn(2, T, P, device=device)
        mask = torch.tensor([[True, True, False], [False, False, False]], device=device)
        result = layer(u, mask)
        torch.testing.assert_close(result[0], layer(u * mask.unsqueeze(2))[0])
        assert (result[1] == 0).all()


class TestCall:
    def test_an_orphan_class_takes_a_share(self, device):
        layer = build(leaky=True).to(device)
        _, coupling = layer(torch.zeros(2, T, P, device=device), return_coupling=True)
        torch.testing.assert_close(coupling, torch.full_like(coupling, 1 / (J + 1)))

    def test_iterations_of_a_call(self, device):
        layer = build(iterations=1).to(device)
        u = torch.randn(2, T, P, device=device)
        assert torch.equal(layer(u, iterations=4), build(iterations=4).to(device)(u))
        assert layer.iterations == 1

    @pytest.mark.parametrize("options", [{}, {"positions": 2, "learned_prior": True}], ids=str)
    def test_a_traced_layer_takes_a_mask(self, options):
        layer, u = build(**options), torch.randn(2, T, P)
        mask = torch.tensor([[True, True, False], [True, False, True]])
        traced = torch.fx.symbolic_trace(layer)
        assert torch.equal(traced(u), layer(u))
        assert torch.equal(traced(u, mask), layer(u, mask))


class TestParameters:
    @pytest.mark.parametrize(
        "options",
        [{}, {"learned_prior": True, "pose_bias": True, "positions": 9}],
        ids=["default", "all"],
    )
    def test_reset_after_to_empty_is_a_fresh_layer(self, options):
        torch.manual_seed(3)
        fresh = RoutedCapsules(T, P, J, D, **options)
        layer = RoutedCapsules(T, P, J, D, device="meta", **options)
        assert all(parameter.is_meta for parameter in layer.parameters())
        layer.to_empty(device="cpu")
        for parameter in layer.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
        torch.manual_seed(3)
        layer.reset_parameters()
        assert layer.state_dict().keys() == fresh.state_dict().keys()
        for name, value in fresh.state_dict().items():
            assert torch.equal(layer.state_dict()[name], value), name

    def test_dtype(self):
        layer = RoutedCapsules(T, P, J, D, learned_prior=True, pose_bias=True, dtype=torch.float64)
        assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
        assert layer(torch.randn(2, T, P, dtype=torch.float64)).dtype == torch.float64

    def test_shared_weights_expect_all_positions(self):
        """The scale is that of a layer with as many inputs, each with weights of its own."""
        torch.manual_seed(0)
        shared = RoutedCapsules(8, 8, 10, 16, positions=36)
        single = RoutedCapsules(8 * 36, 8, 10, 16)
        torch.testing.assert_close(shared.weight.std(), single.weight.std(), rtol=0.05, atol=0)
