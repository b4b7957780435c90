import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor

from bench.retrieval.metrics import Diverged, retrieval

ROOT = Path(__file__).parents[3]


def naive_recall(embeddings: Tensor, labels: Tensor, k: int) -> float:
    hits = 0
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        cosine = [
            float(torch.cosine_similarity(embeddings[i], embeddings[j], dim=0)) for j in others
        ]
        nearest = sorted(range(len(others)), key=lambda position: -cosine[position])[:k]
        hits += any(labels[others[position]] == labels[i] for position in nearest)
    return hits / len(labels)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_recall_agrees_with_nested_loops(chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (45,), generator=generator)
    labels = torch.cat([labels, torch.arange(6), torch.arange(6)])
    embeddings = torch.randn(57, 5, generator=generator) * torch.rand(57, 1, generator=generator)
    got = retrieval(embeddings, labels, (1, 3, 56), chunk_size).recall
    want = {k: naive_recall(embeddings, labels, k) for k in (1, 3, 56)}
    assert got == pytest.approx(want)
    assert 0 < got[1] < got[3] < got[56] == 1


def test_a_query_does_not_find_itself() -> None:
    embeddings = torch.eye(4) + 0.1 * torch.ones(4, 4)
    embeddings[:2, 2] += 0.2  # a point of each class leans towards one of the other class
    labels = torch.tensor([0, 1, 0, 1])
    assert retrieval(embeddings, labels, (1,)).recall[1] < 1


def test_cosine_ignores_length() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [100.0, 1.0], [0.0, 1.0], [0.01, 1.0]])
    assert retrieval(embeddings, torch.tensor([0, 0, 1, 1]), (1,)).recall == {1: 1.0}


@pytest.mark.parametrize(
    ("labels", "ks", "message"),
    [
        ([0, 0, 1, 1], (4,), r"every K must be in \[1, 3\].*got \(4,\)"),
        ([0, 0, 1, 1], (0, 1), r"every K must be in \[1, 3\].*got \(0, 1\)"),
        ([0, 0, 1, 1], (), "every K"),
        ([0, 0, 1, 2], (1,), "at least 2 images to be evaluated, class 1 has 1"),
        ([0, 0, 0, 0], (1,), "at least 2 classes, got 1"),
        ([0, 0, 1], (1,), r"got \(4, 2\) and \(3,\)"),
    ],
)
def test_recall_refuses(labels: list[int], ks: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval(torch.ones(4, 2), torch.tensor(labels), ks)


def test_recall_refuses_embeddings_of_a_diverged_network() -> None:
    embeddings = torch.tensor([[1.0], [math.nan], [1.0], [1.0]])
    with pytest.raises(Diverged, match="finite"):
        retrieval(embeddings, torch.tensor([0, 0, 1, 1]), (1,))


def cloud() -> tuple[Tensor, Tensor]:
    """Classes of 2 to 11 points, so that R differs and exceeds the largest K."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(10).repeat_interleave(torch.arange(2, 12))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = torch.randn(10, 6, generator=generator)
    return centres[labels] + torch.randn(len(labels), 6, generator=generator), labels


@pytest.mark.parametrize("chunk_size", [1, 10, 1000])
def test_map_at_r_agrees_with_nested_loops(chunk_size: int) -> None:
    embeddings, labels = cloud()
    want = 0.0
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        others.sort(key=lambda j: -float(torch.cosine_similarity(embeddings[i], embeddings[j], 0)))
        relevant = [bool(labels[j] == labels[i]) for j in others]
        r = sum(relevant)
        found = [sum(relevant[: k + 1]) / (k + 1) for k in range(r) if relevant[k]]
        want += sum(found) / r / len(labels)
    got = retrieval(embeddings, labels, (1,), chunk_size).map_at_r
    assert got == pytest.approx(want)
    assert 0.1 < got < 0.9


def test_both_agree_with_pytorch_metric_learning() -> None:
    embeddings, labels = cloud()
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    theirs = AccuracyCalculator(
        ("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count", knn_func=_exact_knn
    ).get_accuracy(unit, labels)
    ours = retrieval(embeddings, labels, (1,))
    assert ours.recall[1] == pytest.approx(theirs["precision_at_1"])
    assert ours.map_at_r == pytest.approx(theirs["mean_average_precision_at_r"])


def _exact_knn(query: Tensor, k: int, reference: Tensor, is_same: bool) -> tuple[Tensor, Tensor]:
    distances = torch.cdist(query.double(), reference.double())
    if is_same:
        distances.fill_diagonal_(math.inf)
    nearest = distances.topk(k, largest=False)
    return nearest.values, nearest.indices


def test_labels_may_be_any_integers() -> None:
    embeddings, labels = cloud()
    assert retrieval(embeddings, labels * 1000 - 7) == retrieval(embeddings, labels)


def test_a_row_has_every_figure() -> None:
    embeddings, labels = cloud()
    found = retrieval(embeddings, labels, (1, 10))
    row = found.as_row("best_")
    assert row == {
        "best_r1": found.recall[1], "best_r10": found.recall[10], "best_map_at_r": found.map_at_r
    }  # fmt: skip


def test_a_chunk_is_at_least_one_query() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        retrieval(*cloud(), chunk_size=0)


@pytest.mark.parametrize("width", [1e-1, 1e-3])
def test_a_tight_cloud_is_resolved(width: float) -> None:
    """Embeddings of an untrained network are alike: their cosines differ in the last digits."""
    generator = torch.Generator().manual_seed(5)
    points = torch.randn(400, 64, generator=generator, dtype=torch.float64)
    labels = torch.arange(400) % 40
    points = points + 0.6 * torch.randn(40, 64, generator=generator, dtype=torch.float64)[labels]
    points = torch.nn.functional.normalize(1 + width * points, dim=1)
    nearest = torch.cdist(points, points).fill_diagonal_(math.inf).argmin(dim=1)
    want = (labels[nearest] == labels).double().mean().item()
    assert 0.2 < want < 0.98
    assert retrieval(points, labels, (1,)).recall[1] == pytest.approx(want, abs=0.003)


def test_a_huge_class_bounds_the_chunk() -> None:
    embeddings, labels = torch.randn(300, 4), (torch.arange(300) < 290).long()
    found = [retrieval(embeddings, labels, (1, 5), chunk) for chunk in (7, 10**9)]
    assert found[0].recall == found[1].recall
    assert found[0].map_at_r == pytest.approx(found[1].map_at_r)


@pytest.mark.exhaustive
def test_the_test_images_of_sop_fit_in_4_gb() -> None:
    """In as many classes of as many images, at the largest K of the paper."""
    code = """
import resource, torch
from bench.retrieval.metrics import retrieval
torch.manual_seed(0)
labels = torch.arange(60_502) % 11_316
centres = torch.randn(11_316, 16)
found = retrieval(centres[labels] + torch.randn(60_502, 16), labels, (1, 10, 100, 1000))
print(found.recall[1000], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    recall, kilobytes = map(float, result.stdout.split())
    assert 0.2 < recall < 1
    assert kilobytes < 4e6
