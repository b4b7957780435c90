"""Labelled images in arrays: the form in which every data set reaches the training code."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


class ImageSet(NamedTuple):
    """Labelled images.

    Attributes:
        images: [n, H, W] uint8, 0 is background.
        labels: [n] int64 in [0, number of classes).
        names: a readable name for each class, ``names[label]``.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: list[str]


def split_by_class(data: ImageSet, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Split into two sets without a common class, as zero-shot retrieval wants it.

    Args:
        data: a set of at least two classes.
        seed: chooses the classes; the same seed gives the same split.

    Returns:
        Training and test set, of half of the classes each (test gets the odd one), labels
        renumbered from 0 in the old order.

    Raises:
        ValueError: fewer than two classes.
    """
    classes = len(data.names)
    if classes < 2:
        raise ValueError(f"a split by class needs at least 2 classes, got {classes}")
    shuffled = np.random.default_rng(seed).permutation(classes)
    train, test = np.sort(shuffled[: classes // 2]), np.sort(shuffled[classes // 2 :])
    return _select_classes(data, train), _select_classes(data, test)


def _select_classes(data: ImageSet, classes: NDArray[np.int64]) -> ImageSet:
    keep = np.isin(data.labels, classes)
    return ImageSet(
        data.images[keep],
        np.searchsorted(classes, data.labels[keep]).astype(np.int64),
        [data.names[i] for i in classes],
    )


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """[n, H, W] uint8 to [n, 1, H, W] float32 in [0, 1]."""
    return torch.from_numpy(images).unsqueeze(1).float().div_(255)


def random_affine(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, stretch, shear and shift each image a little, by its own random amount.

    Up to 15 degrees, a factor e^0.15 in size and e^0.1 in proportion, a shear of 0.15 and a shift
    of 6% of the side, all uniform.

    Args:
        images: [n, 1, H, W] float, background 0.
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
