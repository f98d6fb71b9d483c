"""Test images made harder: shifted, rotated, scaled and attacked."""

import pytest
import torch

from engine import distortions
from tritoncaps.data import load_dataset, to_float
from tritoncaps.models import CapsNet
from tritoncaps.ops import margin_loss


@pytest.fixture(scope="module")
def digits():
    return to_float(load_dataset("digits").test.images[:8])


class TestDistortions:
    @pytest.mark.parametrize(
        ("change", "amount"),
        [(distortions.shifted, 0), (distortions.rotated, 0), (distortions.scaled, 1)],
    )
    def test_an_amount_of_nothing_leaves_images_unchanged(self, digits, change, amount):
        torch.testing.assert_close(change(digits, amount), digits, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("pixels", [1, 3, 8])
    def test_shifts_by_whole_pixels_are_exact(self, digits, pixels):
        """They go right, left, down and up in turn. Pixels that leave do not come back."""
        moved = distortions.shifted(digits, pixels)
        n = pixels
        for index in range(8):
            before, after = digits[index, 0], moved[index, 0]
            pairs = [
                (after[:, n:], before[:, :-n], after[:, :n]),
                (after[:, :-n], before[:, n:], after[:, -n:]),
                (after[n:], before[:-n], after[:n]),
                (after[:-n], before[n:], after[-n:]),
            ]
            kept, original, new = pairs[index % 4]
            torch.testing.assert_close(kept, original, atol=1e-5, rtol=0)
            assert new.abs().max() < 1e-5

    def test_a_quarter_turn_is_exact_both_ways(self, digits):
        turned = distortions.rotated(digits, 90)
        for index in range(8):
            expected = torch.rot90(digits[index], 1 if index % 2 == 0 else -1, (1, 2))
            torch.testing.assert_close(turned[index], expected, atol=1e-4, rtol=0)

    def test_a_turn_keeps_a_disc_in_images_that_are_not_square(self):
        rows, columns = torch.meshgrid(torch.arange(30), torch.arange(50), indexing="ij")
        disc = ((rows - 14.5) ** 2 + (columns - 24.5) ** 2 < 100).float()[None, None]
        assert (distortions.rotated(disc, 37) - disc).abs().mean() < 0.02

    def test_scaling_changes_the_area(self, digits):
        blob = torch.zeros(1, 1, 28, 28)
        blob[..., 10:18, 10:18] = 1
        for factor in (0.5, 1.5):
            area = distortions.scaled(blob, factor).sum() / 64
            assert area == pytest.approx(factor**2, rel=0.1)
        with pytest.raises(ValueError, match="factor must be > 0, got 0"):
            distortions.scaled(digits, 0)

    @pytest.mark.parametrize("change", [distortions.shifted, distortions.rotated])
    def test_how_images_are_batched_makes_no_difference(self, digits, change):
        whole = change(digits, 5)
        parts = torch.cat([change(digits[:3], 5, 0), change(digits[3:], 5, 3)])
        torch.testing.assert_close(whole, parts, atol=1e-6, rtol=0)

    @pytest.mark.parametrize(
        ("change", "amount"),
        [(distortions.shifted, 2.5), (distortions.rotated, 33), (distortions.scaled, 1.3)],
    )
    def test_pixels_stay_in_range(self, digits, change, amount):
        changed = change(digits, amount)
        assert changed.shape == digits.shape
        assert changed.min() >= 0 and changed.max() <= 1


class TestAttack:
    def test_it_goes_up_the_gradient_of_each_image_alone(self):
        weight = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, 3.0]])
        images = torch.full((2, 1, 1, 3), 0.5)

        def scores(images):
            return images.flatten(1) @ weight.T

        direction = distortions.sign_of_gradient(
            scores, lambda values: values[torch.arange(2), torch.tensor([0, 1])], images
        )
        assert direction.flatten(1).tolist() == [[1, -1, 0], [1, 0, 1]]
        moved = distortions.attacked(images, direction, 0.7)
        assert moved.flatten(1).tolist() == [[1, 0, 0.5], [1, 0.5, 1]]

    def test_no_gradient_reaches_the_network(self):
        model = CapsNet(channels=4, capsule_types=1)
        images = torch.rand(2, 1, 28, 28)
        distortions.sign_of_gradient(
            lambda changed: model(changed).activations,
            lambda activations: margin_loss(activations, torch.tensor([1, 2]), reduction="none"),
            images,
        )
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not images.requires_grad

    def test_the_margin_loss_leaves_what_is_beyond_its_margins(self):
        """The reason for the second attack: this gradient is exactly 0, but the other is not."""
        labels = torch.tensor([0])

        def scores(images):
            return torch.tensor([[0.95, 0.05]]) + 0.01 * images.flatten(1)

        images = torch.zeros(1, 1, 1, 2)
        silent = distortions.sign_of_gradient(
            scores, lambda values: margin_loss(values, labels, reduction="none"), images
        )
        assert not silent.any()
        loud = distortions.sign_of_gradient(
            scores, lambda values: distortions.score_difference(values, labels), images
        )
        assert loud.flatten().tolist() == [-1, 1]

    def test_the_difference_is_to_the_best_wrong_score(self):
        scores = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.2, 0.7]])
        found = distortions.score_difference(scores, torch.tensor([1, 2]))
        torch.testing.assert_close(found, torch.tensor([-0.6, 0.1]))
