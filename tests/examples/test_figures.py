"""Pictures have the promised size, nothing is cut off, and the pixels show the data."""

import math
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from einops import rearrange
from numpy.typing import NDArray

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.image import imread  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from engine import figures  # noqa: E402
from engine.drawing import drawable, enlarged  # noqa: E402

DIGITS = [str(digit) for digit in range(10)]
TRAIN, VALIDATION, WRONG = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0xC0, 0x00, 0x00)
MINUS = "\N{MINUS SIGN}"

Pixels = NDArray[np.uint8]


def read(path):
    """Return the picture as bytes (height, width, 3), after the checks that apply to every one."""
    assert path.stat().st_size < 300_000
    pixels: Pixels = (imread(path)[..., :3] * 255).round().astype(np.uint8)
    assert len(np.unique(pixels)) > 10
    border = np.concatenate([pixels[:3], pixels[-3:], *np.hsplit(pixels[3:-3], [3, -3])[::2]], None)
    assert (border == 255).all(), "something touches the edge of the picture"
    return pixels


def positions(pixels, colour):
    """Return the (row, column) of each pixel of exactly this colour."""
    return np.argwhere((pixels == colour).all(-1))


def blobs(*shape, channels=1, size=28):
    """Make smooth float images (*shape, channels, size, size), all different."""
    axis = torch.linspace(-2, 2, size)
    number = math.prod(shape)
    centre = torch.linspace(-1, 1, number)[:, None, None, None]
    tint = torch.linspace(1, 0.5, channels)[:, None, None]
    images = tint * torch.exp(-((axis[:, None] - centre) ** 2) - 3 * (axis + centre) ** 2)
    return images.reshape(*shape, channels, size, size)


def history(train, validation, losses: list[float] | None = None):
    losses = losses or [1 / (index + 2) for index in range(len(train))]
    return [
        {
            "epoch": index + 1,
            "train_loss": losses[index],
            "train_accuracy": train[index],
            "validation_loss": losses[index] * 1.1,
            "validation_accuracy": validation[index],
            "learning_rate": 1e-3,
            "seconds": 2.0,
        }
        for index in range(len(train))
    ]


@contextmanager
def drawn_texts():
    """Collect the texts that are drawn inside axes."""
    texts: list[Text] = []
    add_text = Axes.text

    def collect(axes: Axes, *arguments, **options):
        texts.append(add_text(axes, *arguments, **options))
        return texts[-1]

    with mock.patch.object(Axes, "text", collect):
        yield texts


RISING = history([0.5, 0.9, 0.95, 0.99], [0.6, 0.92, 0.96, 0.985])


class TestCurves:
    @pytest.mark.parametrize(
        "rows",
        [
            RISING,
            RISING[:1],
            [{name: str(value) for name, value in row.items()} for row in RISING],
            history([1.0, 1.0], [1.0, 1.0]),
            history([0.0, 0.0], [0.0, 0.0]),
            history([0.9, 0.99], [0.9, 0.99], [1e5, 1e-5]),
            history([0.9 + 0.001 * epoch for epoch in range(50)], [0.95] * 50),
        ],
        ids=["rising", "one-epoch", "text", "perfect", "nothing", "wide", "fifty-epochs"],
    )
    def test_both_curves_are_in_both_panels(self, tmp_path, rows):
        figures.plot_curves(rows, tmp_path / "curves.png", "DeepCapsNet")
        pixels = read(tmp_path / "curves.png")
        assert pixels.shape == (520, 1200, 3)
        for panel in (pixels[:470, :600], pixels[:470, 600:]):
            # Where the curves coincide, the second hides the first, except for smoothed edges.
            assert len(positions(panel, VALIDATION)) >= 4
        assert len(positions(pixels, TRAIN)) >= 4

    @pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0, -1.0, 1e30])
    def test_a_loss_that_cannot_be_shown_leaves_a_gap(self, tmp_path, loss):
        rows = history([0.9, 0.95, 0.97], [0.91, 0.94, 0.96], [0.5, loss, 0.3])
        figures.plot_curves(rows, tmp_path / "gap.png", "A gap")
        with_gap = read(tmp_path / "gap.png")
        figures.plot_curves(rows[::2], tmp_path / "whole.png", "A gap")
        whole = read(tmp_path / "whole.png")
        for colour in (TRAIN, VALIDATION):
            shown = len(positions(with_gap[:470, 600:], colour))
            assert 4 <= shown < len(positions(whole[:470, 600:], colour)) / 2

    def test_nothing_but_nan(self, tmp_path):
        rows = history([math.nan] * 2, [math.nan] * 2, [math.nan] * 2)
        figures.plot_curves(rows, tmp_path / "curves.png", "Nothing to see")
        assert len(positions(read(tmp_path / "curves.png")[:470], TRAIN)) == 0

    def test_no_epoch(self, tmp_path):
        with pytest.raises(ValueError, match="no epoch"):
            figures.plot_curves([], tmp_path / "curves.png", "Empty")

    def test_half_a_percent_near_the_top_shows_beside_a_poor_start(self, tmp_path):
        rows = history([0.5, 0.990], [0.5, 0.995])
        figures.plot_curves(rows, tmp_path / "curves.png", "Zoom")
        accuracy = read(tmp_path / "curves.png")[:470, :600]
        top = {colour: positions(accuracy, colour)[:, 0].min() for colour in (TRAIN, VALIDATION)}
        # On a linear axis from 50 to 100 % it would be 4 pixels.
        assert top[TRAIN] - top[VALIDATION] > 30

    @pytest.mark.parametrize(
        ("losses", "best"),
        [([5.0, 4.0, 3.0, 2.0, 1.0], 4), ([1.0] * 5, 3), ([1.0, 1.0, math.nan, 9.0, 1.0], 4)],
        ids=["loss-decides", "first", "nan-loss"],
    )
    def test_the_best_epoch_is_marked(self, tmp_path, losses, best):
        rows = history([0.9] * 5, [0.9, math.nan, 0.95, 0.95, 0.93], losses)
        with mock.patch.object(Axes, "axvline") as line:
            figures.plot_curves(rows, tmp_path / "curves.png", "Best")
        assert [call.args for call in line.call_args_list] == [(best,), (best,)]
        assert f"95.00 % after epoch {best}" in line.call_args.kwargs["label"]


def as_bytes(images):
    return (images * 255).round().to(torch.uint8)


class TestImages:
    """Reconstructions and perturbations: each pixel of an image is a square in the picture."""

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize(
        "convert",
        [lambda x: x, as_bytes, lambda x: x.clone().requires_grad_(), lambda x: x.double()],
        ids=["float32", "uint8", "requires-grad", "float64"],
    )
    def test_perturbations_show_every_image(self, tmp_path, channels, convert):
        images = blobs(16, 11, channels=channels)
        offsets = torch.linspace(-0.25, 0.25, 11)
        figures.plot_perturbations(convert(images), offsets, tmp_path / "p.png", "A capsule")
        pixels = read(tmp_path / "p.png")
        rows, columns = 16 * 90, 11 * 90
        assert pixels.shape == (40 + rows + 52, 64 + columns + 6, 3)
        cells = rearrange(
            pixels[40 : 40 + rows, 64 : 64 + columns], "(r h) (c w) rgb -> r c h w rgb", h=90, w=90
        )
        assert (cells[:, :, 84:] == 255).all()
        assert (cells[:, :, :, 84:] == 255).all()
        large = as_bytes(images).expand(-1, -1, 3, -1, -1).numpy().repeat(3, 3).repeat(3, 4)
        np.testing.assert_array_equal(
            cells[:, :, :84, :84], rearrange(large, "r c rgb h w -> r c h w rgb")
        )

    def test_perturbations_are_labelled(self, tmp_path):
        offsets = [-0.25, -0.1, -1e-9, 0.05]
        with (
            mock.patch.object(Axes, "set_xticks") as columns,
            mock.patch.object(Axes, "set_yticks") as rows,
        ):
            figures.plot_perturbations(blobs(3, 4), offsets, tmp_path / "p.png", "A capsule")
        assert columns.call_args.args[1] == [f"{MINUS}0.25", f"{MINUS}0.10", "0", "+0.05"]
        assert columns.call_args.args[0] == [42, 132, 222, 312]
        assert rows.call_args.args == ([42, 132, 222], ["1", "2", "3"])

    def test_long_names_stay_below_their_image(self, tmp_path):
        names = [f"{label} coloured digits on paper" for label in range(10)]
        labels, predictions = list(range(10)), [0, 1, 2, 3, 4, 5, 6, 7, 9, 8]
        with drawn_texts() as texts:
            path, images = tmp_path / "r.png", blobs(10, channels=3)
            figures.plot_reconstructions(images, images, labels, predictions, path, "Test", names)
        captions = [text for text in texts if "coloured" in text.get_text()]
        assert len(captions) == 10
        assert max(text.get_window_extent().width for text in captions) <= 84
        assert captions[-1].get_text() == "8 coloured digits\u2026\ntrue: 9 coloured \u2026"

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("number", [1, 10, 13])
    def test_reconstructions_show_every_pair(self, tmp_path, channels, number):
        images = blobs(number, channels=channels)
        reconstructions = 0.7 * images
        labels = torch.arange(number) % 10
        figures.plot_reconstructions(
            as_bytes(images), reconstructions, labels, labels, tmp_path / "r.png", "Pairs", DIGITS
        )
        pixels = read(tmp_path / "r.png")
        strips, columns = -(-number // 10), min(number, 10)
        assert pixels.shape == (40 + 214 * strips, 128 + 90 * columns + 6, 3)
        assert len(positions(pixels, WRONG)) == 0
        for index in range(number):
            top, left = 40 + index // 10 * 214, 128 + index % 10 * 90
            for images_shown, start in ((images, top), (reconstructions, top + 86)):
                shown = pixels[start : start + 84 : 3, left : left + 84 : 3]
                expected = as_bytes(images_shown[index]).expand(3, -1, -1).numpy()
                np.testing.assert_array_equal(shown, rearrange(expected, "c h w -> h w c"))

    def test_wrong_predictions_are_framed_and_named(self, tmp_path):
        images, labels, predictions = blobs(12), torch.arange(12) % 10, torch.arange(12) % 10
        predictions[11] = 7
        with drawn_texts() as texts:
            figures.plot_reconstructions(
                images, images, labels, predictions, tmp_path / "r.png", "Pairs", DIGITS
            )
        captions = [text.get_text() for text in texts if text.get_ha() == "center"]
        assert captions == [*DIGITS, "0", "7\ntrue: 1"]
        framed = positions(read(tmp_path / "r.png"), WRONG)
        top, left = 40 + 214, 128 + 90
        assert top - 4 < framed[:, 0].min() < top
        assert left - 4 < framed[:, 1].min() < left
        assert left + 84 <= framed[:, 1].max() < left + 84 + 4

    def test_long_names_stay_below_their_own_pair(self, tmp_path):
        images, names = blobs(3), ["Long-haired dachshund", "Lawnmower", "Aquarium fish"]
        figures.plot_reconstructions(
            images, images, [0, 1, 2], [0, 0, 2], tmp_path / "r.png", "Pairs", names
        )
        below = read(tmp_path / "r.png")[40 + 2 * 86 + 4 :, 128:]
        for pair in range(3):
            assert (below[:, pair * 90 + 86 : pair * 90 + 88] == 255).all()
            assert (below[:, pair * 90 : pair * 90 + 84] < 128).any()

    @pytest.mark.parametrize(("size", "scale"), [(8, 10), (36, 2), (96, 1)])
    def test_images_are_enlarged_by_whole_numbers(self, tmp_path, size, scale):
        images = blobs(2, 3, size=size)
        figures.plot_perturbations(images, [0, 1, 2], tmp_path / "p.png", "A capsule")
        pixels = read(tmp_path / "p.png")
        assert pixels.shape == (92 + 2 * (size * scale + 6), 70 + 3 * (size * scale + 6), 3)

    def test_values_out_of_range_are_clipped(self, tmp_path):
        image = torch.tensor([[-5.0, 5.0], [math.nan, 0.5]])[None, None, None]
        figures.plot_perturbations(image, [0.0], tmp_path / "p.png", "Out of range")
        pixels = read(tmp_path / "p.png")[40 : 40 + 84, 64 : 64 + 84, 0]
        assert pixels[::42, ::42].tolist() == [[0, 255], [0, 128]]

    def test_the_first_of_a_stereo_pair_is_drawn(self):
        pair = blobs(3, channels=2)
        assert torch.equal(enlarged(pair, 0, 0), enlarged(pair[:, :1], 0, 0))

    def test_four_channels_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="C=4"):
            figures.plot_perturbations(blobs(2, 3, channels=4), [0, 1, 2], tmp_path / "p.png", "")

    def test_no_images_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no images"):
            figures.plot_reconstructions(
                blobs(0), blobs(0), [], [], tmp_path / "r.png", "None", DIGITS
            )


class TestConfusion:
    @pytest.mark.parametrize(
        ("classes", "side"), [(2, 560), (10, 560), (20, 1120), (47, 1400)], ids=str
    )
    def test_size_grows_with_the_classes(self, tmp_path, classes, side):
        names = [f"class {index}" for index in range(classes)]
        matrix = 980 * torch.eye(classes, dtype=torch.int64)
        matrix += torch.ones_like(matrix).triu(1).tril(3)
        figures.plot_confusion(matrix, tmp_path / "c.png", "Test", names)
        assert read(tmp_path / "c.png").shape == (side + 150, side + 260, 3)

    @pytest.mark.parametrize("classes", [12, 100])
    def test_long_names_neither_overlap_nor_crowd_out_the_matrix(self, tmp_path, classes):
        names = [f"{label} of the folders with a name that is far too long" for label in range(100)]
        with mock.patch.object(Axes, "imshow", autospec=True, side_effect=Axes.imshow) as shown:
            figures.plot_confusion(torch.eye(classes), tmp_path / "c.png", "Test", names[:classes])
        axes = shown.call_args.args[0]
        rows = [name.get_window_extent() for name in axes.get_yticklabels()]
        columns = [name.get_window_extent() for name in axes.get_xticklabels()]
        # A line includes some space above its letters.
        assert all(high.y0 - low.y0 > 0.8 * low.height for high, low in pairwise(rows))
        if classes == 100:  # Fewer names are slanted.
            assert all(right.x0 - left.x0 > 0.8 * left.width for left, right in pairwise(columns))
        assert axes.get_window_extent().width > 500

    def test_every_count_is_written_and_zeros_are_not(self, tmp_path):
        matrix = [[1135, 0, 2], [0, 0, 0], [31, 1, 12345]]
        with drawn_texts() as texts:
            figures.plot_confusion(matrix, tmp_path / "c.png", "Test", DIGITS[:3])
        cells = {text.get_position(): text.get_text() for text in texts}
        # Columns are the predicted class, rows the true one.
        assert cells == {(0, 0): "1135", (2, 0): "2", (0, 2): "31", (1, 2): "1", (2, 2): "12345"}

    def test_numbers_fit_their_cells(self, tmp_path):
        matrix = 1234567 * torch.eye(10, dtype=torch.int64)
        with drawn_texts() as texts:
            figures.plot_confusion(matrix, tmp_path / "c.png", "Test", DIGITS)
        for text in texts:
            assert text.get_text() == "1234567"
            assert 40 < text.get_window_extent().width < 56

    @pytest.mark.parametrize(
        ("matrix", "accuracy"),
        [
            ([[9, 1], [0, 10]], "Digits: 19 of 20 right, accuracy 95.00 %"),
            ([[0, 0], [0, 0]], "Digits: 0 of 0 right, accuracy 0.00 %"),
        ],
    )
    def test_the_title_tells_the_accuracy(self, tmp_path, matrix, accuracy):
        with mock.patch.object(
            Figure, "suptitle", autospec=True, side_effect=Figure.suptitle
        ) as title:
            figures.plot_confusion(matrix, tmp_path / "c.png", "Digits", ["3", "8"])
        assert title.call_args.args[1] == accuracy

    def test_colours_tell_the_share_of_the_true_class(self, tmp_path):
        def darkness(*matrix):
            """Draw a matrix, and measure how dark its upper right cell is beside the number."""
            figures.plot_confusion(matrix, tmp_path / "c.png", "Test", ["3", "8"])
            return int(255 - read(tmp_path / "c.png")[100, 600, 0])

        assert darkness([1000, 0], [0, 1000]) == 0
        one, ten = darkness([999, 1], [0, 1000]), darkness([990, 10], [0, 1000])
        assert one > 20, "one confusion in a thousand is invisible"
        assert ten > one + 40
        assert darkness([99, 1], [50, 2]) == ten


def draw_curves(path):
    figures.plot_curves(RISING, path, "DeepCapsNet on MNIST")


def draw_reconstructions(path):
    figures.plot_reconstructions(
        blobs(12), blobs(12), [3] * 12, [3, 8] * 6, path, "Reconstructions", DIGITS
    )


def draw_perturbations(path):
    figures.plot_perturbations(blobs(3, 5), [-0.2, -0.1, 0, 0.1, 0.2], path, "A capsule")


def draw_confusion(path):
    figures.plot_confusion([[90, 10], [3, 97]], path, "Test", ["T-shirt/top", "Ankle boot"])


@pytest.mark.parametrize(
    "draw", [draw_curves, draw_reconstructions, draw_perturbations, draw_confusion]
)
class TestEveryPicture:
    def test_same_input_same_bytes_whatever_the_settings(self, tmp_path, draw):
        draw(tmp_path / "first.png")
        settings = {"text.color": "red", "savefig.bbox": "tight", "savefig.dpi": 37}
        with matplotlib.rc_context(settings):
            draw(tmp_path / "second.png")
            assert {name: matplotlib.rcParams[name] for name in settings} == settings
        read(tmp_path / "first.png")
        assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()

    def test_a_failed_drawing_keeps_the_old_picture(self, tmp_path, draw):
        (tmp_path / "picture.png").write_bytes(b"old")
        with (
            mock.patch("os.fsync", side_effect=OSError("No space left on device")),
            pytest.raises(OSError, match="No space"),
        ):
            draw(tmp_path / "picture.png")
        assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [
            ("picture.png", b"old")
        ]

    def test_long_titles_stay_in_the_picture(self, tmp_path, draw):
        suptitle = Figure.suptitle

        def longer(figure: Figure, title, **options):
            return suptitle(figure, title + ", and what else there is to say" * 3, **options)

        with mock.patch.object(Figure, "suptitle", longer):
            draw(tmp_path / "picture.png")
        read(tmp_path / "picture.png")


def test_scripts_that_the_font_lacks_need_no_warning(tmp_path):
    names = drawable(["собака", "猫", "dog"])
    assert names == ["собака", "class 1", "dog"]
    figures.plot_confusion([[1, 2, 3]] * 3, tmp_path / "picture.png", "動物", names)
    read(tmp_path / "picture.png")


def run_python(code):
    """Run code in a fresh interpreter with the same module path, and return its output."""
    paths = f"import sys; sys.path[:] = {sys.path!r}; "
    command = [sys.executable, "-c", paths + code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_pyplot_is_never_loaded_and_matplotlib_only_to_draw(tmp_path):
    output = run_python(
        "from engine import figures\n"
        "print('matplotlib' in sys.modules)\n"
        f"figures.plot_confusion([[1]], {str(tmp_path / 'c.png')!r}, 'Test', ['0'])\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert output.split() == ["False", "False"]


def test_a_machine_without_matplotlib_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'matplotlib: pip install "tritoncaps\[train\]"'):
        draw_confusion(tmp_path / "c.png")


# -- the pictures of the experiments


def overlapped(count, *, wrong):
    generator = torch.Generator().manual_seed(count)
    labels = torch.tensor([[3, 7]]).repeat(count, 1)
    originals = torch.rand(count, 2, 1, 28, 28, generator=generator)
    return figures.Overlapped(
        originals.sum(dim=1).clamp(max=1),
        originals,
        originals * 0.5,
        labels,
        torch.tensor([[1, 3]]).repeat(count, 1) if wrong else labels,
    )


def draw(name, path):
    grey = torch.rand(3, 4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    names = [str(digit) for digit in range(10)]
    runs = [[0.9, 0.95, 0.99], [0.91, 0.96, 0.98]]
    line = ([0.0, 0.1, 0.2], [0.99, 0.8, 0.3])
    drawings = {
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
def test_a_picture_shows_something_with_nothing_cut_off(name, tmp_path):
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


def test_a_class_that_was_found_has_the_colour_of_its_original():
    """3 and 7 are shown, 1 and 3 are found. The decoded 3 appears in the place of the 3."""
    rows = figures._coloured(overlapped(2, wrong=True))
    assert [row.shape for row in rows] == [(2, 3, 28, 28)] * 7
    block = overlapped(2, wrong=True)
    red = block.reconstructions[:, 1, 0] * figures._FIRST[0]
    torch.testing.assert_close(rows[4][:, 0], red)


def test_nothing_to_draw_is_an_error(tmp_path):
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


def test_routing(tmp_path):
    """Orange where the class feeds on, and blue for the next best."""
    images = blobs(3)
    shares = torch.full((2, 3, 4, 28, 28), 0.25)
    shares[1] = 0
    shares[1, :, 2, :14] = 1  # all of the upper half goes to the class,
    shares[1, :, 0, 14:] = 1  # and all of the lower one to the next best
    logits = torch.tensor([1.0, 0.0, 2.0, 0.5]).expand(3, 4)
    path = tmp_path / "routing.png"
    figures.plot_routing(images, shares, logits, [2, 2, 2], path, "Routing", ["a", "b", "c", "d"])
    pixels = read(path).astype(int)
    warmth = pixels[..., 0] - pixels[..., 2]
    orange, blue = (np.flatnonzero((sign * warmth > 100).any(axis=1)) for sign in (1, -1))
    # The third row of images and the fourth; each is 84 pixels high, below a title of 40.
    assert orange.tolist() == [*range(40 + 2 * 90, 40 + 2 * 90 + 42)]
    assert blue.tolist() == [*range(40 + 3 * 90 + 42, 40 + 3 * 90 + 84)]
    one = tmp_path / "one.png"
    figures.plot_routing(images[:1], shares[:, :1, :1], logits[:1, :1], [0], one, "One", ["a"])
    assert read(one).shape[0] < pixels.shape[0]
