import math
from itertools import permutations

import numpy as np
import pytest
from scipy.optimize import linprog

from bench.retrieval import wasserstein
from bench.retrieval.wasserstein import proxy_distances, wasserstein2


def cloud(n: int, seed: int, depth: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, depth))


def by_linear_program(a: np.ndarray, b: np.ndarray) -> float:
    """The transport problem itself: a plan with given marginals, of least cost."""
    m, n = len(a), len(b)
    costs = [[sum((x - y) ** 2 for x, y in zip(p, q, strict=True)) for q in b] for p in a]
    marginals = []
    for i in range(m):
        marginals.append([float(j // n == i) for j in range(m * n)])
    for k in range(n):
        marginals.append([float(j % n == k) for j in range(m * n)])
    found = linprog(np.ravel(costs), A_eq=marginals, b_eq=[1 / m] * m + [1 / n] * n)
    assert found.status == 0
    return math.sqrt(found.fun)


def by_permutations(a: np.ndarray, b: np.ndarray) -> float:
    return math.sqrt(
        min(
            sum(float(((p - b[j]) ** 2).sum()) for p, j in zip(a, order, strict=True)) / len(a)
            for order in permutations(range(len(b)))
        )
    )


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_equal_counts_against_all_permutations(n: int) -> None:
    a, b = cloud(n, 0), cloud(n, 1)
    assert wasserstein2(a, b) == pytest.approx(by_permutations(a, b), rel=1e-12)


@pytest.mark.parametrize(("m", "n"), [(1, 7), (2, 3), (3, 5), (4, 6), (15, 17), (7, 1)])
def test_any_counts_against_a_linear_program(m: int, n: int) -> None:
    a, b = cloud(m, 2), cloud(n, 3)
    assert wasserstein2(a, b) == pytest.approx(by_linear_program(a, b), rel=1e-7)
    assert wasserstein2(b, a) == pytest.approx(wasserstein2(a, b), rel=1e-12)


def test_large_clouds_by_a_linear_program_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = cloud(6, 5), cloud(35, 5)
    assigned = wasserstein2(a, b)
    monkeypatch.setattr(wasserstein, "_ASSIGNED", 10)
    assert wasserstein2(a, b) == pytest.approx(assigned, rel=1e-9)


def test_closed_forms() -> None:
    a = cloud(5, 4)
    assert wasserstein2(a, a[::-1]) == 0
    shift = np.array([1.0, -2.0, 2.0])
    assert wasserstein2(a, a + shift) == pytest.approx(3.0)
    assert wasserstein2(a, np.repeat(a, 3, axis=0)) == 0  # the same distribution
    point = cloud(1, 5)
    assert wasserstein2(point, a) ** 2 == pytest.approx(((a - point) ** 2).sum(axis=1).mean())
    line = np.array([[0.0], [1.0]])  # a half each; 2/3 of the first point stay, 1/3 moves
    thirds = np.array([[0.0], [0.0], [1.0]])
    assert wasserstein2(line, thirds) ** 2 == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("a", "b"), [((0, 3), (2, 3)), ((2, 3), (0, 3)), ((2, 3), (2, 4)), ((3,), (2, 3))]
)
def test_clouds_that_do_not_match(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected points \[m, D\] and \[n, D\], got"):
        wasserstein2(np.zeros(a), np.zeros(b))


def test_every_class_by_nested_loops() -> None:
    samples, proxies = cloud(12, 6), cloud(8, 7).reshape(4, 2, 3)
    labels = np.array([2, 0, 1, 3, 0, 0, 2, 1, 3, 3, 2, 0])
    calls = []
    found = proxy_distances(5 * samples, labels, 0.1 * proxies, lambda: calls.append(1))
    unit = [p / math.sqrt(sum(x * x for x in p)) for p in samples]
    means, spreads = [], []
    for c in range(4):
        own = np.array([p for p, label in zip(unit, labels, strict=True) if label == c])
        centres = np.array([p / math.sqrt(sum(x * x for x in p)) for p in proxies[c]])
        assert found.w2[c] == pytest.approx(by_linear_program(centres, own), rel=1e-7)
        means.append(sum(own) / len(own))
        spreads.append(by_linear_program(means[-1][None], own))
    assert found.spread == pytest.approx(sum(spreads) / 4, rel=1e-7)
    squares = [((a - b) ** 2).sum() for i, a in enumerate(means) for j, b in enumerate(means)
               if i != j]  # fmt: skip
    assert found.apart == pytest.approx(math.sqrt(sum(squares) / 12))
    assert len(calls) == 4
    assert found.per_class == 2


def test_one_proxy_is_never_nearer_than_the_mean_and_several_may_be() -> None:
    samples = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.1], [0.1, -1.0]])
    labels = np.array([0, 0, 1, 1])
    several = proxy_distances(samples, labels, samples.reshape(2, 2, 2))
    np.testing.assert_allclose(several.w2, 0, atol=1e-7)
    one = proxy_distances(samples, labels, samples.reshape(2, 2, 2).mean(axis=1, keepdims=True))
    assert one.w2.mean() >= one.spread


@pytest.mark.parametrize(
    ("labels", "shape", "message"),
    [
        ([0, 0, 1], (3, 1, 3), "every one of the 3 classes"),
        ([0, 1, 2], (2, 1, 3), "every one of the 2 classes"),
        ([0, 1, 1], (2, 0, 3), r"M >= 1, got \[2, 0, 3\]"),
        ([0, 0, 0], (1, 2, 3), "C >= 2"),
    ],
)
def test_what_cannot_be_measured(labels: list[int], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        proxy_distances(cloud(3, 8), np.array(labels), np.ones(shape))
