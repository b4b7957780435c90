import pytest
import torch
from torch import Tensor

from bench.clouds import make_cloud
from bench.settings import PruningSettings
from pfml_triton import Potential

SETTINGS = PruningSettings(
    small_points=400, large_points=600, worst_points=200, sop_classes=150, sop_batch=20
)
DELTA = Potential().delta


def distances(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pairs of one class, and of those of two."""
    rows, columns = torch.triu_indices(len(points), len(points), 1)
    d = (points[rows] - points[columns]).norm(dim=1)
    same = labels[rows] == labels[columns]
    return d[same], d[~same]


@pytest.mark.parametrize(("name", "n"), [("small", 400), ("large", 600), ("sop", 320)])
def test_classes_attract_and_are_well_apart(name: str, n: int) -> None:
    points, labels = make_cloud(name, SETTINGS)
    assert (points.shape, points.dtype) == ((n, 512), torch.float32)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(n))
    own, other = distances(points, labels)
    assert 0.3 < own.min() < 0.4
    assert 0.55 < own.max() < 0.65
    assert other.min() > 1.1


def test_sop_is_a_batch_and_then_two_proxies_of_every_class() -> None:
    _, labels = make_cloud("sop", SETTINGS)
    assert torch.equal(labels[20:], torch.arange(150).repeat_interleave(2))
    assert labels[:20].unique(return_counts=True)[1].tolist() == 10 * [2]


def test_small_is_in_classes_of_four_in_random_order() -> None:
    _, labels = make_cloud("small", SETTINGS)
    assert labels.unique(return_counts=True)[1].tolist() == 100 * [4]
    assert not torch.equal(labels, labels.sort().values)


def test_in_the_worst_clouds_every_pair_acts() -> None:
    points, labels = make_cloud("one class", SETTINGS)
    own, other = distances(points, labels)
    assert (len(points), len(other)) == (200, 0)
    assert own.min() > 1
    points, labels = make_cloud("collapsed", SETTINGS)
    own, other = distances(points, labels)
    assert len(own) == 50 * 6
    assert max(own.max(), other.max()) < DELTA
    assert other.min() > 0.05


def test_a_cloud_is_fixed_by_its_seed() -> None:
    points, labels = make_cloud("small", SETTINGS)
    again, labels_again = make_cloud("small", SETTINGS)
    assert torch.equal(points, again)
    assert torch.equal(labels, labels_again)
    assert not torch.equal(points, make_cloud("small", PruningSettings(seed=1))[0][:400])
