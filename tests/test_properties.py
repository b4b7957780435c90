"""Random clouds: both backends agree with the reference whatever comes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfml_triton import Potential, potential_energy
from tests.clouds import KINDS, assert_near, cloud, truth


@st.composite
def potentials(draw: st.DrawFn) -> Potential:
    delta = draw(st.floats(0.05, 0.8))
    return Potential(
        alpha=draw(st.one_of(st.integers(0, 6), st.floats(0.1, 6))),
        delta=delta,
        delta_rep=delta * draw(st.floats(1, 2)),
        min_distance=delta * draw(st.floats(0.05, 0.9)),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(2, 20),
    depth=st.integers(1, 40),
    classes=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    potential=potentials(),
)
def test_backends_agree_with_the_reference(
    kind: str, n: int, depth: int, classes: int, seed: int, potential: Potential
) -> None:
    x, labels = cloud(kind, n, depth, classes, torch.float32, seed)
    true_energy, true_grad = truth(x, labels, potential)
    for backend in ("torch", "triton"):
        points = x.clone().requires_grad_()
        energy = potential_energy(points, labels, potential, backend=backend)
        (grad,) = torch.autograd.grad(energy, points)
        assert_near(grad, true_grad, torch.float32, what=f"gradient, {backend}")
        # Attraction and repulsion may cancel in the energy: compare with the sum of their sizes.
        size = sum(
            abs(truth(x[i : i + 2], labels[i : i + 2], potential)[0]) for i in range(n - 1)
        ) + abs(true_energy)
        assert abs(energy.double() - true_energy) <= 1e-6 * size, backend
