import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.retrieval.folders import CUB, SOP, Counts, Parts, Standard, cub, sop
from tests.photographs import COUNTS, IMAGES, nearest_class, write_cub, write_image, write_sop

Loader = Callable[..., Parts]


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    write_cub(tmp_path / "CUB_200_2011")
    return tmp_path


@pytest.fixture
def products(tmp_path: Path) -> Path:
    write_sop(tmp_path / "Stanford_Online_Products")
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def assert_labels_are_those_of_the_pixels(parts: Parts) -> None:
    """Each image has the colour of its class, and classes 1 to 3 train."""
    for images, first in zip(parts, (1, 4), strict=True):
        shown = [nearest_class(images.picture(i)) for i in range(len(images.labels))]
        assert (images.labels + first).tolist() == shown
        assert images.labels.dtype == np.int64
        counts = np.bincount(images.labels).tolist()
        assert counts == list(IMAGES[first - 1 : first - 1 + len(counts)])


def test_published_counts() -> None:
    assert str(CUB.counts) == (
        "5,864 training images of 100 classes and 5,924 test images of 100 classes"
    )
    assert SOP.counts == Counts(59_551, 11_318, 60_502, 11_316)
    assert sum(CUB.counts[::2]) == 11_788
    assert sum(SOP.counts[::2]) == 120_053


@pytest.mark.parametrize("inside", [True, False])
def test_cub(birds: Path, inside: bool) -> None:
    parts = cub(birds / "CUB_200_2011" if inside else birds, COUNTS)
    assert_labels_are_those_of_the_pixels(parts)
    train, test = parts
    assert train.names == ["Bird Of 1", "Bird Of 2", "Bird Of 3"]
    assert test.names == ["Bird Of 4", "Bird Of 5"]
    assert [path.name for path in test.paths[:2]] == ["Bird_4_0001.jpg", "Bird_4_0002.jpg"]


@pytest.mark.parametrize("inside", [True, False])
def test_sop(products: Path, inside: bool) -> None:
    parts = sop(products / "Stanford_Online_Products" if inside else products, COUNTS)
    assert_labels_are_those_of_the_pixels(parts)
    train, test = parts
    assert train.names == ["bicycle 111081", "chair 111082", "toaster 111083"]
    assert test.names == ["bicycle 111084", "chair 111085"]


def test_symbolic_links_spaces_and_other_alphabets(birds: Path, tmp_path: Path) -> None:
    root = birds / "CUB_200_2011"
    image = next((root / "images").glob("001*/Bird_1_0001.jpg"))
    moved = image.parent.rename(image.parent.with_name("001.Vogel größe 鳥"))
    (moved / image.name).rename(moved / "a bird 1.JPG")
    edit(root / "images.txt", "001.Bird_Of_1/Bird_1_0001.jpg", f"{moved.name}/a bird 1.JPG")
    edit(root / "images.txt", "001.Bird_Of_1", moved.name)
    edit(root / "classes.txt", "001.Bird_Of_1", moved.name)
    link = tmp_path / "a link"
    link.symlink_to(root, target_is_directory=True)
    parts = cub(link, COUNTS)
    assert_labels_are_those_of_the_pixels(parts)
    assert parts[0].names[0] == "Vogel größe 鳥"
    assert parts[0].paths[0].name == "a bird 1.JPG"


def test_lists_written_on_windows(birds: Path) -> None:
    for path in (birds / "CUB_200_2011").glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert_labels_are_those_of_the_pixels(cub(birds, COUNTS))


@pytest.mark.parametrize(("load", "standard"), [(cub, CUB), (sop, SOP)])
def test_no_folder_and_an_empty_one_say_what_to_put_there(
    tmp_path: Path, load: Loader, standard: Standard
) -> None:
    with pytest.raises(ValueError, match=r"(?s)there is no such folder.*Expected there.*publish"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="there is no such folder"):
        load(tmp_path / "file")
    with pytest.raises(ValueError, match=r"lacks .*\.txt") as caught:
        load(tmp_path)
    assert standard.title in str(caught.value)
    assert standard.origin in str(caught.value)
    assert standard.contents in str(caught.value)


def test_a_list_that_is_not_there_is_named(birds: Path) -> None:
    (birds / "CUB_200_2011" / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"CUB_200_2011 lacks classes\.txt\.\n"):
        cub(birds, COUNTS)


def test_images_that_are_listed_but_missing(birds: Path, products: Path) -> None:
    for path in (birds / "CUB_200_2011" / "images").glob("003*/*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"found 10 of 14 images; missing are .*, .* and 1 more"):
        cub(birds, COUNTS)
    (products / "Stanford_Online_Products" / "chair_final" / "111085_2.JPG").unlink()
    with pytest.raises(ValueError, match=r"found 13 of 14 images; missing are .*/111085_2\.JPG\."):
        sop(products, COUNTS)


def test_other_counts_than_the_published_ones(birds: Path, products: Path) -> None:
    found = "found 9 training images of 3 classes and 5 test images of 2 classes"
    with pytest.raises(ValueError, match=re.escape(f"{SOP.counts}, {found}")):
        sop(products)
    with pytest.raises(ValueError, match=r"expected 5,864 .*, found 14 .* 5 .* and 0 test images"):
        cub(birds)
    with pytest.raises(ValueError, match=r"found 5 training images of 2 classes and 9 test"):
        cub(birds, Counts(9, 2, 5, 3))


def test_an_image_that_is_listed_twice(products: Path) -> None:
    path = products / "Stanford_Online_Products" / "Ebay_test.txt"
    edit(path, "111085_2", "111085_1")
    with pytest.raises(ValueError, match="1 of 14 images are listed twice"):
        sop(products, COUNTS)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("images.txt", "3 001", "x 001", r"images\.txt, line 3: expected a number and a text"),
        ("images.txt", "3 001", "2 001", r"images\.txt, line 3: number 2 is there a second time"),
        ("images.txt", "14 005", "15 005", "only one of them has 14, 15"),
        ("image_class_labels.txt", "3 1\n", "3 9\n", "class in classes.txt, got '9'"),
        ("image_class_labels.txt", "3 1\n", "3 one\n", "class in classes.txt, got 'one'"),
        ("image_class_labels.txt", "3 1\n", "3\n", r"line 12: expected a number and a text"),
    ],
)
def test_lists_of_cub_that_are_not_as_they_should_be(
    birds: Path, name: str, old: str, new: str, message: str
) -> None:
    edit(birds / "CUB_200_2011" / name, old, new)
    with pytest.raises(ValueError, match=message):
        cub(birds, COUNTS)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("Ebay_train.txt", "2 1 1 ", "2 1 ", r"Ebay_train\.txt, line 3: expected two numbers"),
        ("Ebay_test.txt", "10 4 1", "10 four 1", r"line 2: expected the number of a class"),
        ("Ebay_test.txt", "bicycle_final/111084", "bicycle_final/111081", r"both .*bicycle 111081"),
    ],
)
def test_lists_of_sop_that_are_not_as_they_should_be(
    products: Path, name: str, old: str, new: str, message: str
) -> None:
    edit(products / "Stanford_Online_Products" / name, old, new)
    with pytest.raises(ValueError, match=message):
        sop(products, COUNTS)


def test_a_list_that_is_no_text(birds: Path) -> None:
    write_image(birds / "CUB_200_2011" / "picture.jpg", 1).rename(
        birds / "CUB_200_2011" / "classes.txt"
    )
    with pytest.raises(ValueError, match=r"classes\.txt must be text in UTF-8"):
        cub(birds, COUNTS)


def test_a_folder_that_may_not_be_entered_is_not_called_incomplete(
    birds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not bind the superuser, under whom tests may run."""
    stat = Path.stat

    def denied(path: Path, **arguments: bool) -> object:
        if path.parent.name.startswith("002"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **arguments)

    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(PermissionError, match=r"002\.Bird_Of_2"):
        cub(birds, COUNTS)
