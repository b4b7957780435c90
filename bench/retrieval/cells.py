"""Finished runs, gathered into cells: the runs that differ in their seed alone."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Self

Row = dict[str, Any]

# What the plots and tables call a loss, in their order.
LOSSES = {
    "pfml": "PFML",
    "proxy-anchor": "Proxy Anchor",
    "proxynca": "ProxyNCA",
    "multi-similarity": "Multi-Similarity",
    "triplet": "Triplet",
    "contrastive": "Contrastive",
    "npair": "N-pair",
}
PLAIN = ""  # the variant that is the recipe as it stands

# Fields in which the runs of a cell may differ: what was measured, and where and when.
_MEASURED = re.compile(r"(final|best|untrained)_.+|active_share(_.+)?|(.+_)?seconds")
PROVENANCE = (
    "time", "commit", "python", "torch", "triton", "pfml_triton", "pytorch_metric_learning",
    "pykeops", "cpu", "driver", "device", "threads",
)  # fmt: skip
_FREE = {"run", "seed", *PROVENANCE}


class Spread(NamedTuple):
    """Of a quantity over seeds: mean, sample standard deviation (None of one seed), and count."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), sd, len(values))

    def text(self, scale: float = 100.0, digits: int = 1) -> str:
        """ "86.6 ± 0.4", in percent unless another scale is asked for."""
        mean = f"{scale * self.mean:.{digits}f}"
        return mean if self.sd is None else f"{mean} ± {scale * self.sd:.{digits}f}"


@dataclass(frozen=True)
class Cell:
    """The runs of one recipe, at least one, by ascending seed.

    Attributes:
        dataset, split, network, loss, label_noise, variant: as in the rows.
        rows: one a seed, equal but for the seed, what was measured, and where.
    """

    dataset: str
    split: str
    network: str
    loss: str
    label_noise: float
    variant: str
    rows: tuple[Row, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(row["seed"] for row in self.rows)

    @property
    def title(self) -> str:
        """Of the loss."""
        return LOSSES.get(self.loss, self.loss)

    def value(self, metric: str) -> Spread:
        """Mean and spread of a field that is a share.

        Raises:
            ValueError: a row lacks it, or it is no number in [0, 1].
        """
        return Spread.of([share(row, metric) for row in self.rows])


KEY = ("dataset", "split", "network", "loss", "label_noise", "variant")


def share(row: Row, metric: str) -> float:
    """A field of a row that is a share. ValueError if it is missing or not in [0, 1]."""
    value = row.get(metric)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"run {row['run']}: {metric} must be in [0, 1], got {value!r}")
    return value


def gather(rows: Iterable[Row]) -> list[Cell]:
    """Cells of the latest row of every run, losses in the order of `LOSSES`, plain ones first.

    Raises:
        ValueError: a row lacks a field that says what it is, two runs of a cell have one seed, or
            they differ in a field that is neither measured nor provenance, naming it.
    """
    latest: dict[str, Row] = {}
    for number, row in enumerate(rows, 1):
        missing = [name for name in ("run", "seed", *KEY) if name not in row]
        if missing:
            raise ValueError(f"row {number} of the results lacks {', '.join(missing)}")
        latest[row["run"]] = row
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in latest.values():
        groups.setdefault(tuple(row[name] for name in KEY), []).append(row)
    cells = []
    for key, members in groups.items():
        members.sort(key=lambda row: row["seed"])
        for other in members[1:]:
            _check_alike(members[0], other)
        for first, second in pairwise(members):
            if first["seed"] == second["seed"]:
                raise ValueError(
                    f"runs {first['run']} and {second['run']} are of one recipe and one seed, "
                    f"{first['seed']}, and would count twice"
                )
        cells.append(Cell(**dict(zip(KEY, key, strict=True)), rows=tuple(members)))
    return sorted(cells, key=_order)


def recall_ks(cells: Iterable[Cell]) -> list[int]:
    """The K, ascending, of which every row has R@K at the last epoch."""
    found = [
        {int(m[1]) for name in row if (m := re.fullmatch(r"final_r(\d+)", name))}
        for cell in cells
        for row in cell.rows
    ]
    return sorted(set.intersection(*found)) if found else []


def _check_alike(first: Row, other: Row) -> None:
    for name in sorted({*first, *other}):
        if name in _FREE or _MEASURED.fullmatch(name):
            continue
        a, b = first.get(name, "nothing"), other.get(name, "nothing")
        if a != b:
            raise ValueError(
                f"runs {first['run']} and {other['run']} would be averaged, but differ in {name}: "
                f"{a!r} and {b!r}; give one of them a variant or a folder of its own"
            )


def _order(cell: Cell) -> tuple[Any, ...]:
    losses = list(LOSSES)
    place = losses.index(cell.loss) if cell.loss in losses else len(losses)
    where = (cell.dataset, cell.network, cell.split)
    return *where, place, cell.loss, natural(cell.variant), cell.label_noise


def natural(variant: str) -> list[tuple[str, float, str]]:
    """A key that sorts variants by their settings' names, and those by value: 2 before 10."""
    parts = []
    for override in filter(None, variant.split(",")):
        name, _, value = override.partition("=")
        try:
            parts.append((name, float(value), ""))
        except ValueError:
            parts.append((name, math.inf, value))
    return parts
