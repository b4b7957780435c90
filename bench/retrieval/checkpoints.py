"""Files that are either whole or as they were: written beside their place, then renamed."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.recipes import Recipe
from bench.retrieval.images import DataSet


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in its place at once; its folder is made where missing.

    Raises:
        OSError: the disk is full, the folder cannot be written, and so on. What was at `path`
            before is still there, and nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def save_checkpoint(path: Path, recipe: Recipe, data: DataSet, state: Mapping[str, Any]) -> None:
    """Write the state of a training with its recipe and data. OSError as `write_whole`."""
    buffer = io.BytesIO()  # where PyTorch writes by itself, a full disk is no OSError
    torch.save({"recipe": _comparable(recipe, data), "state": dict(state)}, buffer)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: Path, recipe: Recipe, data: DataSet) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU.

    Raises:
        ValueError: it is of another recipe or other data, naming what differs, or no checkpoint.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        theirs, state = saved["recipe"], saved["state"]
    except Exception as error:  # whatever a damaged file makes of pickle and zip
        raise ValueError(f"{path} is not a checkpoint of this benchmark: {error}") from error
    ours = _comparable(recipe, data)
    differences = [
        f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
        for name in ours | theirs
        if theirs.get(name) != ours.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path} is of another configuration: {'; '.join(differences)}. "
            "Give another --out, or --restart to begin anew in its place"
        )
    return state


def _comparable(recipe: Recipe, data: DataSet) -> dict[str, Any]:
    """The recipe and what the data are, as a plain dict of what torch.load allows."""
    fields = asdict(recipe)
    fields |= {"options": dict(recipe.options), "recall_at": list(recipe.recall_at)}
    parts = {"training data": data.train, "test data": data.test}
    return fields | {name: images.fingerprint for name, images in parts.items()}
