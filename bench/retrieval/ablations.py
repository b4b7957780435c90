"""The ablations over PFML's settings: measured points, and published ones on axes of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bench.retrieval.cells import PLAIN, Cell, Spread
from bench.retrieval.published import ABLATIONS, FLAT_DELTA, SHORT_TITLES
from bench.retrieval.style import DPI, FAINT, INK, undress
from bench.retrieval.tables import title_of


def _gap(options: dict[str, Any]) -> float:
    delta, repulsion = options["delta"], options["delta_rep"]
    return 0.0 if repulsion is None else round(repulsion - delta, 9)


# By the setting that a variant overrides: the axis, and where on it a run stands.
PANELS: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "proxies_per_class": ("proxies a class, M", lambda options: options["proxies_per_class"]),
    "alpha": (r"decay, $\alpha$", lambda options: options["alpha"]),
    "delta": (r"radius, $\delta$", lambda options: options["delta"]),
    "delta_rep": (r"$\delta_{rep} - \delta_{att}$", _gap),
}
_TOGETHER = {"delta": {"delta", "delta_rep", "min_distance"}}  # radii may move together
_MEASURED = (("#0b3c6f", "o", "-"), ("#D55E00", "s", (0, (5, 1.5))), ("#009E73", "^", (0, (2, 1))))
_PUBLISHED = {"cars": ("#444444", "D", "-"), "cub": ("#9a9a9a", "v", "-")}

Style = tuple[str, str, Any]  # colour, marker and dash
Points = list[tuple[float, Spread]]


def points_of(cells: Sequence[Cell], field: str, when: str = "final") -> dict[float, Points]:
    """R@1 by one setting of PFML, at every label noise: (value, spread), ascending.

    Args:
        cells: of one data set, network and split; those of PFML count that are plain or override
            this setting alone.
        field: of `PANELS`.
        when: "final" or "best".

    Returns:
        By label noise, without those where no run overrides the setting.
    """
    found: dict[float, Points] = {}
    varied = set()
    for cell in cells:
        names = [change.partition("=")[0] for change in cell.variant.split(",")]
        alone = names[0] == field and set(names) <= _TOGETHER.get(field, {field})
        if cell.loss == "pfml" and (cell.variant == PLAIN or alone):
            x = PANELS[field][1](cell.rows[0]["options"])
            found.setdefault(cell.label_noise, []).append((x, cell.value(f"{when}_r1")))
            varied |= {cell.label_noise} if alone else set()
    return {noise: sorted(found[noise]) for noise in sorted(varied)}


def ablation_figure(cells: Sequence[Cell], out: Path, when: str = "final") -> None:
    """Draw R@1 over M, alpha, delta and delta_rep - delta, and below what is published of it.

    Args:
        cells: of one data set, network and split.
        out: the PNG to create; its folder must exist.
        when: "final" or "best".

    Raises:
        ValueError: no run of PFML overrides one of these settings alone.
    """
    curves = {field: points_of(cells, field, when) for field in PANELS}
    if not any(curves.values()):
        raise ValueError(f"no run varies one of {', '.join(PANELS)} alone")
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    first = cells[0]
    noises = sorted({noise for panel in curves.values() for noise in panel})
    measured = above.subplots(1, len(PANELS), sharey=True)
    for field, axes in zip(PANELS, measured, strict=True):
        for noise, points in curves[field].items():
            _draw(axes, points, _MEASURED[noises.index(noise) % len(_MEASURED)])
        _dress(axes, PANELS[field][0])
        if not curves[field]:
            axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color=FAINT)
            axes.set_xticks([])
    _title(above, f"Measured: {title_of(first.dataset)}, {first.network}, {first.split} classes")
    measured[0].set_ylabel("R@1, %", color=INK)
    names = [f"{100 * n:g} % label noise" if n else "right labels" for n in noises]
    _legend(above, names, [_MEASURED[i % len(_MEASURED)] for i in range(len(noises))])

    shown = below.subplots(1, len(PANELS), sharey=True)
    for field, axes in zip(PANELS, shown, strict=True):
        for dataset, curve in ABLATIONS[field].items():
            points = [(x, Spread(y, None, 1)) for x, y in curve.items()]
            _draw(axes, points, _PUBLISHED[dataset])
        _dress(axes, PANELS[field][0])
        if field == "delta":
            axes.axvspan(*FLAT_DELTA, color="#d9d9d9", lw=0)
            axes.set_xlim(0, 0.45)
            axes.text(sum(FLAT_DELTA) / 2, 0.5, "flat", transform=axes.get_xaxis_transform(),
                      ha="center", color=INK)  # fmt: skip
        if field == "proxies_per_class":
            axes.annotate("flat →", (15, 92.7), (0, 6), textcoords="offset points", ha="center",
                          fontsize=8, color=FAINT)  # fmt: skip
    shown[0].set_ylabel("R@1, %", color=INK)
    _title(below, "Published, other data sets: read off the paper's plots")
    _legend(below, [SHORT_TITLES[d] for d in _PUBLISHED], list(_PUBLISHED.values()))
    figure.savefig(out, dpi=DPI)


def _draw(axes: Axes, points: Points, style: Style) -> None:
    colour, marker, dash = style
    axes.errorbar(
        [x for x, _ in points], [100 * y.mean for _, y in points],
        yerr=[100 * (y.sd or 0.0) for _, y in points],
        color=colour, marker=marker, ls=dash, ms=5, lw=1.5, elinewidth=1.2, capsize=2.5,
    )  # fmt: skip


def _dress(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.08, y=0.12)
    undress(axes)


def _title(figure: SubFigure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=10.5, weight="bold", color=INK)


def _legend(
    figure: SubFigure, names: Sequence[str], styles: Sequence[tuple[str, str, Any]]
) -> None:
    handles = [
        Line2D([], [], color=colour, marker=marker, ls=dash, ms=5, lw=1.5, label=name)
        for name, (colour, marker, dash) in zip(names, styles, strict=True)
    ]
    figure.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False, fontsize=9)
