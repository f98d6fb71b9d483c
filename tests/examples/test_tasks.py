"""What the experiments are made of: distortions, attacks, tasks, the CNN, and the pictures."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import baseline, distortions
from engine.experiment import _limited, _open_directory, mean_and_spread, percent
from engine.run_directory import RunDirectoryError
from engine.tasks import Task, TwoClasses, TwoClassesLoss, per_class_rate
from engine.trained import check_trained
from tritoncaps.data import Originals, load_dataset, to_float
from tritoncaps.layers import ReconstructionDecoder
from tritoncaps.models import CapsNet
from tritoncaps.ops import margin_loss


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return to_float(load_dataset("digits").test.images[:8])


class TestDistortions:
    @pytest.mark.parametrize(
        ("change", "amount"),
        [(distortions.shifted, 0), (distortions.rotated, 0), (distortions.scaled, 1)],
    )
    def test_nothing_leaves_images_as_they_are(
        self, digits: Tensor, change: Callable[..., Tensor], amount: float
    ) -> None:
        torch.testing.assert_close(change(digits, amount), digits, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("pixels", [1, 3, 8])
    def test_shifts_by_whole_pixels_are_exact(self, digits: Tensor, pixels: int) -> None:
        """To the right, to the left, down and up in turn; what leaves does not come back."""
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

    def test_a_quarter_turn_is_exact_both_ways(self, digits: Tensor) -> None:
        turned = distortions.rotated(digits, 90)
        for index in range(8):
            expected = torch.rot90(digits[index], 1 if index % 2 == 0 else -1, (1, 2))
            torch.testing.assert_close(turned[index], expected, atol=1e-4, rtol=0)

    def test_a_turn_keeps_a_disc_in_images_that_are_not_square(self) -> None:
        rows, columns = torch.meshgrid(torch.arange(30), torch.arange(50), indexing="ij")
        disc = ((rows - 14.5) ** 2 + (columns - 24.5) ** 2 < 100).float()[None, None]
        assert (distortions.rotated(disc, 37) - disc).abs().mean() < 0.02

    def test_scaling_changes_the_area(self, digits: Tensor) -> None:
        blob = torch.zeros(1, 1, 28, 28)
        blob[..., 10:18, 10:18] = 1
        for factor in (0.5, 1.5):
            area = distortions.scaled(blob, factor).sum() / 64
            assert area == pytest.approx(factor**2, rel=0.1)
        with pytest.raises(ValueError, match="factor must be > 0, got 0"):
            distortions.scaled(digits, 0)

    @pytest.mark.parametrize("change", [distortions.shifted, distortions.rotated])
    def test_how_images_are_batched_makes_no_difference(
        self, digits: Tensor, change: Callable[..., Tensor]
    ) -> None:
        whole = change(digits, 5)
        parts = torch.cat([change(digits[:3], 5, 0), change(digits[3:], 5, 3)])
        torch.testing.assert_close(whole, parts, atol=1e-6, rtol=0)

    @pytest.mark.parametrize(
        ("change", "amount"),
        [(distortions.shifted, 2.5), (distortions.rotated, 33), (distortions.scaled, 1.3)],
    )
    def test_pixels_stay_in_range(
        self, digits: Tensor, change: Callable[..., Tensor], amount: float
    ) -> None:
        changed = change(digits, amount)
        assert changed.shape == digits.shape
        assert changed.min() >= 0 and changed.max() <= 1


class TestAttack:
    def test_it_goes_up_the_gradient_of_each_image_alone(self) -> None:
        weight = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, 3.0]])
        images = torch.full((2, 1, 1, 3), 0.5)

        def scores(images: Tensor) -> Tensor:
            return images.flatten(1) @ weight.T

        direction = distortions.sign_of_gradient(
            scores, lambda values: values[torch.arange(2), torch.tensor([0, 1])], images
        )
        assert direction.flatten(1).tolist() == [[1, -1, 0], [1, 0, 1]]
        moved = distortions.attacked(images, direction, 0.7)
        assert moved.flatten(1).tolist() == [[1, 0, 0.5], [1, 0.5, 1]]

    def test_no_gradient_reaches_the_network(self) -> None:
        model = CapsNet(channels=4, capsule_types=1)
        images = torch.rand(2, 1, 28, 28)
        distortions.sign_of_gradient(
            lambda changed: model(changed).activations,
            lambda activations: margin_loss(activations, torch.tensor([1, 2]), reduction="none"),
            images,
        )
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not images.requires_grad

    def test_the_margin_loss_leaves_what_is_beyond_its_margins(self) -> None:
        """The reason for the second attack: this gradient is exactly 0, the other one is not."""
        labels = torch.tensor([0])

        def scores(images: Tensor) -> Tensor:
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

    def test_the_difference_is_that_of_the_best_wrong_score(self) -> None:
        scores = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.2, 0.7]])
        found = distortions.score_difference(scores, torch.tensor([1, 2]))
        torch.testing.assert_close(found, torch.tensor([-0.6, 0.1]))


class TestTasks:
    def test_one_class(self) -> None:
        activations = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
        assert Task().correct(activations, torch.tensor([1, 1])).tolist() == [True, False]

    def test_two_classes_are_right_in_any_order_and_only_together(self) -> None:
        task = TwoClasses(nn.Identity())
        activations = torch.tensor([[0.1, 0.9, 0.8], [0.7, 0.2, 0.9], [0.5, 0.4, 0.1]])
        assert task.predictions(activations).tolist() == [[1, 2], [0, 2], [0, 1]]
        labels = torch.tensor([[1, 2], [1, 2], [0, 1]])
        target = Originals(torch.zeros(3, 2, 1, 2, 2), labels)
        assert task.correct(activations, target).tolist() == [True, False, True]
        assert per_class_rate(task.predictions(activations), labels) == pytest.approx(5 / 6)

    def test_each_class_is_decoded_on_its_own(self) -> None:
        """In training that of the label, whatever the network thinks."""
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

    def test_the_loss_is_that_of_both(self) -> None:
        torch.manual_seed(0)
        activations, labels = torch.rand(4, 10), torch.tensor([[0, 1], [2, 5], [3, 9], [4, 7]])
        originals, decoded = torch.rand(4, 2, 1, 3, 3), torch.rand(4, 2, 1, 3, 3)
        present = torch.zeros(4, 10)
        for row, pair in enumerate(labels.tolist()):
            present[row, pair] = 1
        squares = ((decoded - originals) ** 2).sum() / 4
        expected = margin_loss(activations, present) + 0.0005 * squares
        loss = TwoClassesLoss()(activations, Originals(originals, labels), decoded, torch.empty(0))
        torch.testing.assert_close(loss, expected)


class TestConvNet:
    def test_it_is_as_large_as_the_capsule_networks(self) -> None:
        sizes = {}
        for name in baseline.list_networks():
            with torch.device("meta"):
                model = baseline.ConvNet() if name == "cnn" else CapsNet()
            sizes[name] = sum(parameter.numel() for parameter in model.parameters())
        assert abs(sizes["cnn"] - sizes["capsnet"]) < 0.05 * sizes["capsnet"]

    def test_it_answers_like_a_capsule_network(self) -> None:
        model = baseline.ConvNet(5, 3, (20, 24), channels=(2, 2, 2), hidden=(4, 4)).eval()
        images = torch.rand(2, 3, 20, 24)
        output = model(images)
        assert output.activations.shape == (2, 5) and output.reconstruction is None
        assert torch.equal(output.activations, model(images, torch.tensor([1, 2])).activations)
        loss = baseline.CrossEntropy()(output.activations, torch.tensor([0, 4]), None, images)
        assert loss.shape == () and loss > 0

    def test_an_image_that_is_too_small_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"image_size=\(13, 28\), both sides must be at least"):
            baseline.ConvNet(image_size=(13, 28))

    def test_its_name_builds_it(self) -> None:
        assert set(baseline.list_networks()) == set(baseline.TITLES)
        with torch.device("meta"):
            assert isinstance(baseline.create_network("cnn"), baseline.ConvNet)
            assert isinstance(baseline.create_network("capsnet"), CapsNet)
        assert baseline.network_loss("capsnet") is None


def test_numbers_for_people() -> None:
    assert percent(0.99444) == "99.44 %"
    assert percent(0.99444, 0.0005) == "99.44 ± 0.05 %"
    assert mean_and_spread([0.5]) == (0.5, None)
    assert mean_and_spread([0.4, 0.6]) == (0.5, pytest.approx(math.sqrt(0.02)))


# -- the pictures


def overlapped(count: int, *, wrong: bool) -> Any:
    from engine.experiment_figures import Overlapped

    generator = torch.Generator().manual_seed(count)
    labels = torch.tensor([[3, 7]]).repeat(count, 1)
    originals = torch.rand(count, 2, 1, 28, 28, generator=generator)
    return Overlapped(
        originals.sum(dim=1).clamp(max=1),
        originals,
        originals * 0.5,
        labels,
        torch.tensor([[1, 3]]).repeat(count, 1) if wrong else labels,
    )


def draw(name: str, path: Path) -> None:
    from engine import experiment_figures as figures

    grey = torch.rand(3, 4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    names = [str(digit) for digit in range(10)]
    runs = [[0.9, 0.95, 0.99], [0.91, 0.96, 0.98]]
    line = ([0.0, 0.1, 0.2], [0.99, 0.8, 0.3])
    drawings: dict[str, Callable[[], None]] = {
        "curves": lambda: figures.plot_model_curves(
            {"one": runs, "two": runs[:1]}, path, "Title", "share"
        ),
        "one point": lambda: figures.plot_model_curves({"one": [[1.0]]}, path, "Title", "share"),
        "heat map": lambda: figures.plot_heat_map(
            [[0.9, math.nan], [0.95, 0.99]], [1, 2], [1, 2], path, "Title", ("a", "b", "c")
        ),
        "one cell": lambda: figures.plot_heat_map([[0.9]], [1], [1], path, "T", ("a", "b", "c")),
        "trade-off": lambda: figures.plot_trade_off(
            [("a", 1.0, 0.9), ("b", 2.0, 0.95), ("c", 3.0, 0.9)], [0, 1], path, "T", ("a", "b")
        ),
        "panels": lambda: figures.plot_panels(
            [figures.Panel("P", "x", {"one": line, "two": line}, (0.7, "level"))] * 4,
            path, "Title", "share",
        ),
        "sizes": lambda: figures.plot_by_size(
            {"one": {100: [0.8, 0.82], 1000: [0.9]}, "two": {100: [0.7]}}, path, "T", ("a", "b")
        ),
        "overlapped": lambda: figures.plot_overlapped(
            [overlapped(4, wrong=False), overlapped(2, wrong=True)], path, "Title", names
        ),
        "grids": lambda: figures.plot_grids(grey, grey, ["3", "5", "8"], path, "Title"),
        "failures": lambda: figures.plot_failures(
            grey[0], grey[1], grey[2], [1, 2, 3, 4], [5, 6, 7, 8], path, "Title", names
        ),
        "strips": lambda: figures.plot_strips(
            [("a", grey[0], list("abcd")), ("b", grey[1][:2], list("ab"))], path, "Title"
        ),
    }  # fmt: skip
    drawings[name]()


PICTURES = [
    "curves", "one point", "heat map", "one cell", "trade-off", "panels", "sizes", "overlapped",
    "grids", "failures", "strips",
]  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_shows_something_with_nothing_cut_off(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")
    from matplotlib.image import imread

    path = tmp_path / "picture.png"
    draw(name, path)
    assert path.stat().st_size < 300_000
    picture = imread(path)[..., :3]
    assert 0.01 < (picture != 1).any(-1).mean() < 0.98
    for edge in (picture[:3], picture[-3:], picture[:, :3], picture[:, -3:]):
        assert (edge == 1).all()
    first = path.read_bytes()
    draw(name, path)
    assert path.read_bytes() == first


def test_a_class_that_was_found_has_the_colour_of_its_original() -> None:
    """3 and 7 are shown, 1 and 3 found: what 3 is decoded to stands in the place of the 3."""
    from engine import experiment_figures as figures

    rows = figures._coloured(overlapped(2, wrong=True))
    assert rows.shape == (7, 2, 3, 28, 28)
    block = overlapped(2, wrong=True)
    red = block.reconstructions[:, 1, 0] * figures._FIRST[0]
    torch.testing.assert_close(rows[4][:, 0], red)


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    from engine import experiment_figures as figures

    path = tmp_path / "picture.png"
    for function, arguments in (
        (figures.plot_model_curves, ({}, path, "", "")),
        (figures.plot_heat_map, ([[math.nan]], [1], [1], path, "", ("", "", ""))),
        (figures.plot_trade_off, ([], [], path, "", ("", ""))),
        (figures.plot_panels, ([], path, "", "")),
        (figures.plot_by_size, ({}, path, "", ("", ""))),
        (figures.plot_overlapped, ([], path, "", [])),
    ):
        with pytest.raises(ValueError, match="there is no"):
            function(*arguments)  # type: ignore[operator]
    assert not path.exists()


def test_the_decoder_of_a_pair_may_be_of_any_size() -> None:
    decoder = ReconstructionDecoder(10, 16, (1, 36, 36), hidden=(4, 4))
    model = CapsNet(image_size=36, channels=2, capsule_types=1)
    output = TwoClasses(decoder).run(model, torch.rand(1, 1, 36, 36))
    assert output.reconstruction is not None and output.reconstruction.shape == (1, 2, 1, 36, 36)


class TestRefusals:
    def test_more_images_than_there_are(self) -> None:
        dataset = load_dataset("digits")
        with pytest.raises(ValueError, match=r"--limit-test 361: .* has 360 such images"):
            _limited(dataset, None, 361)
        with pytest.raises(ValueError, match=r"--limit-train 1438: .* has 1,437 such images"):
            _limited(dataset, 1438, None)
        kept = _limited(dataset, 1437, 360)
        assert (len(kept.train), len(kept.test)) == (1437, 360)

    def test_an_output_directory_that_cannot_be_used(self, tmp_path: Path) -> None:
        content = {"experiment": "less_data", "recipe": {"epochs": 2}}
        file = tmp_path / "file"
        file.touch()
        with pytest.raises(RunDirectoryError, match=r"--output-dir .*file: File exists"):
            _open_directory(file, content)
        directory = tmp_path / "experiment"
        _open_directory(directory, content)
        assert json.loads((directory / "experiment.json").read_text()) == content
        (directory / "run").touch()
        (directory / "experiment.json").write_text("{")
        with pytest.raises(RunDirectoryError, match=r"experiment\.json is damaged"):
            _open_directory(directory, content)

    def test_a_run_that_has_no_trained_network(self, tmp_path: Path) -> None:
        with pytest.raises(RunDirectoryError, match=r"holds no model_best\.pt: give a directory"):
            check_trained(tmp_path)
        (tmp_path / "last.pt").touch()
        with pytest.raises(RunDirectoryError, match="has not finished an epoch: go on with it"):
            check_trained(tmp_path)
        (tmp_path / "model_best.previous.pt").touch()
        assert check_trained(str(tmp_path)) == tmp_path
