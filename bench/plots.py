"""Pictures of rows in JSON lines. They read the rows and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.results import read_rows
from bench.settings import PROVIDERS, SIZES
from bench.tables import MEASURED

Row = dict[str, Any]

_BOTH, _FORWARD = "forward+backward", "forward"
# Colours that differ in lightness too, so that they do in grey and to the colour-blind.
FAMILIES = {
    "this loss": ("#0b3c6f", ("pfml", "pfml-triton", "pfml-torch")),
    "this loss, without pruning": (
        "#4a90c4", ("pfml-dense", "pfml-triton-dense", "pfml-torch-dense"),
    ),
    "the same energy": ("#e08214", ("eager", "compile", "keops")),
    "another loss": ("#a9a9a9", ("proxy-anchor", "multi-similarity", "triplet", "contrastive")),
}  # fmt: skip
_INK, _FAINT = "#222222", "#8a8a8a"
_MARKERS = dict(zip(PROVIDERS, "osvP^X>DsPhvd", strict=True))
_UNTOLD = ("needs", "is what")  # statuses of a provider that is not one of this machine's
_CURVES = ("pfml", "pfml-dense", "eager", "compile", "keops")


def speed_figure(rows_path: Path, out: Path) -> None:
    """Draw the times of every provider at every size, a panel a size, on one logarithmic axis.

    Args:
        rows_path: ``speed.jsonl``. Of each size, provider and mode it is the latest row that
            counts, of those with the machine and the dtype of the last one.
        out: the PNG (or other format that matplotlib writes) to create; its folder must exist.

    Raises:
        OSError, ValueError: the rows cannot be read, or nothing in them is measured.
    """
    latest = _latest(read_rows(rows_path), rows_path)
    times = [row["p50_ms"] for row in latest.values() if row["status"] == MEASURED]
    panels = {
        size: [name for name in PROVIDERS if _is_told(latest, size, name)]
        for size in sorted({size for size, _, _ in latest}, key=_place)
    }
    panels = {size: providers for size, providers in panels.items() if providers}
    columns = min(2, len(panels))
    lines = [list(panels)[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(len(panels[size]) for size in line) + 1.5 for line in lines]
    figure = Figure(figsize=(5.6 * columns, 0.3 * sum(heights) + 1.1), layout=_layout())
    grid = figure.add_gridspec(len(lines), columns, height_ratios=heights)
    limits = 10 ** math.floor(math.log10(min(times))), 10 ** math.ceil(math.log10(max(times)) + 0.4)
    for i, line in enumerate(lines):
        for j, size in enumerate(line):
            panel = figure.add_subplot(grid[i, j])
            _draw_bars(panel, latest, size, panels[size], limits)
    shown = {name for providers in panels.values() for name in providers}
    handles = [
        Patch(color=colour, label=family)
        for family, (colour, names) in FAMILIES.items() if shown & {*names}
    ]  # fmt: skip
    modes = {mode for _, _, mode in latest}
    if _FORWARD in modes:
        handles.append(Patch(color=_INK, alpha=0.35, lw=0, label="forward only"))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9
    )
    _caption(figure, [row for row in latest.values() if row["status"] == MEASURED])
    figure.savefig(out, dpi=160)


def growth_figure(rows_path: Path, out: Path) -> None:
    """Draw the time of forward and backward against N, both logarithmic.

    Args:
        rows_path, out: as for `speed_figure`. Of the sizes with classes apart it is those that
            differ in the number of classes only, most of them.

    Raises:
        OSError, ValueError: the rows cannot be read, or have no two such sizes.
    """
    latest = _latest(read_rows(rows_path), rows_path)
    alike: dict[tuple[int, int], list[Row]] = {}
    for (_, provider, mode), row in latest.items():
        drawn = row["status"] == MEASURED and row["kind"] == "apart"
        if drawn and provider in _CURVES and mode == _BOTH:
            alike.setdefault((row["d"], row["proxies"]), []).append(row)
    (depth, proxies), rows = max(
        alike.items(), key=lambda item: len({row["n"] for row in item[1]}), default=((0, 0), [])
    )
    if len({row["n"] for row in rows}) < 2:
        raise ValueError(
            f"{rows_path} holds no two sizes that differ in their classes only, of one machine and "
            "dtype: try python -m bench speed --n 2000 8000 32000"
        )
    figure = Figure(figsize=(6.4, 4.6), layout=_layout())
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel="N, points", ylabel="forward + backward")
    ends = min(row["n"] for row in rows), max(row["n"] for row in rows)
    curves = {
        provider: sorted((r["n"], r["p50_ms"]) for r in rows if r["provider"] == provider)
        for provider in _CURVES
    }
    curves = {provider: curve for provider, curve in curves.items() if curve}
    _draw_slopes(axes, ends, [row["p50_ms"] for row in rows])
    for provider, curve in curves.items():
        n, ms = zip(*curve, strict=True)
        axes.plot(n, ms, color=_colour(provider), marker=_MARKERS[provider], markersize=6, lw=1.8)
    for end in {curve[-1][0] for curve in curves.values()}:
        ending = {p: curve[-1][1] for p, curve in curves.items() if curve[-1][0] == end}
        names = sorted(ending, key=ending.__getitem__)
        heights = _spread([ending[provider] for provider in names], axes.get_ylim())
        for provider, height in zip(names, heights, strict=True):
            axes.annotate(
                provider, (end, height), xytext=(9, 0), textcoords="offset points",
                va="center", color=_colour(provider), fontsize=10,
            )  # fmt: skip
    axes.set_xlim(ends[0] / 1.2, ends[1] * (ends[1] / ends[0]) ** 0.25)
    axes.set_xticks(sorted({row["n"] for row in rows}))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: duration(ms)))
    axes.set_title(
        f"D = {depth}, {proxies} proxies a class, classes apart", fontsize=10, loc="left"
    )
    axes.grid(color="#e4e4e4", lw=0.7)
    _undress(axes)
    _caption(figure, rows)
    figure.savefig(out, dpi=160)


def duration(ms: float) -> str:
    """Milliseconds with two or three digits and a unit of their size."""
    for unit, scale in (("µs", 1e-3), ("ms", 1.0), ("s", 1e3)):
        value = ms / scale
        if value < 999.5 or unit == "s":
            return f"{value:.2g} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    raise AssertionError


def _latest(rows: Sequence[Row], path: Path) -> dict[tuple[str, str, str], Row]:
    """The latest row by size, provider and mode, of the machine and dtype of the last one."""
    rows = [row for row in rows if row.get("bench") == "speed"]
    machine = ("device", "cpu", "threads", "dtype")
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if all(row[key] == rows[-1][key] for key in machine):
            found[row["size"], row["provider"], row["mode"]] = row
    if not any(row["status"] == MEASURED for row in found.values()):
        raise ValueError(f"{path} holds no measured row of bench speed")
    return found


def _is_told(latest: dict[tuple[str, str, str], Row], size: str, provider: str) -> bool:
    found = [row for key, row in latest.items() if key[:2] == (size, provider)]
    return any(not row["status"].startswith(_UNTOLD) for row in found)


def _draw_bars(
    panel: Axes,
    latest: dict[tuple[str, str, str], Row],
    size: str,
    providers: Sequence[str],
    limits: tuple[float, float],
) -> None:
    row: Row = {}
    for y, provider in enumerate(providers):
        modes = {m: latest[size, provider, m] for m in (_BOTH, _FORWARD) if
                 (size, provider, m) in latest}  # fmt: skip
        row = next(iter(modes.values()))
        if row["status"] != MEASURED:
            panel.text(
                limits[0] * 1.15, y, _short(row["status"]), va="center", fontsize=7.5,
                color=_FAINT, style="italic",
            )  # fmt: skip
            continue
        thin = len(modes) == 2
        for mode, row in modes.items():
            forward = mode == _FORWARD
            height, shift = (0.28, 0.27) if thin and forward else (0.5, -0.13) if thin else (0.6, 0)
            ms = row["p50_ms"]
            panel.barh(
                y + shift, ms - limits[0], left=limits[0], height=height,
                color=_colour(provider), alpha=0.45 if forward else 1.0, lw=0,
            )  # fmt: skip
            panel.annotate(
                duration(ms), (ms, y + shift), xytext=(3, 0), textcoords="offset points",
                va="center", fontsize=6 if forward and thin else 8,
                color=_FAINT if forward and thin else _INK,
                weight="bold" if provider == "pfml" and not forward else "normal",
            )  # fmt: skip
    panel.set_xscale("log")
    panel.set_xlim(*limits)
    panel.set_ylim(len(providers) - 0.4, -0.6)
    panel.set_yticks(np.arange(len(providers)), providers, fontsize=8.5)
    panel.xaxis.set_major_locator(LogLocator(numticks=10))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: duration(ms)))
    panel.tick_params(axis="x", labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.set_axisbelow(True)
    panel.grid(axis="x", color="#e4e4e4", lw=0.7)
    points, classes = f"N = {row['n']:,}", f"{row['classes']:,} classes"
    classes = "1 class" if row["classes"] == 1 else classes
    name, rest = (size, f"{points}   ") if size in SIZES else (points, "")
    panel.set_title(name, fontsize=11, weight="bold", loc="left")
    panel.set_title(f"{rest}D = {row['d']}   {classes}", fontsize=8.5, loc="right", color=_FAINT)
    _undress(panel)
    panel.spines["left"].set_visible(False)


def _draw_slopes(axes: Axes, ends: tuple[int, int], times: Sequence[float]) -> None:
    """How time grows that is linear in N, and quadratic, from the least of the times."""
    span, handles = np.array(ends), []
    for power, style in ((1, ":"), (2, "--")):
        axes.plot(span, min(times) * (span / ends[0]) ** power, color=_FAINT, ls=style, lw=1)
        label = "grows as N" if power == 1 else "grows as N²"
        handles.append(Line2D([], [], color=_FAINT, ls=style, lw=1, label=label))
    axes.legend(handles=handles, loc="best", frameon=False, fontsize=9)


def _spread(values: Sequence[float], limits: tuple[float, float]) -> list[float]:
    """Rising values on a logarithmic axis, moved up where two are too near to write beside."""
    apart, placed = (limits[1] / limits[0]) ** 0.05, [values[0]]
    for value in values[1:]:
        placed.append(max(value, placed[-1] * apart))
    return placed


def _place(size: str) -> tuple[int, int, str]:
    """The order of panels: sizes with names as they stand in `SIZES`, then others by their N."""
    if size in SIZES:
        return list(SIZES).index(size), 0, size
    number = size[1:].partition("-")[0]
    return len(SIZES), int(number) if number.isdigit() else 0, size


def _short(status: str) -> str:
    """What fits a panel of a status."""
    text = status.partition(", ")[0].replace("does not fit: needs", "does not fit:")
    return text if len(text) <= 52 else text[:51] + "…"


def _colour(provider: str) -> str:
    return next(colour for colour, names in FAMILIES.values() if provider in names)


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1)


def _undress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)


def _caption(figure: Figure, rows: Sequence[Row]) -> None:
    """What was measured where and when, below."""
    last = rows[-1]
    days = sorted({row["time"][:10] for row in rows})
    commits = ", ".join(dict.fromkeys(row["commit"] or "no commit" for row in rows))
    machine = last["cpu"] if last["device"] == "cpu" else last["device"]
    count = "1 thread" if last["threads"] == 1 else f"{last['threads']} threads"
    threads = f", {count}" if last["device"] == "cpu" else ""
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    figure.supxlabel(
        f"Measured: {machine}{threads}, {last['dtype']}, medians. PyTorch {last['torch']}, "
        f"{when}, commit {commits}.",
        fontsize=8, color=_FAINT,
    )  # fmt: skip
