"""What a long training meets sooner or later: values that are not finite, ties to the ulp, huge
counts, threads, streams, thousands of steps."""

from __future__ import annotations

import gc
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from pfml_triton import PFMLLoss, Potential, class_potential, operators, potential_energy, sketch
from pfml_triton import torch_backend as plain
from pfml_triton.kernels import launch, tuning
from pfml_triton.potential import FieldTerms, Given, Split
from tests.clouds import cloud

backends = pytest.mark.parametrize("backend", ["torch", "triton"])

BAD = (math.nan, math.inf, -math.inf)


def step(loss: PFMLLoss, x: Tensor, labels: Tensor, *bank: Tensor) -> list[Tensor]:
    """Value, gradients and stats of a call in evaluation, which leaves the sketch where it is."""
    loss.eval()
    x = x.detach().requires_grad_()
    value = loss(x, labels, None, *bank)
    stats = loss.last_stats
    assert stats is not None
    return [value.detach(), *torch.autograd.grad(value, (x, loss.proxies)), *stats.values()]


def same(ours: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


# Values that are not finite


@backends
@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("where", ["embeddings", "proxies", "ref_emb"])
@pytest.mark.parametrize("normalize", [True, False])
def test_what_is_not_finite_shows(where: str, normalize: bool, prune: bool, backend: str) -> None:
    """Whatever it is, in any tile: far away, of a class of its own, the last of a tile of padding.

    The loss is NaN, and so is every entry of every gradient; with `validate` the row is named.
    """
    for bad in BAD[:2]:
        loss = PFMLLoss(70, 5, 1, normalize=normalize, prune=prune, backend=backend)
        x = 100 * torch.randn(65, 5)
        bank, bank_labels = 100 * torch.randn(3, 5), torch.tensor([1, 2, 3])
        x.requires_grad_()
        bank.requires_grad_()
        with torch.no_grad():
            loss.proxies *= 100
            {"embeddings": x, "proxies": loss.proxies[:, 0], "ref_emb": bank}[where][-1, 2] = bad
        value = loss(x, torch.arange(65), None, bank, bank_labels)
        assert value.isnan()
        for grad in torch.autograd.grad(value, (x, loss.proxies, bank)):
            assert grad.isnan().all()
        rows = {"embeddings": 65, "proxies": 70, "ref_emb": 3}[where]
        loss.validate = True
        says = f"{where} must be finite, got NaN or Inf in 1 of {rows} rows, the first being row"
        with pytest.raises(ValueError, match=f"{says} {rows - 1}"):
            loss(x, torch.arange(65), None, bank, bank_labels)


@backends
@pytest.mark.parametrize(
    ("wrong", "normalize"),
    [(-1, True), (70, False), (2**32, True), (2**32 + 69, False), (-(2**63), True),
     (2**63 - 1, False)],
)  # fmt: skip
def test_labels_out_of_range_show(
    wrong: int, normalize: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody waits to look at them, the loss and all gradients are NaN, and stats say why."""
    monkeypatch.setattr(operators, "check_range", lambda *_: None)
    loss = PFMLLoss(70, 5, 1, normalize=normalize, backend=backend)
    x, bank = torch.randn(66, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    right = torch.arange(66)
    right[0] = 69
    labels = right.clone()
    labels[[0, 64, 65]] = wrong
    for others in ((), (bank, torch.tensor([1, -7, wrong]))):
        leaves = [x, loss.proxies, *others[:1]]
        found = []
        for given in (right, labels, labels[:64], labels[1:64]):
            batch = x[-len(given) :]
            value = loss(batch, given, None, *others)
            grads = torch.autograd.grad(value, leaves)
            assert loss.last_stats is not None
            found.append(int(loss.last_stats["labels_out_of_range"]))
            assert loss.last_stats["labels_out_of_range"].dtype == torch.int64
            if found[-1]:
                assert value.isnan()
                assert grads[0][-len(given) :].isnan().all()
                assert all(grad.isnan().all() for grad in grads[1:])
            else:
                assert value.isfinite()
                assert all(grad.isfinite().all() for grad in grads)
        assert found == [0, 3, 1, 0]


@backends
def test_labels_of_a_memory_bank_are_any(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those out of range repel all points, and are no class of the batch in 32 bits either."""
    loss = PFMLLoss(5, 4, 2, backend=backend, delta=0.9).eval()
    x, labels, bank = torch.randn(9, 4), torch.arange(9) % 5, torch.randn(7, 4)
    results = []
    for on_gpu in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(operators, "check_range", lambda *_: None)
            if on_gpu:
                patch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
            for offset in (-8, 5, 2**32, -(2**32), 2**63 - 9):
                results.append(step(loss, x, labels, bank, torch.arange(7) + offset))
    assert results[0][5] > 0  # repelling pairs
    assert all(same(result, results[0]) for result in results[1:])


@backends
@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("n", [1, 65])
def test_a_point_that_is_not_finite_among_few(n: int, prune: bool, backend: str) -> None:
    """Alone it has no pair, and the last of 65 begins a tile."""
    for bad in BAD[:2]:
        x = torch.zeros(n, 3)
        x[-1] = bad
        x.requires_grad_()
        value = potential_energy(x, torch.arange(n), prune=prune, backend=backend)
        (grad,) = torch.autograd.grad(value, x)
        assert value.isnan()
        assert grad.isnan().all()


@backends
@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("norm", [1.2e19, 1.5e19, 1.8e19, 2e19])
def test_squares_of_distances_that_overflow_show(norm: float, prune: bool, backend: str) -> None:
    """Though the square of the norm may be finite."""
    x = torch.tensor([[norm, 0.0], [norm, 0.0], [-norm, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 1, 0])
    value = potential_energy(x, labels, prune=prune, backend=backend)
    assert value.isnan()
    assert torch.autograd.grad(value, x)[0].isnan().all()
    still = torch.zeros(1, 2, requires_grad=True)
    value = potential_energy(
        still, labels[:1], sources=x.detach(), source_labels=labels, prune=prune, backend=backend
    )
    assert value.isnan()
    assert torch.autograd.grad(value, still)[0].isnan().all()
    for field in (
        class_potential(still, x.detach(), labels, 0, prune=prune, backend=backend),
        class_potential(x, still.detach(), labels[:1], 0, prune=prune, backend=backend),
    ):
        assert field.isnan().all()


@backends
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("upstream", BAD)
def test_an_upstream_gradient_that_is_not_finite_shows(
    upstream: float, normalize: bool, backend: str
) -> None:
    loss = PFMLLoss(3, 5, 1, normalize=normalize, backend=backend)
    x, labels = torch.randn(9, 5, requires_grad=True), torch.arange(9) % 3
    for grad in torch.autograd.grad(upstream * loss(x, labels), (x, loss.proxies)):
        assert not grad.isfinite().any()


@backends
def test_lengths_from_nothing_to_huge_are_scaled(backend: str) -> None:
    """Longer than 1e-12, a point counts by its direction alone."""
    directions = torch.nn.functional.normalize(torch.randn(8, 5, dtype=torch.float64), dim=1)
    labels = torch.arange(8) % 3
    loss = PFMLLoss(3, 5, 2, backend=backend)
    expected = step(loss, directions.float(), labels)
    for norm in (1e-11, 1e-6, 1e6, 1e18):
        value, grad, of_proxies, *_ = step(loss, (norm * directions).float(), labels)
        assert torch.allclose(value, expected[0], rtol=1e-6)
        scale = float(expected[1].abs().max())
        assert torch.allclose(norm * grad, expected[1], rtol=1e-5, atol=1e-5 * scale)
        assert torch.allclose(of_proxies, expected[2], rtol=1e-5, atol=1e-5 * scale)
    # Shorter ones are scaled as if they were 1e-12 long, which is a linear map.
    given = PFMLLoss(3, 5, 2, normalize=False, backend=backend)
    with torch.no_grad():
        given.proxies.copy_(torch.nn.functional.normalize(loss.proxies, dim=2))
    for norm in (1e-16, 5e-13):
        value, grad, *_ = step(loss, (norm * directions).float(), labels)
        scaled, of_scaled, *_ = step(given, (1e12 * norm * directions).float(), labels)
        assert torch.allclose(value, scaled, rtol=1e-6)
        scale = float(of_scaled.abs().max())
        assert torch.allclose(1e-12 * grad, of_scaled, rtol=1e-5, atol=1e-5 * scale)
    for short in (1e-20 * directions, 1e-30 * directions, 0 * directions):
        assert all(t.isfinite().all() for t in step(loss, short.float(), labels)[:3])


# Ties and duplicates


@backends
@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta", [0.25, 0.75])
def test_a_tie_to_the_ulp(delta: float, dtype: torch.dtype, prune: bool, backend: str) -> None:
    """Two points an ulp inside, at, and an ulp outside both radii, along an axis from the origin.

    At delta a class attracts, at delta_rep none repels.
    """
    at = torch.tensor(delta, dtype=dtype)
    down, up = at.new_tensor(-math.inf), at.new_tensor(math.inf)
    potential = Potential(2.0, delta, delta, delta / 4)
    for distance in (torch.nextafter(at, down), at, torch.nextafter(at, up)):
        x = torch.zeros(2, 4, dtype=dtype)
        x[1, 1] = distance
        outside = float(distance) >= delta
        for labels, acts in (([5, 5], outside), ([5, 6], not outside)):
            points = x.clone().requires_grad_()
            value = potential_energy(
                points, torch.tensor(labels), potential, prune=prune, backend=backend
            )
            (grad,) = torch.autograd.grad(value, points)
            assert bool(grad.any()) == acts, (float(distance), labels)


@backends
@pytest.mark.parametrize("prune", [True, False])
def test_duplicates_of_one_class_and_of_two(prune: bool, backend: str) -> None:
    """Copies exert no force on each other, and feel the same."""
    x, labels = cloud("clusters", 40, 6, 4, torch.float32)
    x = x.repeat(3, 1).requires_grad_()
    labels = torch.cat([labels, labels, (labels + 1) % 4])
    value = potential_energy(x, labels, prune=prune, backend=backend)
    (grad,) = torch.autograd.grad(value, x)
    assert value.isfinite()
    assert torch.allclose(grad[:40], grad[40:80], rtol=1e-5, atol=1e-5 * float(grad.abs().max()))
    # What the points do to each other adds up to nothing.
    assert grad.double().sum(0).abs().max() <= 1e-5 * grad.abs().double().sum()


@backends
@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("depth", [1, 16, 130])
@pytest.mark.parametrize("scale", [1e6, 1e11, 1e16])
def test_duplicates_far_out(scale: float, depth: int, prune: bool, backend: str) -> None:
    """Where rounding of a product moves points across the radii, though they coincide."""
    column = scale * torch.arange(1, 25)[:, None] / 7
    x = torch.cat([column, column]).expand(48, depth)
    p = Potential(1.0, 0.2, 0.4, 0.1)
    loss = potential_energy(x, torch.arange(48), p, prune=prune, backend=backend)
    core = p.min_distance**-1 * 1.5  # the parabola at d = 0
    apart = 48 * 47 - 48
    assert loss.item() == pytest.approx(48 * core + apart * p.repulsion_constant, rel=1e-6)


# Counts


@backends
def test_counts_of_40_billion_pairs_are_exact(backend: str) -> None:
    """200,000 points of one class and at rest: the counts are made up, for no N x N work."""
    n, p = 200_000, Potential(0.0, 0.5, 2.0, 0.1)  # constants log 0.5 and -log 2
    served: Any = {"torch": plain, "triton": launch}[backend]
    few = served.gather(torch.zeros(64, 1), torch.zeros(64, dtype=torch.int64), p)
    counts = torch.int64 if backend == "torch" else torch.int32
    x = torch.zeros(n, 1)
    if backend == "torch":
        many = plain.Cloud(x, None, torch.zeros(n, dtype=torch.int64), None)
    else:
        many = replace(few, points=x, sq_norm=torch.zeros(n))
    for own, attracting, repelling in ((n, 0, 0), (n, n - 1, 0), (1, 0, n - 1), (77_777, 5, 99)):
        terms = FieldTerms(
            energy=torch.full((n,), 0.0, dtype=torch.float64 if backend == "torch" else None),
            attracting=torch.full((n,), attracting, dtype=counts),
            repelling=torch.full((n,), repelling, dtype=counts),
            own_class=torch.full((n,), own, dtype=counts),
            grad=None,
            nearest=torch.full((n,), math.inf).index_fill(0, torch.tensor([12_345]), 0.25),
            active=torch.full((12_500,), 3125, dtype=counts),
            tiles=12_500 * 3125,
        )
        value, totals = served.total(terms, many, many, p, among=True)
        above, attractions, repulsions, nearest, active, energy, _, tiles, _ = totals.tolist()
        assert nearest == 0.5
        assert attractions == n * attracting
        assert repulsions == n * repelling
        assert active == tiles
        constants = n * (attracting * p.attraction_constant + repelling * p.repulsion_constant)
        assert above == pytest.approx(-constants, rel=1e-12)
        ours = n * (own - 1)
        at_rest = ours * p.attraction_constant + (n * (n - 1) - ours) * p.repulsion_constant
        assert energy == pytest.approx(at_rest - constants, abs=1e-12 * n * n)
        assert value.item() == pytest.approx(energy, rel=1e-6)
        given = Given(torch.arange(n) - 1, n, n)
        _, wrong = served.total(terms, many, many, p, among=True, given=given)
        assert wrong[-1] == 1
        mean, _ = served.total(terms, many, many, p, among=True, pairs=n * (n - 1))
        assert mean.item() == pytest.approx(energy / (n * (n - 1)), rel=1e-6)


@backends
@pytest.mark.parametrize("nothing", [0.0, math.nan])
@pytest.mark.parametrize("nearest", [0.0, math.inf])
def test_the_totals_of_two_fields_are_one(nearest: float, nothing: float, backend: str) -> None:
    """Sums, but for the smallest distance; what is not finite in one shows in the value."""
    served: Any = {"torch": plain, "triton": launch}[backend]
    x, labels = cloud("collisions", 30, 6, 3, torch.float32)
    p = Potential()
    points = served.gather(x, labels, p)
    terms = served.field_terms(points, points, p, needs_grad=False)
    _, alone = served.total(terms, points, points, p, among=True)
    assert 0 < alone[3] < math.inf
    before = torch.tensor([1.5, 2, 3, nearest, 4, -5.25, nothing, 6, 7], dtype=torch.float64)
    value, both = served.total(terms, points, points, p, among=True, pairs=7, before=before)
    expected = alone + before
    expected[3] = min(float(alone[3]), nearest)
    apart = torch.stack([labels, labels - 9], 1)[:, 0]
    given = Given(apart, 20, 1)
    _, wrong = served.total(terms, points, points, p, among=True, before=before, given=given)
    assert wrong[6].isnan()
    assert wrong[8] == 7 + int((labels[:20] > 0).sum())
    assert torch.allclose(both, expected, rtol=1e-12, equal_nan=True)
    assert torch.allclose(value.double(), (expected[5] / 7) + nothing, rtol=1e-6, equal_nan=True)


@backends
def test_labels_of_stride_0(backend: str) -> None:
    x = torch.randn(9, 4)
    given = torch.tensor([3]).expand(9)
    assert given.stride() == (0,)
    ours, theirs = (potential_energy(x, y, backend=backend) for y in (given, given.clone()))
    assert torch.equal(ours, theirs)


@backends
def test_the_gradient_of_a_mean_over_40_billion_pairs(backend: str) -> None:
    pairs = 200_000 * 199_999
    served: Any = {"torch": plain, "triton": launch}[backend]
    grad = torch.full((3, 2), float(pairs))
    first, _ = served.pull_back(
        grad, None, None, grad_output=torch.tensor(2.0), totals=torch.zeros(7).double(),
        split=Split(3, (torch.float32, None)), pairs=pairs, twice=True,
    )  # fmt: skip
    assert torch.allclose(first, torch.full((3, 2), 4.0), rtol=1e-6)


# The same every time, in any thread


def problem(seed: int, n: int, depth: int = 20) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, labels = cloud("clusters", n, depth, 5, torch.float32, seed)
    bank, bank_labels = cloud("collisions", n // 2, depth, 5, torch.float32, seed + 1)
    return x, labels, bank, bank_labels


@pytest.mark.parametrize(("backend", "n", "runs"), [("torch", 150, 200), ("triton", 12, 6)])
def test_runs_are_the_same_bit_for_bit(backend: str, n: int, runs: int) -> None:
    """Value, gradients and stats, pruned or not."""
    for prune in (True, False):
        loss = PFMLLoss(5, 20, 2, delta=0.5, prune=prune, backend=backend)
        given = problem(0, n)
        first = step(loss, *given)
        for _ in range(runs // 2):
            assert same(step(loss, *given), first)


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_runs_of_the_torch_backend_on_several_threads_are_the_same(four_threads: None) -> None:
    """On the CPU, large enough that PyTorch shares the work out."""
    x, labels = cloud("clusters", 3000, 64, 5, torch.float32)
    loss = PFMLLoss(5, 64, 2, delta=0.5, backend="torch")
    first = step(loss, x, labels)
    for _ in range(4):
        assert same(step(loss, x, labels), first)


class _InTurn:
    """A kernel whose launches take turns: Triton's interpreter has one program at a time."""

    lock = threading.Lock()

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launched(*args: Any, **kwargs: Any) -> None:
            with self.lock:
                self.kernel[grid](*args, **kwargs)

        return launched


@contextmanager
def kernels_in_turn() -> Iterator[None]:
    names = [name for name in vars(launch) if name.endswith("_kernel")]
    stand_ins = {name: _InTurn(getattr(launch, name)) for name in names}
    with mock.patch.multiple(launch, **stand_ins):
        yield


def in_threads(call: Callable[[int], list[Tensor]]) -> list[list[Tensor]]:
    """The call with 0 to 7, each in a thread of its own, all of them started together."""
    barrier = threading.Barrier(8)

    def together(i: int) -> list[Tensor]:
        torch.set_grad_enabled(True)
        barrier.wait()
        return call(i)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(together, range(8)))


@pytest.mark.parametrize(
    ("backend", "n", "shared"), [("torch", 300, True), ("torch", 300, False), ("triton", 3, False)]
)
def test_threads_that_call_at_once(backend: str, n: int, shared: bool) -> None:
    """Each gets what it gets alone, of a loss of its own or of one that all evaluate.

    The tables that calls fill are empty at first. What is in a loss, no backend sees.
    """
    problems = [problem(seed, n + seed) for seed in range(8)]
    losses = [PFMLLoss(5, 20, 2, alpha=i, delta=0.5, backend=backend).eval() for i in range(8)]
    if shared:
        losses = losses[1:2] * 8
    with kernels_in_turn():
        alone = [call_of(losses[i], problems[i]) for i in range(8)]
        sketch._random_bases.clear()
        operators._potential.cache_clear()
        tuning.forget()
        for loss in losses:
            loss._proxy_labels = None
        together = in_threads(lambda i: call_of(losses[i], problems[i]))
    for ours, expected in zip(together, alone, strict=True):
        assert same(ours, expected)


def call_of(loss: PFMLLoss, given: tuple[Tensor, ...]) -> list[Tensor]:
    """`step` without the stats, which a shared loss has of the last call alone."""
    x, labels, bank, bank_labels = given
    x = x.detach().requires_grad_()
    value = loss(x, labels, None, bank, bank_labels)
    return [value.detach(), *torch.autograd.grad(value, (x, loss.proxies))]


# Thousands of steps


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> list[Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def train(loss: PFMLLoss, steps: int) -> None:
    """Another batch and another size every time, as the last one of an epoch has."""
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for i in range(steps):
        x = torch.randn(1 + i % 40, 60, requires_grad=True)
        loss(x, torch.arange(len(x)) % 5, None, x.detach(), torch.arange(len(x)) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize(("backend", "warm", "steps"), [("torch", 200, 500), ("triton", 3, 6)])
def test_steps_leave_nothing_behind(backend: str, warm: int, steps: int) -> None:
    loss = PFMLLoss(5, 60, 2, backend=backend)
    train(loss, warm)
    # Tensors of other tests may die meanwhile, and their threads may still allocate memory.
    before = [weakref.ref(tensor) for tensor in live_tensors()]
    growth = []
    while not growth or growth[-1] >= 2 << 20:
        assert len(growth) < 3, growth
        memory = resident()
        train(loss, steps)
        growth.append(resident() - memory)
    # A leak of the gradients of a step would be more than that, every time.
    old = {id(tensor()) for tensor in before}
    new = [tensor.shape for tensor in live_tensors() if id(tensor) not in old]
    assert len(new) < steps / 2, new  # the statistics of the last step are new


def test_a_sweep_of_potentials_leaves_little_behind() -> None:
    x, labels = cloud("clusters", 5, 4, 2, torch.float32)
    for i in range(500):
        potential_energy(x, labels, Potential(1 + i / 500))
    assert operators._potential.cache_info().currsize < 100
