import pytest
import torch
from torch import Tensor

from bench.clouds import make_cloud
from bench.settings import SIZES, Size
from pfml_triton import Potential

DELTA = Potential().delta
APART = Size(batch=20, classes=150, proxies=2)


def distances(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pairs of one class, and of those of two."""
    rows, columns = torch.triu_indices(len(points), len(points), 1)
    d = (points[rows] - points[columns]).norm(dim=1)
    same = labels[rows] == labels[columns]
    return d[same], d[~same]


def test_sizes_are_those_of_the_data_sets() -> None:
    found = {name: (s.n, s.batch, s.classes, s.proxies, s.depth) for name, s in SIZES.items()}
    assert found == {
        "cub": (1_600, 100, 100, 15, 512),
        "cars": (1_570, 100, 98, 15, 512),
        "sop": (22_736, 100, 11_318, 2, 512),
        "vit-sop": (22_736, 100, 11_318, 2, 384),
        "faces-100k": (100_512, 512, 100_000, 1, 512),
        "one-class": (8_000, 100, 1, 7_900, 512),
        "collapsed": (8_000, 100, 1_975, 4, 512),
    }


def test_classes_attract_and_are_well_apart() -> None:
    points, labels, _ = make_cloud(APART, seed=0)
    assert (points.shape, points.dtype) == ((320, 512), torch.float32)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(320))
    own, other = distances(points, labels)
    assert 0.3 < own.min() < 0.4
    assert 0.55 < own.max() < 0.65
    assert other.min() > 1.1


def test_a_cloud_is_a_batch_and_then_the_proxies_of_every_class() -> None:
    cloud = make_cloud(APART, seed=0)
    assert torch.equal(cloud.labels[20:], torch.arange(150).repeat_interleave(2))
    assert cloud.batch_labels.unique(return_counts=True)[1].tolist() == 10 * [2]
    assert (cloud.embeddings.shape, cloud.proxies.shape) == ((20, 512), (150, 2, 512))
    whole = torch.cat([cloud.embeddings, cloud.proxies.flatten(0, 1)])
    assert torch.equal(whole, cloud.points)


def test_a_batch_larger_than_its_classes_has_more_of_each() -> None:
    cloud = make_cloud(Size(batch=12, classes=3, proxies=0, depth=8), seed=0)
    assert cloud.batch_labels.unique(return_counts=True)[1].tolist() == 3 * [4]


def test_in_the_worst_clouds_every_pair_acts() -> None:
    points, labels, _ = make_cloud(Size(20, 1, 180, kind="one-class"), seed=0)
    own, other = distances(points, labels)
    assert (len(points), len(other)) == (200, 0)
    assert own.min() > 1
    points, labels, _ = make_cloud(Size(20, 45, 4, kind="collapsed"), seed=0)
    own, other = distances(points, labels)
    assert max(own.max(), other.max()) < DELTA
    assert other.min() > 0.05


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (Size(2, 2, 1, kind="elsewhere"), "apart, one-class, collapsed, got 'elsewhere'"),
        (Size(2, 2, 1, kind="one-class"), "classes = 1, got 2"),
    ],
)
def test_a_cloud_that_cannot_be(size: Size, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cloud(size, seed=0)


def test_a_cloud_is_fixed_by_its_seed() -> None:
    points, labels, _ = make_cloud(APART, seed=0)
    again, labels_again, _ = make_cloud(APART, seed=0)
    assert torch.equal(points, again)
    assert torch.equal(labels, labels_again)
    assert not torch.equal(points, make_cloud(APART, seed=1).points)
