"""Labelled images, the form in which every data set reaches training and evaluation."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Images(ABC):
    """Labelled images, wherever their pixels are.

    Attributes:
        labels: [n] int64 in [0, number of classes), every class present.
        names: a readable name for each class, ``names[label]``.
    """

    labels: Labels
    names: Sequence[str]

    @property
    @abstractmethod
    def channels(self) -> int:
        """Of a batch: 1 or 3."""

    @abstractmethod
    def training(self, batches: Sequence[Labels], seeds: Sequence[int]) -> Iterator[Tensor]:
        """Augmented batches, each fixed by its indices and its seed, whatever came before.

        Args:
            batches: of each the indices of its images, [b] int64.
            seeds: of each batch's augmentation.

        Yields:
            [b, channels, H, W] float32, on the CPU.
        """

    @abstractmethod
    def evaluation(self, batch_size: int) -> Iterator[Tensor]:
        """All images in their order, not augmented: [b, channels, H, W] float32, on the CPU."""

    @abstractmethod
    def picture(self, index: int) -> NDArray[np.uint8]:
        """One image as a person sees it: [H, W] or [H, W, 3] uint8."""

    @abstractmethod
    def content(self) -> int:
        """A checksum of what the images are, labels apart."""

    @cached_property
    def fingerprint(self) -> str:
        """What tells this set from others of the same name."""
        checksums = f"{zlib.crc32(self.labels.tobytes()):08x}{self.content():08x}"
        return f"{len(self.labels)} images of {len(self.names)} classes ({checksums})"

    @abstractmethod
    def take(self, keep: NDArray[np.bool_]) -> Self:
        """The images [n] for which `keep` is true, labels and names as they are."""

    def relabelled(self, labels: Labels) -> Self:
        """The same images under other labels [n] of the same classes."""
        return replace(self, labels=labels)

    def of_classes(self, classes: NDArray[np.int64]) -> Self:
        """The images of some classes, ascending, renumbered from 0 in their order."""
        kept = self.take(np.isin(self.labels, classes))
        labels = np.searchsorted(classes, kept.labels).astype(np.int64)
        return replace(kept, labels=labels, names=[self.names[c] for c in classes])


@dataclass(frozen=True)
class ArrayImages(Images):
    """Images in one array; augmentation turns, scales, shears and shifts them a little.

    Attributes:
        images: [n, H, W] or [n, H, W, 3] uint8; what comes in from outside the frame is 0.
        moved: None evaluates images as they are; a seed moves each of them first, always the same
            way.
    """

    images: NDArray[np.uint8]
    moved: int | None = None

    @property
    def channels(self) -> int:
        return 1 if self.images.ndim == 3 else self.images.shape[3]

    def training(self, batches: Sequence[Labels], seeds: Sequence[int]) -> Iterator[Tensor]:
        for batch, seed in zip(batches, seeds, strict=True):
            yield random_affine(to_tensor(self.images[batch]), random_moves(len(batch), seed))

    def evaluation(self, batch_size: int) -> Iterator[Tensor]:
        moves = None if self.moved is None else random_moves(len(self.images), self.moved)
        for start in range(0, len(self.images), batch_size):
            part = slice(start, start + batch_size)
            images = to_tensor(self.images[part])
            yield images if moves is None else random_affine(images, moves[part])

    def picture(self, index: int) -> NDArray[np.uint8]:
        image = to_tensor(self.images[index : index + 1])
        if self.moved is not None:
            image = random_affine(image, random_moves(len(self.images), self.moved)[[index]])
        pixels = image[0].permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy()
        return pixels[..., 0] if self.channels == 1 else pixels

    def content(self) -> int:
        return zlib.crc32(np.ascontiguousarray(self.images).tobytes())

    def take(self, keep: NDArray[np.bool_]) -> Self:
        return replace(self, labels=self.labels[keep], images=self.images[keep])


AnyImages = TypeVar("AnyImages", bound=Images)


class DataSet(NamedTuple):
    """A split of images into classes to train on and other classes to retrieve.

    Attributes:
        name: what rows and folders of results call it.
        train, test: without a common class.
        skipped: images that could not be read and are in neither.
    """

    name: str
    train: Images
    test: Images
    skipped: int = 0


def arrays(
    train_images: NDArray[np.uint8],
    train_labels: NDArray[np.integer],
    test_images: NDArray[np.uint8],
    test_labels: NDArray[np.integer],
    name: str = "arrays",
) -> DataSet:
    """A data set of one's own.

    Args:
        train_images, test_images: [n, H, W], [n, H, W, 1] or [n, H, W, 3] uint8, with H and W of 8
            or more; what training turns and shifts in from outside the frame is 0.
        train_labels, test_labels: [n] integers, any. The classes of the two sets are taken to be
            different ones, whatever their numbers.
        name: what rows and folders of results call it.

    Raises:
        TypeError, ValueError: another dtype or shape, or lengths that do not match.
    """
    train = _as_images(train_images, train_labels, "train")
    test = _as_images(test_images, test_labels, "test")
    if train.channels != test.channels:
        raise ValueError(
            "train and test images must have as many channels, "
            f"got {train.channels} and {test.channels}"
        )
    return DataSet(name, train, test)


def _as_images(images: NDArray[np.uint8], labels: NDArray[np.integer], which: str) -> ArrayImages:
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(
            f"{which} images must be uint8 and labels integers, got {images.dtype} and "
            f"{labels.dtype}"
        )
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    is_gray, is_colour = images.ndim == 3, images.ndim == 4 and images.shape[3] == 3
    if not (is_gray or is_colour) or min(images.shape[1:3]) < 8:
        raise ValueError(
            f"{which} images must be [n, H, W] or [n, H, W, 3] with H and W of at least 8, "
            f"got {list(images.shape)}"
        )
    if labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"{which} labels must be [{len(images)}] as the images, and not empty, "
            f"got {list(labels.shape)}"
        )
    values, numbered = np.unique(labels, return_inverse=True)
    return ArrayImages(numbered.astype(np.int64), [str(value) for value in values], images)


def split_by_class(
    data: AnyImages, seed: int = 0, train_share: float = 0.5
) -> tuple[AnyImages, AnyImages]:
    """Split into two sets without a common class, as zero-shot retrieval wants it.

    Args:
        data: a set of at least two classes.
        seed: chooses the classes; the same seed gives the same split.
        train_share: of the classes, in (0, 1), that goes to the first set, rounded down.

    Returns:
        The two sets, labels renumbered from 0 in the old order.

    Raises:
        ValueError: fewer than two classes, or none for one of the sets.
    """
    classes = len(data.names)
    if classes < 2:
        raise ValueError(f"a split by class needs at least 2 classes, got {classes}")
    first = int(classes * train_share)
    if not 0 < first < classes:
        raise ValueError(
            f"train_share must leave each set a class of {classes}, got {train_share}: "
            f"{first} and {classes - first}"
        )
    shuffled = np.random.default_rng(seed).permutation(classes)
    return data.of_classes(np.sort(shuffled[:first])), data.of_classes(np.sort(shuffled[first:]))


def with_label_noise(labels: Labels, classes: int, share: float, seed: int) -> Labels:
    """Replace some labels by others, uniformly at random among the other classes.

    Args:
        labels: [n] int64 in [0, classes).
        classes: C, 2 or more if any label is to change.
        share: of the labels that change, in [0, 1); rounded to whole labels.
        seed: chooses which, and to what.

    Returns:
        [n] int64, a copy. A class may lose all its images, if it has few.

    Raises:
        ValueError: a share outside its range.
    """
    if not 0 <= share < 1:
        raise ValueError(f"label noise must be in [0, 1), got {share}")
    generator = np.random.default_rng(seed)
    wrong = generator.permutation(len(labels))[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong] + generator.integers(1, classes, len(wrong))) % classes
    return noisy


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """[n, H, W] or [n, H, W, 3] uint8 to [n, 1 or 3, H, W] float32 in [0, 1]."""
    # Whatever its strides are, and whether or not it may be written to.
    pixels = torch.from_numpy(images.astype(np.float32, order="C")).div_(255)
    return pixels.unsqueeze(1) if images.ndim == 3 else pixels.permute(0, 3, 1, 2)


def random_moves(n: int, seed: int) -> Tensor:
    """What `random_affine` needs for n images: [n, 6] in [-1, 1), the same on any device."""
    return 2 * torch.rand(n, 6, generator=torch.Generator().manual_seed(seed)) - 1


def random_affine(images: Tensor, moves: Tensor) -> Tensor:
    """Turn, scale, stretch, shear and shift each image a little, by its own amount.

    Args:
        images: [n, C, H, W] float; what comes in from outside the frame is 0.
        moves: [n, 6] in [-1, 1], in units of 15 degrees, a shear of 0.15, a factor e^0.15 in size
            and e^0.1 in proportion, and shifts of 6% of the side.

    Returns:
        Images of the same shape, dtype and device.
    """
    limits = torch.tensor([math.radians(15), 0.15, 0.15, 0.1, 0.12, 0.12])  # the side is 2
    angle, shear, size, proportion, shift_x, shift_y = (moves * limits).unbind(1)
    scale_x, scale_y = (size + proportion).exp(), (size - proportion).exp()
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, shift_x], dim=1)
    row_y = torch.stack([sin * scale_x, (shear * sin + cos) * scale_y, shift_y], dim=1)
    theta = torch.stack([row_x, row_y], dim=1).to(images)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)
