"""Clouds of points to test on, eager PyTorch to compare with, and the one table of tolerances.

|ours - truth| <= K * |eager - truth| + FLOOR[dtype], relative to the largest entry of the truth,
which is the reference in float64 on the same points.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pfml_triton import Potential
from pfml_triton.potential import FieldTerms
from pfml_triton.sketch import random_basis
from reference import potential_field

K = 1.0
FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

KINDS = ("clusters", "tight", "collisions", "duplicates", "one_class", "all_apart", "wide_norms")


def cloud(
    kind: str, n: int, depth: int, classes: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """`n` points and int64 labels. All kinds but the last two lie on or near the unit sphere."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    labels = torch.randint(0, classes, (n,), generator=g)
    spread = {"tight": 0.02, "all_apart": 2.0}.get(kind, 0.25)
    centre = torch.nn.functional.normalize(normal(classes, depth), dim=1)
    points = 0.5 * centre[labels] + spread * normal(n, depth) / depth**0.5
    if kind == "collisions":  # different classes, from 1e-4 apart to beyond min_distance
        half = n // 2
        step = torch.nn.functional.normalize(normal(half, depth), dim=1)
        points[half : 2 * half] = points[:half] + step * torch.logspace(-4, -0.5, half)[:, None]
        labels[half : 2 * half] = (labels[:half] + 1) % max(classes, 2)
    elif kind == "duplicates":
        points[n // 2 :] = points[: n - n // 2].clone()
    elif kind == "one_class":
        labels[:] = 7
    elif kind == "wide_norms":
        points *= torch.logspace(-3, 2, n)[:, None]
    return points.to(dtype), labels


def basis(points: Tensor) -> Tensor:
    """The sketch of `points` that is used if one knows nothing of them."""
    return random_basis(points.shape[1], points.device)


def truth(points: Tensor, labels: Tensor, potential: Potential) -> tuple[Tensor, Tensor]:
    """Energy and gradient by the reference in float64."""
    points = points.detach().double().requires_grad_()
    energy = potential_field.point_energy(points, labels, potential).sum()
    (grad,) = torch.autograd.grad(energy, points)
    return energy.detach(), grad


def eager(points: Tensor, labels: Tensor, potential: Potential) -> tuple[Tensor, Tensor]:
    """What one writes in PyTorch: the Gram matrix in the points' own dtype, and autograd."""
    points = points.detach().clone().requires_grad_()
    norm = points.square().sum(1)
    d2 = norm[:, None] + norm[None, :] - 2 * points @ points.T
    same = labels[:, None] == labels[None, :]
    d = d2.clamp_min(potential.min_distance**2).sqrt()
    psi = torch.where(
        same, potential_field.attraction(d, potential), potential_field.repulsion(d, potential)
    )
    energy = psi[~torch.eye(len(points), dtype=torch.bool)].sum()
    (grad,) = torch.autograd.grad(energy, points)
    return energy.detach(), grad


def assert_near(
    ours: Tensor, true: Tensor, dtype: torch.dtype, eager: Tensor | None = None, what: str = ""
) -> None:
    """The rule of this file; the message names the worst element."""
    assert ours.shape == true.shape, f"{what}: shape {ours.shape}, expected {true.shape}"
    if true.numel() == 0:
        return
    scale = true.abs().max().clamp_min(1e-300)
    error = (ours.double() - true).abs() / scale
    allowed = FLOOR[dtype]
    if eager is not None:
        allowed += K * float(((eager.double() - true).abs() / scale).nan_to_num(0, 0, 0).max())
    worst = error.nan_to_num(float("inf")).flatten().argmax()
    index = [int(i) for i in torch.unravel_index(worst, error.shape)]
    assert error.flatten()[worst] <= allowed, (
        f"{what}: error {float(error.flatten()[worst]):.2e} of the largest entry at {index} "
        f"(got {float(ours.flatten()[worst]):.9g}, true {float(true.flatten()[worst]):.9g}), "
        f"allowed {allowed:.2e} in {dtype}"
    )


def terms_of(
    backend: Any,
    x: Tensor,
    x_labels: Tensor,
    y: Tensor,
    y_labels: Tensor,
    potential: Potential,
    *,
    needs_grad: bool,
    **how: Any,
) -> FieldTerms:
    """What the field of `y` does to `x`, by one of the two backends; `how` goes to `gather`."""
    acted_on = backend.gather(x, x_labels, potential, **how)
    mutual = y is x and y_labels is x_labels
    acting = acted_on if mutual else backend.gather(y, y_labels, potential, **how)
    terms: FieldTerms = backend.field_terms(acted_on, acting, potential, needs_grad=needs_grad)
    return terms


def assert_terms_near(ours: FieldTerms, true: FieldTerms, dtype: torch.dtype) -> None:
    """The same pairs exert force, and energy and gradient are as near as the table says."""
    assert torch.equal(ours.attracting.long(), true.attracting.long())
    assert torch.equal(ours.repelling.long(), true.repelling.long())
    assert torch.equal(ours.own_class.long(), true.own_class.long())
    assert_near(ours.energy, true.energy, dtype, what="energy")
    assert ours.grad is not None
    assert true.grad is not None
    assert_near(ours.grad, true.grad, dtype, what="gradient")
    near = true.nearest.double()
    assert torch.allclose(ours.nearest.double(), near, rtol=1e-5, atol=1e-12)


def assert_same_without_grad(alone: FieldTerms, terms: FieldTerms) -> None:
    """Bit for bit what was computed along with the gradient."""
    assert alone.grad is None
    assert alone.tiles == terms.tiles
    for name in ("energy", "attracting", "repelling", "own_class", "nearest", "active"):
        assert torch.equal(getattr(alone, name), getattr(terms, name)), name
