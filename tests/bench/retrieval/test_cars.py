import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from bench.retrieval.cars import CARS, cars
from bench.retrieval.folders import Parts
from tests.photographs import (
    CAR_NAMES,
    COUNTS,
    IMAGES,
    annotations,
    cells,
    nearest_class,
    write_car_folders,
    write_car_ims,
    write_cars,
    write_image,
)

LAYOUTS: dict[str, Callable[[Path], None]] = {
    "devkit": write_cars,
    "beside": partial(write_cars, beside=True),
    "car_ims": write_car_ims,
    "train and test": write_car_folders,
    "classes": partial(write_car_folders, halves=("",)),
}


def assert_labels_are_those_of_the_pixels(parts: Parts) -> None:
    for images, first in zip(parts, (1, 4), strict=True):
        shown = [nearest_class(images.picture(i)) for i in range(len(images.labels))]
        assert (images.labels + first).tolist() == shown
        counts = np.bincount(images.labels).tolist()
        assert counts == list(IMAGES[first - 1 : first - 1 + len(counts)])


def test_published_counts() -> None:
    assert CARS.counts == (8_054, 98, 8_131, 98)
    assert sum(CARS.counts[::2]) == 16_185


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_classes(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "größe of cars"
    LAYOUTS[layout](root)
    link = tmp_path / "link"
    link.symlink_to(root, target_is_directory=True)
    parts = cars(link, COUNTS)
    assert_labels_are_those_of_the_pixels(parts)
    assert [*parts[0].names, *parts[1].names] == CAR_NAMES


def test_images_in_a_folder_of_the_archives_name(tmp_path: Path) -> None:
    write_cars(tmp_path)
    for half in ("cars_train", "cars_test"):
        (tmp_path / half).rename(tmp_path / "x")
        (tmp_path / half).mkdir()
        (tmp_path / "x").rename(tmp_path / half / half)
    assert_labels_are_those_of_the_pixels(cars(tmp_path, COUNTS))


def test_what_else_lies_in_a_folder_of_classes_is_no_image(tmp_path: Path) -> None:
    write_car_folders(tmp_path)
    (tmp_path / "train" / ".DS_Store").write_text("")
    (tmp_path / "train" / "readme.txt").write_text("")
    (tmp_path / "train" / CAR_NAMES[0] / "Thumbs.db").write_text("")
    (tmp_path / "train" / CAR_NAMES[0] / "._0001.jpg").write_text("")
    image = tmp_path / "train" / CAR_NAMES[0] / "0001.jpg"
    image.rename(image.with_suffix(".JPG"))
    assert_labels_are_those_of_the_pixels(cars(tmp_path, COUNTS))


def test_a_class_of_one_half_only(tmp_path: Path) -> None:
    write_car_folders(tmp_path)
    one = tmp_path / "test" / CAR_NAMES[3]
    for path in one.iterdir():
        path.rename(tmp_path / "train" / CAR_NAMES[3] / path.name)
    one.rmdir()
    assert_labels_are_those_of_the_pixels(cars(tmp_path, COUNTS))


@pytest.mark.parametrize("make", ["empty", "absent", "file", "images at once"])
def test_no_layout_says_what_to_put_there(tmp_path: Path, make: str) -> None:
    root = tmp_path / "cars"
    if make == "file":
        root.write_text("")
    elif make != "absent":
        root.mkdir()
    if make == "images at once":
        write_image(root / "1.jpg", 1)
    with pytest.raises(ValueError, match=r"none of its layouts|no such folder") as caught:
        cars(root, COUNTS)
    assert CARS.contents in str(caught.value)
    assert CARS.origin in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "gone", "message"),
    [
        ("devkit", "devkit", r"lacks cars_meta\.mat, cars_train_annos\.mat, cars_test_annos_with"),
        ("devkit", "devkit/cars_test_annos_withlabels.mat",
         r"lacks cars_test_annos_withlabels\.mat.*cars_test_annos\.mat has no labels"),
        ("devkit", "cars_test", "found 7 of 14 images; missing are .*cars_test.* and 4 more"),
        ("devkit", "cars_train/00003.jpg", r"found 13 of 14 images; missing are .*00003\.jpg\.\n"),
        ("car_ims", "cars_annos.mat", r"lacks cars_annos\.mat, beside car_ims/"),
        ("car_ims", "car_ims", "found 0 of 14 images"),
        ("train and test", "test", "lacks test/"),
        ("classes", CAR_NAMES[4], "found 9 training images of 3 .* 2 test images of 1 classes"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path: Path, layout: str, gone: str, message: str) -> None:
    LAYOUTS[layout](tmp_path)
    path = tmp_path / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(ValueError, match=message):
        cars(tmp_path, COUNTS)


def test_other_counts_than_the_published_ones(tmp_path: Path) -> None:
    write_cars(tmp_path)
    with pytest.raises(ValueError, match=r"expected 8,054 training images of 98 .* found 14"):
        cars(tmp_path)


def annotated(numbers: list[int]) -> dict[str, np.ndarray]:
    files = [f"0000{k}.jpg" for k in range(1, len(numbers) + 1)]
    return {"annotations": annotations(files, numbers, "fname")}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            annotated([1, 1, 2, 3, 3, 4, 6]),
            r"train_annos\.mat must have classes in \[1, 5\], got 6",
        ),
        (annotated([0]), r"must have classes in \[1, 5\], got 0"),
        ({"annotations": annotations(["a"], [1], "name")}, "annotations with fname and class, got"),
        ({"annotations": np.arange(3)}, "with fname and class, got no structure"),
        ({"class_names": cells(["a"])}, "must hold annotations, got class_names"),
        ({}, "must hold annotations, got nothing"),
    ],
)
def test_annotations_that_are_not_as_they_should_be(
    tmp_path: Path, variables: dict[str, np.ndarray], message: str
) -> None:
    write_cars(tmp_path)
    savemat(tmp_path / "devkit" / "cars_train_annos.mat", variables)
    with pytest.raises(ValueError, match=message):
        cars(tmp_path, COUNTS)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"cut"])
def test_a_damaged_matlab_file_is_named(tmp_path: Path, content: bytes) -> None:
    write_cars(tmp_path)
    path = tmp_path / "devkit" / "cars_train_annos.mat"
    path.write_bytes(path.read_bytes()[:700] if content == b"cut" else content)
    with pytest.raises(ValueError, match=r"train_annos\.mat cannot be read as a MATLAB file: ."):
        cars(tmp_path, COUNTS)
