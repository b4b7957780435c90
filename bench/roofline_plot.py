"""The picture of modelled steps, from their rows alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]


def roofline_figure(rows: Iterable[Row], path: Path) -> None:
    Figure().savefig(path)
