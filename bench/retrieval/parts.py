"""The parts of a report on one data set and network: which rows each shows, and what it lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from rich.progress import Progress

from bench.figures import embedding_field_figure
from bench.recipes import PRESETS, preset
from bench.retrieval.ablations import PANELS, ablation_figure, points_of
from bench.retrieval.cells import PLAIN, Cell, Row
from bench.retrieval.curves import distance_figure, learning_figure
from bench.retrieval.images import DataSet
from bench.retrieval.maps import map_classes, map_figure
from bench.retrieval.published import READ_OFF
from bench.retrieval.runs import ARRAYS, LOG, RESULTS, Arrays, Curve, read_arrays
from bench.retrieval.sheets import NEIGHBOURS, sheet_figure
from bench.retrieval.tables import (
    TextTable,
    all_seeds,
    distance_table,
    main_table,
    noise_table,
    study_table,
)
from bench.retrieval.wasserstein import ProxyDistances, proxy_distances
from pfml_triton import Potential

Key = TypeVar("Key")


class Picture(NamedTuple):
    """A picture of the page: its file, what it shows to who cannot see it, and how to read it."""

    file: str
    width: int
    height: int
    alt: str
    caption: str


@dataclass(frozen=True)
class Part:
    """A heading with what is under it.

    Attributes:
        title, text: what it is about.
        tables, pictures: what is shown.
        source: of which rows or files.
        command: that made these, or would make what is missing.
        missing: what is not there, if so.
        published: of the paper, not measured.
    """

    title: str
    text: str
    tables: Sequence[TextTable] = ()
    pictures: Sequence[Picture] = ()
    source: str = ""
    command: str = ""
    missing: str = ""
    published: bool = False


@dataclass(frozen=True)
class Work:
    """What the parts are made from.

    Attributes:
        runs: the folder of the runs.
        folder: gets the pictures, named `prefix` and what they show.
        cells: of one data set and network.
        curves: R@1 by epoch and run.
        data: the data set, if it was given.
        progress: shows how far slow parts are.
    """

    runs: Path
    folder: Path
    prefix: str
    cells: Sequence[Cell]
    curves: dict[str, Curve]
    data: DataSet | None
    progress: Progress

    @property
    def plain(self) -> list[Cell]:
        """The recipes as they stand, on the test classes."""
        return [c for c in self.cells if c.split == "test" and c.variant == PLAIN]

    def command(self, rest: str) -> str:
        """That of a benchmark of this data set and network; "" where no preset has them."""
        first = self.cells[0]
        names = (first.dataset, f"{first.dataset}-{first.network}")
        name = next((name for name in names if name in PRESETS), None)
        if name is None:
            return ""
        epochs = first.rows[0]["epochs"]
        rest += f" --epochs {epochs}" if epochs != preset(name).epochs else ""
        data = "" if name == "glyphs" else " --data FOLDER"
        out = "" if self.runs == Path("runs/retrieval") else f" --out {self.runs}"
        return f"python -m bench retrieval --preset {name}{data} {rest}{out}"

    def draw(self, name: str, figure: Callable[[Path], None], alt: str, caption: str) -> Picture:
        """Let a function draw a picture into the folder."""
        return draw(self.folder / f"{self.prefix}-{name}.png", figure, alt, caption)


def draw(path: Path, figure: Callable[[Path], None], alt: str, caption: str) -> Picture:
    """Let a function draw a picture to a path."""
    figure(path)
    with Image.open(path) as image:
        width, height = image.size
    return Picture(path.name, width, height, alt, caption)


def parts_of(work: Work) -> list[Part]:
    """All parts, in their order."""
    makers = (_results, _noise, _learning, _ablations, _study, _distances, _fields, _map, _sheet)
    parts = []
    task = work.progress.add_task(work.prefix, total=len(makers))
    for maker in makers:
        parts.append(maker(work))
        work.progress.advance(task)
    return parts


def _results(work: Work) -> Part:
    title = "All losses"
    text = (
        "Every image of the test classes, which training never saw, queries all the others: the "
        "share that finds its class among the K nearest, and the mean average precision at R."
    )
    command = work.command("--losses all --seeds 0 1 2")
    cells = [cell for cell in work.plain if not cell.label_noise]
    if not cells:
        return Part(title, text, command=command, missing="No run with right labels has finished.")
    tables = [main_table(cells), main_table(cells, "best")]
    return Part(title, text, tables, source=_rows(cells), command=command)


def _noise(work: Work) -> Part:
    title = "Wrong labels"
    text = "The same with a share of the training labels replaced at random. Test labels are right."
    command = work.command("--losses all --seeds 0 1 2 --label-noise 0.2")
    if not any(cell.label_noise for cell in work.plain):
        missing = "No run with label noise has finished."
        return Part(title, text, command=command, missing=missing)
    tables = [noise_table(work.plain), noise_table(work.plain, "best")]
    return Part(title, text, tables, source=_rows(work.plain), command=command)


def _learning(work: Work) -> Part:
    title = "How R@1 rises"
    text = "R@1 of the test classes by epoch, the mean over seeds. The bands span all seeds."
    command = work.command("--losses all --seeds 0 1 2")
    cells = [c for c in work.plain if any(row["run"] in work.curves for row in c.rows)]
    if not cells:
        return Part(title, text, command=command, missing=f"{LOG} holds no evaluation of a run.")
    picture = work.draw(
        "learning", lambda path: learning_figure(cells, work.curves, path),
        f"Curves of R@1 over epochs for {_titles(cells)}, a panel for each label noise.",
        "An epoch is drawn that was evaluated with every seed.",
    )  # fmt: skip
    return Part(title, text, pictures=[picture], source=_rows(cells, LOG), command=command)


def _ablations(work: Work) -> Part:
    title = "Ablations of PFML"
    text = (
        "R@1 after the last epoch over one setting, the others as in the recipe: the number of "
        "proxies, the decay, the radius, and the radius of repulsion beyond that of attraction. "
        f"The lower panels are published, of other data sets, {READ_OFF}."
    )
    command = work.command("--losses pfml --seeds 0 1 2 --set alpha=0,1,2,6")
    pictures, shown = [], []
    for split, cells in _by(work.cells, lambda cell: cell.split).items():
        if any(points_of(cells, name) for name in PANELS):
            shown += [c for c in cells if c.loss == "pfml" and "," not in c.variant]
            pictures.append(
                work.draw(
                    f"ablations-{split}", partial(ablation_figure, cells),
                    "Four panels of measured R@1 over M, alpha, delta and the difference of the "
                    "radii, and below them four panels of published R@1.",
                    f"Measured on the {split} classes. Bars: sample standard deviation over "
                    "seeds, none where there is one.",
                )
            )  # fmt: skip
    if not pictures:
        return Part(title, text, command=command, missing="No run overrides one of these alone.")
    return Part(title, text, pictures=pictures, source=_rows(shown), command=command)


def _study(work: Work) -> Part:
    title = "Study of the recipe"
    text = "Each line overrides settings of the recipe by those that it names."
    command = work.command("--losses pfml --seeds 0 1 2 --set min_distance=0.001,0.1")
    groups = _by(work.cells, lambda cell: (cell.split, cell.loss))
    varied = [cells for cells in groups.values() if any(c.variant != PLAIN for c in cells)]
    if not varied:
        return Part(title, text, command=command, missing="No run overrides a setting.")
    tables = [study_table(cells) for cells in varied]
    source = _rows([cell for cells in varied for cell in cells])
    return Part(title, text, tables, source=source, command=command)


def _distances(work: Work) -> Part:
    title = "Proxies and their samples"
    text = (
        "How well do proxies represent their class? The 2-Wasserstein distance from the proxies of "
        "a class to its training samples, by their true labels (the paper's advantage 4)."
    )
    command = work.command("--losses pfml proxynca proxy-anchor --seeds 0 1 2")
    found: list[tuple[Cell, list[ProxyDistances]]] = []
    for cell in work.plain:
        arrays = {row["run"]: read_arrays(work.runs, row["run"]) for row in cell.rows}
        kept = {run: a for run, a in arrays.items() if a is not None and a.proxies.shape[1]}
        if kept:
            rows = tuple(row for row in cell.rows if row["run"] in kept)
            found.append((replace(cell, rows=rows), _measure(work, cell, [*kept.values()])))
    if not found:
        missing = f"No run of a loss with proxies has left {ARRAYS}."
        return Part(title, text, command=command, missing=missing)
    picture = work.draw(
        "distances", lambda path: distance_figure(found, path),
        f"Boxes of the W2 distances of all classes for {_titles([cell for cell, _ in found])}: as "
        "they are, relative to the spread of a class, and to the distance between classes.",
        "Boxes: quartiles and median over classes and seeds; whiskers: 5 to 95 %. Dashed: what the "
        "mean of a class's samples reaches, below which one proxy cannot come.",
    )  # fmt: skip
    cells = [cell for cell, _ in found]
    tables = [distance_table(found, all_seeds(work.plain))]
    return Part(title, text, tables, [picture], _rows(cells, ARRAYS), command)


def _measure(work: Work, cell: Cell, runs: Sequence[Arrays]) -> list[ProxyDistances]:
    task = work.progress.add_task(f"W2, {cell.title}", total=sum(len(a.proxies) for a in runs))
    distances = [
        proxy_distances(a.train, a.train_labels, a.proxies, lambda: work.progress.advance(task))
        for a in runs
    ]
    work.progress.remove_task(task)
    return distances


def _fields(work: Work) -> Part:
    title = "Class fields"
    text = (
        "What members of a class feel: drawn into the wells, pushed off the hills. Two "
        "neighbouring classes of the trained embedding, on a section of the sphere."
    )
    command = work.command("--losses pfml")
    shown = _shown(work, pfml=True)
    if shown is None:
        missing = f"No run of PFML has left {ARRAYS}."
        return Part(title, text, command=command, missing=missing)
    row, arrays = shown
    known = {field.name for field in fields(Potential)}
    options = row["options"]
    potential = Potential(**{name: options[name] for name in options if name in known})
    names = _names(work, len(arrays.proxies))
    picture = work.draw(
            "learned-fields",
            lambda path: embedding_field_figure(
                path, torch.from_numpy(arrays.train), torch.from_numpy(arrays.train_labels),
                torch.from_numpy(arrays.proxies), potential, names,
            ),
            "Filled contours of the fields of two classes of the trained embedding, with their "
            "samples and proxies.",
            "The two classes are those at the median distance of all classes and their nearest.",
    )  # fmt: skip
    return Part(title, text, pictures=[picture], source=_of_run(row), command=command)


def _map(work: Work) -> Part:
    title = "A map of test classes"
    text = (
        "Embeddings of classes never seen in training, where t-SNE puts them in the plane. Only "
        "who is near whom means something; distances between groups do not."
    )
    command = work.command("--losses pfml")
    shown = _shown(work)
    if shown is None:
        return Part(title, text, command=command, missing=f"No run has left {ARRAYS}.")
    row, arrays = shown
    images = None if work.data is None else work.data.test
    classes = len(map_classes(arrays.test_labels))
    picture = work.draw(
        "map", lambda path: map_figure(arrays.test, arrays.test_labels, path, images),
        f"Points of {classes} test classes in the plane, coloured by class.",
        f"{classes} classes, evenly spaced in the data set's order; PCA to start from, seed 0.",
    )  # fmt: skip
    return Part(title, text, pictures=[picture], source=_of_run(row), command=command)


def _sheet(work: Work) -> Part:
    title = "Retrieval sheet"
    text = (
        "Test images and the five nearest others; green: of the query's class, red: of another. "
        "On the left queries whose nearest is right, on the right queries whose nearest is wrong, "
        "the first of each kind in a random order that nobody picked."
    )
    shown = _shown(work)
    if shown is None or work.data is None:
        missing = (
            f"No run has left {ARRAYS}." if shown is None
            else "The images were not given: python -m bench report --data FOLDER."
        )  # fmt: skip
        command = work.command("--losses pfml") if shown is None else ""
        return Part(title, text, command=command, missing=missing)
    row, arrays = shown
    images = work.data.test
    if len(arrays.test) <= NEIGHBOURS:
        return Part(title, text, missing=f"{len(arrays.test)} images are too few for a sheet.")
    picture = work.draw(
        "sheet", lambda path: sheet_figure(arrays.test, arrays.test_labels, images, path),
        "Rows of images: a query and its five nearest neighbours, framed green or red.",
        "As many of both kinds, whatever their share: of all queries, "
        f"{100 * row['final_r1']:.1f} % have a nearest image that is right.",
    )  # fmt: skip
    command = work.command("--losses pfml")
    return Part(title, text, pictures=[picture], source=_of_run(row), command=command)


def _shown(work: Work, *, pfml: bool = False) -> tuple[Row, Arrays] | None:
    """The run that stands for all in pictures: the first with arrays, PFML, right labels first."""
    cells = [cell for cell in work.plain if cell.loss == "pfml" or not pfml]
    for cell in sorted(cells, key=lambda cell: (cell.loss != "pfml", cell.label_noise)):
        for row in cell.rows:
            arrays = read_arrays(work.runs, row["run"])
            if arrays is not None:
                return row, arrays
    return None


def _names(work: Work, classes: int) -> Sequence[str]:
    """Of the training classes."""
    if work.data is None:
        return [str(c) for c in range(classes)]
    if len(work.data.train.names) != classes:
        raise ValueError(
            f"the run has proxies of {classes} classes, but the data set given trains on "
            f"{len(work.data.train.names)}"
        )
    return work.data.train.names


def _by(cells: Sequence[Cell], key: Callable[[Cell], Key]) -> dict[Key, list[Cell]]:
    groups: dict[Key, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups


def _rows(cells: Sequence[Cell], file: str = RESULTS) -> str:
    """Which rows were shown."""
    rows = [row for cell in cells for row in cell.rows]
    epochs = " or ".join(map(str, sorted({row["epochs"] for row in rows})))
    runs = "1 run" if len(rows) == 1 else f"{len(rows)} runs"
    return f"{runs} of {epochs} epochs, in {file}."


def _titles(cells: Sequence[Cell]) -> str:
    return ", ".join(dict.fromkeys(cell.title for cell in cells))


def _of_run(row: Row) -> str:
    return f"{ARRAYS} of run {row['run']}."
