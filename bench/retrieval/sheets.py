"""A retrieval sheet: some test images, and the five that their embedding finds first."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bench.retrieval.images import Images
from bench.retrieval.maps import check_same
from bench.retrieval.style import DPI, FAINT, INK, RIGHT, WRONG, plain
from bench.retrieval.wasserstein import Floats, normalised

NEIGHBOURS = 5
_CHUNK = 256  # queries at a time
_ROW, _TITLE = 0.95, 0.3  # inches: of a query, and above the first
_NAME = 12  # characters of a class's name below an image


class Query(NamedTuple):
    """A test image and the nearest others, nearest first, as indices."""

    image: int
    neighbours: tuple[int, ...]


def choose_queries(
    embeddings: Floats, labels: NDArray[np.int64], wanted: int, neighbours: int = NEIGHBOURS
) -> tuple[list[Query], list[Query]]:
    """Queries whose nearest image is of their class, and queries where it is not.

    They are the first of each kind in a random order that is the same every time, so that nobody
    picked them. Nothing is said by how many of each there are: see R@1 for that.

    Args:
        embeddings: [n, D] with n > neighbours, any length but 0; normalised here.
        labels: [n].
        wanted: of each kind; fewer come back if there are fewer.
        neighbours: of each query.

    Raises:
        ValueError: no more embeddings than neighbours.
    """
    if len(embeddings) <= neighbours:
        raise ValueError(
            f"{neighbours} neighbours need {neighbours + 1} images or more, got {len(embeddings)}"
        )
    unit = normalised(embeddings).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(unit))
    found: tuple[list[Query], list[Query]] = ([], [])
    for start in range(0, len(order), _CHUNK):
        queries = order[start : start + _CHUNK]
        similarity = unit[queries] @ unit.T
        similarity[np.arange(len(queries)), queries] = -np.inf
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :neighbours]
        for query, row in zip(queries.tolist(), nearest.tolist(), strict=True):
            kind = found[int(labels[row[0]] != labels[query])]
            if len(kind) < wanted:
                kind.append(Query(query, tuple(row)))
        if min(map(len, found)) == wanted:
            break
    return found


def sheet_figure(
    embeddings: Floats, labels: NDArray[np.int64], images: Images, out: Path, wanted: int = 5
) -> None:
    """Draw queries whose nearest image is right, on the left, and some where it is wrong.

    Args:
        embeddings: [n, D], of the images.
        labels: [n], their classes.
        images: n, whose labels are the same.
        out: the PNG to create; its folder must exist.
        wanted: queries of each kind.

    Raises:
        ValueError: the images are not those that were embedded.
    """
    check_same(labels, images)
    found = choose_queries(embeddings, labels, wanted)
    rows = max(map(len, found))
    height = _ROW * rows + _TITLE
    figure = Figure(figsize=(11, height))
    titles = ("the nearest image is right", "the nearest image is wrong")
    # A column for the query, a narrow gap, and the neighbours, twice.
    widths = [1, 0.16, *[1] * NEIGHBOURS]
    grid = figure.add_gridspec(
        rows, 2 * len(widths) + 1, width_ratios=[*widths, 0.45, *widths], wspace=0.08, hspace=0.36,
        left=0.01, right=0.99, bottom=0.2 / height, top=1 - _TITLE / height,
    )  # fmt: skip
    for side, queries in enumerate(found):
        left = side * (len(widths) + 1)
        for i, query in enumerate(queries):
            axes = figure.add_subplot(grid[i, left])
            own = labels[query.image]
            _draw(axes, images, query.image, INK, _short(images.names[own]))
            if i == 0:
                axes.set_title("query", fontsize=9, color=INK, weight="bold")
            for j, index in enumerate(query.neighbours):
                axes = figure.add_subplot(grid[i, left + 2 + j])
                right = labels[index] == own
                name = "✓" if right else f"✗ {_short(images.names[labels[index]])}"
                _draw(axes, images, index, RIGHT if right else WRONG, name)
                if i == 0 and j == 0:
                    axes.set_title(titles[side], fontsize=9, color=INK, loc="left")
    figure.savefig(out, dpi=DPI)


def _draw(axes: Axes, images: Images, index: int, colour: str, text: str) -> None:
    picture = images.picture(index)
    axes.imshow(picture, cmap="gray" if picture.ndim == 2 else None, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(1.2 if colour == INK else 3.0)
    axes.set_xlabel(plain(text), fontsize=7.5, labelpad=2, color=FAINT if colour == INK else colour)


def _short(name: str) -> str:
    name = name.replace("_", " ")
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"
