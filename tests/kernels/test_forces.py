"""The kernels under Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from pfml_triton import Potential, class_potential, potential_energy
from pfml_triton.kernels import launch
from pfml_triton.kernels.config import Tiles, tiles_for
from reference import potential_field as reference
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

# Lengths that float32 holds: Triton 3.6 rounds scalar arguments to it, float64 points or not.
CORE = 2.0**-6
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def energy_and_grad(points: Tensor, labels: Tensor, potential: Potential) -> tuple[Tensor, Tensor]:
    points = points.detach().clone().requires_grad_()
    energy = potential_energy(points, labels, potential, backend="triton")
    (grad,) = torch.autograd.grad(energy, points, torch.tensor(0.25, dtype=energy.dtype))
    return energy.detach(), grad


def check(points: Tensor, labels: Tensor, potential: Potential) -> None:
    energy, grad = energy_and_grad(points, labels, potential)
    true_energy, true_grad = truth(points, labels, potential)
    _, eager_grad = eager(points, labels, potential)
    dtype = points.dtype
    assert grad.dtype == dtype
    assert energy.dtype == torch.promote_types(dtype, torch.float32)
    # The energy is float32 at least; a float16 gradient overflows to infinity where it is > 65504.
    fits = (0.25 * true_grad).abs() <= torch.finfo(dtype).max
    assert_near(energy, true_energy, energy.dtype, what="energy")
    assert_near(
        torch.where(fits, grad, 0.0),
        torch.where(fits, 0.25 * true_grad, 0.0),
        dtype,
        # Half precision may lose what eager loses; float32 and float64 only what the floor says.
        torch.where(fits, 0.25 * eager_grad, 0.0) if dtype.itemsize == 2 else None,
        "gradient",
    )
    assert torch.isinf(grad[~fits]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_clouds(kind: str, dtype: torch.dtype) -> None:
    check(*cloud(kind, 40, 24, 4, dtype), Potential(3.0, 0.1875, 0.25, CORE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "depth"), [(1, 4), (2, 1), (16, 16), (65, 3), (17, 100), (20, 130), (18, 260), (16, 520)]
)
def test_sizes(n: int, depth: int, dtype: torch.dtype) -> None:
    check(*cloud("clusters", n, depth, 3, dtype), Potential(3.0, 0.1875, 0.25, CORE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, 2.0, 4.0, 5.5, 6.0, 7.3])
def test_exponents(alpha: float, dtype: torch.dtype) -> None:
    check(*cloud("collisions", 30, 10, 3, dtype), Potential(alpha, 0.1875, 0.3125, CORE))


@pytest.mark.parametrize(
    ("n", "depth", "tiles"),
    [
        (50, 20, {"block_k": 16}),
        (50, 40, {"block_k": 32, "filter_n": 256}),
        (150, 40, {"chunk": 1, "filter_strip": 1}),
        (20, 70, {"block_d": 16, "block_k": 16, "slices": 2}),
    ],
)
def test_tile_shapes_agree(n: int, depth: int, tiles: dict[str, int]) -> None:
    """Sums run in another order, in float64 here."""
    x, labels = cloud("clusters", n, depth, 1 + n // 10, torch.float64)
    default = tiles_for(depth)
    results = []
    for shape in (default, dataclasses.replace(default, **tiles)):
        energy, grad = field(x, labels, shape)
        results.append((energy, grad))
    (energy, grad), (other_energy, other_grad) = results
    assert torch.allclose(energy, other_energy, rtol=1e-13, atol=0)
    assert torch.allclose(grad, other_grad, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("extra", [1, 3, 50])
def test_long_lists_are_shared_out(extra: int) -> None:
    """The same sums in another order, and the same every time, however many programs there are."""
    x, labels = cloud("collisions", 130, 20, 30, torch.float64)
    labels[:25] = 2  # one class with long lists
    y, y_labels = cloud("collisions", 230, 20, 30, torch.float64, seed=1)
    y[:130] = x + 0.1 * torch.nn.functional.normalize(torch.randn(130, 20).double(), dim=1)
    shared = dataclasses.replace(
        tiles_for(20), long_list=0, least_budget=1, extra_programs=extra, chunk=2
    )
    for a, a_labels, b, b_labels in ((x, labels, x, labels), (x, labels, y, y_labels)):
        one, other, again = (
            terms_of(
                launch,
                a,
                a_labels,
                b,
                b_labels,
                Potential(),
                needs_grad=True,
                basis=basis(x),
                tiles=tiles,
            )
            for tiles in (tiles_for(20), shared, shared)
        )
        assert_terms_near(other, one, torch.float64)
        assert torch.equal(other.active, one.active)
        for name in ("energy", "attracting", "repelling", "own_class", "nearest", "grad"):
            assert torch.equal(getattr(other, name), getattr(again, name)), name


@pytest.mark.parametrize("extra", [1, 100, 5000])
def test_a_plan_of_many_lists(extra: int) -> None:
    """Two blocks of them and a half, as 40,000 points have: no more programs than there are."""
    count = torch.randint(0, 50, (2500,), dtype=torch.int32)
    extra_of, budget = torch.empty_like(count), count.new_empty(1)
    launch._plan_kernel[(1,)](count, extra_of, budget, 2500, extra, 3, BLOCK=1024)
    least = max(-(-int(count.sum()) // extra), 3)
    assert budget.tolist() == [least]
    expected = ((count - 1).clamp(0) // least).cumsum(0)
    assert extra_of.tolist() == expected.tolist()
    assert extra_of[-1] <= extra


@pytest.mark.parametrize("filter_n", [128, 256])
@pytest.mark.parametrize("n", [200, 300, 530])
def test_the_filter_is_the_sign_of_a_product(n: int, filter_n: int) -> None:
    """Of each 16 x 16 pairs, for two clouds, and for one, whose answers above the diagonal are
    mirrored."""
    x, _ = cloud("collisions", n, 12, 40, torch.float32)
    labels = torch.randperm(n)  # near points are anywhere
    tiles = dataclasses.replace(tiles_for(12), filter_n=filter_n, filter_strip=1)
    packed, other = (
        launch.gather(points, labels, Potential(), basis=basis(x), tiles=tiles)
        for points in (x, x.flip(0))
    )
    for acting in (packed, other):
        largest = packed.left.double() @ acting.right.double().T
        largest = largest.unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).amax((1, 3))
        clear = largest.abs() > 1e-5  # of float32's rounding
        assert 0.1 < (largest > 0)[: n // 16, : n // 16].double().mean() < 0.97
        near = launch.near_tiles(packed, acting)
        bits = ((near[:, :, None] >> torch.arange(8)) & 1).flatten(1).bool()
        assert torch.equal(bits[clear], (largest > 0)[clear])


@pytest.mark.parametrize("shared_out", [False, True])
def test_tiles_are_looked_at_that_are_near_or_share_a_class(shared_out: bool) -> None:
    """64 columns at a time; classes are compared as the ranges of what a tile has."""
    x, labels = 3 * torch.randn(300, 12), torch.randint(60, (300,))
    x[:10] = x[10:20] + 0.03  # the others are near nothing
    tiles = tiles_for(12)
    if shared_out:
        tiles = dataclasses.replace(tiles, long_list=0, least_budget=1, extra_programs=5, chunk=2)
    packed = launch.gather(x, labels, Potential(), basis=basis(x), tiles=tiles)
    near = launch.near_tiles(packed, packed)[:, :, None] >> torch.tensor([0, 4]) & 15 != 0
    near = near.flatten(1)[: -(-300 // 16), : -(-300 // 64)]
    rows, columns = ([part.aminmax() for part in labels.sort()[0].split(n)] for n in (16, 64))
    shares = torch.tensor([[a.min <= b.max and b.min <= a.max for b in columns] for a in rows])
    expected = near | shares
    assert (near & ~shares).any()
    assert (shares & ~near).any()
    assert not expected.all()
    terms = launch.field_terms(packed, packed, Potential(), needs_grad=False)
    assert terms.active.tolist() == expected.sum(1).tolist()


def field(x: Tensor, labels: Tensor, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    terms = terms_of(
        launch, x, labels, x, labels, Potential(), needs_grad=True, basis=basis(x), tiles=tiles
    )
    assert terms.grad is not None
    return terms.energy, terms.grad


def test_energy_is_the_same_with_and_without_gradient() -> None:
    x, labels = cloud("collisions", 70, 12, 3, torch.float32)
    terms, alone = (
        terms_of(launch, x, labels, x, labels, Potential(), needs_grad=needs_grad, basis=basis(x))
        for needs_grad in (True, False)
    )
    assert_same_without_grad(alone, terms)


def test_order_of_points_does_not_matter() -> None:
    x, labels = cloud("clusters", 60, 12, 5, torch.float64)
    energy, grad = field(x, labels)
    shuffle = torch.randperm(60)
    other_energy, other_grad = field(x[shuffle], labels[shuffle])
    assert torch.allclose(energy[shuffle], other_energy, rtol=1e-12)
    assert torch.allclose(grad[shuffle], other_grad, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("case", ["transposed", "sliced", "expanded", "offset"])
def test_strides(case: str) -> None:
    x, labels = cloud("clusters", 24, 10, 3, torch.float32)
    view = {
        "transposed": lambda: x.T.contiguous().T,
        "sliced": lambda: torch.stack([x, x + 1], 2).flatten(1)[:, ::2],
        "expanded": lambda: x[:1].expand(24, 10),
        "offset": lambda: torch.cat([torch.zeros(3), x.flatten()])[3:].view(24, 10),
    }[case]()
    before = view.clone()
    energy, grad = field(view, labels)
    expected_energy, expected_grad = field(before.contiguous(), labels)
    assert torch.equal(energy, expected_energy)
    assert torch.equal(grad, expected_grad)
    assert torch.equal(view, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pair_exactly_at_its_radius(dtype: torch.dtype) -> None:
    """Distances that every dtype holds exactly: delta attracts, delta_rep does not repel."""
    x = torch.tensor([[0.0, 0.0], [0.25, 0.0], [0.25, 0.5], [0.25, -0.5]], dtype=dtype)
    labels = torch.tensor([0, 0, 1, 2])
    p = Potential(2.0, 0.25, 0.5, 0.125)
    energy, grad = energy_and_grad(x, labels, p)
    true_energy, _ = truth(x, labels, p)
    assert energy == true_energy
    force = 2 * 2 * 0.25**-4 * 0.25  # 2 alpha d^-(alpha + 2) d, and 0.25 upstream
    assert grad.tolist() == [[-0.25 * force, 0], [0.25 * force, 0], [0, 0], [0, 0]]


@pytest.mark.slow
def test_gradcheck() -> None:
    """Finite differences of the kernels themselves, both clouds of two."""
    x, labels = cloud("clusters", 5, 3, 2, torch.float64)
    y, y_labels = cloud("collisions", 4, 3, 3, torch.float64, seed=1)
    x.requires_grad_()
    y.requires_grad_()
    p = Potential(2.5, 0.2, 0.3, 0.05)

    def energy(x: Tensor, y: Tensor) -> Tensor:
        return potential_energy(x, labels, p, sources=y, source_labels=y_labels, backend="triton")

    assert torch.autograd.gradcheck(energy, (x, y), eps=1e-7, atol=1e-3, rtol=1e-4)
    queries = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q: class_potential(q, y.detach(), y_labels, 1, p, backend="triton"),
        (queries,), eps=1e-7, atol=1e-3, rtol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_clouds(dtype: torch.dtype) -> None:
    points, labels = cloud("clusters", 70, 6, 3, dtype)
    queries = torch.cat([torch.randn(20, 6, dtype=torch.float64).to(dtype), points[:3]])
    for class_index in (1, 99):
        p = Potential(3.0, 0.1875, None, CORE)
        ours = class_potential(queries, points, labels, class_index, p, backend="triton")
        true = reference.class_potential(queries.double(), points.double(), labels, class_index, p)
        assert_near(ours, true, ours.dtype, what="class potential")


def test_labels_of_32_bits() -> None:
    """As a loss on a GPU has them: the same bits as of 64, in long lists as well."""
    x, labels = cloud("clusters", 90, 12, 7, torch.float32)
    tiles = dataclasses.replace(tiles_for(12), long_list=0, least_budget=1, extra_programs=3)
    found = [
        terms_of(launch, x, kind, x, kind, Potential(), needs_grad=True, tiles=tiles)
        for kind in (labels, labels.int())
    ]
    assert found[0].attracting.any()
    for a, b in zip(found[0][:-1], found[1][:-1], strict=True):
        assert torch.equal(a, b)


def test_padding_reads_nothing_uninitialised() -> None:
    """Packed buffers come from torch.empty, which holds NaN in these tests."""
    x, labels = cloud("clusters", 21, 5, 3, torch.float32)
    packed = launch.gather(x, labels, Potential(), basis=basis(x), tiles=tiles_for(5))
    assert torch.equal(packed.labels[:21], labels[packed.order[:21]])
    assert not packed.coarse[21:].any()
    assert not packed.coarse[:, 5:].any()
    assert torch.isnan(packed.sq_norm[21:]).all()  # never nominated
    assert torch.equal(packed.coarse, packed.coarse.bfloat16().float())
    ordered = x[packed.order[:21]]
    error = (ordered.double() - packed.coarse[:21, :5].double()).norm(dim=1)
    assert (packed.radius[:21].double() >= error).all()
    # The interpreter truncates to bfloat16; compiled code rounds, see test_emulated.
    assert (packed.radius[:21] <= 2.0**-7 * ordered.norm(dim=1)).all()


def test_results_are_the_same_bit_for_bit_every_time() -> None:
    x, labels = cloud("collisions", 40, 12, 3, torch.float32)
    first = field(x, labels)
    for _ in range(3):
        for a, b in zip(field(x, labels), first, strict=True):
            assert torch.equal(a, b)


# Each of these needs the margin of the nomination, or a part of it: without that part the coarse
# distance is on the wrong side of the radius for some of the pairs.


def test_nominated_at_the_radii() -> None:
    """A hair inside delta_rep, a hair outside delta: coarse points alone would lose them."""
    g = torch.Generator().manual_seed(3)
    unit = torch.nn.functional.normalize
    a, step = (unit(torch.randn(20, 48, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
    p = Potential(3.0, 0.2, 0.3)
    inside = 1 - 10 ** torch.linspace(-6, -3, 20, dtype=torch.float64)[:, None]
    for radius, factor, labels in (
        (0.3, inside, torch.arange(40)),
        (0.2, 1 / inside, torch.arange(20).repeat(2)),
    ):
        x = torch.cat([a, a + radius * factor * step]).float()
        energy, grad = energy_and_grad(x, labels, p)
        true_energy, true_grad = truth(x, labels, p)
        assert (true_grad[:20].abs().sum(1) > 0).all()
        assert_near(grad, 0.25 * true_grad, torch.float32, what="gradient")
        assert_near(energy, true_energy, torch.float32, what="energy")


def test_nominated_in_spite_of_the_products_rounding() -> None:
    """Points that bfloat16 holds, of norm 500, within 3e-7 of a radius: the slack."""
    g = torch.Generator().manual_seed(0)
    for _ in range(12):
        x = (64 * torch.randn(1, 64, generator=g)).bfloat16()
        y = (x + 0.6 * torch.randn(1, 64, generator=g)).bfloat16()
        d = (x.double() - y.double()).norm().item()
        one, other = torch.tensor([0]), torch.tensor([1])
        p = Potential(3.0, 0.5 * d, d * (1 + 3e-7))
        terms = terms_of(launch, x, one, y, other, p, needs_grad=False, basis=basis(x))
        assert terms.repelling.tolist() == [1]
        p = Potential(3.0, d * (1 - 3e-7))
        terms = terms_of(launch, x, one, y, one, p, needs_grad=False, basis=basis(x))
        assert terms.attracting.tolist() == [1]


@pytest.mark.parametrize("swapped", [False, True])
def test_nominated_with_one_coarse_cloud_exact(swapped: bool) -> None:
    """x is a bfloat16 number, y is not: the radius of each side counts."""
    g = torch.Generator().manual_seed(1)
    step = torch.nn.functional.normalize(torch.rand(24, 16, generator=g), dim=1)
    x, y = torch.full((1, 16), 4.0), 4.0 - 0.2499 * step
    p = Potential(3.0, 0.25)
    clouds = [(x, torch.tensor([0])), (y, torch.arange(1, 25))]
    (a, a_labels), (b, b_labels) = reversed(clouds) if swapped else clouds
    terms = terms_of(launch, a, a_labels, b, b_labels, p, needs_grad=False, basis=basis(x))
    assert terms.repelling.tolist() == [1] * 24 if swapped else [24]


def test_nominated_where_the_margin_exceeds_the_radius() -> None:
    """Norms of 320: coarse points are off by more than delta, so every pair of a class counts."""
    g = torch.Generator().manual_seed(2)
    x = 40 * torch.randn(24, 64, generator=g)
    y = x + 0.27 * torch.nn.functional.normalize(torch.randn(24, 64, generator=g), dim=1)
    labels = torch.arange(24)
    terms = terms_of(
        launch, x, labels, y, labels, Potential(3.0, 0.25), needs_grad=False, basis=basis(x)
    )
    assert terms.attracting.tolist() == [1] * 24
