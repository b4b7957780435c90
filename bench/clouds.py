"""Clouds of points to measure the loss on: trained-like ones, and those where every pair acts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bench.settings import KINDS, Size

OWN_DISTANCES = (0.35, 0.6)  # between points of a class: outside delta, so that they attract
COLLAPSED_DISTANCE = 0.1


class Cloud(NamedTuple):
    """A batch, and then the proxies as `PFMLLoss` orders them."""

    points: Tensor  # [N, D] float32, of unit length
    labels: Tensor  # [N] int64
    size: Size

    @property
    def embeddings(self) -> Tensor:  # [B, D]
        return self.points[: self.size.batch]

    @property
    def batch_labels(self) -> Tensor:  # [B]
        return self.labels[: self.size.batch]

    @property
    def proxies(self) -> Tensor:  # [C, M, D]
        shape = self.size.classes, self.size.proxies, self.size.depth
        return self.points[self.size.batch :].view(shape)

    def to(self, device: torch.device) -> Cloud:
        return Cloud(self.points.to(device), self.labels.to(device), self.size)


def make_cloud(size: Size, seed: int) -> Cloud:
    """The cloud of a size, on the CPU, fixed by the seed.

    Of the kind "apart", classes lie around random centres: points of a class 0.35 to 0.6 apart, two
    classes about sqrt(2). "one-class" is spread over the sphere, so that all pairs attract;
    "collapsed" is all classes within delta of each other, so that all repel. The batch has 2
    samples of a class, of classes drawn at random, or more where these would not fill it.

    Raises:
        ValueError: an unknown kind, or "one-class" with several.
    """
    if size.kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {size.kind!r}")
    if size.kind == "one-class" and size.classes != 1:
        raise ValueError(f"a cloud of one class has classes = 1, got {size.classes}")
    generator = torch.Generator().manual_seed(seed)

    def directions(n: int) -> Tensor:
        return functional.normalize(torch.randn(n, size.depth, generator=generator), dim=1)

    drawn = torch.randperm(size.classes, generator=generator)
    batch = drawn.repeat_interleave(size.samples_per_class)[: size.batch]
    labels = torch.cat([batch, torch.arange(size.classes).repeat_interleave(size.proxies)])
    if size.kind == "one-class":
        return Cloud(directions(size.n), labels, size)
    if size.kind == "collapsed":
        centres = directions(1).expand(size.n, -1)
        distances = torch.full((size.n,), COLLAPSED_DISTANCE)
    else:
        distances = torch.empty(size.classes).uniform_(*OWN_DISTANCES, generator=generator)
        distances, centres = distances[labels], directions(size.classes)[labels]
    spread = distances / (2 - distances.square()).sqrt()  # two that share their centre
    points = functional.normalize(centres + spread[:, None] * directions(size.n), dim=1)
    return Cloud(points, labels, size)
