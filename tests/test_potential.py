"""`Potential`: its formulas against the reference's derivative, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pfml_triton import Potential
from reference import potential_field as reference


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("same", [True, False])
def test_pair_terms_are_the_energy_and_the_force(alpha: float, same: bool) -> None:
    p = Potential(alpha, 0.25, 0.375, 0.0625)
    d = torch.linspace(0, 1, 397, dtype=torch.float64)[1:].requires_grad_()
    psi = reference.attraction(d, p) if same else reference.repulsion(d, p)
    (slope,) = torch.autograd.grad(psi.sum(), d)
    energy, weight, active = p.pair_terms(d.detach() ** 2, torch.full(d.shape, same))
    saturated = p.attraction_constant if same else p.repulsion_constant
    assert not energy[~active].any()
    scale = psi.abs().max().item()
    assert torch.allclose(energy + saturated * ~active, psi, atol=1e-12 * scale)
    assert torch.allclose(weight * d, slope, atol=1e-12 * slope.abs().max().item())


def test_a_pair_exactly_at_its_radius() -> None:
    """d = delta attracts (Eq. 1: d >= delta), d = delta_rep does not repel (Eq. 2: d < delta)."""
    p = Potential(2.0, 0.25, 0.5)
    at = torch.tensor([0.25**2, 0.5**2])
    same = torch.tensor([True, False])
    energy, weight, active = p.pair_terms(at, same)
    assert active.tolist() == [True, False]
    assert energy.tolist() == [-(0.25**-2), 0]
    assert weight.tolist() == [2 * 0.25**-4, 0]
    _, inside, _ = p.pair_terms(at * (1 - 1e-6), same)
    assert inside[0] == 0
    assert inside[1] < 0


def test_coinciding_points_exert_no_force() -> None:
    energy, weight, _ = Potential().pair_terms(torch.zeros(2), torch.tensor([True, False]))
    assert torch.isfinite(energy).all()
    assert torch.isfinite(weight).all()
    assert weight[0] == 0  # and any finite weight times a zero difference is no force


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"alpha": -1}, ValueError, r"alpha must be >= 0, got -1"),
        ({"alpha": float("nan")}, ValueError, r"alpha must be finite, got nan"),
        ({"alpha": "3"}, TypeError, r"alpha must be a real number, got '3'"),
        ({"alpha": True}, TypeError, r"got True"),
        ({"delta": 0}, ValueError, r"delta must be > 0, got 0"),
        ({"delta": 0.3, "delta_rep": 0.2}, ValueError, r"delta_rep must be >= delta = 0.3, got"),
        ({"min_distance": 0}, ValueError, r"min_distance must be in \(0, delta\) .*, got 0"),
        ({"min_distance": 0.2}, ValueError, r"\(0, 0.2\), got 0.2"),
        ({"alpha": 10**400}, ValueError, "alpha must be finite, got 1000"),
        ({"delta": 1e160}, ValueError, r"lengths must be in \[1e-15, 1e15\], .* = 1e\+160"),
        ({"min_distance": 1e-200}, ValueError, r"got min_distance = 1e-200"),
        ({"min_distance": None}, TypeError, r"min_distance must be a real number, got None"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Potential(**arguments)


def test_delta_rep_defaults_to_delta() -> None:
    assert Potential(delta=0.4).repulsion_radius == 0.4
    assert Potential(1, 0.2) == Potential(1.0, 0.2, 0.2)
    assert hash(Potential(1, 0.2)) == hash(Potential(1.0, 0.2, 0.2))


@pytest.mark.parametrize(("alpha", "stiffest"), [(0.0, 1e4), (0.5, 1e5), (3.0, 3e10)])
def test_the_largest_stiffness(alpha: float, stiffest: float) -> None:
    """alpha m^-(alpha + 2), and m^-2 of the logarithm; below 1, alpha is taken for 1."""
    assert Potential(alpha, min_distance=0.01).max_stiffness == pytest.approx(stiffest)
