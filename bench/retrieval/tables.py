"""Tables of retrieval results, for the console and for a page; published figures marked as such."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from bench.retrieval.cells import PLAIN, Cell, Spread, recall_ks, share
from bench.retrieval.published import (
    FIGURES,
    NOISE,
    RESNET,
    SHORT_TITLES,
    SOURCE,
    TITLES,
    published,
)
from bench.retrieval.wasserstein import ProxyDistances

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
)
_BUDGET = ("epochs", "batch_size", "images_per_class", "embedding_size", "weights")  # for all alike
NOTHING, _PUBLISHED = "—", "published"
_SOURCE = f" Published: {SOURCE}."
_WHEN = {"final": "after the last epoch", "best": "at the best epoch"}
_FLATTERS = {
    "final": "",
    "best": " The best epoch of a run is chosen on the same images, which flatters it.",
}


@dataclass(frozen=True)
class Line:
    """One line of a table: its texts, whether they are published, and which ones are the best."""

    texts: tuple[str, ...]
    published: bool = False
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class TextTable:
    """A table as texts, the first `labels` columns being names and the others numbers.

    Attributes:
        title: what it shows.
        columns: their headings.
        lines: each with a text a column.
        note: how to read it.
        labels: columns that are aligned to the left.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    note: str
    labels: int = 1

    def rich(self) -> Table:
        """For a console."""
        table = Table(
            title=escape(self.title), caption=escape(self.note), title_justify="left",
            caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
        )  # fmt: skip
        for i, name in enumerate(self.columns):
            number = i >= self.labels
            table.add_column(
                escape(name), justify="right" if number else "left", no_wrap=number,
                overflow="fold",
            )  # fmt: skip
        for line in self.lines:
            texts = [
                f"[bold]{escape(text)}[/bold]" if i in line.best else escape(text)
                for i, text in enumerate(line.texts)
            ]
            table.add_row(*texts, style="dim italic" if line.published else None)
        return table

    def html(self) -> str:
        """For a page: the table element, everything in it escaped."""
        return TEMPLATES.get_template("table.html").render(table=self)


def main_table(cells: Sequence[Cell], when: str = "final") -> TextTable:
    """R@K and MAP@R of every loss, in percent; below them what is published for this data set.

    Args:
        cells: of one data set, network, split and label noise, one a loss.
        when: "final" or "best".
    """
    dataset, network, split, noise = _same(cells)
    ks = recall_ks(cells)
    metrics = [*(f"{when}_r{k}" for k in ks), f"{when}_map_at_r"]
    spreads = [[cell.value(metric) for metric in metrics] for cell in cells]
    seeds = all_seeds(cells)
    lines = _with_best([(cell.title, count(cell, seeds)) for cell in cells], spreads)
    others = published(dataset, noise) if split == "test" else []
    for figure in others:
        recalls = (f"{100 * figure.recall[k]:.1f}" if k in figure.recall else NOTHING for k in ks)
        texts = (f"{figure.method} ({figure.network})", _PUBLISHED, *recalls, NOTHING)
        lines.append(Line(texts, published=True))
    return TextTable(
        f"{title_of(dataset)}, {network}, {split} classes{_noise_words(noise)}: {_WHEN[when]}",
        ("loss", "seeds", *(f"R@{k}" for k in ks), "MAP@R"),
        tuple(lines),
        f"Percent, {_over(seeds)}. Bold: the best measured mean.{_FLATTERS[when]}"
        f"{_SOURCE if others else ''}",
    )


def noise_table(cells: Sequence[Cell], when: str = "final") -> TextTable:
    """What label noise costs every loss: R@1 clean, noisy, and the drop, at every noise there is.

    Args:
        cells: plain ones of one data set, network and split, one a loss and label noise.
        when: "final" or "best".
    """
    dataset, network, split, _ = _same(cells, noise=False)
    seeds = all_seeds(cells)
    levels = sorted({cell.label_noise for cell in cells} - {0.0})
    by_loss: dict[str, dict[float, Cell]] = {}
    for cell in cells:
        by_loss.setdefault(cell.title, {})[cell.label_noise] = cell
    names, spreads = [], []
    for title, found in by_loss.items():
        counts = [count(found.get(level), seeds) for level in (0.0, *levels)]
        names.append((title, " / ".join(dict.fromkeys(counts))))
        values = [found[0.0].value(f"{when}_r1") if 0.0 in found else None]
        for level in levels:
            values.append(found[level].value(f"{when}_r1") if level in found else None)
            values.append(difference(found.get(0.0), found.get(level), f"{when}_r1"))
        spreads.append(values)
    drops = range(len(names[0]) + 2, len(names[0]) + 1 + 2 * len(levels), 2)
    lines = _with_best(names, spreads, low=drops)
    beside = split == "test" and levels == [NOISE] and bool(published(dataset, NOISE))
    if beside:
        lines += _published_drops(dataset)
    pairs = [name for level in levels for name in (f"{100 * level:g} % noise", "drop")]
    return TextTable(
        f"{title_of(dataset)}, {network}, {split} classes: R@1 with wrong training labels, "
        f"{_WHEN[when]}",
        ("loss", "seeds", "clean", *pairs),
        tuple(lines),
        f"Percent, {_over(seeds)}; the drop, in points, is of the seeds that ran with and "
        f"without noise. Bold: the best measured mean.{_FLATTERS[when]}{_SOURCE if beside else ''}",
    )


def study_table(cells: Sequence[Cell], when: str = "final") -> TextTable:
    """Variants of one loss: R@1 and MAP@R at every label noise, and R@1 against the plain recipe.

    Args:
        cells: of one data set, network, split and loss.
        when: "final" or "best".
    """
    dataset, network, split, _ = _same(cells, noise=False)
    seeds = all_seeds(cells)
    plain = {cell.label_noise: cell for cell in cells if cell.variant == PLAIN}
    lines = []
    for cell in cells:
        base = plain.get(cell.label_noise)
        gain = (
            difference(cell, base, f"{when}_r1") if base is not None and base is not cell else None
        )
        lines.append(
            Line((
                cell.variant.replace(",", ", ") or "plain",
                f"{100 * cell.label_noise:g} %",
                count(cell, seeds),
                cell.value(f"{when}_r1").text(),
                "" if gain is None else _signed(gain),
                cell.value(f"{when}_map_at_r").text(),
            ))
        )  # fmt: skip
    return TextTable(
        f"{title_of(dataset)}, {network}, {split} classes: {cells[0].title} and its variants, "
        f"{_WHEN[when]}",
        ("variant", "noise", "seeds", "R@1", "gain", "MAP@R"),
        tuple(lines),
        f"Percent, {_over(seeds)}; the gain over the plain recipe, "
        f"in points, is of the seeds that both have.{_FLATTERS[when]}",
    )


def distance_table(
    distances: Sequence[tuple[Cell, Sequence[ProxyDistances]]], seeds: Sequence[int]
) -> TextTable:
    """How near proxies are to the samples of their class, in three units.

    Args:
        distances: cells of losses with proxies, of one data set and network, each with the
            distances of its runs.
        seeds: that could be there.
    """
    dataset, network, split, _ = _same([cell for cell, _ in distances], noise=False)
    names = [
        (cell.title, str(found[0].per_class), f"{100 * cell.label_noise:g} %", count(cell, seeds))
        for cell, found in distances
    ]
    spreads = [
        [
            Spread.of([run.w2.mean() / unit for run, unit in zip(found, units, strict=True)])
            for units in (
                [1.0] * len(found), [run.spread for run in found], [run.apart for run in found],
            )
        ]
        for _, found in distances
    ]  # fmt: skip
    lines = [
        Line((*name, *(spread.text(scale=1, digits=3) for spread in row)))
        for name, row in zip(names, spreads, strict=True)
    ]
    return TextTable(
        f"{title_of(dataset)}, {network}, {split} runs: W2 from the proxies of a training class "
        "to its samples",
        ("loss", "M", "noise", "seeds", "W2", "÷ spread", "÷ apart"),
        tuple(lines),
        "Exact 2-Wasserstein distance on the unit sphere, the mean over classes; "
        f"{_over(seeds)}. M: proxies a class. Spread: W2 from the samples of "
        "a class to their mean, below which one proxy cannot come, but several can. "
        "Apart: the root mean square distance between two class means. Less is nearer; losses "
        "compare in the last two columns, since each spreads its embeddings differently.",
    )


def published_table() -> TextTable:
    """The paper's main table."""
    return _published_table("R@K of the paper's main table", 0.0)


def published_noise_table() -> TextTable:
    """The paper's table of label noise."""
    return _published_table(f"R@K with {100 * NOISE:g} % of the training labels wrong", NOISE)


def difference(cell: Cell | None, other: Cell | None, metric: str) -> Spread | None:
    """Of a share, one cell less another, seed by seed; None if no seed is in both."""
    if cell is None or other is None:
        return None
    values, others = ({r["seed"]: share(r, metric) for r in c.rows} for c in (cell, other))
    both = sorted(values.keys() & others.keys())
    return Spread.of([values[seed] - others[seed] for seed in both]) if both else None


def all_seeds(cells: Sequence[Cell]) -> tuple[int, ...]:
    """Of any of the cells, so that one that lacks some can say so."""
    return tuple(sorted({seed for cell in cells for seed in cell.seeds}))


def count(cell: Cell | None, seeds: Sequence[int]) -> str:
    """ "3" where every seed is there, otherwise "2 of 3, no 1"."""
    if cell is None:
        return f"0 of {len(seeds)}"
    missing = [seed for seed in seeds if seed not in cell.seeds]
    if not missing:
        return str(len(seeds))
    return f"{len(cell.rows)} of {len(seeds)}, no {_listed(missing)}"


def title_of(dataset: str) -> str:
    """A data set's proper name, or the name its rows have."""
    return TITLES.get(dataset, dataset)


def _same(cells: Sequence[Cell], *, noise: bool = True) -> tuple[str, str, str, float]:
    """Data set, network, split and label noise of all the cells. ValueError if they differ."""
    if not cells:
        raise ValueError("a table needs at least one cell, got none")
    for name in ("dataset", "network", "split", *(("label_noise",) if noise else ()), *_BUDGET):
        if name in _BUDGET and any(cell.variant != PLAIN for cell in cells):
            continue  # a study varies what it likes
        found = dict.fromkeys(cell.rows[0].get(name) for cell in cells)
        if len(found) > 1:
            raise ValueError(f"one table is of one {name}, got {', '.join(map(str, found))}")
    first = cells[0]
    return first.dataset, first.network, first.split, first.label_noise


def _with_best(
    names: Sequence[tuple[str, ...]],
    spreads: Sequence[Sequence[Spread | None]],
    low: Container[int] = (),
) -> list[Line]:
    """Measured lines, the best mean of each column marked; that is the least in columns `low`."""
    first = len(names[0])
    best: list[set[int]] = [set() for _ in names]
    for j, column in enumerate(zip(*spreads, strict=True), first):
        means = [s.mean for s in column if s is not None]
        if len(means) > 1:
            wanted = min(means) if j in low else max(means)
            for i, spread in enumerate(column):
                if spread is not None and spread.mean == wanted:
                    best[i].add(j)
    return [
        Line((*name, *(NOTHING if s is None else s.text() for s in row)), best=frozenset(marks))
        for name, row, marks in zip(names, spreads, best, strict=True)
    ]


def _published_drops(dataset: str) -> list[Line]:
    clean = {f.method: f.recall[1] for f in published(dataset, 0.0) if f.network == RESNET}
    lines = []
    for figure in published(dataset, NOISE):
        before, after = clean.get(figure.method), figure.recall[1]
        texts = (
            (NOTHING, f"{100 * after:.1f}", NOTHING)
            if before is None
            else tuple(f"{100 * value:.1f}" for value in (before, after, before - after))
        )
        name = f"{figure.method} ({figure.network})"
        lines.append(Line((name, _PUBLISHED, *texts), published=True))
    return lines


def _published_table(title: str, noise: float) -> TextTable:
    by_method: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    ks: dict[str, list[int]] = {}
    for figure in FIGURES:
        if figure.label_noise == noise:
            key = figure.network, figure.method
            by_method.setdefault(key, {})[figure.dataset] = figure.recall
            ks[figure.dataset] = list(figure.recall)
    columns = [(dataset, k) for dataset in ks for k in ks[dataset]]
    lines = []
    for key, recalls in by_method.items():
        values = [recalls.get(dataset, {}).get(k) for dataset, k in columns]
        texts = (NOTHING if value is None else f"{100 * value:.1f}" for value in values)
        lines.append(Line((*key, *texts), published=True))
    return TextTable(
        f"Published, other data sets: {title}",
        ("network", "method", *(f"{SHORT_TITLES[dataset]} R@{k}" for dataset, k in columns)),
        tuple(lines),
        f"Percent, as published: {SOURCE}. Not measured here.",
        labels=2,
    )


def _noise_words(noise: float) -> str:
    return f", {100 * noise:g} % of the training labels wrong" if noise else ""


def _signed(gain: Spread) -> str:
    return f"{'+' if gain.mean >= 0 else ''}{gain.text()}"


def _over(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"of one seed, {seeds[0]}"
    return f"mean ± sample standard deviation over seeds {_listed(seeds)}"


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
