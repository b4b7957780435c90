"""A map of test classes: their embeddings in the plane, by t-SNE."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from sklearn.manifold import TSNE

from bench.retrieval.images import Images
from bench.retrieval.style import CLASS_COLOURS, DPI, FAINT, INK, MARKERS, plain
from bench.retrieval.wasserstein import Floats, normalised

CLASSES = 20
PERPLEXITY = 30.0  # or a third of the points, if they are few
_LEGEND_NAME = 24  # characters
_PICTURE = 26.0  # points, the longer side
_CLEAR = 0.046  # of the map: half a picture and a little
_RINGS, _ANGLES = (0.05, 0.07, 0.09, 0.12, 0.15), 16


def map_classes(labels: NDArray[np.int64], classes: int = CLASSES) -> list[int]:
    """As many of the classes, evenly spaced in their order; all if there are not more."""
    present = np.unique(labels)
    chosen = np.linspace(0, len(present) - 1, min(classes, len(present))).round().astype(int)
    return present[chosen].tolist()


def map_figure(
    embeddings: Floats,
    labels: NDArray[np.int64],
    out: Path,
    images: Images | None = None,
    classes: int = CLASSES,
) -> None:
    """Draw the embeddings of some classes where t-SNE puts them, each class with an image of it.

    Args:
        embeddings: [n, D], any length but 0; normalised here.
        labels: [n].
        out: the PNG to create; its folder must exist.
        images: what was embedded; numbers stand for the classes if it is not given.
        classes: how many, see `map_classes`.

    Raises:
        ValueError: fewer than four embeddings in these classes, or other images.
    """
    chosen = map_classes(labels, classes)
    kept = np.isin(labels, chosen)
    if kept.sum() < 4:
        raise ValueError(f"a map needs 4 embeddings or more, got {kept.sum()}")
    if images is not None:
        check_same(labels, images)
    points = normalised(embeddings[kept]).astype(np.float32)
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
    low, high = places.min(axis=0), places.max(axis=0)
    places = (places - low) / (high - low).max()
    width, height = places.max(axis=0)
    figure = Figure(figsize=(8.8, max(4.5, 6.8 * min(1.1, height / width))), layout="constrained")
    axes = figure.add_subplot()
    middles = np.empty((len(chosen), 2))
    for i, c in enumerate(chosen):
        own = places[labels[kept] == c]
        middles[i] = _middle(own)
        name = f"class {c}" if images is None else images.names[c]
        axes.scatter(
            own[:, 0], own[:, 1], s=26, color=CLASS_COLOURS[i % len(CLASS_COLOURS)],
            marker=MARKERS[(i + i // len(CLASS_COLOURS)) % len(MARKERS)],
            edgecolors="white", linewidths=0.4, label=_entry(i, name), zorder=2,
        )  # fmt: skip
    for i, place in enumerate(_free_places(middles, places)):
        axes.plot(*zip(middles[i], place, strict=True), color=FAINT, lw=0.7, zorder=1)
        picture = None
        if images is not None:
            picture = images.picture(int(np.flatnonzero(labels == chosen[i])[0]))
        _mark(axes, place, i, picture)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, handletextpad=0.2)
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.06)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(FAINT)
        spine.set_linewidth(0.6)
    figure.savefig(out, dpi=DPI)


def check_same(labels: NDArray[np.int64], images: Images) -> None:
    """Raise ValueError where images are not those that a run embedded, told by their labels."""
    if not np.array_equal(labels, images.labels):
        raise ValueError(
            f"the {len(images.labels)} test images given are not the {len(labels)} that the run "
            "embedded: is it another data set, or another version of it?"
        )


def _mark(
    axes: Axes, place: NDArray[np.floating], index: int, picture: NDArray[np.uint8] | None
) -> None:
    """The picture of a class, or its number in the legend."""
    colour = CLASS_COLOURS[index % len(CLASS_COLOURS)]
    if picture is None:
        axes.text(
            place[0], place[1], str(index + 1), ha="center", va="center", fontsize=11,
            weight="bold", color=INK, zorder=4,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
        return
    box = OffsetImage(picture, zoom=_PICTURE / max(picture.shape[:2]), cmap="gray")
    frame = {"edgecolor": colour, "linewidth": 1.6, "boxstyle": "square,pad=0.02"}
    marked = AnnotationBbox(box, tuple(place), pad=0.0, bboxprops=frame)
    marked.set_zorder(3)
    axes.add_artist(marked)
    axes.annotate(
        str(index + 1), tuple(place), (5 - _PICTURE / 2, _PICTURE / 2 - 4), fontsize=7, color=INK,
        textcoords="offset points", ha="center", va="center", zorder=4,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
    )  # fmt: skip


def _middle(points: NDArray[np.floating]) -> NDArray[np.floating]:
    """The point with the least distance to all the others: where a class is, outliers or not."""
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    return points[distances.sum(axis=1).argmin()]


def _free_places(
    middles: NDArray[np.floating], points: NDArray[np.floating]
) -> list[NDArray[np.floating]]:
    """For each class the place nearest to its middle that is clear of points and other places.

    Where there is none, the place with most room around it.
    """
    angles = np.arange(_ANGLES) * 2 * np.pi / _ANGLES
    circle = np.stack([np.sin(angles), np.cos(angles)], axis=1)
    around = np.concatenate([radius * circle for radius in _RINGS])
    taken: list[NDArray[np.floating]] = []
    for middle in middles:
        places = middle + around
        room = np.linalg.norm(places[:, None] - points[None], axis=2).min(axis=1)
        if taken:  # two pictures need twice the room of one and a point
            others = np.linalg.norm(places[:, None] - np.array(taken)[None], axis=2)
            room = np.minimum(room, others.min(axis=1) / 2)
        clear = room >= _CLEAR
        taken.append(places[clear.argmax() if clear.any() else room.argmax()])
    return taken


def _entry(index: int, name: str) -> str:
    name = name.replace("_", " ")
    name = name if len(name) <= _LEGEND_NAME else name[: _LEGEND_NAME - 1] + "…"
    return plain(f"{index + 1}  {name}")
