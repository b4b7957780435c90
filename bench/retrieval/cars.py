"""Cars-196 from a user's folder, in any of the three layouts in which it is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat

from bench.retrieval.folders import Counts, Parts, Standard, photos, split
from bench.retrieval.photos import PhotoImages

CARS = Standard(
    "Cars-196",
    "Stanford Cars, of the paper 3D Object Representations for Fine-Grained Categorization, by "
    "Stanford's AI laboratory",
    "cars_train/ and cars_test/ with cars_train_annos.mat, cars_test_annos_withlabels.mat and "
    "cars_meta.mat in devkit/ or beside it; or car_ims/ with cars_annos.mat; or a folder of images "
    "for each class, in train/ and test/ or at once",
    Counts(8_054, 98, 8_131, 98),
)
SUFFIXES = {".jpg", ".jpeg", ".png"}


def cars(folder: Path, counts: Counts = CARS.counts) -> Parts:
    """The first 98 models of cars to train on, the other 98 to retrieve.

    The division into training and test images that some layouts have is one of classification, and
    both halves are used. A folder for each class has no numbers; there the classes are sorted as
    bytes, capitals first. In the authors' order the makes are sorted so, and the two orders have
    the same first 98.

    Args:
        folder: holds one of the layouts that `CARS` names.
        counts: what must be there; the first `train_classes` classes are those to train on.

    Returns:
        The parts, images in the order of their list, or sorted by class and name.

    Raises:
        ValueError: it is not complete, or an annotation file is not as it should be, naming what.
    """
    if not folder.is_dir():
        raise CARS.incomplete(folder, "there is no such folder")
    if _any_folder(folder, "cars_train", "cars_test"):
        images = _halves(folder)
    elif _any_folder(folder, "car_ims") or (folder / "cars_annos.mat").exists():
        images = _whole(folder)
    else:
        images = _by_folder(folder)
    return CARS.check(folder, *split(images, counts.train_classes), counts)


def _any_folder(folder: Path, *names: str) -> bool:
    return any((folder / name).is_dir() for name in names)


def _halves(folder: Path) -> PhotoImages:
    """cars_train/ and cars_test/, with the annotations of the devkit."""
    files = ("cars_meta.mat", "cars_train_annos.mat", "cars_test_annos_withlabels.mat")
    found = [_first(folder / "devkit" / name, folder / name) for name in files]
    missing = [path.name for path in found if not path.exists()]
    if missing:
        hint = ". cars_test_annos.mat has no labels" if missing == list(files[2:]) else ""
        raise CARS.incomplete(folder, f"lacks {', '.join(missing)}, in devkit/ or beside it{hint}")
    names = _cells(found[0], "class_names")
    paths: list[Path] = []
    numbers: list[int] = []
    for half, path in zip(("cars_train", "cars_test"), found[1:], strict=True):
        # Some copies were unpacked into a folder of the archive's name.
        root = _first(folder / half / half, folder / half)
        images, classes = _annotations(path, "fname", names)
        paths += [root / image for image in images]
        numbers += classes
    return photos(paths, numbers, names)


def _whole(folder: Path) -> PhotoImages:
    """car_ims/, with all annotations and the names of the classes in one file."""
    path = folder / "cars_annos.mat"
    if not path.exists():
        raise CARS.incomplete(folder, "lacks cars_annos.mat, beside car_ims/")
    names = _cells(path, "class_names")
    files, numbers = _annotations(path, "relative_im_path", names)
    return photos([folder / file for file in files], numbers, names)


def _by_folder(folder: Path) -> PhotoImages:
    """A folder for each class, in train/ and test/, whose classes are joined, or at once."""
    roots = [folder]
    if _any_folder(folder, "train", "test"):
        roots = [folder / "train", folder / "test"]
        for root in roots:
            if not root.is_dir():
                raise CARS.incomplete(folder, f"lacks {root.name}/")
    by_class: dict[str, list[Path]] = {}
    for root in roots:
        for path in _sorted(root):
            if path.is_dir():
                images = [image for image in _sorted(path) if image.suffix.lower() in SUFFIXES]
                by_class.setdefault(path.name, []).extend(images)
    names = sorted(by_class)
    paths = [path for name in names for path in by_class[name]]
    numbers = [number for number, name in enumerate(names) for _ in by_class[name]]
    if not paths:
        raise CARS.incomplete(folder, "found none of its layouts")
    return photos(paths, numbers, dict(enumerate(names)))


def _sorted(folder: Path) -> list[Path]:
    """What is in a folder, by name, without hidden files, which some systems leave."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _first(*paths: Path) -> Path:
    """The first that exists, or else the last."""
    return next((path for path in paths if path.exists()), paths[-1])


def _variable(path: Path, name: str) -> Any:
    """A variable of a MATLAB file; ValueError, naming the file, if it is not there."""
    try:
        variables = loadmat(path, squeeze_me=True)
    except Exception as error:  # damaged files raise whatever the parser stumbles over
        raise ValueError(f"{path} cannot be read as a MATLAB file: {error}") from error
    if name not in variables:
        given = [key for key in variables if not key.startswith("__")]
        raise ValueError(f"{path} must hold {name}, got {', '.join(given) or 'nothing'}")
    return variables[name]


def _cells(path: Path, name: str) -> dict[int, str]:
    """The texts of a cell array, by their number from 1."""
    return {i: str(text) for i, text in enumerate(np.atleast_1d(_variable(path, name)), 1)}


def _annotations(path: Path, file_field: str, names: dict[int, str]) -> tuple[list[str], list[int]]:
    """The file and the class of each image in an array of structures."""
    table = np.atleast_1d(_variable(path, "annotations"))
    fields = table.dtype.names or ()
    if not {file_field, "class"} <= set(fields):
        raise ValueError(
            f"{path} must hold annotations with {file_field} and class, "
            f"got {', '.join(fields) or 'no structure'}"
        )
    classes = [int(number) for number in table["class"]]
    wrong = sorted(set(classes) - names.keys())
    if wrong:
        raise ValueError(f"{path} must have classes in [1, {len(names)}], got {wrong[0]}")
    return [str(file) for file in table[file_field]], classes
