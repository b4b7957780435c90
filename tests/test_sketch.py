"""The filter's bound, attacked: no pair that exerts force is ever dropped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pfml_triton import Potential, torch_backend
from pfml_triton.kernels import launch
from pfml_triton.potential import FieldTerms
from pfml_triton.sketch import (
    MAX_DEPTH,
    REACH,
    accumulation,
    lifted,
    random_basis,
    sketch_depth,
    sound_basis,
    turned_basis,
)
from tests.clouds import terms_of

CPU = torch.device("cpu")
DEPTHS = (1, 2, 7, 28, 60, 61, 64, 200, 512, 1000, 2048)
NORMS = (1e-3, 1.0, 30.0, 1e3)


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def ulps(x: Tensor, steps: Tensor) -> Tensor:
    """float32 numbers moved by whole units in their last place."""
    return (x.view(torch.int32) + steps).view(torch.float32)


def partners(depth: int, norm: float, delta: float, n: int = 64) -> tuple[Tensor, Tensor]:
    """x and y [n, depth], each pair at delta to within some ulps, along directions that the sketch
    keeps and along random ones."""
    basis = random_basis(depth, CPU).double()
    x = norm * unit(torch.randn(n, depth, dtype=torch.float64))
    inside = unit(torch.randn(n, basis.shape[1], dtype=torch.float64) @ basis.T)
    step = torch.where(
        torch.arange(n)[:, None] % 4 > 0, inside, unit(torch.randn(n, depth).double())
    )
    x, y = x.float(), (x + delta * step).float()
    # The rounding of large points moves them by more than an ulp of delta: search the last place.
    for scale in (1 - 1e-7, 1 - 1e-6, 1 - 1e-4, 1 - 1e-3):
        apart = (x.double() - y.double()).norm(dim=1) >= delta
        nearer = (x.double() + scale * delta * step).float()
        y = torch.where(apart[:, None], nearer, y)
    return x, y


def factors(x: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """What the kernels make of points: [N, K] bfloat16 each. The sketch is that of points rounded
    to bfloat16, by tensor cores that truncate."""
    basis = random_basis(x.shape[1], CPU)
    coarse = x.bfloat16()
    error = (x.double() - coarse.double()).norm(dim=1).float() * 1.001
    sketch = tensor_core(coarse[:, None, :], basis.T[None], 8).float()
    return lifted(sketch, error + accumulation(x.shape[1]) * coarse.float().norm(dim=1), delta)


def tensor_core(a: Tensor, b: Tensor, group: int) -> Tensor:
    """Inner products over the last dimension as tensor cores may compute them: `group` terms and
    the sum so far are aligned to the largest and truncated to 24 bits."""
    a, b = a.double(), b.double()
    total = torch.zeros(1, dtype=torch.float64)
    for part_a, part_b in zip(a.split(group, -1), b.split(group, -1), strict=True):
        part = part_a * part_b
        aligned = torch.cat([total.expand(part.shape[:-1])[..., None], part], -1)
        largest = aligned.abs().amax(-1, keepdim=True).clamp_min(1e-300)
        quantum = torch.exp2(largest.log2().floor() - 23)
        total = ((aligned / quantum).trunc() * quantum).sum(-1)
    return total


def computed_as_near(x: Tensor, y: Tensor, delta: float) -> Tensor:
    """Whether the squared distance, as float32 differences give it, is below delta^2."""
    return (x - y).square().sum(1) < torch.tensor(delta).square()


@pytest.mark.parametrize("norm", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("depth", [20, 61, 200])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_lift_has_all_that_it_has_to_allow_for(backend: str, depth: int, norm: float) -> None:
    """Term by term, as sketch.py derives it: the attacks above need no more than some of them."""
    n, p, basis = 40, Potential(3.0, 0.2, 1.0), random_basis(depth, CPU)
    x = norm * unit(torch.randn(n, depth))
    labels = torch.arange(n)
    if backend == "torch":
        cloud = torch_backend.gather(x, labels, p, basis=basis)
        left, right = torch_backend._sketches(cloud, p, basis)
        coarse = x
    else:
        packed = launch.gather(x, labels, p, basis=basis)
        left, right, coarse = packed.left, packed.right, packed.coarse[:n, :depth]
    width, k = basis.shape[1], left.shape[1] - 4  # the kernels pad it
    left, right, coarse = left.double(), right.double(), coarse.double()
    assert torch.equal(left[:n, :k], right[:n, :k])
    assert not left[:n, width:k].any()
    assert torch.equal(left[:, k : k + 2], right[:, k + 2 :])
    assert (left[:, k + 2 :] == 1).all()
    assert (right[:, k : k + 2] == 1).all()
    assert (left[n:, k] == -torch.inf).all()
    sketch = left[:n, :width]
    radius = (x.double() - coarse).norm(dim=1)
    radius += 8 * (depth + 16) * 2.0**-23 * coarse.norm(dim=1)
    radius += (sketch - coarse @ basis.double()).norm(dim=1)
    reach, square = 1.001 * p.repulsion_radius, sketch.square().sum(1)
    given = reach * radius + radius.square() + reach**2 / 4
    least = given - square / 2 + 2.0**-14 * (given + square)
    lift = left[:n, k : k + 2].sum(1)
    # Two numbers of bfloat16, truncated; and what little of the radius is float32's rounding.
    assert (lift >= least - 2.0**-15 * least.abs() - 1e-6 * (given + square)).all()
    assert (lift <= least + 0.02 * given + 2.0**-14 * least.abs()).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_no_pair_at_the_radius_is_dropped(depth: int, norm: float) -> None:
    delta = 0.2
    x, y = partners(depth, norm, delta)
    rows, _ = factors(x, delta)
    _, columns = factors(y, delta)
    near = computed_as_near(x, y, delta)
    assert near.sum() >= 16
    for group in (1, 4, 8, 16, MAX_DEPTH):
        assert (tensor_core(rows, columns, group)[near] >= 0).all(), group
    assert ((rows.float() * columns.float()).sum(1)[near] >= 0).all()
    # TF32 truncates the factors themselves: it finds nothing to truncate.
    tf32 = [(f.float().view(torch.int32) & ~0x1FFF).view(torch.float32) for f in (rows, columns)]
    assert torch.equal(tf32[0], rows.float())
    assert torch.equal(tf32[1], columns.float())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("depth", [1, 7, 28, 60])
def test_rounding_that_pushes_apart(depth: int, norm: float) -> None:
    """Every coordinate of x just above the middle of two bfloat16 numbers, every one of y below:
    rounding adds a bfloat16 ulp to each difference. Without the radius these pairs are lost."""
    base = (norm * unit(torch.rand(64, depth) + 0.5)).bfloat16().float()
    gap = base.bfloat16().float().view(torch.int32) + 0x8000
    middle = gap.view(torch.float32)  # half way to the next bfloat16 number
    steps = torch.ones(64, depth, dtype=torch.int32)
    x, y = ulps(middle, steps), ulps(middle, -steps)
    assert (x.bfloat16() > y.bfloat16()).all()
    d = (x.double() - y.double()).norm(dim=1)
    for i in range(0, 64, 8):
        delta = float(d[i]) * 1.01
        row, _ = factors(x[i : i + 1], delta)
        _, column = factors(y[i : i + 1], delta)
        assert (row.double() * column.double()).sum() >= 0
        # The same with lifts that know of no rounding.
        row, column = row.double(), column.double()
        k = depth
        for f, at in ((row, k), (column, k + 2)):
            f[:, at : at + 2] = 0
            f[:, at] = (0.5 * REACH * delta) ** 2 - 0.5 * f[:, :k].square().sum(1)
        assert (row * column).sum() < 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("backend", "depth"),
    [*(("torch", d) for d in DEPTHS), *(("triton", d) for d in (1, 2, 28, 60, 61, 512))],
)
def test_backends_drop_nothing(
    monkeypatch: pytest.MonkeyPatch, backend: str, depth: int, norm: float
) -> None:
    """Pairs at delta, each in a tile of its own, which nothing else makes active: the other points
    of its rows and those of its columns are far apart."""
    monkeypatch.setattr(torch_backend, "_ACTIVE_SHARE", 2.0)  # never all of a row of tiles
    delta, pairs, height = 0.1875, 4, 64 if backend == "torch" else 16
    p, tile = Potential(3.0, delta), torch.arange(pairs)
    at_x, at_y = tile * height + torch.randint(height, (4,)), tile * 64 + torch.randint(64, (4,))
    x, y = partners(depth, norm, delta, pairs)
    rows, columns = torch.zeros(pairs * height, depth), torch.zeros(pairs * 64, depth)
    rows[:, 0], columns[:, 0] = 16 * max(norm, 1), -16 * max(norm, 1)
    labels = torch.arange(len(rows)), 1000 + torch.arange(len(columns))

    def field(basis: Tensor | None) -> FieldTerms:
        given = rows, labels[0], columns, labels[1], p
        return field_terms(backend)(*given, needs_grad=False, basis=basis)

    assert field(random_basis(depth, CPU)).active.sum() == 0
    rows[at_x], columns[at_y] = x, y
    terms, dense = field(random_basis(depth, CPU)), field(None)
    assert dense.repelling[at_x].sum() >= 1
    assert 0 < terms.active.sum() <= pairs**2
    assert torch.equal(terms.repelling, dense.repelling)
    assert torch.allclose(terms.nearest, dense.nearest, rtol=1e-4)
    assert torch.allclose(terms.energy, dense.energy, rtol=1e-5)


def field_terms(backend: str) -> Callable[..., FieldTerms]:
    return partial(terms_of, torch_backend if backend == "torch" else launch)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_basis_never_lengthens(depth: int, cast: torch.dtype) -> None:
    random = random_basis(depth, CPU)
    assert random.shape == (depth, min(depth, sketch_depth(depth) - 4))
    points = torch.randn(300, depth) * torch.logspace(0, -2, depth)
    assert torch.equal(sound_basis(random.to(cast)), random.to(cast).bfloat16())
    turned = turned_basis(random, points)
    one_direction = random[:, :1].expand(random.shape)
    given = (turned, 100 * turned, one_direction)
    for basis in (random, *(sound_basis(basis.to(cast)) for basis in given)):
        assert basis.is_contiguous()
        assert basis.dtype == torch.bfloat16
        assert torch.linalg.matrix_norm(basis.double(), 2) <= 1


def test_a_tracers_basis_is_not_kept() -> None:
    with FakeTensorMode():
        random_basis(123, CPU)
    assert type(random_basis(123, CPU)) is Tensor


def test_the_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        assert random_basis(124, CPU).device == CPU


def test_the_turned_basis_finds_the_leading_directions() -> None:
    axes = torch.linalg.qr(torch.randn(200, 200))[0]
    points = (torch.randn(500, 200) * torch.logspace(0, -3, 200)) @ axes.T + 5
    basis = random_basis(200, CPU)
    kept = []
    for _ in range(4):
        centred = points - points.mean(0)
        kept.append(float((centred @ basis.float()).square().sum() / centred.square().sum()))
        basis = turned_basis(basis, points)
    assert kept[0] < 0.5
    assert kept[1] > 0.85
    assert kept[3] > 0.88  # the best 60 of 200 directions hold 0.984, and Q is 0.96 as long
    assert all(b >= a - 1e-3 for a, b in itertools.pairwise(kept))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_points_that_are_not_finite_leave_the_basis_alone(bad: float) -> None:
    points = torch.randn(300, 100)
    points[3, 4] = bad
    basis = random_basis(100, CPU)
    assert torch.equal(turned_basis(basis, points), basis)


@pytest.mark.parametrize("points", [torch.zeros(50, 100), torch.ones(1, 100), torch.zeros(0, 100)])
def test_points_without_directions_give_a_basis_all_the_same(points: Tensor) -> None:
    basis = turned_basis(random_basis(100, CPU), points)
    assert torch.linalg.matrix_norm(basis.double(), 2) <= 1


def test_norms_that_overflow_are_near_to_everything() -> None:
    sketch = torch.tensor([[1e25, 1.0], [1.0, 2.0]])
    rows, columns = lifted(sketch, torch.zeros(2), 0.2)
    near = rows.float() @ columns.float().T
    assert not (near[0] < 0).any()
    assert not (near[:, 0] < 0).any()
