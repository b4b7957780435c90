"""Pictures of all losses together: how R@1 rises, and how near proxies are to their samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bench.retrieval.cells import Cell
from bench.retrieval.runs import Curve
from bench.retrieval.style import DPI, FAINT, INK, loss_style, noise_title, undress
from bench.retrieval.wasserstein import ProxyDistances

_STEEP = 5  # the first fifth of training may begin below the picture, or it would be all of it


def learning_figure(cells: Sequence[Cell], curves: Mapping[str, Curve], out: Path) -> None:
    """Draw R@1 by epoch of every loss, a panel a label noise: mean over seeds, and their range.

    Beside each curve stands the mean it ends with; the steep beginning may lie below the picture.

    Args:
        cells: plain ones of one data set, network and split.
        curves: R@1 in [0, 1] by epoch, by run id; an epoch is drawn that all seeds of a cell have.
        out: the PNG to create; its folder must exist.

    Raises:
        ValueError: none of the runs has a curve.
    """
    drawn = [cell for cell in cells if _common(cell, curves)]
    if not drawn:
        raise ValueError(f"the log has no evaluation of {', '.join(cell.loss for cell in cells)}")
    noises = sorted({cell.label_noise for cell in drawn})
    figure = Figure(figsize=(5.2 * max(len(noises), 1.3), 4.4), layout="constrained")
    panels = figure.subplots(1, len(noises), sharey=True, squeeze=False)[0]
    early: list[float] = []
    ends: list[dict[str, float]] = [{} for _ in noises]
    for noise, axes, end in zip(noises, panels, ends, strict=True):
        for cell in drawn:
            if cell.label_noise != noise:
                continue
            epochs = _common(cell, curves)
            values = 100 * np.array([[curves[r["run"]][e] for e in epochs] for r in cell.rows])
            colour, marker, dash = loss_style(cell.loss)
            front = 3 if cell.loss == "pfml" else 2
            axes.plot(
                epochs, values.mean(axis=0), color=colour, ls=dash, marker=marker, ms=5,
                markevery=max(1, len(epochs) // 8), lw=2.2 if front == 3 else 1.5, zorder=front,
            )  # fmt: skip
            end[colour] = values[:, -1].mean()
            early.append(values[:, len(epochs) // _STEEP :].min())
            axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour,
                              alpha=0.15, lw=0, zorder=1)  # fmt: skip
        axes.set_title(noise_title(noise), fontsize=10.5, loc="left", color=INK)
        axes.set_xlabel("epoch", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        undress(axes)
    panels[0].set_ylim(bottom=min(early))  # of all, since they share the axis
    for axes, end in zip(panels, ends, strict=True):
        _label_ends(axes, end)
    panels[0].set_ylabel("R@1 of the test classes, %", color=INK)
    figure.legend(handles=_handles(drawn), loc="outside lower center", ncols=4, frameon=False,
                  fontsize=9.5)  # fmt: skip
    figure.savefig(out, dpi=DPI)


def distance_figure(distances: Sequence[tuple[Cell, Sequence[ProxyDistances]]], out: Path) -> None:
    """Draw the W2 distances of all classes, a box a loss and label noise, in three units.

    Args:
        distances: cells of losses with proxies, each with the distances of its runs.
        out: the PNG to create; its folder must exist.
    """
    units = {
        "as it is, on the sphere": lambda d: 1.0,
        "÷ spread of a class": lambda d: d.spread,
        "÷ distance between classes": lambda d: d.apart,
    }
    figure = Figure(figsize=(10.5, 1.5 + 0.46 * len(distances)), layout="constrained")
    panels = figure.subplots(1, len(units), sharey=True)
    for (title, unit), axes in zip(units.items(), panels, strict=True):
        for y, (cell, runs) in enumerate(distances):
            values = np.concatenate([run.w2 / unit(run) for run in runs])
            colour = loss_style(cell.loss)[0]
            axes.boxplot(
                values, positions=[y], orientation="horizontal", widths=0.6, whis=(5, 95),
                showfliers=False, patch_artist=True, manage_ticks=False,
                boxprops={"facecolor": colour, "edgecolor": colour, "alpha": 0.85},
                medianprops={"color": "white", "lw": 1.8},
                whiskerprops={"color": colour, "lw": 1.4}, capprops={"color": colour, "lw": 1.4},
            )  # fmt: skip
        axes.set_title(title, fontsize=10, loc="left", color=INK)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        undress(axes, grid="x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[1].axvline(1, color=FAINT, ls=(0, (3, 2)), lw=1.2, zorder=0)
    names = [
        f"{cell.title}, {100 * cell.label_noise:g} % noise" if cell.label_noise else cell.title
        for cell, _ in distances
    ]
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel("W2 from the proxies to the samples of their class; less is nearer",
                     fontsize=9.5, color=INK)  # fmt: skip
    figure.savefig(out, dpi=DPI)


def _label_ends(axes: Axes, ends: Mapping[str, float]) -> None:
    """Write what curves end with beside them, by colour, moved apart where two are too near."""
    low, high = axes.get_ylim()
    least, right = 0.045 * (high - low), axes.get_xlim()[1]
    height = low
    for colour, value in sorted(ends.items(), key=lambda end: end[1]):
        height = max(value, height + least)
        axes.annotate(f"{value:.1f}", (right, height), xytext=(2, 0), textcoords="offset points",
                      va="center", fontsize=9, color=colour, annotation_clip=False)  # fmt: skip


def _common(cell: Cell, curves: Mapping[str, Curve]) -> list[int]:
    """The epochs that the curves of all runs of a cell have."""
    return sorted(set.intersection(*({*curves.get(row["run"], {})} for row in cell.rows)))


def _handles(cells: Sequence[Cell]) -> list[Line2D]:
    handles = []
    for loss, title in {cell.loss: cell.title for cell in cells}.items():
        colour, marker, dash = loss_style(loss)
        handles.append(
            Line2D([], [], color=colour, marker=marker, ls=dash, ms=5, lw=1.8, label=title)
        )
    return handles
