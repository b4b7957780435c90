"""CUB-200-2011 and Stanford Online Products from a user's folder, in the layout of their authors.

Nothing is downloaded. A folder that is not complete is refused with a message that says what was
looked for and what to put where; whether the images can be read is seen later, in `readable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.retrieval.photos import PhotoImages

NAMED = 3  # of the files that are missing

Parts = tuple[PhotoImages, PhotoImages]  # to train on and to test


class Counts(NamedTuple):
    """What the two parts of a data set hold."""

    train_images: int
    train_classes: int
    test_images: int
    test_classes: int

    @classmethod
    def of(cls, train: PhotoImages, test: PhotoImages) -> Counts:
        return cls(len(train.paths), len(train.names), len(test.paths), len(test.names))

    def __str__(self) -> str:
        return (
            f"{self.train_images:,} training images of {self.train_classes:,} classes and "
            f"{self.test_images:,} test images of {self.test_classes:,} classes"
        )


@dataclass(frozen=True)
class Standard:
    """A data set as its authors publish it.

    Attributes:
        title: its name.
        origin: the title and the publisher under which it is found.
        contents: what its folder holds, the end of a sentence.
        counts: of the zero-shot split that the field uses.
    """

    title: str
    origin: str
    contents: str
    counts: Counts

    def incomplete(self, folder: Path, found: str) -> ValueError:
        """The error for a folder, with what was found there."""
        images = self.counts.train_images + self.counts.test_images
        return ValueError(
            f"{self.title} is not complete in {folder}: {found}.\n"
            f"Expected there: {self.contents}; {images:,} images in all.\n"
            f"Its authors publish it as {self.origin}; nothing is downloaded from here."
        )

    def check(self, folder: Path, train: PhotoImages, test: PhotoImages, counts: Counts) -> Parts:
        """Both parts again, once it is known that no image is missing and the counts are right.

        Raises:
            ValueError: an image is not there, one is listed twice, or the counts are not `counts`.
            OSError: a folder may not be entered, naming it.
        """
        paths = [*train.paths, *test.paths]
        if len(set(paths)) < len(paths):
            twice = len(paths) - len(set(paths))
            raise self.incomplete(folder, f"{twice:,} of {len(paths):,} images are listed twice")
        missing = [path for path in paths if not _exists(path)]
        if missing:
            expected = counts.train_images + counts.test_images
            raise self.incomplete(
                folder,
                f"found {len(paths) - len(missing):,} of {expected:,} images; missing are "
                f"{first_of(missing)}",
            )
        if Counts.of(train, test) != counts:
            raise self.incomplete(folder, f"expected {counts}, found {Counts.of(train, test)}")
        return train, test


CUB = Standard(
    "CUB-200-2011",
    "Caltech-UCSD Birds-200-2011, by Caltech's vision laboratory",
    "CUB_200_2011/ with images.txt, image_class_labels.txt, classes.txt and images/, "
    "or what is in it",
    Counts(5_864, 100, 5_924, 100),
)
SOP = Standard(
    "Stanford Online Products",
    "Stanford Online Products, by Stanford's computational vision and geometry laboratory",
    "Stanford_Online_Products/ with Ebay_train.txt, Ebay_test.txt and the folders "
    "bicycle_final/ to toaster_final/, or what is in it",
    Counts(59_551, 11_318, 60_502, 11_316),
)


def cub(folder: Path, counts: Counts = CUB.counts) -> Parts:
    """The first 100 species of birds to train on, the other 100 to retrieve.

    Args:
        folder: ``CUB_200_2011``, or the folder above it.
        counts: what must be there; the first `train_classes` classes are those to train on.

    Returns:
        The parts, images in the order of ``images.txt``, classes in that of their numbers.

    Raises:
        ValueError: it is not complete, or a list is not as it should be, naming what.
    """
    lists = ("images.txt", "image_class_labels.txt", "classes.txt")
    root = root_with(CUB, folder, "CUB_200_2011", lists)
    images, labels, classes = (_numbered(root / name) for name in lists)
    names = {number: _species(name) for number, name in classes.items()}
    if images.keys() != labels.keys():
        differing = sorted(images.keys() ^ labels.keys())
        raise ValueError(
            f"{root}: images.txt and image_class_labels.txt must number the same images, "
            f"but only one of them has {first_of(differing)}"
        )
    paths = [root / "images" / relative for relative in images.values()]
    numbers = [_class_number(labels[image], names, root / lists[1]) for image in images]
    return CUB.check(root, *split(photos(paths, numbers, names), counts.train_classes), counts)


def sop(folder: Path, counts: Counts = SOP.counts) -> Parts:
    """The products of ``Ebay_train.txt`` to train on, those of ``Ebay_test.txt`` to retrieve.

    Args:
        folder: ``Stanford_Online_Products``, or the folder above it.
        counts: what must be there.

    Returns:
        The parts, images in the order of their list, classes in that of their numbers.

    Raises:
        ValueError: it is not complete, or a list is not as it should be, naming what.
    """
    lists = ("Ebay_train.txt", "Ebay_test.txt")
    root = root_with(SOP, folder, "Stanford_Online_Products", lists)
    train, test = (_products(root, name) for name in lists)
    shared = set(train.names) & set(test.names)
    if shared:
        raise ValueError(f"{root}: both lists have products {first_of(sorted(shared))}")
    return SOP.check(root, train, test, counts)


def root_with(standard: Standard, folder: Path, inner: str, files: Sequence[str]) -> Path:
    """The folder itself, or `inner` in it, whichever has the files; ValueError if neither has."""
    if not folder.is_dir():
        raise standard.incomplete(folder, "there is no such folder")
    roots = (folder / inner, folder)
    for root in roots:
        if all(_exists(root / name) for name in files):
            return root
    root = next(root for root in roots if root.is_dir())
    missing = [name for name in files if not _exists(root / name)]
    raise standard.incomplete(folder, f"{root} lacks {', '.join(missing)}")


def photos(paths: Sequence[Path], numbers: Sequence[int], names: Mapping[int, str]) -> PhotoImages:
    """Images of the classes `numbers`, of which those that occur are labelled from 0 ascending."""
    present, labels = np.unique(np.array(numbers, dtype=np.int64), return_inverse=True)
    return PhotoImages(labels.astype(np.int64), [names[c] for c in present.tolist()], paths)


def split(images: PhotoImages, train_classes: int) -> Parts:
    """The first classes, and the others."""
    classes = np.arange(len(images.names))
    return images.of_classes(classes[:train_classes]), images.of_classes(classes[train_classes:])


def first_of(items: Sequence[object]) -> str:
    """The first few, and how many more."""
    more = f" and {len(items) - NAMED:,} more" if len(items) > NAMED else ""
    return ", ".join(str(item) for item in items[:NAMED]) + more


def _exists(path: Path) -> bool:
    """Whether there is such a file. A folder that may not be entered is an error, and not a no."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _lines(path: Path) -> Iterable[tuple[str, str]]:
    """The lines of a text file that are not empty, each with where it is."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _numbered(path: Path) -> dict[int, str]:
    """The lines "number text" of a file, text by number, in their order."""
    rows: dict[int, str] = {}
    for where, line in _lines(path):
        number, _, text = line.partition(" ")
        if not number.isdecimal() or not text:
            raise ValueError(f"{where}: expected a number and a text, got {line!r}")
        if int(number) in rows:
            raise ValueError(f"{where}: number {number} is there a second time")
        rows[int(number)] = text
    return rows


def _class_number(text: str, names: Mapping[int, str], path: Path) -> int:
    if not text.isdecimal() or int(text) not in names:
        raise ValueError(f"{path}: expected the number of a class in classes.txt, got {text!r}")
    return int(text)


def _species(name: str) -> str:
    """The name in "001.Black_footed_Albatross" as a person writes it."""
    return name.partition(".")[2].replace("_", " ") or name


def _products(root: Path, name: str) -> PhotoImages:
    """A list of SOP: a line of headings, then image, class, kind of product and path of each."""
    paths: list[Path] = []
    numbers: list[int] = []
    names: dict[int, str] = {}
    for where, line in _lines(root / name):
        fields = line.split(maxsplit=3)
        if len(fields) != 4:
            raise ValueError(f"{where}: expected two numbers, a kind and a path, got {line!r}")
        number, relative = fields[1], fields[3]
        if number == "class_id":
            continue
        if not number.isdecimal():
            raise ValueError(f"{where}: expected the number of a class, got {number!r}")
        paths.append(root / relative)
        numbers.append(int(number))
        # "bicycle_final/111085122871_0.JPG" is picture 0 of an item.
        item = relative.replace("_final/", " ").rpartition("_")[0]
        names.setdefault(int(number), item or relative)
    return photos(paths, numbers, names)
