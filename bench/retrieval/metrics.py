"""Retrieval quality: R@K and MAP@R, exact, in memory that grows with the points only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Diverged(ValueError):
    """Embeddings that are not finite."""


class Retrieval(NamedTuple):
    """How well every point finds the others of its class, by cosine similarity.

    Attributes:
        recall: R@K by K: the share in [0, 1] of queries with one of their class among the K nearest
            other points.
        map_at_r: mean average precision at R in [0, 1] (Musgrave et al., ECCV 2020, Eq. 2-3): for a
            query whose class has R other points, the mean over the R nearest of the precision at
            each place that is of the class, and 0 at the others.
    """

    recall: dict[int, float]
    map_at_r: float

    def as_row(self, prefix: str = "") -> dict[str, float]:
        """Flat, for a row of results: ``r1`` and so on, and ``map_at_r``, after a prefix."""
        row = {f"{prefix}r{k}": value for k, value in self.recall.items()}
        return row | {f"{prefix}map_at_r": self.map_at_r}


def retrieval(
    embeddings: Tensor, labels: Tensor, ks: Sequence[int] = (1, 2, 4, 8), chunk_size: int = 1024
) -> Retrieval:
    """R@K and MAP@R, exact: every point queries all the others.

    At most `chunk_size` x n similarities exist at a time.

    Args:
        embeddings: [n, D] float, any length; their device is used.
        labels: [n] integers, at least two classes and two points of each.
        ks: the values of K, each in [1, n - 1].
        chunk_size: queries at a time, 1 or more.

    Raises:
        Diverged: embeddings that are not finite.
        ValueError: shapes that do not match, a K outside its range, fewer than two classes, or a
            class that has one point and so no right answer.
    """
    n = len(labels)
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            "expected embeddings [n, D] and labels [n], "
            f"got {tuple(embeddings.shape)} and {tuple(labels.shape)}"
        )
    check_gallery(labels, ks)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if not embeddings.isfinite().all():
        raise Diverged("embeddings must be finite, got NaN or infinity: training diverged")
    device = embeddings.device
    classes, counts = labels.to(device).unique(return_inverse=True, return_counts=True)[1:]
    relevant = counts[classes] - 1  # R of each query
    depth = max(max(ks), int(relevant.max()))
    places = torch.arange(1, depth + 1, device=device)
    # Cosine similarity falls with the distance on the sphere. Of centred points, float32 resolves
    # distances that it would lose beside the 1 of a cosine, where all embeddings are alike.
    unit = functional.normalize(embeddings.double(), dim=1)
    points = (unit - unit.mean(dim=0)).float()
    offset = -0.5 * points.square().sum(dim=1)
    chunk_size = min(chunk_size, max(1, 2**25 // depth))  # a class may be huge
    hits = torch.zeros(len(ks), dtype=torch.int64, device=device)
    precision_sum = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, n, chunk_size):
        similarity = torch.addmm(offset, points[start : start + chunk_size], points.T)
        rows = torch.arange(len(similarity), device=device)
        similarity[rows, start + rows] = -math.inf
        neighbours = similarity.topk(depth, dim=1).indices
        right = classes[neighbours] == classes[start + rows, None]
        hits += torch.stack([right[:, :k].any(dim=1).sum() for k in ks])
        wanted = relevant[start + rows, None]
        precision = right.cumsum(dim=1) / places
        counted = (precision * (right & (places <= wanted))).sum(dim=1, dtype=torch.float64)
        precision_sum += (counted / wanted[:, 0]).sum()
    recall = {k: hit / n for k, hit in zip(ks, hits.tolist(), strict=True)}
    return Retrieval(recall, precision_sum.item() / n)


def check_gallery(labels: Tensor, ks: Sequence[int]) -> None:
    """Raise ValueError where points of these labels [n] could not be evaluated at these K."""
    n = len(labels)
    if not ks or min(ks) < 1 or max(ks) > n - 1:
        raise ValueError(f"every K must be in [1, {n - 1}], the gallery's size, got {tuple(ks)}")
    classes, counts = labels.unique(return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"retrieval needs at least 2 classes, got {len(classes)}")
    if counts.min() < 2:
        raise ValueError(
            "every class needs at least 2 images to be evaluated, "
            f"class {classes[counts.argmin()].item()} has 1"
        )
