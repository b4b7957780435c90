"""Is a provider right? Its gradient and its energy against `reference/`, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.clouds import Cloud
from pfml_triton import Potential
from reference import potential_field

SAMPLED_ROWS = 64
MOST_POINTS = 4096  # of which the energy is computed
_BLOCK_PAIRS = 1 << 18


class Truth(NamedTuple):
    """What the loss of a cloud and its gradient are."""

    rows: Tensor  # [R] which points, of the batch and then of the proxies
    gradient: Tensor  # [R, D] float64, by these points before they are scaled to unit length
    force: float  # the largest entry of the gradient by the points on the sphere
    energy: float | None  # None for more than `MOST_POINTS` points


class Errors(NamedTuple):
    gradient: float  # relative to the largest entry of the force, see `truth`
    energy: float | None  # relative


def truth(cloud: Cloud, dtype: torch.dtype, potential: Potential) -> Truth:
    """Eq. 6 of a cloud whose embeddings are rounded to `dtype`, on its device.

    The reference's potentials, of distances in float64 from differences. The gradient is that of at
    most `SAMPLED_ROWS` points, spread evenly; each pair counts twice in the energy.

    The scaling to unit length takes the radial part of a force away, in one class that is spread
    over the sphere nearly all of it. What rounding leaves is relative to the whole.
    """
    raw = torch.cat([cloud.embeddings.to(dtype).double(), cloud.proxies.flatten(0, 1).double()])
    points, labels, n = normalize(raw), cloud.labels, len(raw)
    rows = torch.linspace(0, n - 1, min(n, SAMPLED_ROWS), device=raw.device).round().long()
    some = raw[rows].requires_grad_()
    placed = normalize(some)
    on_sphere = placed.detach().requires_grad_()
    block = max(1, _BLOCK_PAIRS // len(rows))
    for others, other_labels in zip(points.split(block), labels.split(block), strict=True):
        _field(on_sphere, labels[rows], others, other_labels, potential).backward()
    assert on_sphere.grad is not None
    force = 2 * on_sphere.grad
    placed.backward(force)
    assert some.grad is not None
    energy = _energy(points, labels, potential) if n <= MOST_POINTS else None
    return Truth(rows, some.grad, float(force.abs().max()), energy)


def errors(expected: Truth, energy: float, embeddings_grad: Tensor, proxies_grad: Tensor) -> Errors:
    """How far a provider is from the truth.

    Args:
        expected: of the same cloud.
        energy: the value of the loss.
        embeddings_grad, proxies_grad: its gradient by [B, D] and [C, M, D].
    """
    gradient = torch.cat([embeddings_grad.double(), proxies_grad.flatten(0, 1).double()])
    off = (gradient[expected.rows] - expected.gradient).abs().max()
    of_energy = None
    if expected.energy is not None:
        of_energy = abs(energy - expected.energy) / abs(expected.energy)
    return Errors(float(off) / expected.force, of_energy)


def _field(
    x: Tensor, x_labels: Tensor, y: Tensor, y_labels: Tensor, potential: Potential
) -> Tensor:
    """The potential of the points x [R, D] in the field of y [M, D], with their own: scalar."""
    d = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    same = x_labels[:, None] == y_labels
    attraction = potential_field.attraction(d, potential)
    return torch.where(same, attraction, potential_field.repulsion(d, potential)).sum()


def _energy(points: Tensor, labels: Tensor, potential: Potential) -> float:
    block = max(1, _BLOCK_PAIRS // len(points))
    blocks = zip(points.split(block), labels.split(block), strict=True)
    total = sum(float(_field(x, own, points, labels, potential)) for x, own in blocks)
    # Every point's potential on itself is left out of Eq. 6.
    return total - len(points) * potential.attraction_constant
