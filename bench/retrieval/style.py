"""What the pictures of retrieval share: one colour, dash and marker a loss, and plain axes."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

INK, FAINT, GRID = "#222222", "#777777", "#e4e4e4"
RIGHT, WRONG = "#009E73", "#CC3311"
DPI = 160

# After Okabe and Ito, for colour-blind readers; marker and dash tell them apart in grey too.
_LOSSES: dict[str, tuple[str, str, Any]] = {
    "pfml": ("#0b3c6f", "o", "-"),
    "proxy-anchor": ("#D55E00", "s", (0, (5, 1.5))),
    "proxynca": ("#E69F00", "D", (0, (3, 1.2))),
    "multi-similarity": ("#009E73", "^", (0, (6, 1.2, 1.2, 1.2))),
    "triplet": ("#56B4E9", "v", (0, (1.5, 1))),
    "contrastive": ("#CC79A7", "P", (0, (4, 1, 1, 1, 1, 1))),
    "npair": ("#8a8a8a", "X", (0, (2, 2))),
}
_OTHER = ("#444444", "h", "-")  # a loss that has no colour yet
MARKERS = "os^DvPX*<>"
CLASS_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#222222",
    "#999999", "#B7A800",
)  # fmt: skip


def loss_style(loss: str) -> tuple[str, str, Any]:
    """Colour, marker and dash of a loss."""
    return _LOSSES.get(loss, _OTHER)


def undress(axes: Axes, grid: str = "y") -> None:
    """Only the axes that carry numbers, and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=GRID, lw=0.7)  # type: ignore[arg-type]


def plain(text: str) -> str:
    """A name as matplotlib shall write it: a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def noise_title(noise: float) -> str:
    """What a label noise is called above a panel."""
    return f"{100 * noise:g} % of the training labels wrong" if noise else "right labels"
