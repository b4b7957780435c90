"""The picture of modelled steps, from their rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.results import read_rows

Row = dict[str, Any]

# Colours that stay apart for colour-blind readers (after Okabe and Ito), by part of the step.
_COLOURS = {
    "pack": "#56B4E9", "filter": "#0072B2", "count": "#009E73", "plan": "#7BC8A4",
    "force": "#D55E00", "join": "#E69F00", "total": "#CC79A7", "pull_back": "#B8860B",
    "launches": "#9A9A9A", "PyTorch": "#D5D5D5",
}  # fmt: skip
_OTHER = "#444444"  # a kernel that has no colour yet
_INK, _FAINT = "#222222", "#777777"
_DENSE: dict[str, Any] = {"color": _INK, "linewidth": 1.4, "linestyle": (0, (2, 1.2))}
_BAR = 0.62
_ROOM = 1.3  # of an axis, to the right of its longest bar


def roofline_figure(rows_path: Path, out: Path) -> None:
    """Draw the modelled step of each size and chip as a bar of its parts.

    Args:
        rows_path: ``roofline.jsonl``; the last row of a kind counts.
        out: the picture to create; its folder must exist.

    Each size has its own scale. The whisker is from the lower to the upper end of the step, the
    dashed line what two dense bfloat16 products would take at the chip's peak.

    Raises:
        OSError, ValueError: the rows cannot be read, or no step is among them.
    """
    steps: dict[str, dict[str, Row]] = {}
    kernels: dict[tuple[str, str], dict[str, float]] = {}
    for row in read_rows(rows_path):
        key = row.get("size"), row["chip"]
        if row["level"] == "step":
            steps.setdefault(row["size"], {})[row["chip"]] = row
        elif row["level"] == "kernel":
            kernels.setdefault(key, {})[row["kernel"]] = row["us_point"]  # type: ignore[arg-type]
    if not steps:
        raise ValueError(f"{rows_path} has no modelled step: run `python -m bench roofline`")
    heights = [len(chips) + 0.9 for chips in steps.values()]
    figure = Figure(figsize=(9, 1.5 + 0.42 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(steps), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (size, chips) in zip(axes, steps.items(), strict=True):
        _draw(axis, size, chips, kernels)
    axes[-1].set_xlabel("modelled microseconds of a step, forward and backward", color=_INK)
    parts = {name: None for chips in kernels.values() for name in chips}
    names = [*sorted(parts, key=_order), "launches", "PyTorch"]
    handles: list[Artist] = [Patch(color=_COLOURS.get(name, _OTHER)) for name in names]
    handles.append(Line2D([], [], **_DENSE))
    names.append("two dense products")
    figure.legend(
        handles, names, loc="outside upper center", ncols=-(-len(names) // 2), frameon=False,
        fontsize=9, handlelength=1.4, handletextpad=0.5, columnspacing=1.2,
        title="Modelled from the machine code, not measured", title_fontsize=11,
    )  # fmt: skip
    figure.savefig(out, dpi=160)


def _draw(
    axis: Axes, size: str, chips: dict[str, Row], kernels: dict[tuple[str, str], dict[str, float]]
) -> None:
    longest = max(row["us_high"] for row in chips.values())
    axis.set_xlim(0, longest * _ROOM)
    axis.set_ylim(len(chips) - 0.45, -0.55)
    for y, (chip, row) in enumerate(chips.items()):
        left, total = 0.0, row["us_point"]
        found = kernels[size, chip]
        parts = [(name, found[name]) for name in sorted(found, key=_order)]
        parts += [("launches", row["launches_us"])]
        parts += [("PyTorch", row["forward_us"] + row["backward_us"])]
        for name, width in parts:
            colour = _COLOURS.get(name, _OTHER)
            axis.barh(y, width, _BAR, left, color=colour, edgecolor="white", linewidth=0.6)
            left += width
        low, high = total - row["us_low"], row["us_high"] - total
        axis.errorbar(total, y, xerr=[[low], [high]], color=_INK, linewidth=0.9, capsize=2.5)
        axis.text(
            row["us_high"] + 0.012 * longest, y - 0.08, f"{total:,.0f} µs", va="center",
            fontweight="bold", fontsize=9.5, color=_INK,
        )  # fmt: skip
        _mark_dense(axis, y, row["dense_bfloat16_us"], longest * _ROOM)
    axis.set_yticks(range(len(chips)), list(chips), fontsize=9.5, color=_INK)
    row = next(iter(chips.values()))
    axis.set_title(
        f"{size}   N = {row['n']:,}, D = {row['depth']}, {row['dtype']}", loc="left", fontsize=10.5,
        color=_INK,
    )  # fmt: skip
    axis.tick_params(axis="both", length=0, labelcolor=_INK)
    axis.tick_params(axis="x", labelsize=8.5, labelcolor=_FAINT)
    axis.grid(axis="x", color="#E6E6E6", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in axis.spines.values():
        side.set_visible(False)


def _mark_dense(axis: Axes, y: int, dense: float, end: float) -> None:
    """What two dense products take: a line, or where it is beyond the axis an arrow and a word."""
    if dense < 0.98 * end:
        axis.plot([dense, dense], [y - 0.42, y + 0.42], **_DENSE)
        return
    time = f"{dense:,.0f} µs" if dense < 10_000 else f"{dense / 1000:,.1f} ms"
    axis.annotate(
        f"dense {time}", (end, y + 0.2), (0.985 * end, y + 0.2), ha="right", va="center",
        fontsize=8, color=_FAINT,
        arrowprops={"arrowstyle": "->", "color": _FAINT, "linewidth": 0.9},
    )  # fmt: skip


def _order(name: str) -> int:
    names = list(_COLOURS)
    return names.index(name) if name in names else len(names)
