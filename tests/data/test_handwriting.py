"""Pictures of digits become like those of MNIST: polarity, box, centre of mass, what is refused."""

import pytest
import torch
import torch.nn.functional as F

from tritoncaps.data import DatasetError, load_dataset, prepare_digit, read_digit

PIL = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def drawn():
    """A large seven in grey, its strokes 10 wide: (1, 90, 70), white on black."""
    picture = torch.zeros(1, 90, 70)
    picture[0, 20:30, 10:60] = 220
    picture[0, 30:80, 40:50] = 220
    return picture


def box(digit):
    rows, columns = ((digit[0] > 0).any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
    return int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1


def test_it_fills_the_box_with_its_centre_of_mass_in_the_middle(drawn):
    digit = prepare_digit(drawn)
    assert digit.shape == (1, 28, 28)
    assert digit.max() == 1 and digit.min() == 0
    assert box(digit) == (20, 17)  # 60×50
    places = torch.arange(28.0)
    for axis in (1, 2):
        centre = (digit.sum(dim=3 - axis)[0] * places).sum() / digit.sum()
        assert abs(centre - 14) <= 0.5


@pytest.mark.parametrize(
    "change",
    [
        lambda x: 255 - x,
        lambda x: 0.5 * x + 20,
        lambda x: 200 - 0.4 * x,
        lambda x: F.pad(x, (300, 5, 40, 100)),
        lambda x: (255 - x).expand(3, -1, -1),
        lambda x: x.to(torch.uint8),
        lambda x: F.interpolate(x[None], scale_factor=3)[0],
    ],
    ids=["dark", "faint", "grey-paper", "aside", "colours", "bytes", "larger"],
)
def test_what_does_not_matter(drawn, change):
    torch.testing.assert_close(
        prepare_digit(change(drawn)), prepare_digit(drawn), rtol=0, atol=0.05
    )


def test_uneven_paper_is_no_ink(drawn):
    generator = torch.Generator().manual_seed(0)
    paper = 210 + torch.linspace(-15, 15, 70) + 4 * torch.randn(1, 90, 70, generator=generator)
    digit = prepare_digit((paper - 0.7 * drawn).clamp(0, 255))
    assert (digit - prepare_digit(drawn)).abs().mean() < 0.02


def test_thin_strokes_become_white():
    picture = torch.full((1, 500, 500), 255)
    picture[:, 50:450, 250:252] = 0
    assert ((prepare_digit(picture) > 0.9).sum(dim=(1, 2)) >= 20).all()


def test_a_digit_like_mnist_stays_almost_as_it_is():
    digits = load_dataset("digits").test.images[:20]
    for image in digits:
        digit = prepare_digit(image)
        assert max(box(digit)) == 20
        again = prepare_digit(255 * digit)
        assert (again - digit).abs().mean() < 0.02


def test_a_stroke_at_the_edge_and_a_single_pixel():
    edge = torch.zeros(1, 40, 40)
    edge[0, :, 19:22] = 255
    assert box(prepare_digit(edge))[0] == 20
    dot = torch.zeros(1, 40, 40)
    dot[0, 3, 5] = 255
    assert box(prepare_digit(dot)) == (20, 20)
    assert prepare_digit(torch.eye(3)[None] * 255).isfinite().all()


@pytest.mark.parametrize(
    ("pixels", "kind", "message"),
    [
        ([[1]], TypeError, "pixels must be a Tensor, got list"),
        (torch.zeros(28, 28), ValueError, r"pixels must be \(1 or 3, H, W\), got \(28, 28\)"),
        (torch.zeros(1, 0, 5), ValueError, r"got \(1, 0, 5\)"),
        (torch.full((1, 9, 9), float("nan")), ValueError, "pixels must be finite"),
        (torch.full((1, 9, 9), 77), DatasetError, "the picture is blank"),
        (torch.rand(1, 9, 9), DatasetError, "blank: no pixel differs from its edge by 16 of 255"),
        (torch.ones(1, 1, 1), DatasetError, "the picture is blank"),
    ],
    ids=["list", "axes", "empty", "nan", "blank", "up-to-1", "one-pixel"],
)
def test_refused(pixels, kind, message):
    with pytest.raises(kind, match=message):
        prepare_digit(pixels)


def test_files(tmp_path, drawn):
    picture = PIL.fromarray((255 - drawn[0]).to(torch.uint8).numpy())
    picture.save(tmp_path / "seven.png")
    torch.testing.assert_close(
        read_digit(tmp_path / "seven.png"), prepare_digit(drawn), rtol=0, atol=0.01
    )
    ink = drawn[0].to(torch.uint8)
    for colour in (0, 255):  # on a transparent background
        PIL.fromarray(torch.stack([torch.full_like(ink, colour), ink], dim=2).numpy()).save(
            tmp_path / "clear.png"
        )
        torch.testing.assert_close(
            read_digit(tmp_path / "clear.png"), prepare_digit(drawn), rtol=0, atol=0.01
        )
    PIL.new("L", (30, 30), 255).save(tmp_path / "blank.png")
    PIL.new("LA", (30, 30), (255, 0)).save(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    PIL.new("L", (30, 30)).save(tmp_path / "digit.gif")
    for name, words in {
        "none.png": "does not exist",
        ".": "is a folder: give its images",
        "text.png": r"cannot be read \(not an image of the formats JPEG, PNG, ",
        "digit.gif": r"cannot be read \(not an image of the formats JPEG, PNG, ",
        "empty.png": r"cannot be read \(empty\)",
        "blank.png": "the picture is blank",
        "nothing.png": "the picture is blank",
    }.items():
        with pytest.raises(DatasetError, match=words) as error:
            read_digit(tmp_path / name)
        assert str(tmp_path) in str(error.value)
