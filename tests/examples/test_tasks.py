"""Tasks: losses, predictions and scores. And the CNN that the capsules are compared with."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine import baseline
from engine.tasks import CrossEntropy, Spread, Task, TwoClasses, per_class_rate
from tritoncaps.data import Originals
from tritoncaps.layers import ReconstructionDecoder
from tritoncaps.losses import CapsuleLoss
from tritoncaps.models import CapsNet, CapsuleOutput
from tritoncaps.ops import margin_loss, spread_loss


def answer(activations):
    """Make the output of a model with these activations."""
    return CapsuleOutput(torch.tensor(activations), torch.empty(0))


class TestTasks:
    def test_one_class(self):
        output = answer([[0.1, 0.9], [0.8, 0.2]])
        assert Task().predictions(output).tolist() == [1, 0]
        assert Task().correct(output, torch.tensor([1, 1])).tolist() == [True, False]

    @pytest.mark.parametrize("weight", [0.0005, 0.5])
    def test_its_loss_is_the_capsule_loss(self, weight):
        torch.manual_seed(0)
        images, target = torch.rand(3, 1, 4, 4), torch.tensor([1, 0, 4])
        output = CapsuleOutput(torch.rand(3, 5), torch.empty(0), torch.rand(3, 1, 4, 4))
        expected = CapsuleLoss(weight)(output.activations, target, output.reconstruction, images)
        assert torch.equal(Task(weight).loss(output, target, images), expected)

    def test_the_margin_of_the_spread_loss_follows_the_step(self):
        torch.manual_seed(0)
        images, target = torch.rand(3, 1, 4, 4), torch.tensor([1, 0, 4])
        output = CapsuleOutput(torch.rand(3, 5), torch.empty(0))
        task = Spread(steps=10)
        for step, margin in ((0, 0.2), (5, 0.55), (50, 0.9), (None, 0.9)):
            task.step = step
            expected = spread_loss(output.activations, target, margin)
            torch.testing.assert_close(task.loss(output, target, images), expected)
        drawn = output._replace(reconstruction=torch.rand(3, 1, 4, 4))
        error = (drawn.reconstruction - images).square().sum() / 3
        torch.testing.assert_close(task.loss(drawn, target, images), expected + 0.0005 * error)

    def test_logits_tell_classes_apart_whose_activations_are_all_1(self):
        logits = torch.tensor([[20.0, 50.0, 30.0]])
        output = CapsuleOutput(logits.sigmoid(), torch.empty(0), None, logits)
        assert CrossEntropy().predictions(output).tolist() == [1]

    def test_two_classes_are_right_in_any_order_and_only_together(self):
        task = TwoClasses(nn.Identity())
        output = answer([[0.1, 0.9, 0.8], [0.7, 0.2, 0.9], [0.5, 0.4, 0.1]])
        assert task.predictions(output).tolist() == [[1, 2], [0, 2], [0, 1]]
        labels = torch.tensor([[1, 2], [1, 2], [0, 1]])
        target = Originals(torch.zeros(3, 2, 1, 2, 2), labels)
        assert task.correct(output, target).tolist() == [True, False, True]
        assert per_class_rate(task.predictions(output), labels) == pytest.approx(5 / 6)

    def test_each_class_is_decoded_on_its_own(self):
        """In training, the label's class is decoded, whatever the network predicts."""
        torch.manual_seed(0)
        model = CapsNet(channels=4, capsule_types=1)
        images, labels = torch.rand(3, 1, 28, 28), torch.tensor([[0, 1], [4, 9], [2, 7]])
        output = TwoClasses(model.decoder).run(  # type: ignore[arg-type]
            model, images, Originals(torch.zeros(3, 2, 1, 28, 28), labels)
        )
        assert output.reconstruction is not None
        assert output.reconstruction.shape == (3, 2, 1, 28, 28)
        for place in range(2):
            alone = model(images, labels[:, place]).reconstruction
            torch.testing.assert_close(output.reconstruction[:, place], alone)

    def test_the_loss_covers_both(self):
        torch.manual_seed(0)
        activations, labels = torch.rand(4, 10), torch.tensor([[0, 1], [2, 5], [3, 9], [4, 7]])
        originals, decoded = torch.rand(4, 2, 1, 3, 3), torch.rand(4, 2, 1, 3, 3)
        present = torch.zeros(4, 10)
        for row, pair in enumerate(labels.tolist()):
            present[row, pair] = 1
        squares = ((decoded - originals) ** 2).sum() / 4
        expected = margin_loss(activations, present) + 0.0005 * squares
        output = CapsuleOutput(activations, torch.empty(0), decoded)
        loss = TwoClasses(nn.Identity()).loss(output, Originals(originals, labels), torch.empty(0))
        torch.testing.assert_close(loss, expected)


def test_the_decoder_of_a_pair_may_be_of_any_size():
    decoder = ReconstructionDecoder(10, 16, (1, 36, 36), hidden=(4, 4))
    model = CapsNet(image_size=36, channels=2, capsule_types=1)
    output = TwoClasses(decoder).run(model, torch.rand(1, 1, 36, 36))
    assert output.reconstruction is not None and output.reconstruction.shape == (1, 2, 1, 36, 36)


class TestConvNet:
    def test_it_is_as_large_as_the_capsule_networks(self):
        sizes = {}
        for name in baseline.list_networks():
            with torch.device("meta"):
                model = baseline.ConvNet() if name == "cnn" else CapsNet()
            sizes[name] = sum(parameter.numel() for parameter in model.parameters())
        assert abs(sizes["cnn"] - sizes["capsnet"]) < 0.05 * sizes["capsnet"]

    def test_it_answers_like_a_capsule_network(self):
        model = baseline.ConvNet(5, 3, (20, 24), channels=(2, 2, 2), hidden=(4, 4)).eval()
        images = torch.rand(2, 3, 20, 24)
        output, target = model(images), torch.tensor([0, 4])
        assert output.activations.shape == (2, 5) and output.reconstruction is None
        torch.testing.assert_close(output.activations, output.logits.softmax(dim=1))
        assert torch.equal(output.logits, model(images, torch.tensor([1, 2])).logits)
        expected = F.cross_entropy(output.logits, target)
        assert torch.equal(CrossEntropy().loss(output, target, images), expected)

    def test_an_image_that_is_too_small_is_refused(self):
        with pytest.raises(ValueError, match=r"image_size=\(13, 28\), both sides must be at least"):
            baseline.ConvNet(image_size=(13, 28))

    def test_its_name_builds_it(self):
        assert set(baseline.list_networks()) == set(baseline.TITLES)
        with torch.device("meta"):
            assert isinstance(baseline.create_network("cnn"), baseline.ConvNet)
            assert isinstance(baseline.create_network("capsnet"), CapsNet)
