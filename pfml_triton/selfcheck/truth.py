"""What the self-check compares with: the energy as a dense formula, and points for it.

Eq. 1, 2 and 6 of the paper on the matrix of all distances, in the dtype of the points. Nothing of
it is shared with what is checked.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..potential import Potential

# Attraction and repulsion, on both sides of both radii, of points at 0.04 to 0.5 of each other.
POTENTIAL = Potential(alpha=3.0, delta=0.2, delta_rep=0.4, min_distance=0.01)
# What is allowed, of the largest entry. Float32 rounds to 6e-8. A force takes the power alpha + 2,
# which is 5, of the inverse of a distance, which sums D squares, and the inverse square roots of
# GPUs are good to 2e-7.
FLOAT32 = 5e-6
# Rounding to bfloat16: to the nearest on a GPU, towards zero in Triton's interpreter.
BRAIN = 2.0**-7 if os.environ.get("TRITON_INTERPRET") == "1" else 2.0**-8
# Of what is handed out in a dtype, which is rounded to it once.
FLOOR = {
    torch.float64: 1e-10,
    torch.float32: FLOAT32,
    torch.float16: 2.0**-11 + FLOAT32,
    torch.bfloat16: BRAIN + FLOAT32,
}
LOSSES = 2.0  # times what the dense formula loses in float32, where points are scaled in float32
_TIE = 2e-5  # relative: so near to a radius, rounding may decide whether a pair exerts a force
_ROWS = 1024  # of the matrix of distances at a time


def pair_energy(d: Tensor, same: Tensor, potential: Potential) -> Tensor:
    """psi at distances `d`, of pairs of one class (`same`) and of two."""
    alpha, m = potential.alpha, potential.min_distance

    def phi(d: Tensor) -> Tensor:
        return -d.log() if alpha == 0 else d**-alpha

    core = max(alpha, 1.0) * m ** -(alpha + 2) * (m**2 - d.clamp_max(m) ** 2) / 2
    repulsion = phi(d.clamp(m, potential.repulsion_radius)) + core
    return torch.where(same, -phi(d.clamp_min(potential.delta)), repulsion)


def energy(
    points: Tensor, labels: Tensor, potential: Potential, *, by_differences: bool = True
) -> Tensor:
    """Eq. 6, the sum over all ordered pairs of distinct points, differentiable.

    Args:
        by_differences: distances from x - y; else from |x|^2 + |y|^2 - 2 x.y, which is faster, and
            loses what points that are near have apart.
    """
    mode = "donot_use_mm" if by_differences else "use_mm"
    d = torch.cdist(points, points, compute_mode=f"{mode}_for_euclid_dist")
    psi = pair_energy(d, labels[:, None] == labels[None, :], potential)
    constant = potential.attraction_constant  # of every point with itself
    return psi.sum() - len(points) * constant


class Field(NamedTuple):
    """What points do to each of N points, by pairs that exert a force, in float64."""

    energy: Tensor  # [N]
    grad: Tensor  # [N, D]
    attracting: Tensor  # [N] int64, pairs
    repelling: Tensor  # [N] int64
    own_class: Tensor  # [N] int64, pairs of one class, with or without force
    nearest: Tensor  # [N], smallest d^2 of the repelling pairs, or inf


def field(x: Tensor, x_labels: Tensor, y: Tensor, y_labels: Tensor, potential: Potential) -> Field:
    """The field of points `y` [M, D] on points `x` [N, D], both float64."""
    parts = [
        _field(*part, y, y_labels, potential)
        for part in zip(x.split(_ROWS), x_labels.split(_ROWS), strict=True)
    ]
    return Field(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _field(x: Tensor, x_labels: Tensor, y: Tensor, y_labels: Tensor, potential: Potential) -> Field:
    d = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").requires_grad_()
    same = x_labels[:, None] == y_labels[None, :]
    psi = pair_energy(d, same, potential)
    (slope,) = torch.autograd.grad(psi.sum(), d)
    d, psi = d.detach(), psi.detach()
    attracts, repels = same & (d >= potential.delta), ~same & (d < potential.repulsion_radius)
    active = attracts | repels
    w = torch.where(active & (d > 0), slope / d, 0.0)
    return Field(
        (psi * active).sum(1),
        w.sum(1)[:, None] * x - w @ y,
        attracts.sum(1),
        repels.sum(1),
        same.sum(1),
        torch.where(repels, d, math.inf).amin(1) ** 2,
    )


def cloud(
    n: int, depth: int, dtype: torch.dtype, device: torch.device, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Nearly `n` points on or near the unit sphere, and their int64 classes, in no order.

    Two classes share a centre, around which points lie nearer or farther: inside and outside of the
    radii of `POTENTIAL`. No pair is at a radius, where the force jumps: a point that would be in
    one, scaled to unit length or not, is left out.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    classes = 2 * max(1, n // 32)
    labels = torch.randint(0, classes, (n,), generator=g)
    centre = torch.nn.functional.normalize(normal(classes // 2, depth), dim=1)
    step = torch.nn.functional.normalize(normal(n, depth), dim=1)
    distance = 0.03 + 0.27 * torch.rand(n, 1, generator=g, dtype=torch.float64)
    points = (centre[labels // 2] + distance * step).to(dtype)
    points, labels = points.to(device), labels.to(device)
    wide = points.double()
    tied = _in_ties(wide) | _in_ties(torch.nn.functional.normalize(wide, dim=1))
    return points[~tied], labels[~tied]


def _in_ties(points: Tensor) -> Tensor:
    """Which points [N] are in a pair whose distance is a radius of `POTENTIAL`, nearly."""
    tied = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for part in points.split(_ROWS):
        d = torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist")
        for radius in (POTENTIAL.delta, POTENTIAL.repulsion_radius):
            tied |= ((d / radius - 1).abs() < _TIE).any(0)
    return tied


def collisions(depth: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """96 points, float32: pairs of two classes 1e-4 to 0.3 apart, and exact duplicates of both
    kinds, of one class and of two."""
    g = torch.Generator().manual_seed(0)
    some = torch.nn.functional.normalize(torch.randn(32, depth, generator=g), dim=1)
    step = torch.nn.functional.normalize(torch.randn(32, depth, generator=g), dim=1)
    near = some + step * torch.logspace(-4, -0.5, 32)[:, None]
    points = torch.cat([some, near, some[:16], near[:16]])
    labels = torch.arange(32) // 2
    labels = torch.cat([labels, labels + 1, labels[:16], labels[:16]])
    return points.to(device), labels.to(device)
