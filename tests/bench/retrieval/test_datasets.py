import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from bench.retrieval import datasets
from bench.retrieval.datasets import load
from bench.retrieval.images import ArrayImages, with_label_noise
from bench.retrieval.photos import PhotoImages
from tests.photographs import COUNTS, IMAGES, write_cars, write_cub, write_sop

WRITERS: dict[str, Callable[[Path], None]] = {
    "cub": write_cub,
    "cars": write_cars,
    "sop": write_sop,
}
QUIET = Console(quiet=True)


@pytest.mark.parametrize("name", WRITERS)
def test_load_reads_a_folder(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    data = load(name, tmp_path, workers=3, console=QUIET, counts=COUNTS)
    assert (data.name, data.skipped) == (name, 0)
    assert isinstance(data.train, PhotoImages)
    assert isinstance(data.test, PhotoImages)
    assert data.train.workers == data.test.workers == 3
    assert np.bincount(data.train.labels).tolist() == list(IMAGES[:3])
    assert np.bincount(data.test.labels).tolist() == list(IMAGES[3:])
    assert not set(data.train.names) & set(data.test.names)


def test_load_counts_or_refuses_what_cannot_be_read(tmp_path: Path) -> None:
    write_cub(tmp_path)
    (path,) = (tmp_path / "images").glob("001*/*_0002.jpg")
    path.write_bytes(path.read_bytes()[:-100])
    console = Console(file=io.StringIO(), width=200)
    data = load("cub", tmp_path, workers=0, console=console, counts=COUNTS)
    assert (data.skipped, len(data.train.labels), len(data.test.labels)) == (1, 8, 5)
    assert isinstance(console.file, io.StringIO)
    assert "1 of 14 images of cub cannot be read" in console.file.getvalue()
    with pytest.raises(ValueError, match="1 of 14 images of cub cannot be read"):
        load("cub", tmp_path, workers=0, console=QUIET, counts=COUNTS, strict=True)


def test_published_counts_are_checked_unless_others_are_given(tmp_path: Path) -> None:
    write_sop(tmp_path)
    with pytest.raises(ValueError, match="expected 59,551 training images"):
        load("sop", tmp_path, console=QUIET)


def test_loaded_images_train_under_other_labels(tmp_path: Path) -> None:
    write_cub(tmp_path)
    train = load("cub", tmp_path, workers=0, console=QUIET, counts=COUNTS).train
    noisy = train.relabelled(with_label_noise(train.labels, 3, 0.5, seed=0))
    assert (noisy.labels != train.labels).sum() == 4
    batches = [np.array([0, 4]), np.array([8])]
    for a, b in zip(train.training(batches, [1, 2]), noisy.training(batches, [1, 2]), strict=True):
        assert torch.equal(a, b)


def test_glyphs_take_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="take no folder, got"):
        load("glyphs", tmp_path)
    assert isinstance(load("glyphs").train, ArrayImages)


@pytest.mark.parametrize("name", WRITERS)
def test_the_others_need_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs the folder of .*, got none.*publish"):
        load(name)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of glyphs, cub, cars, sop, got 'mnist'"):
        load("mnist", tmp_path)


def test_workers_are_as_many_as_cores_but_not_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cub(tmp_path)
    for cores, workers in ((3, 3), (64, 8)):
        monkeypatch.setattr(datasets, "_cores", lambda cores=cores: cores)
        train = load("cub", tmp_path, console=QUIET, counts=COUNTS).train
        assert isinstance(train, PhotoImages)
        assert train.workers == workers
