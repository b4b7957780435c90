"""The torch backend against the reference in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pfml_triton import Potential, potential_energy, torch_backend
from tests.clouds import (
    KINDS,
    assert_near,
    assert_same_without_grad,
    assert_terms_near,
    basis,
    cloud,
    eager,
    terms_of,
    truth,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["pairs", "dense", "pairs of tiles", "dense tiles"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force one of the ways of evaluating rows or active tiles, and make blocks small."""
    share = -1.0 if request.param.startswith("dense") else 2.0
    monkeypatch.setattr(torch_backend, "_DENSE_SHARE", share)
    monkeypatch.setattr(torch_backend, "_DENSE_SHARE_OF_TILE", share)
    monkeypatch.setattr(torch_backend, "_ACTIVE_SHARE", 2.0 if "tiles" in request.param else -1.0)
    monkeypatch.setattr(torch_backend, "_BLOCK_PAIRS", 3000)
    monkeypatch.setattr(torch_backend, "_CHUNK", 3)
    monkeypatch.setattr(torch_backend, "_GATHER_ENTRIES", 5000)
    monkeypatch.setattr(torch_backend, "_COLUMNS", 33)
    return str(request.param)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_clouds(kind: str, dtype: torch.dtype) -> None:
    x, labels = cloud(kind, 150, 24, 6, dtype)
    p = Potential(3.0, 0.2, 0.25)
    points = x.clone().requires_grad_()
    energy = potential_energy(points, labels, p, backend="torch")
    (grad,) = torch.autograd.grad(energy, points, torch.tensor(2.0**-8, dtype=energy.dtype))
    true_energy, true_grad = truth(x, labels, p)
    _, eager_grad = eager(x, labels, p)
    assert_near(energy.detach(), true_energy, energy.dtype, what="energy")
    fits = (2.0**-8 * true_grad).abs() <= torch.finfo(dtype).max
    assert_near(
        torch.where(fits, grad, 0.0),
        torch.where(fits, 2.0**-8 * true_grad, 0.0),
        dtype,
        torch.where(fits, 2.0**-8 * eager_grad, 0.0) if dtype.itemsize == 2 else None,
        what="gradient",
    )


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, 6.0])
@pytest.mark.parametrize("depth", [1, 7])
def test_exponents_and_depths(alpha: float, depth: int) -> None:
    x, labels = cloud("collisions", 60, depth, 3, torch.float32)
    p = Potential(alpha, 0.2, 0.3, 0.02)
    terms, alone = (
        terms_of(torch_backend, x, labels, x, labels, p, needs_grad=needs_grad)
        for needs_grad in (True, False)
    )
    true_energy, true_grad = truth(x, labels, p)
    assert_same_without_grad(alone, terms)
    assert terms.grad is not None
    assert_near(2 * terms.grad, true_grad, torch.float32, what="gradient")
    assert (potential_energy(x, labels, p, backend="torch") - true_energy).abs() <= 2e-7 * abs(
        true_energy
    )


@pytest.mark.usefixtures("path")
def test_gradcheck() -> None:
    x, labels = cloud("clusters", 10, 3, 2, torch.float64)
    y, y_labels = cloud("collisions", 8, 3, 3, torch.float64, seed=1)
    x.requires_grad_()
    y.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y: potential_energy(
            x, labels, Potential(2.5, 0.2, 0.3, 0.05),
            sources=y, source_labels=y_labels, backend="torch",
        ),
        (x, y), eps=1e-7, atol=1e-3, rtol=1e-4,
    )  # fmt: skip


def test_many_and_few_pairs_in_one_call_choose_both_paths() -> None:
    """A collapsed class beside spread-out ones, at the shipped block sizes."""
    x, labels = cloud("clusters", 3000, 8, 1500, torch.float32)
    x[:700] = x[0] + 0.3 * torch.randn(700, 8)
    labels[:700] = 5000
    p = Potential()
    terms, exact = (
        terms_of(torch_backend, z, labels, z, labels, p, needs_grad=True) for z in (x, x.double())
    )
    assert_terms_near(terms, exact, torch.float32)


def partners(distance: float, norm: float, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """200 pairs of two classes at a distance, on a sphere of a norm: [400, depth]."""
    unit = torch.nn.functional.normalize
    x = unit(torch.randn(200, depth, dtype=torch.float64), dim=1)
    step = torch.randn(200, depth, dtype=torch.float64)
    step = unit(step - (step * x).sum(1, keepdim=True) * x, dim=1)
    return torch.cat([norm * x, norm * x + distance * step]).float(), torch.arange(400)


@pytest.mark.parametrize(
    ("distance", "norm", "depth"), [(0.1999, 1.0, 512), (0.1999, 270.0, 64), (0.19999, 30.0, 300)]
)
def test_nominated_in_spite_of_the_products_rounding(
    monkeypatch: pytest.MonkeyPatch, distance: float, norm: float, depth: int
) -> None:
    monkeypatch.setattr(torch_backend, "_DENSE_SHARE", 2.0)
    x, labels = partners(distance, norm, depth)
    terms = terms_of(torch_backend, x, labels, x, labels, Potential(), needs_grad=False)
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(terms.repelling, (exact < 0.2).sum(1) - 1)


@pytest.mark.parametrize(("norm", "depth"), [(270.0, 64), (100.0, 300)])
def test_attraction_nominated_in_spite_of_the_products_rounding(
    monkeypatch: pytest.MonkeyPatch, norm: float, depth: int
) -> None:
    """Tile by tile; where all of a row of tiles is looked at, classes decide."""
    monkeypatch.setattr(torch_backend, "_ACTIVE_SHARE", 2.0)
    monkeypatch.setattr(torch_backend, "_DENSE_SHARE_OF_TILE", 2.0)
    x, _ = partners(0.2002, norm, depth)
    labels = torch.arange(200).repeat(2)
    given = x, labels, x, labels, Potential()
    terms = terms_of(torch_backend, *given, needs_grad=False, basis=basis(x))
    assert (terms.attracting == 1).all()


def test_tiles_are_looked_at_that_are_near_or_share_a_class() -> None:
    """Of more points than one product has columns: what is below the diagonal is mirrored."""
    n, p = 2500, Potential()
    x, labels = 3 * torch.randn(n, 12), torch.randint(400, (n,))
    x[:30] = x[30:60] + 0.03  # the others are near nothing
    points, again = (torch_backend.gather(x, labels, p, basis=basis(x)) for _ in range(2))
    rows, columns = torch_backend._sketches(points, p, basis(x))
    largest = rows.double() @ columns.double().T
    near = largest.unflatten(1, (-1, 64)).unflatten(0, (-1, 64)).amax((1, 3)) > 0
    ranges = [part.aminmax() for part in labels.sort()[0].split(64)]
    shares = torch.tensor([[a.min <= b.max and b.min <= a.max for b in ranges] for a in ranges])
    assert (near & ~shares).any()
    assert (shares & ~near).any()
    for acting in (points, again):
        active = torch_backend._active_tiles(points, acting, p, basis(x))
        assert torch.equal(active, near | shares)


@pytest.mark.parametrize("how", ["autocast", "medium"])
def test_reduced_precision_changes_nothing(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(torch_backend, "_DENSE_SHARE", 2.0)
    x, labels = partners(0.19, 1.0, 8)
    expected = potential_energy(x, labels)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(potential_energy(x, labels), expected)
            return
    before = torch.get_float32_matmul_precision()

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:  # what "medium" may do
        return torch.matmul(a.bfloat16().float(), b.bfloat16().float())

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(potential_energy(x, labels), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_far_from_the_origin_both_paths_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """|x|^2 + |y|^2 - 2 x.y of such points keeps 4 digits even in float64."""
    x = torch.zeros(64, 2)
    x[:, 0] = 1e6
    x[:, 1] = 0.05 * torch.arange(64)
    labels = torch.arange(64) % 3
    results = []
    for share in (2.0, -1.0):
        monkeypatch.setattr(torch_backend, "_DENSE_SHARE", share)
        results.append(terms_of(torch_backend, x, labels, x, labels, Potential(), needs_grad=True))
    assert_terms_near(*results, torch.float32)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("norm", "alpha", "m"), [(1, 6.0, 0.01), (1, 5.5, 1e-3), (100, 3.0, 0.01)])
def test_duplicates_with_conflicting_labels(norm: float, alpha: float, m: float) -> None:
    """No force at d = 0, though the weight there is enormous."""
    x = norm * torch.nn.functional.normalize(torch.randn(64, 64), dim=1)
    x[32:] = x[:32]
    labels = torch.arange(64) // 16
    p = Potential(alpha, 0.2, None, m)
    terms, exact = (
        terms_of(torch_backend, z, labels, z, labels, p, needs_grad=True) for z in (x, x.double())
    )
    assert_terms_near(terms, exact, torch.float32)


@pytest.mark.usefixtures("path")
def test_near_pairs_of_two_far_clumps() -> None:
    x = torch.tensor([[1000, 0], [1000, 1.5e-3], [-1000, 0], [-1000, 1.5e-3]])
    labels = torch.arange(4)
    p = Potential(3.0, 0.2, None, 1e-3)
    terms, exact = (
        terms_of(torch_backend, z, labels, z, labels, p, needs_grad=True) for z in (x, x.double())
    )
    assert_terms_near(terms, exact, torch.float32)


MEMORY = """
import resource, torch
from pfml_triton import potential_energy
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.manual_seed(0)
labels = torch.arange(2000).repeat_interleave(4)
centre = torch.randn(2000, 512)[labels] * {centres}
x = torch.nn.functional.normalize(centre + 0.6 * torch.randn(8000, 512), dim=1).requires_grad_()
potential_energy(x[:200], labels[:200]).backward()
before = peak()
potential_energy(x, labels).backward()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("centres", [1.0, 0.0], ids=["apart", "collapsed"])
def test_peak_memory_at_8000_points_of_512(centres: float) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEMORY.format(centres=centres)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 200e6  # one N x N matrix in float32 is 256 MB
