"""The data sets by name, each loaded with its standard split into classes."""

from __future__ import annotations

from pathlib import Path

from bench.retrieval.glyphs import glyphs
from bench.retrieval.images import DataSet


def load(name: str, folder: Path | None = None, *, strict: bool = False) -> DataSet:
    """A data set by name.

    Args:
        name: one of `bench.recipes.DATASETS`.
        folder: where the user's copy lies; None for the glyphs, which are drawn.
        strict: raise ValueError for an image that cannot be read, instead of leaving it out.

    Raises:
        ValueError: no such name, or a folder that is not as the data set's authors ship it.
    """
    if name == "glyphs":
        return glyphs()
    raise ValueError(f"dataset must be glyphs, got {name!r}")
