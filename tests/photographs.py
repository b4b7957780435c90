"""Small data sets in the layouts of CUB-200-2011, Cars-196 and SOP, written into a folder.

The pixels of a class have a colour of their own, so that a test can tell from an image alone what
its label should be: `colour_of(number)` for the class that the layout gives this number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from bench.retrieval.folders import Counts

# Of the classes 1 to 5, of which the first three train.
IMAGES = (3, 2, 4, 2, 3)
COUNTS = Counts(9, 3, 5, 2)
CAR_NAMES = ["AM General 1", "Acura 2", "FIAT 500 3", "Ferrari 4", "smart 5"]  # sorted as bytes


def colour_of(number: int) -> tuple[int, int, int]:
    return (40 * number, 255 - 40 * number, 120)


def nearest_class(pixels: np.ndarray) -> int:
    """The class whose colour a picture [H, W, 3] has."""
    mean = pixels.reshape(-1, 3).mean(axis=0)
    return min(range(1, 6), key=lambda number: abs(mean - colour_of(number)).sum())


def write_image(path: Path, number: int, size: tuple[int, int] = (24, 18)) -> Path:
    """An image of one colour, but for some noise that makes it unlike any other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([number, *path.name.encode()]).integers(-9, 9, (*size[::-1], 3))
    pixels = np.clip(np.array(colour_of(number)) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, format="PNG" if path.suffix == ".png" else "JPEG")
    return path


def each_image() -> list[tuple[int, int]]:
    """Class and image of the class, both from 1, in the order of classes."""
    return [(number, i) for number, count in enumerate(IMAGES, 1) for i in range(1, count + 1)]


def write_cub(root: Path) -> None:
    """Rows of image_class_labels.txt and classes.txt in another order than those of images.txt."""
    images, labels = [], []
    for identity, (number, i) in enumerate(each_image(), 1):
        relative = f"00{number}.Bird_Of_{number}/Bird_{number}_000{i}.jpg"
        write_image(root / "images" / relative, number)
        images.append(f"{identity} {relative}")
        labels.append(f"{identity} {number}")
    (root / "images.txt").write_text("\n".join(images) + "\n")
    (root / "image_class_labels.txt").write_text("\n".join(labels[::-1]) + "\n")
    classes = [f"{number} 00{number}.Bird_Of_{number}" for number in (2, 5, 1, 3, 4)]
    (root / "classes.txt").write_text("\n".join(classes) + "\n")


def write_sop(root: Path) -> None:
    kinds = ("bicycle", "chair", "toaster", "bicycle", "chair")
    rows = ["image_id class_id super_class_id path"]
    for identity, (number, i) in enumerate(each_image(), 1):
        relative = f"{kinds[number - 1]}_final/11108{number}_{i - 1}.JPG"
        write_image(root / relative, number)
        rows.append(f"{identity} {number} 1 {relative}")
    cut = 1 + COUNTS.train_images
    (root / "Ebay_train.txt").write_text("\n".join(rows[:cut]) + "\n")
    (root / "Ebay_test.txt").write_text("\n".join([rows[0], *rows[cut:]]) + "\n")


def annotations(files: Sequence[str], numbers: Sequence[int], file_field: str) -> np.ndarray:
    """A row of structures, which is what the authors' files hold."""
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", file_field]
    table = np.empty((1, len(files)), dtype=[(field, object) for field in fields])
    for column, (file, number) in enumerate(zip(files, numbers, strict=True)):
        table[0, column] = (1, 2, 20, 15, np.uint8(number), file)
    return table


def cells(texts: Sequence[str]) -> np.ndarray:
    row = np.empty((1, len(texts)), dtype=object)
    row[0] = texts
    return row


def write_cars(root: Path, *, beside: bool = False) -> None:
    """cars_train and cars_test, each with images of every class; both number theirs from 1."""
    devkit = root if beside else root / "devkit"
    devkit.mkdir(parents=True, exist_ok=True)
    halves = {"cars_train": each_image()[::2], "cars_test": each_image()[1::2]}
    files = {"cars_train": "cars_train_annos.mat", "cars_test": "cars_test_annos_withlabels.mat"}
    for half, members in halves.items():
        names = [f"0000{k}.jpg" for k in range(1, len(members) + 1)]
        for name, (number, _) in zip(names, members, strict=True):
            write_image(root / half / name, number)
        table = annotations(names, [number for number, _ in members], "fname")
        savemat(devkit / files[half], {"annotations": table})
    savemat(devkit / "cars_meta.mat", {"class_names": cells(CAR_NAMES)})


def write_car_ims(root: Path) -> None:
    members = each_image()[::-1]
    files = [f"car_ims/00000{k}.jpg" for k in range(1, len(members) + 1)]
    for file, (number, _) in zip(files, members, strict=True):
        write_image(root / file, number)
    table = annotations(files, [number for number, _ in members], "relative_im_path")
    savemat(root / "cars_annos.mat", {"annotations": table, "class_names": cells(CAR_NAMES)})


def write_car_folders(root: Path, halves: Sequence[str] = ("train", "test")) -> None:
    for k, (number, i) in enumerate(each_image()):
        half = halves[k % len(halves)]
        write_image(root / half / CAR_NAMES[number - 1] / f"{i:04d}.jpg", number)
