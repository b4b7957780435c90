"""One page of tables and pictures from what the runs of a folder left there."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from bench.figures import class_field_figure
from bench.retrieval.cells import Cell, Row, gather
from bench.retrieval.images import DataSet
from bench.retrieval.parts import Part, Work, draw, parts_of
from bench.retrieval.published import SOURCE
from bench.retrieval.runs import RESULTS, read_curves, read_results
from bench.retrieval.tables import TEMPLATES, published_noise_table, published_table, title_of

PAGE = "report.html"


@dataclass(frozen=True)
class Chapter:
    """A data set and network, or what is published."""

    title: str
    anchor: str
    parts: Sequence[Part]


def data_sets(runs: Path) -> list[str]:
    """The names of the data sets that a folder of runs is of. Raises as `read_results` does."""
    return list(dict.fromkeys(cell.dataset for cell in gather(read_results(runs))))


def write_report(
    runs: Path, out: Path, data: DataSet | None = None, *, console: Console | None = None
) -> Path:
    """Write tables and pictures of all finished runs, and a page that holds them.

    Everything is made in a temporary folder inside `out` first, and moved when it is complete, the
    page last: where something fails, an older report is as it was. Other files stay.

    Args:
        runs: the folder that runs were told to write to.
        out: the folder that gets the page and its pictures; created where missing.
        data: the images that were embedded, for the retrieval sheet and the names of classes;
            without it the page says what is missing.
        console: where tables and progress are printed; standard output if None.

    Returns:
        The page.

    Raises:
        OSError: something cannot be read or written.
        ValueError: no finished run, rows of one recipe that contradict each other, damaged arrays,
            or `data` that no run is of.
    """
    console = console or Console()
    cells = gather(read_results(runs))
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.dataset, cell.network), []).append(cell)
    names = {cell.dataset for cell in cells}
    if data is not None and data.name not in names:
        raise ValueError(f"the runs in {runs} are of {', '.join(sorted(names))}, not {data.name}")
    curves = read_curves(runs)
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with tempfile.TemporaryDirectory(prefix=".report-", dir=out) as folder:
        chapters: list[Chapter] = []
        with Progress(*columns, console=console, transient=True) as progress:
            for (dataset, network), members in groups.items():
                images = data if data is not None and data.name == dataset else None
                prefix = _file_name(f"{dataset}-{network}")
                while prefix in {chapter.anchor for chapter in chapters}:
                    prefix += "_"
                work = Work(runs, Path(folder), prefix, members, curves, images, progress)
                title = f"{title_of(dataset)}, {network}"
                chapters.append(Chapter(title, prefix, parts_of(work)))
        for chapter in chapters:
            for part in chapter.parts:
                for table in part.tables:
                    console.print(table.rich())
        chapters.append(Chapter("The paper", "paper", _paper(Path(folder))))
        text = TEMPLATES.get_template(PAGE).render(
            chapters=chapters,
            environment=environment([row for cell in cells for row in cell.rows]),
            shown_by=shlex.join(["python", "-m", "bench", "report", "--runs", str(runs),
                                 "--out", str(out)]),
        )  # fmt: skip
        (Path(folder) / PAGE).write_text(text, encoding="utf-8")
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == PAGE):
            os.replace(path, out / path.name)
    return out / PAGE


def environment(rows: Sequence[Row]) -> str:
    """Where and when the rows were made, a sentence; what differs among them is listed."""

    def every(name: str, unknown: str = "unknown") -> str:
        return ", ".join(dict.fromkeys(str(row.get(name) or unknown) for row in rows))

    days = sorted({row["time"][:10] for row in rows if "time" in row})
    when = " to ".join(dict.fromkeys(days[:1] + days[-1:])) or "unknown"
    machine = every("cpu") if {row.get("device") for row in rows} == {"cpu"} else every("device")
    runs = "1 finished run" if len(rows) == 1 else f"{len(rows)} finished runs"
    return (
        f"{runs} in {RESULTS}, measured on {machine}; CPU threads {every('threads')}; "
        f"PyTorch {every('torch')}; commit {every('commit', 'none')}; {when}."
    )


def _paper(folder: Path) -> list[Part]:
    """The picture of the method, and what the paper reports."""
    fields = draw(
        folder / "toy-fields.png", class_field_figure,
        "Filled contours of the fields of two classes in the plane, with samples, proxies and "
        "arrows for the net force.",
        "Computed with this loss, after the paper's picture; the points were placed by hand.",
    )  # fmt: skip
    method = Part(
        "The method",
        "What members of each of two classes feel: a class draws its members from afar, but not "
        "inside the radius δ of its points, and the other class repels them inside it.",
        pictures=[fields],
    )
    figures = Part(
        "The paper's tables",
        "What the paper reports. Nothing of it was measured here.",
        tables=[published_table(), published_noise_table()],
        source=f"Source: {SOURCE}.",
        published=True,
    )
    return [method, figures]


def _file_name(text: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in text)
