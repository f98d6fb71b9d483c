"""What the pictures show of a network, before it is drawn."""

import pytest
import torch

from engine.pictures import class_shares
from tritoncaps.layers import ClassMatrixCapsules
from tritoncaps.models import MatrixCapsNet


@pytest.mark.parametrize("competition", ["children", "position"])
@pytest.mark.parametrize("temperature", [None, [0.1, 0.2, 0.3]])
def test_every_place_shares_itself_out_among_the_classes(competition, temperature):
    torch.manual_seed(0)
    model = MatrixCapsNet(
        4, 2, (19, 23), iterations=3, channels=(4, 2, 3, 2), competition=competition,
        temperature=temperature,
    )  # fmt: skip
    shares = class_shares(model, torch.rand(2, 2, 19, 23))
    assert shares.shape == (3, 2, 4, 19, 23)
    # A convolution of 5×5 with stride 2 has 8×10 positions. 7×9 of them lie in windows.
    seen = torch.zeros(19, 23)
    seen[1:15, 1:19] = 1
    torch.testing.assert_close(shares.sum(dim=2), seen.expand(3, 2, 19, 23))
    torch.testing.assert_close(shares[0], (seen / 4).expand(2, 4, 19, 23))


def test_a_network_keeps_its_temperatures_even_if_drawing_fails(monkeypatch):
    """The class layer is asked for fewer iterations than it has."""
    model = MatrixCapsNet(3, image_size=17, channels=(4, 2, 3, 2), temperature=[0.1, 0.2])
    images = torch.rand(1, 1, 17, 17)
    class_shares(model, images)
    assert model.classes.temperature == [0.1, 0.2]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(ClassMatrixCapsules, "forward", lambda *_, **__: 1 / 0)
        class_shares(model, images)
    assert model.classes.temperature == [0.1, 0.2]


def test_the_last_shares_are_those_of_the_assignments():
    """Those of one place, with one type of primary capsules, go through three layers."""
    torch.manual_seed(0)
    model = MatrixCapsNet(3, image_size=17, channels=(4, 1, 2, 2))
    images = torch.rand(1, 1, 17, 17)
    first, second, last = model(images, return_coupling=True).coupling
    # The first capsule of the 7×7 lies in one window, and so does its output in the 3×3.
    expected = first[0, 0, 0, 0, 0, 0] @ second[0, 0, 0, 0, 0] @ last[0, 0, 0]
    torch.testing.assert_close(class_shares(model, images)[-1, 0, :, 1, 1], expected)
