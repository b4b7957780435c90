"""Clouds of points to measure the energy on: trained-like ones, and those where every pair acts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bench.settings import PruningSettings

CLASS_SIZE = 4
OWN_DISTANCES = (0.35, 0.6)  # between points of a class: outside delta, so that they attract
COLLAPSED_DISTANCE = 0.1
WORST_CLOUDS = ("one class", "collapsed")


def make_cloud(name: str, settings: PruningSettings) -> tuple[Tensor, Tensor]:
    """Unit-length points [N, D] float32 and their labels [N], fixed by the seed.

    Args:
        name: "small" and "large" are classes of 4 around random centres, in random order: points
            of a class 0.35 to 0.6 apart, two classes about sqrt(2). "sop" is the same with a
            batch, then 2 proxies of every class, as `PFMLLoss` orders them. "one class" is spread
            over the sphere, so that all pairs attract; "collapsed" is classes of 4 within delta of
            each other, so that all repel.
        settings: N, D and the seed.
    """
    generator = torch.Generator().manual_seed(settings.seed)

    def directions(n: int) -> Tensor:
        return functional.normalize(torch.randn(n, settings.depth, generator=generator), dim=1)

    def around(centres: Tensor, distances: Tensor) -> Tensor:
        """Points [N, D]: two that share their centre are about `distances` [N] apart."""
        spread = distances / (2 - distances.square()).sqrt()
        return functional.normalize(centres + spread[:, None] * directions(len(centres)), dim=1)

    if name == "one class":
        n = settings.worst_points
        return directions(n), torch.zeros(n, dtype=torch.int64)
    if name == "collapsed":
        labels = torch.arange(settings.worst_points) // CLASS_SIZE
        centres = directions(1).expand(len(labels), -1)
        return around(centres, torch.full((len(labels),), COLLAPSED_DISTANCE)), labels
    if name == "sop":
        proxies = torch.arange(settings.sop_classes).repeat_interleave(2)
        drawn = torch.randperm(settings.sop_classes, generator=generator)
        labels = torch.cat([drawn[: settings.sop_batch // 2].repeat_interleave(2), proxies])
    else:
        n = settings.small_points if name == "small" else settings.large_points
        labels = torch.randperm(n, generator=generator) // CLASS_SIZE
    classes = int(labels.max()) + 1
    distances = torch.empty(classes).uniform_(*OWN_DISTANCES, generator=generator)
    return around(directions(classes)[labels], distances[labels]), labels
