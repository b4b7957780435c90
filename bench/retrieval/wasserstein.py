"""How well proxies represent their class: the 2-Wasserstein distance to its samples, exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment, linprog
from scipy.spatial.distance import cdist

Floats = NDArray[np.floating]

_ASSIGNED = 1000  # the largest side of an assignment; beyond it a linear program is quicker


class ProxyDistances(NamedTuple):
    """Between the proxies and the samples of every class, on the unit sphere.

    Attributes:
        w2: [C] float64, the 2-Wasserstein distance of each class, both sides with uniform weights.
        per_class: M, the proxies of a class.
        spread: the mean over classes of the W2 distance from the samples to their mean point. One
            proxy cannot come nearer than that to the samples of its class; several can.
        apart: the root mean square distance between the mean points of two classes.

    Losses spread their embeddings differently, so distances of two losses compare only in units of
    one of these lengths.
    """

    w2: NDArray[np.float64]
    per_class: int
    spread: float
    apart: float


def wasserstein2(a: Floats, b: Floats) -> float:
    """The exact 2-Wasserstein distance between two clouds with uniform weights.

    Args:
        a: [m, D], m >= 1.
        b: [n, D], n >= 1.

    Returns:
        The square root of the least mean squared distance at which one cloud can be carried over
        to the other.

    Raises:
        ValueError: an empty cloud, or two depths.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"expected points [m, D] and [n, D], got {a.shape} and {b.shape}")
    costs = cdist(a.astype(np.float64), b.astype(np.float64), "sqeuclidean")
    size = math.lcm(len(a), len(b))
    if size > _ASSIGNED:
        return math.sqrt(_transported(costs))
    # Each point repeated until both clouds are as many, l: a plan between them that is best among
    # all is then a permutation (Birkhoff), and moves 1/l from each to one other.
    costs = costs.repeat(size // len(a), axis=0).repeat(size // len(b), axis=1)
    return math.sqrt(costs[linear_sum_assignment(costs)].mean())


def _transported(costs: NDArray[np.float64]) -> float:
    """The least mean cost of a plan, by linear programming, in memory that grows with [m, n]."""
    m, n = costs.shape
    sums = sparse.vstack(
        [sparse.kron(sparse.eye(m), np.ones((1, n))), sparse.kron(np.ones((1, m)), sparse.eye(n))],
        format="csr",
    )
    masses = np.concatenate([np.full(m, n), np.full(n, m)])
    found = linprog(costs.ravel(), A_eq=sums, b_eq=masses, method="highs")
    if not found.success:
        raise RuntimeError(f"no plan for costs {costs.shape}: {found.message}")
    return max(float(found.fun), 0.0) / (m * n)


def proxy_distances(
    samples: Floats,
    labels: NDArray[np.int64],
    proxies: Floats,
    on_class: Callable[[], None] | None = None,
) -> ProxyDistances:
    """The distance of each class's proxies to its samples, and two lengths to compare it with.

    Args:
        samples: [n, D], any length but 0; normalised here.
        labels: [n] in [0, C).
        proxies: [C, M, D] with C >= 2 and M >= 1, any length but 0; normalised here.
        on_class: called after every class.

    Raises:
        ValueError: no proxies, one class, or a class without samples.
    """
    classes, per_class = proxies.shape[:2]
    if classes < 2 or per_class < 1:
        raise ValueError(
            f"expected proxies [C, M, D] of C >= 2 and M >= 1, got {list(proxies.shape)}"
        )
    counts = np.bincount(labels, minlength=classes)
    if len(counts) > classes or not counts.all():
        raise ValueError(
            f"every one of the {classes} classes with proxies needs samples, and no other class, "
            f"got labels {labels.min()} to {labels.max()}, {(counts == 0).sum()} of them absent"
        )
    points, centres = normalised(samples), normalised(proxies)
    w2, spreads = np.empty(classes), np.empty(classes)
    means = np.empty((classes, samples.shape[1]))
    order = np.argsort(labels, kind="stable")
    for c, own in enumerate(np.split(points[order], counts.cumsum()[:-1])):
        means[c] = own.mean(axis=0)
        spreads[c] = math.sqrt(((own - means[c]) ** 2).sum(axis=1).mean())
        w2[c] = wasserstein2(centres[c], own)
        if on_class is not None:
            on_class()
    # Over pairs of two classes: mean |a - b|^2 = 2 C / (C - 1) mean |a - mean|^2.
    variance = ((means - means.mean(axis=0)) ** 2).sum(axis=1).mean()
    apart = math.sqrt(2 * classes / (classes - 1) * variance)
    return ProxyDistances(w2, per_class, float(spreads.mean()), apart)


def normalised(points: Floats) -> NDArray[np.float64]:
    """The points [..., D] at unit length, in float64."""
    points = points.astype(np.float64)
    return points / np.linalg.norm(points, axis=-1, keepdims=True)
