"""What runs leave in their folder: rows of results, events of the log, arrays of embeddings."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.results import read_rows
from bench.retrieval.cells import Row

RESULTS, LOG, ARRAYS = "results.jsonl", "log.jsonl", "embeddings.npz"

Floats = NDArray[np.float32]
Curve = dict[int, float]  # a share by epoch


class Arrays(NamedTuple):
    """The embeddings that a run ended with.

    Attributes:
        test, test_labels: [n, D] float32 of any length, and [n] int64.
        train, train_labels: [m, D] and [m], the true classes whatever the label noise was.
        proxies: [C, M, D] float32 of any length; M = 0 of a loss without.
    """

    test: Floats
    test_labels: NDArray[np.int64]
    train: Floats
    train_labels: NDArray[np.int64]
    proxies: Floats


def read_results(runs: Path) -> list[Row]:
    """The rows of all finished runs, in the order in which they finished.

    Raises:
        OSError: they cannot be read.
        ValueError: there are none, or a line is not JSON.
    """
    path = runs / RESULTS
    rows = read_rows(path) if path.exists() else []
    if not rows:
        raise ValueError(f"{path} holds no finished run: python -m bench retrieval makes them")
    return rows


def read_curves(runs: Path, metric: str = "r1") -> dict[str, Curve]:
    """A measure in [0, 1] by epoch of every run in the log; of an epoch run twice, the last."""
    path = runs / LOG
    curves: dict[str, Curve] = {}
    for event in read_rows(path) if path.exists() else []:
        if event.get("event") == "start":
            curves.pop(event["run"], None)  # of a run that was begun anew
        elif event.get("event") == "evaluation":
            curves.setdefault(event["run"], {})[event["epoch"]] = event[metric]
    return curves


def read_arrays(runs: Path, run: str) -> Arrays | None:
    """The arrays of a run; None if it left none.

    Raises:
        ValueError: the file is damaged, lacks an array, or one has a shape that does not fit, or
            holds NaN or infinity, naming the file.
    """
    path = runs / run / ARRAYS
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = Arrays(*(file[name] for name in Arrays._fields))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete the folder and run it again"
        ) from error
    problem = _problem(arrays)
    if problem:
        raise ValueError(f"{path}: {problem}")
    return arrays


def _problem(arrays: Arrays) -> str | None:
    """What is wrong with the shapes and values, if anything is."""
    depth = arrays.test.shape[-1]
    wanted = {
        "test": (len(arrays.test_labels), depth),
        "train": (len(arrays.train_labels), depth),
        "proxies": (*arrays.proxies.shape[:2], depth),
    }
    for name, shape in wanted.items():
        found = getattr(arrays, name)
        if found.shape != shape:
            return f"{name} must be {list(shape)}, got {list(found.shape)}"
        if not np.isfinite(found).all():
            return f"{name} holds NaN or infinity"
    return None
