from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox

from bench.retrieval import maps
from tests.bench.retrieval.synthetic import arrays, dots


def test_classes_are_evenly_spaced() -> None:
    labels = np.arange(100).repeat(2)
    assert maps.map_classes(labels, 4) == [0, 33, 66, 99]
    assert maps.map_classes(np.array([5, 2, 2, 9]), 20) == [2, 5, 9]
    assert len(maps.map_classes(labels)) == 20


@pytest.mark.parametrize("given", [True, False])
def test_the_map_is_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))
    found, images = arrays("pfml", 0), dots().test
    for _ in range(2):
        maps.map_figure(found["test"], found["test_labels"], tmp_path / "x.png",
                        images if given else None, classes=4)  # fmt: skip
    places = [
        np.concatenate([np.asarray(c.get_offsets()) for c in figure.axes[0].collections])
        for figure in figures
    ]
    np.testing.assert_array_equal(*places)
    assert len(places[0]) == 4 * 5
    names = [t.get_text() for t in figures[0].legends[0].get_texts()]
    assert names[0] == ("1  dot \\$6" if given else "1  class 0")
    pictures = [a for a in figures[0].axes[0].artists if isinstance(a, AnnotationBbox)]
    assert len(pictures) == (4 if given else 0)


def test_neighbours_on_the_sphere_are_neighbours_on_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths do not count, and tight classes come out as tight groups."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))
    found = arrays("pfml", 0, spread=0.02)
    lengths = np.random.default_rng(0).uniform(0.1, 100, (30, 1))
    maps.map_figure(lengths * found["test"], found["test_labels"], tmp_path / "x.png")
    groups = [np.asarray(c.get_offsets()) for c in figures[0].axes[0].collections]
    middles = np.stack([g.mean(axis=0) for g in groups])
    for i, group in enumerate(groups):
        nearest = np.linalg.norm(group[:, None] - middles, axis=2).argmin(axis=1)
        assert (nearest == i).all()


def test_pictures_keep_clear_of_points_and_of_each_other() -> None:
    generator = np.random.default_rng(0)
    middles = generator.uniform(size=(8, 2))
    points = np.concatenate([middles, middles + 0.01])
    places = np.array(maps._free_places(middles, points))
    assert np.linalg.norm(places[:, None] - points, axis=2).min() >= maps._CLEAR
    between = np.linalg.norm(places[:, None] - places, axis=2) + np.eye(8)
    assert between.min() >= 2 * maps._CLEAR


def test_too_few_points_and_other_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 embeddings or more, got 3"):
        maps.map_figure(np.eye(3), np.arange(3), tmp_path / "x.png")
    found = arrays("pfml", 0)
    with pytest.raises(ValueError, match="the 30 test images given are not the 30"):
        maps.map_figure(found["test"], found["test_labels"][::-1], tmp_path / "x.png", dots().test)
