"""A folder of images: which files are taken, what becomes of their pixels, and what is refused."""

import io
import os
import struct
import sys

import pytest
import torch
from image_sets import assert_same_set, make_set

from tritoncaps.data import Dataset, DatasetError, image_pixels, load_dataset

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")


def save(path, colour=128, size=(20, 20), mode="L", **options):
    """Save a plain image of a size (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def fill(folder, names=("cat", "dog"), count=5, **options):
    """Write `count` images of each class. Their grey levels tell them apart."""
    for label, name in enumerate(names):
        for index in range(count):
            save(folder / name / f"{index}.png", 10 * label + index, **options)


def load(folder, image_size=None):
    return load_dataset("folder", folder, image_size=image_size)


def refused(folder, *fragments, image_size=None):
    with pytest.raises(DatasetError) as caught:
        load(folder, image_size)
    for fragment in fragments:
        assert str(fragment) in str(caught.value)
    return str(caught.value)


def levels(images):
    """The grey levels of plain images, sorted."""
    return sorted(images.images[:, 0, 0, 0].tolist())


@pytest.fixture
def pixels(tmp_path):
    """Reads one image, saved as a file of a class, and returns it as (C, H, W)."""

    def read(image, name="x.png", image_size=None, **options):
        save(tmp_path / "train" / "a" / "0.png", size=image.size)
        for part in ("train", "test"):
            for other in ("a", "b"):
                (tmp_path / part / other).mkdir(parents=True, exist_ok=True)
                save(tmp_path / part / other / "0.png", size=image.size)
        image.save(tmp_path / "test" / "a" / name, **options)
        return load(tmp_path, image_size).test.images[1]

    return read


# which files are taken ---------------------------------------------------------------------------


def test_classes_and_a_split(tmp_path):
    fill(tmp_path / "pets", ("dog", "cat", "ox"), count=10)
    dataset = load(tmp_path / "pets")
    assert (dataset.name, dataset.title) == ("folder", "pets")
    assert dataset.class_names == ("cat", "dog", "ox")
    assert dataset.train.images.shape == (24, 1, 20, 20) and dataset.validation is None
    assert dataset.train.labels.bincount().tolist() == [8, 8, 8]
    assert dataset.test.labels.bincount().tolist() == [2, 2, 2]
    # "cat" was written second. No image is in both sets, and none is lost.
    assert sorted(levels(dataset.train) + levels(dataset.test)) == list(range(30))
    assert dataset.train.images[dataset.train.labels == 0].min() >= 10
    assert dataset.note == (
        f"3 classes in {tmp_path / 'pets'}, grey, 20x20, tested on a fifth of each class"
    )
    again = load(tmp_path / "pets")
    assert_same_set(again.test, dataset.test)
    assert_same_set(again.train, dataset.train)


def test_two_images_of_a_class_are_enough_and_one_is_not(tmp_path):
    fill(tmp_path, count=2)
    assert load(tmp_path).test.labels.tolist() == [0, 1]
    (tmp_path / "dog" / "1.png").unlink()
    refused(tmp_path, tmp_path / "dog", "has 1 image, but one is needed for training and one for")


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "validation", "testing")])
def test_published_parts(tmp_path, names):
    for count, name in zip((4, 3, 2), names, strict=True):
        fill(tmp_path / name, count=count)
    dataset = load(tmp_path)
    assert [len(dataset.train), len(dataset.validation), len(dataset.test)] == [8, 6, 4]
    assert dataset.note.endswith(f"tested on {names[2]}/, validated on {names[1]}/")


@pytest.mark.parametrize("name", ["val", "valid", "test"])
def test_a_single_second_part_is_the_test_set(tmp_path, name):
    fill(tmp_path / "train", count=4)
    fill(tmp_path / name, count=2)
    dataset = load(tmp_path)
    assert len(dataset.train) == 8 and len(dataset.test) == 4 and dataset.validation is None
    assert dataset.note.endswith(f"tested on {name}/")


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, ("bus", "train"))
    assert load(tmp_path).class_names == ("bus", "train")


def test_other_folders_beside_the_parts_are_no_classes(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    (tmp_path / "annotations").mkdir()
    assert load(tmp_path).class_names == ("cat", "dog")


def test_it_finds_what_imagefolder_finds(tmp_path):
    """On a clean folder: the same classes, labels and order."""
    datasets = pytest.importorskip("torchvision.datasets")
    fill(tmp_path / "train", ("b", "a", "10", "9"), count=11)
    save(tmp_path / "train" / "a" / "deep" / "er" / "0.JPG", 200)
    save(tmp_path / "train" / "a" / "De.ep" / "1.bmp", 201)
    fill(tmp_path / "test", ("b", "a", "10", "9"), count=1)
    theirs = datasets.ImageFolder(tmp_path / "train")
    ours = load(tmp_path)
    assert list(ours.class_names) == theirs.classes
    assert ours.train.labels.tolist() == theirs.targets
    expected = [image.getpixel((0, 0))[0] for image, _ in theirs]
    assert ours.train.images[:, 0, 0, 0].tolist() == expected


def test_what_systems_leave_behind_is_skipped(tmp_path):
    fill(tmp_path)
    for name in (".git", ".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        fill(tmp_path / name)
        fill(tmp_path / "cat" / name)
    save(tmp_path / "cat" / ".hidden.png")
    (tmp_path / "cat" / "._0.png").write_bytes(b"resource fork")
    (tmp_path / "README.md").write_text("beside the classes")
    assert len(load(tmp_path).train) == 8


def test_files_of_other_types_are_skipped_and_counted(tmp_path):
    fill(tmp_path)
    for name in ("labels.txt", "a.gif", "b.gif", "Thumbs.db"):
        (tmp_path / "dog" / name).write_bytes(b"")
    assert load(tmp_path).note.endswith("; skipped 4 files of other types: .gif, .db, .txt")


def test_links_are_followed_but_not_round_in_circles(tmp_path):
    fill(tmp_path / "data")
    save(tmp_path / "elsewhere" / "9.png", 99)
    links = {"more": tmp_path / "elsewhere", "again": tmp_path / "elsewhere", "up": tmp_path,
             "root": tmp_path / "data", "dog": tmp_path / "data" / "dog"}  # fmt: skip
    for name, target in links.items():
        (tmp_path / "data" / "cat" / name).symlink_to(target)
    (tmp_path / "data" / "cat" / "itself").symlink_to("itself")
    dataset = load(tmp_path / "data")
    assert len(dataset.train) + len(dataset.test) == 11
    assert dataset.note.endswith("skipped 1 file of other types: itself")


# what becomes of the pixels ----------------------------------------------------------------------


def test_grey_values_are_kept_and_colour_anywhere_means_three_channels(pixels):
    picture = Image.frombytes("L", (20, 20), bytes(range(200)) * 2)
    expected = torch.arange(200, dtype=torch.uint8).repeat(2).view(1, 20, 20)
    assert torch.equal(pixels(picture), expected)
    # A grey image may be stored in colours.
    assert torch.equal(pixels(picture.convert("RGB")), expected)
    assert torch.equal(pixels(picture.convert("P")), expected)
    blue = pixels(Image.new("RGB", (20, 20), (10, 20, 200)))
    assert blue[:, 0, 0].tolist() == [10, 20, 200]


def test_grey_images_before_and_after_a_coloured_one_keep_their_values(tmp_path):
    for part in ("train", "test"):
        fill(tmp_path / part)
    save(tmp_path / "train" / "cat" / "7.png", (255, 0, 0), mode="RGB")
    dataset = load(tmp_path)
    assert dataset.train.images.shape == (11, 3, 20, 20)
    assert dataset.train.images[:, :, 0, 0].tolist() == [
        *([level] * 3 for level in range(5)),
        [255, 0, 0],
        *([level] * 3 for level in range(10, 15)),
    ]
    assert ", RGB, 20x20" in dataset.note


@pytest.mark.parametrize(("level", "expected"), [(0, 0), (257 * 100 + 128, 100), (65535, 255)])
def test_16_bits_become_8(pixels, level, expected):
    assert pixels(Image.new("I;16", (20, 20), level)).unique().tolist() == [expected]


def test_12_bits_of_a_tiff_become_8(tmp_path):
    fill(tmp_path)
    buffer = io.BytesIO()
    Image.new("I;16", (20, 20), 0x8888).save(buffer, "TIFF")
    # The tag of the bits of a sample. Pillow reads 12, but does not write them.
    tag = (struct.pack("<HHII", 258, 3, 1, bits) for bits in (16, 12))
    (tmp_path / "cat" / "0.tif").write_bytes(buffer.getvalue().replace(*tag))
    dataset = load(tmp_path)
    assert 0x88 in levels(dataset.train) + levels(dataset.test)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, [255]),
        ("LA", (100, 255), [100]),
        ("LA", (0, 0), [255]),
        ("RGBA", (0, 0, 0, 0), [255]),
        ("RGBA", (200, 100, 0, 255), [200, 100, 0]),
        ("RGBA", (0, 0, 255, 51), [204, 204, 255]),
    ],
)
def test_transparent_pixels_become_white(pixels, mode, colour, expected):
    assert pixels(Image.new(mode, (20, 20), colour))[:, 3, 4].tolist() == expected


def test_a_transparent_colour_of_a_palette_becomes_white(pixels):
    image = Image.new("P", (20, 20), 0)
    image.putpalette([255, 0, 0])
    assert pixels(image, transparency=0).unique().tolist() == [255]


@pytest.mark.parametrize(("mode", "colour"), [("CMYK", (0, 255, 255, 0)), ("YCbCr", (76, 85, 255))])
def test_other_colour_spaces_become_rgb(pixels, mode, colour):
    red = pixels(Image.new(mode, (20, 20), colour), "x.jpg", quality=95)
    assert (red[:, 5, 5].int() - torch.tensor([255, 0, 0])).abs().max() <= 4


def test_the_orientation_of_a_photograph_is_applied(pixels):
    image = Image.new("L", (20, 10))
    image.paste(255, (0, 0, 10, 10))  # The left half is white.
    exif = Image.Exif()
    exif[0x0112] = 6  # "Turn by 90° clockwise": left becomes top.
    turned = pixels(image, "x.jpg", (20, 10), exif=exif)[0]
    assert turned[:9].min() > 240 and turned[11:].max() < 15


def test_images_are_squashed_and_antialiased(pixels):
    stripes = torch.tensor([0, 255]).repeat(30).byte().expand(40, 60)
    image = Image.frombytes("L", (60, 40), bytes(stripes.flatten().tolist()))
    small = pixels(image, image_size=(20, 15))
    assert small.shape == (1, 20, 15)
    # Two stripes and two gaps make one pixel. Picking one of them would give 0 or 255.
    assert ((small > 110) & (small < 145))[:, :, 2:-2].all()


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(pixels, monkeypatch):
    decoded, inner = [], ImageOps.exif_transpose
    monkeypatch.setattr(
        ImageOps, "exif_transpose", lambda image: decoded.append(image.size) or inner(image)
    )
    image = Image.linear_gradient("L").resize((2000, 1000))
    small = pixels(image, "x.jpg", 20)
    assert (250, 125) in decoded
    expected = torch.linspace(0, 255, 21)[:-1] + 6
    assert (small[0, :, 10] - expected).abs().max() < 4


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(20, 20), (20, 20)], (20, 20)),
        ([(30, 64), (30, 64)], (64, 30)),
        ([(20, 20), (20, 21)], (32, 32)),
        ([(65, 20), (65, 20)], (32, 32)),
    ],
)
def test_without_a_size_small_and_equal_images_keep_theirs(tmp_path, sizes, expected):
    for name, size in zip(("a", "b"), sizes, strict=True):
        fill(tmp_path, (name,), size=size)
    assert load(tmp_path).train.images.shape[2:] == expected


def test_an_error_while_choosing_the_size_is_not_swallowed(tmp_path, monkeypatch):
    """Also not if the images can be read."""
    fill(tmp_path)
    monkeypatch.setattr(image_pixels, "_LARGEST_OWN", "a mistake")
    with pytest.raises(TypeError):
        load(tmp_path)


def test_a_turned_image_counts_with_the_size_it_has_upright(tmp_path):
    fill(tmp_path, size=(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "cat" / "turned.jpg", size=(30, 20), exif=exif)
    assert load(tmp_path).train.images.shape[2:] == (30, 20)


# what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "fragments"),
    [
        ([], ["is empty", "cat/1.png"]),
        (["a.png", "b.png"], ["has 2 files but no subfolders", "cat/1.png"]),
        (["cat/a.png"], ["has one class, cat, but at least two"]),
        (["pets/cat/a.png", "pets/dog/a.png"], ["Did you mean", "pets, which has subfolders?"]),
        (["cat/a.png", "dog/a.heic"], ["dog has no images (only 1 file of other types: .heic)"]),
        (["cat/a.png", "dog/"], ["dog has no images (nothing)", ".jpeg, .png"]),
        (["train/cat/a.png", "train/dog/a.png", "val/cat/a.png"], ["val lacks the classes dog"]),
        (
            [f"train/{name}/a.png" for name in ("cat", "dog")]
            + [f"test/{name}/a.png" for name in ("cat", "dog", "ox")],
            ["test has the classes ox, which", "train lacks"],
        ),
        (["train/cat/a.png", "train/dog/a.png", "test/a.png"], ["test has 1 file but no subfold"]),
        (["train/a.png", "val/a.png"], ["train has 1 file but no subfolders"]),
        (["val/cat/a.png", "test/cat/a.png"], ["has test/ and val/ but no train/"]),
        (["train/cat/a.png", "val/", "valid/"], ["val/ and valid/, which mean the same"]),
    ],
)
def test_a_wrong_layout_is_named_with_what_to_do(tmp_path, files, fragments):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            save(tmp_path / name, format="PNG")
    refused(tmp_path, tmp_path, *fragments)


def test_a_folder_that_is_not_there_or_no_folder(tmp_path):
    refused(tmp_path / "typo", f"folder {tmp_path / 'typo'} does not exist", "check data_dir")
    (tmp_path / "pets.zip").write_bytes(b"")
    refused(tmp_path / "pets.zip", "pets.zip is a file", "unpacked")


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    fill(tmp_path)
    inner = os.listdir

    def listdir(path):
        if path == tmp_path / "dog":
            raise PermissionError(13, "Permission denied")
        return inner(path)

    monkeypatch.setattr(os, "listdir", listdir)
    refused(tmp_path, f"the folder {tmp_path / 'dog'} cannot be read: Permission denied")


def broken_files():
    whole = io.BytesIO()
    Image.effect_noise((50, 50), 90).save(whole, "PNG")
    content = whole.getvalue()
    return {
        "empty.png": (b"", "empty"),
        "text.jpg": (b"<html>not found</html>", "not an image"),
        "truncated.png": (content[:1500], "truncated"),
        "header.png": (content[:20], "Truncated"),
        "moved.png": (None, "No such file"),
    }


@pytest.mark.parametrize("image_size", [None, 20])
def test_broken_images_are_all_counted_and_the_first_are_named(tmp_path, image_size):
    fill(tmp_path)
    for name, (content, _) in broken_files().items():
        if content is None:
            (tmp_path / "dog" / name).symlink_to("nowhere.png")
        else:
            (tmp_path / "dog" / name).write_bytes(content)
    Image.new("F", (20, 20)).save(tmp_path / "dog" / "z.tif")
    (tmp_path / "dog" / "z.png").write_bytes(b"")
    message = refused(
        tmp_path, "7 of 17 images in", "and 2 more. Repair or remove", image_size=image_size
    )
    for name, (_, reason) in broken_files().items():
        assert f"dog/{name} (" in message
        assert reason in message.partition(f"dog/{name} (")[2].partition("dog/")[0]


def test_pixels_of_32_bits_are_refused(tmp_path):
    fill(tmp_path)
    Image.new("F", (20, 20)).save(tmp_path / "dog" / "z.tif")
    refused(tmp_path, "dog/z.tif (pixels of 32 bits have no fixed white")


def test_images_that_would_fill_the_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    fill(tmp_path)
    save(tmp_path / "cat" / "9.png", (255, 0, 0), mode="RGB")
    monkeypatch.setattr(image_pixels, "_memory", lambda: 2 * 11 * 100 * 100)
    refused(tmp_path, "11 images of 3x100x100", "smaller image_size", image_size=100)
    (tmp_path / "cat" / "9.png").unlink()
    assert len(load(tmp_path, 100).train) == 8
    monkeypatch.setattr(image_pixels, "_memory", lambda: None)
    assert len(load(tmp_path, 100).train) == 8


def test_without_pillow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(tmp_path, 'pip install "tritoncaps[train]"')


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("folder", {}, ValueError, "needs data_dir"),
        ("folder", {"data_dir": ".", "image_size": "32"}, TypeError, "int or .height, width."),
        ("folder", {"data_dir": ".", "image_size": (32, 0)}, ValueError, "image_size must be >= 1"),
        ("digits", {"image_size": 32}, ValueError, "for name='folder' alone, the images of 'digi"),
    ],
)
def test_arguments_that_contradict_each_other(name, options, error, message):
    with pytest.raises(error, match=message):
        load_dataset(name, **options)


# how it is shown ---------------------------------------------------------------------------------


def test_sets_print_their_shape_and_not_their_pixels():
    images = make_set(30, seed=1)
    N, C, H, W = images.images.shape
    shown = f"ImageSet(N={N}, C={C}, H={H}, W={W}, device='cpu')"
    assert repr(images) == shown
    names = tuple(map(str, range(1000)))
    dataset = Dataset("mine", "Mine", images, images, names, "note")
    assert repr(dataset) == f"Dataset('mine', 1000 classes, train={shown}, test={shown})"
