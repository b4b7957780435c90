"""Labelled images, the form in which every data set reaches training and evaluation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Labels = NDArray[np.int64]
T = TypeVar("T", bound="Images")


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
    """

    images: NDArray[np.uint8]

    @property
    def channels(self) -> int:
        return 1 if self.images.ndim == 3 else self.images.shape[3]

    def training(self, batches: Sequence[Labels], seeds: Sequence[int]) -> Iterator[Tensor]:
        for batch, seed in zip(batches, seeds, strict=True):
            yield random_affine(to_tensor(self.images[batch]), torch.Generator().manual_seed(seed))

    def evaluation(self, batch_size: int) -> Iterator[Tensor]:
        for start in range(0, len(self.images), batch_size):
            yield to_tensor(self.images[start : start + batch_size])

    def picture(self, index: int) -> NDArray[np.uint8]:
        return self.images[index]

    def take(self, keep: NDArray[np.bool_]) -> Self:
        return replace(self, labels=self.labels[keep], images=self.images[keep])


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


def split_by_class(data: T, seed: int = 0, train_share: float = 0.5) -> tuple[T, T]:
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
    pixels = torch.from_numpy(images).float().div_(255)
    return pixels.unsqueeze(1) if images.ndim == 3 else pixels.permute(0, 3, 1, 2)


def random_affine(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, stretch, shear and shift each image a little, by its own random amount.

    Up to 15 degrees, a factor e^0.15 in size and e^0.1 in proportion, a shear of 0.15 and a shift
    of 6% of the side, all uniform.

    Args:
        images: [n, C, H, W] float, background 0.
        generator: CPU generator that draws the amounts, so that they are the same on any device.

    Returns:
        Images of the same shape, dtype and device.
    """

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * limit

    angle, shear = uniform(math.radians(15)), uniform(0.15)
    size, proportion = uniform(0.15), uniform(0.1)
    shift_x, shift_y = uniform(0.12), uniform(0.12)  # the side is 2 in these coordinates
    scale_x, scale_y = (size + proportion).exp(), (size - proportion).exp()
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, shift_x], dim=1)
    row_y = torch.stack([sin * scale_x, (shear * sin + cos) * scale_y, shift_y], dim=1)
    theta = torch.stack([row_x, row_y], dim=1).to(images)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)
