from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from bench.retrieval import sheets
from bench.retrieval.style import RIGHT, WRONG
from tests.bench.retrieval.synthetic import arrays, dots


def nearest(embeddings: np.ndarray, query: int, k: int) -> list[int]:
    """One cosine at a time."""
    cosines = {}
    for i, point in enumerate(embeddings):
        if i != query:
            other = embeddings[query]
            cosines[i] = float(point @ other) / float(np.linalg.norm(point) * np.linalg.norm(other))
    return sorted(cosines, key=cosines.__getitem__, reverse=True)[:k]


def test_neighbours_are_the_nearest_and_both_kinds_are_there() -> None:
    found = arrays("pfml", 0)
    labels = found["test_labels"]
    right, wrong = sheets.choose_queries(found["test"], labels, wanted=3)
    assert (len(right), len(wrong)) == (3, 3)
    for kind, queries in ((True, right), (False, wrong)):
        for query in queries:
            expected = nearest(found["test"].astype(float), query.image, 5)
            assert list(query.neighbours) == expected
            assert (labels[expected[0]] == labels[query.image]) == kind
    assert sheets.choose_queries(found["test"], labels, wanted=3) == (right, wrong)


def test_queries_are_found_beyond_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    found = arrays("pfml", 0)
    whole = sheets.choose_queries(found["test"], found["test_labels"], wanted=100)
    monkeypatch.setattr(sheets, "_CHUNK", 4)
    assert sheets.choose_queries(found["test"], found["test_labels"], wanted=100) == whole
    assert sum(map(len, whole)) == 30


def test_no_query_finds_itself_where_all_others_are_opposite() -> None:
    simplex = np.eye(6) - 1 / 6  # every two at an obtuse angle
    for queries in sheets.choose_queries(simplex, np.array([0, 0, 1, 1, 2, 2]), wanted=6):
        for query in queries:
            assert sorted([query.image, *query.neighbours]) == [*range(6)]


def test_a_perfect_embedding_has_no_failures(tmp_path: Path) -> None:
    data = dots().test
    embeddings = np.eye(6)[data.labels]
    right, wrong = sheets.choose_queries(embeddings, data.labels, wanted=2)
    assert (len(right), wrong) == (2, [])
    sheets.sheet_figure(embeddings, data.labels, data, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("colour", [False, True])
def test_borders_are_green_for_the_same_class_and_red_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colour: bool
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))
    found, data = arrays("pfml", 0), dots().test
    if colour:
        data = type(data)(data.labels, data.names, data.images[..., None].repeat(3, axis=3))
    sheets.sheet_figure(found["test"], data.labels, data, tmp_path / "x.png", wanted=2)
    right, wrong = sheets.choose_queries(found["test"], data.labels, wanted=2)
    expected = []
    for query in (*right, *wrong):
        expected.append((query.image, None))
        expected += [(i, data.labels[i] == data.labels[query.image]) for i in query.neighbours]
    assert len(figures[0].axes) == len(expected) == 4 * 6
    for axes, (index, same) in zip(figures[0].axes, expected, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), data.images[index])
        if same is not None:
            border = to_hex(axes.spines["left"].get_edgecolor())
            assert border.upper() == (RIGHT if same else WRONG)
            assert axes.get_xlabel()[0] == ("✓" if same else "✗")


def test_images_of_another_data_set_are_an_error(tmp_path: Path) -> None:
    found, data = arrays("pfml", 0), dots().test
    fewer = data.take(data.labels != 3)
    with pytest.raises(ValueError, match="the 25 test images given are not the 30 that the run"):
        sheets.sheet_figure(found["test"], found["test_labels"], fewer, tmp_path / "x.png")
    with pytest.raises(ValueError, match="5 neighbours need 6 images or more, got 5"):
        sheets.choose_queries(np.eye(5), np.arange(5), wanted=1)
