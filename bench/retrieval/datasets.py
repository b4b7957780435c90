"""The data sets by name, each loaded with its standard split into classes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bench.recipes import DATASETS
from bench.retrieval.cars import CARS, cars
from bench.retrieval.folders import CUB, SOP, Counts, Parts, Standard, cub, sop
from bench.retrieval.glyphs import glyphs
from bench.retrieval.images import DataSet
from bench.retrieval.readable import readable_only

FOLDERS: dict[str, tuple[Standard, Callable[[Path, Counts], Parts]]] = {
    "cub": (CUB, cub),
    "cars": (CARS, cars),
    "sop": (SOP, sop),
}
MOST_WORKERS = 8  # of those chosen here; more hardly helps one GPU


def load(
    name: str,
    folder: Path | None = None,
    *,
    strict: bool = False,
    workers: int | None = None,
    console: Console | None = None,
    counts: Counts | None = None,
) -> DataSet:
    """A data set by name.

    Args:
        name: one of `bench.recipes.DATASETS`.
        folder: where the user's copy lies; None for the glyphs, which are drawn.
        strict: raise ValueError for an image that cannot be read, instead of leaving it out.
        workers: processes that decode photographs, and threads that look for those that cannot be
            read; one for each core, up to 8, if None.
        console: where progress and images left out are printed; standard output if None.
        counts: images and classes that the folder must have, before any is left out, if they are
            not the published ones.

    Raises:
        ValueError: no such name; a folder for the glyphs, or none for another; one that is not as
            the data set's authors ship it; or too few images that can be read, see
            `readable_only`.
        OSError: a folder or a list may not be read.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    if name == "glyphs":
        if folder is not None:
            raise ValueError(f"glyphs are drawn and take no folder, got {folder}")
        return glyphs()
    standard, read = FOLDERS[name]
    if folder is None:
        raise ValueError(
            f"{name} needs the folder of {standard.title}, got none. It holds "
            f"{standard.contents}. Its authors publish it as {standard.origin}"
        )
    workers = min(MOST_WORKERS, _cores()) if workers is None else workers
    train, test = read(folder, counts or standard.counts)
    return readable_only(
        name,
        replace(train, workers=workers),
        replace(test, workers=workers),
        strict=strict,
        threads=max(1, workers),
        console=console or Console(),
    )


def _cores() -> int:
    """Of the machine, or as many of them as this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1
