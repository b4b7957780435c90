"""Eq. 1-6 of "Potential Field Based Deep Metric Learning" (Bhatnagar and Ahuja, CVPR 2025).

Plain differentiable torch on the full distance matrix, in the dtype it is given: the specification
that the kernels and the torch backend are checked against. The only departures from the paper are
the softened core of the repulsion (`min_distance`) and alpha = 0, the logarithmic limit, both
described in `pfml_triton.potential`; and a point's potential on itself, a constant, is left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pfml_triton import Potential


def attraction(d: Tensor, potential: Potential) -> Tensor:
    """Eq. 1: psi_att at distances `d` >= 0 (any shape): -max(d, delta)^-alpha."""
    d = torch.where(d < potential.delta, potential.delta, d)
    return d.log() if potential.alpha == 0 else -(d**-potential.alpha)


def repulsion(d: Tensor, potential: Potential) -> Tensor:
    """Eq. 2: psi_rep at distances `d` >= 0 (any shape): min(d, delta_rep)^-alpha, softened."""
    alpha, m, radius = potential.alpha, potential.min_distance, potential.repulsion_radius
    outer = torch.where((d < m) | (d >= radius), radius, d)
    inner = (1 - (d / m) ** 2) / 2
    if alpha == 0:
        return torch.where(d < m, inner - math.log(m), -outer.log())
    return torch.where(d < m, m**-alpha * (1 + alpha * inner), outer**-alpha)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """||x_i - y_j|| of x [N, D] and y [M, D], [N, M], from differences; slope 0 at d = 0."""
    squared = (x[:, None, :] - y[None, :, :]).square().sum(-1)
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)


def class_potential(
    queries: Tensor, points: Tensor, labels: Tensor, class_index: int, potential: Potential
) -> Tensor:
    """Eq. 3-4: Psi_j at `queries` [Q, D], of `points` [N, D] with classes `labels` [N]: [Q]."""
    d = distances(queries, points)
    same = (labels == class_index)[None, :]
    return torch.where(same, attraction(d, potential), repulsion(d, potential)).sum(1)


def point_energy(points: Tensor, labels: Tensor, potential: Potential) -> Tensor:
    """Every point's potential in the field of all others, [N]: Psi_{y_i}(z_i) without itself."""
    d = distances(points, points)
    same = labels[:, None] == labels[None, :]
    psi = torch.where(same, attraction(d, potential), repulsion(d, potential))
    return (psi * ~torch.eye(len(points), dtype=torch.bool)).sum(1)


def total_potential_energy(
    embeddings: Tensor,
    labels: Tensor,
    proxies: Tensor,
    proxy_labels: Tensor,
    potential: Potential,
) -> Tensor:
    """Eq. 6: U of a batch [B, D] and its proxies [P, D], without the points' self terms: scalar."""
    points = torch.cat([embeddings, proxies])
    return point_energy(points, torch.cat([labels, proxy_labels]), potential).sum()
