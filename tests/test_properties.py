"""Random clouds: both backends agree with the reference whatever comes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfml_triton import Potential, potential_energy
from pfml_triton.kernels import launch
from pfml_triton.kernels.config import tiles_for
from tests.clouds import KINDS, assert_near, basis, cloud, truth


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


def pruned_as_dense(
    backend: str, kind: str, n: int, depth: int, classes: int, seed: int, potential: Potential
) -> None:
    x, labels = cloud(kind, n, depth, classes, torch.float32, seed)
    results = []
    for prune in (True, False):
        points = x.clone().requires_grad_()
        energy = potential_energy(points, labels, potential, prune=prune, backend=backend)
        (grad,) = torch.autograd.grad(energy, points)
        results.append((energy.detach(), grad))
    (energy, grad), (dense_energy, dense_grad) = results
    assert_near(grad, dense_grad.double(), torch.float32, what="gradient")
    assert torch.allclose(
        energy, dense_energy, rtol=1e-6, atol=1e-6 * float(dense_grad.abs().max())
    )


CONFIGURATIONS = {
    "kind": st.sampled_from(KINDS),
    "n": st.integers(2, 300),
    "depth": st.integers(1, 130),
    "classes": st.integers(1, 150),
    "seed": st.integers(0, 2**31),
    "potential": potentials(),
}


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(**CONFIGURATIONS)
def test_pruning_changes_nothing(**configuration: object) -> None:
    pruned_as_dense("torch", **configuration)  # type: ignore[arg-type]


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(**CONFIGURATIONS | {"n": st.integers(2, 150)})
def test_pruning_changes_nothing_in_the_kernels(**configuration: object) -> None:
    pruned_as_dense("triton", **configuration)  # type: ignore[arg-type]


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(**CONFIGURATIONS, wide=st.booleans())
def test_the_filter_kernel_drops_no_repelling_pair(
    kind: str, n: int, depth: int, classes: int, seed: int, potential: Potential, wide: bool
) -> None:
    x, labels = cloud(kind, n, depth, classes, torch.float32, seed)
    tiles = tiles_for(depth, hopper=wide)
    packed = launch.gather(x, labels, potential, basis=basis(x), tiles=tiles)
    near = launch.near_tiles(packed, packed)
    bits = (near[:, :, None] >> torch.arange(8)) & 1
    let_through = bits.flatten(1).repeat_interleave(16, 0).repeat_interleave(16, 1)[:n, :n]
    x, labels = x[packed.order[:n]], labels[packed.order[:n]]
    d2 = (x[:, None] - x).square().sum(2)
    repels = (labels[:, None] != labels) & (d2 < potential.repulsion_radius**2)
    assert let_through[repels].all()
