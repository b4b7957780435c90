"""The specification itself: against nested loops, closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from pfml_triton import Potential
from reference import potential_field as reference
from tests.clouds import cloud

ALPHAS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.5)


def psi(d: float, same: bool, p: Potential) -> float:
    """Eq. 1-2 with the softened core, in plain Python."""

    def phi(r: float) -> float:
        return -math.log(r) if p.alpha == 0 else r**-p.alpha

    if same:
        return -phi(p.delta) if d < p.delta else -phi(d)
    assert p.delta_rep is not None
    if d >= p.delta_rep:
        return phi(p.delta_rep)
    m = p.min_distance
    if d >= m:
        return phi(d)
    if p.alpha == 0:
        return -math.log(m) + (1 - d * d / (m * m)) / 2
    return m**-p.alpha * (1 + p.alpha / 2 * (1 - d * d / (m * m)))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_energy_by_nested_loops(alpha: float) -> None:
    p = Potential(alpha, 0.2, 0.3, 0.02)
    z, labels = cloud("collisions", 14, 3, 3, torch.float64)
    proxies, proxy_labels = cloud("clusters", 6, 3, 3, torch.float64, seed=1)
    points = torch.cat([z, proxies]).tolist()
    classes = torch.cat([labels, proxy_labels]).tolist()
    expected = sum(
        psi(math.dist(points[i], points[j]), classes[i] == classes[j], p)
        for i in range(20)
        for j in range(20)
        if i != j
    )
    u = reference.total_potential_energy(z, labels, proxies, proxy_labels, p)
    assert u.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_class_field_by_nested_loops(alpha: float) -> None:
    p = Potential(alpha, 0.2, 0.3, 0.02)
    points, labels = cloud("clusters", 12, 2, 2, torch.float64)
    queries = torch.cat([torch.randn(5, 2, dtype=torch.float64), points[:1]])
    field = reference.class_potential(queries, points, labels, 1, p)
    for q, value in zip(queries.tolist(), field.tolist(), strict=True):
        expected = sum(
            psi(math.dist(q, z), c == 1, p)
            for z, c in zip(points.tolist(), labels.tolist(), strict=True)
        )
        assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("same", "d", "energy", "slope"),
    [
        # alpha = 2, delta = 0.5, delta_rep = 1, m = 0.25: d^-2, and its slope -2 d^-3
        (True, 0.4, -4.0, 0.0),
        (True, 0.5, -4.0, 16.0),
        (True, 2.0, -0.25, 0.25),
        (False, 2.0, 1.0, 0.0),
        (False, 1.0, 1.0, 0.0),
        (False, 0.5, 4.0, -16.0),
        (False, 0.25, 16.0, -128.0),
        (False, 0.125, 28.0, -64.0),  # the parabola 32 - 256 d^2
        (False, 0.0, 32.0, 0.0),
    ],
)
def test_two_points(same: bool, d: float, energy: float, slope: float) -> None:
    p = Potential(2.0, 0.5, 1.0, 0.25)
    x = torch.tensor([[0.0], [d]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0 if same else 1])
    u = reference.point_energy(x, labels, p).sum()
    (grad,) = torch.autograd.grad(u, x)
    assert u.item() == pytest.approx(2 * energy, abs=1e-12)
    assert grad[1].item() == pytest.approx(2 * slope, abs=1e-9)
    assert grad[0].item() == pytest.approx(-2 * slope, abs=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_by_finite_differences(alpha: float) -> None:
    p = Potential(alpha, 0.2, 0.3, 0.02)
    points, labels = cloud("collisions", 12, 3, 3, torch.float64)
    points.requires_grad_()
    scale = reference.point_energy(points, labels, p).sum().abs().item()
    assert torch.autograd.gradcheck(
        lambda x: reference.point_energy(x, labels, p).sum() / scale, (points,), eps=1e-7, atol=1e-6
    )


def test_alpha_zero_is_the_limit() -> None:
    """(d^-alpha - 1) / alpha tends to -log d."""
    d = torch.logspace(-3, 1, 50, dtype=torch.float64)
    small, zero = Potential(1e-7, 0.2, 0.3), Potential(0.0, 0.2, 0.3)
    for psi, sign in ((reference.attraction, -1), (reference.repulsion, 1)):
        limit = (psi(d, small) - sign) / 1e-7
        assert torch.allclose(limit, psi(d, zero), atol=1e-4)
