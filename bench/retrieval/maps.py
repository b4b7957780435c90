"""A map of test classes: their embeddings in the plane, by t-SNE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from sklearn.manifold import TSNE

from bench.retrieval.style import CLASS_COLOURS, DPI, FAINT, INK, MARKERS, plain
from bench.retrieval.wasserstein import Floats, normalised

CLASSES = 20
_ON_THE_MAP = 3  # characters of a name, at most; longer ones stand beside, behind a number
_LEGEND_NAME = 26  # characters
PERPLEXITY = 30.0  # or a third of the points, if they are few


def map_classes(labels: NDArray[np.int64], classes: int = CLASSES) -> list[int]:
    """As many of the classes, evenly spaced in their order; all if there are not more."""
    present = np.unique(labels)
    chosen = np.linspace(0, len(present) - 1, min(classes, len(present))).round().astype(int)
    return present[chosen].tolist()


def map_figure(
    embeddings: Floats,
    labels: NDArray[np.int64],
    names: Sequence[str],
    out: Path,
    classes: int = CLASSES,
) -> None:
    """Draw the embeddings of some classes where t-SNE puts them, each class with its name.

    Args:
        embeddings: [n, D], any length but 0; normalised here.
        labels: [n] in [0, len(names)).
        names: of the classes.
        out: the PNG to create; its folder must exist.
        classes: how many, see `map_classes`.

    Raises:
        ValueError: fewer than four embeddings in these classes.
    """
    chosen = map_classes(labels, classes)
    kept = np.isin(labels, chosen)
    if kept.sum() < 4:
        raise ValueError(f"a map needs 4 embeddings or more, got {kept.sum()}")
    points = normalised(embeddings[kept]).astype(np.float32)
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
    short = all(len(names[c]) <= _ON_THE_MAP for c in chosen)
    figure = Figure(figsize=(7.2 if short else 9.6, 6.4), layout="constrained")
    axes = figure.add_subplot()
    middles = np.empty((len(chosen), 2))
    for i, c in enumerate(chosen):
        own = places[labels[kept] == c]
        middles[i] = _middle(own)
        axes.scatter(
            own[:, 0], own[:, 1], s=30, color=CLASS_COLOURS[i % len(CLASS_COLOURS)],
            marker=MARKERS[(i + i // len(CLASS_COLOURS)) % len(MARKERS)],
            edgecolors="white", linewidths=0.5, label=_entry(i, names[c]),
        )  # fmt: skip
    low, high = places.min(axis=0), places.max(axis=0)
    size = float((high - low).max())
    for i, place in enumerate(_apart(middles + np.array([0, 0.03 * size]), 0.045 * size)):
        axes.annotate(
            plain(names[chosen[i]]) if short else str(i + 1), middles[i], place,
            ha="center", va="center", fontsize=12, weight="bold", color=INK, zorder=4,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
    if not short:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9, handletextpad=0.2)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(FAINT)
        spine.set_linewidth(0.6)
    figure.savefig(out, dpi=DPI)


def _middle(points: NDArray[np.floating]) -> NDArray[np.floating]:
    """The point with the least distance to all the others: where a class is, outliers or not."""
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    return points[distances.sum(axis=1).argmin()]


def _apart(places: NDArray[np.floating], gap: float) -> NDArray[np.floating]:
    """The places, pushed away from each other until no two are nearer than `gap`, or nearly."""
    moved = places.astype(np.float64)
    for _ in range(200):
        offsets = moved[:, None] - moved[None]
        distances = np.linalg.norm(offsets, axis=2) + np.eye(len(moved)) * 2 * gap
        lacking = np.clip(gap - distances, 0, None)
        if not lacking.any():
            break
        directions = offsets / np.maximum(distances, 1e-9)[..., None]
        moved += 0.5 * (lacking[..., None] * directions).sum(axis=1)
    return moved


def _entry(index: int, name: str) -> str:
    name = name.replace("_", " ")
    name = name if len(name) <= _LEGEND_NAME else name[: _LEGEND_NAME - 1] + "…"
    return plain(f"{index + 1}  {name}")
