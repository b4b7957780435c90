"""Images that cannot be read are found before training: left out and counted, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.retrieval.images import DataSet
from bench.retrieval.photos import PhotoImages, read_rgb

NAMED = 5  # of the files that cannot be read
CHUNK = 32  # images that a thread takes at a time


def readable_only(
    name: str,
    train: PhotoImages,
    test: PhotoImages,
    *,
    strict: bool,
    threads: int,
    console: Console,
) -> DataSet:
    """A data set of those images that can be decoded, each of which is tried once.

    Args:
        name: of the data set.
        train, test: its parts.
        strict: refuse images that cannot be read, instead of leaving them out.
        threads: that decode, 1 or more.
        console: gets a progress bar, and how many images were left out with the first names.

    Raises:
        ValueError: `strict`, and an image cannot be read; or a class has no image left, or one for
            test has fewer than the two that retrieval needs. Names them.
    """
    paths = [*train.paths, *test.paths]
    reasons = unreadable(paths, threads=threads, console=console, label=f"reading {name}")
    if reasons:
        message = f"{len(reasons):,} of {len(paths):,} images of {name} cannot be read"
        listed = "".join(f"\n  {reason}" for reason in list(reasons.values())[:NAMED])
        more = f"\n  and {len(reasons) - NAMED:,} more" if len(reasons) > NAMED else ""
        if strict:
            raise ValueError(f"{message}:{listed}{more}")
        text = f"{message} and are left out:{listed}{more}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    keep = np.ones(len(paths), dtype=np.bool_)
    keep[list(reasons)] = False
    train, test = train.take(keep[: len(train.paths)]), test.take(keep[len(train.paths) :])
    _check_classes(f"{name}, training", train, 1)
    _check_classes(f"{name}, test", test, 2)
    return DataSet(name, train, test, len(reasons))


def unreadable(
    paths: Sequence[Path], *, threads: int, console: Console, label: str
) -> dict[int, str]:
    """Why images cannot be read, by their index in `paths`, ascending; arguments as above."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    reasons: dict[int, str] = {}
    pool = ThreadPoolExecutor(threads)
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(label, total=len(paths))
            for k, found in enumerate(pool.map(_problems, chunks)):
                reasons |= {k * CHUNK + i: reason for i, reason in found.items()}
                progress.advance(task, len(chunks[k]))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for all that is queued
    return reasons


def _problems(paths: Sequence[Path]) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for i, path in enumerate(paths):
        try:
            read_rgb(path, small=True)
        except OSError as error:
            reasons[i] = str(error)
    return reasons


def _check_classes(part: str, images: PhotoImages, at_least: int) -> None:
    counts = np.bincount(images.labels, minlength=len(images.names))
    short = np.flatnonzero(counts < at_least)
    if len(short):
        names = ", ".join(f"{images.names[c]} ({counts[c]})" for c in short[:NAMED])
        raise ValueError(
            f"{part}: a class needs at least {at_least} readable images, "
            f"{len(short)} of {len(counts)} have fewer: {names}"
        )
