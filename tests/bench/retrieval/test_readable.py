import io
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from bench.retrieval import readable
from bench.retrieval.images import DataSet
from bench.retrieval.photos import PhotoImages, read_rgb
from bench.retrieval.readable import readable_only, unreadable
from tests.photographs import write_image

SIZE = (120, 90)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def part(folder: Path, images_per_class: int) -> PhotoImages:
    labels = np.arange(2).repeat(images_per_class)
    paths = [write_image(folder / f"{i}.jpg", label + 1, SIZE) for i, label in enumerate(labels)]
    return PhotoImages(labels, [f"{folder.name} a", f"{folder.name} b"], paths, 16, 18)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[PhotoImages, PhotoImages]:
    return part(tmp_path / "train", 3), part(tmp_path / "test", 3)


def read(
    parts: tuple[PhotoImages, PhotoImages], console: Console, *, strict: bool = False
) -> DataSet:
    return readable_only("cub", *parts, strict=strict, threads=2, console=console)


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    image = Image.open(io.BytesIO(data))
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":  # in the last rows
        path.write_bytes(data[: -len(data) // 8])
    elif kind == "cut in the header":
        path.write_bytes(data[:100])
    elif kind == "progressive, cut":
        image.save(path, format="JPEG", progressive=True)
        path.write_bytes(path.read_bytes()[:-300])
    elif kind == "PNG, cut":
        image.save(path, format="PNG")
        path.write_bytes(path.read_bytes()[:-3000])
    elif kind == "PNG, flipped bits":
        image.save(path, format="PNG")
        png = bytearray(path.read_bytes())
        png[2000:2010] = bytes(255 - b for b in png[2000:2010])
        path.write_bytes(png)
    elif kind == "text":
        path.write_text("<html>404 Not Found</html>")
    elif kind == "gone":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "link to nothing":
        path.unlink()
        path.symlink_to("nowhere.jpg")


KINDS = [
    "empty", "cut", "cut in the header", "progressive, cut", "PNG, cut", "PNG, flipped bits",
    "text", "gone", "folder", "link to nothing",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_read_is_left_out_and_named(
    parts: tuple[PhotoImages, PhotoImages], console: Console, kind: str
) -> None:
    train, _ = parts
    damage(train.paths[1], kind)
    with pytest.raises(OSError, match=r"cannot read .*1\.jpg"):  # training would not read it either
        read_rgb(train.paths[1])
    data = read(parts, console)
    assert data.skipped == 1
    assert isinstance(data.train, PhotoImages)
    assert data.train.paths == [train.paths[i] for i in (0, 2, 3, 4, 5)]
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert len(data.test.labels) == 6
    out = printed(console)
    assert "1 of 12 images of cub cannot be read and are left out:" in out
    assert str(train.paths[1]) in out
    with pytest.raises(ValueError, match=r"1 of 12 images of cub cannot be read:\n.*1\.jpg"):
        read(parts, console, strict=True)


def test_readable_images_stay_and_nothing_is_printed(
    parts: tuple[PhotoImages, PhotoImages], console: Console
) -> None:
    train, test = parts
    train.paths[0].rename(train.paths[0].with_suffix(".JPG"))
    paths = [train.paths[0].with_suffix(".JPG"), *train.paths[1:]]
    for path, mode in zip(paths, ["L", "CMYK", "L", "CMYK", "RGB", "RGB"], strict=True):
        Image.open(path).convert(mode).save(path)
    data = read((replace(train, paths=paths), test), console, strict=True)
    assert data.skipped == 0
    assert isinstance(data.train, PhotoImages)
    assert data.train.paths == paths
    assert printed(console).strip() == ""


def test_many_are_counted_and_the_first_named(tmp_path: Path, console: Console) -> None:
    train, test = part(tmp_path / "train", 60), part(tmp_path / "test", 3)
    bad = [*range(40, 50), 119]
    for i in bad:
        damage(train.paths[i], "cut")
    data = read((train, test), console)
    assert data.skipped == 11
    assert isinstance(data.train, PhotoImages)
    assert data.train.paths == [path for i, path in enumerate(train.paths) if i not in bad]
    out = printed(console)
    assert "11 of 126" in out
    assert all(str(train.paths[i]) in out for i in bad[:5])
    assert str(train.paths[45]) not in out
    assert "and 6 more" in out


def test_names_are_printed_as_they_are(tmp_path: Path, console: Console) -> None:
    train, test = part(tmp_path / "[red] größe [/x]", 3), part(tmp_path / "test", 3)
    damage(train.paths[0], "empty")
    read((train, test), console)
    assert "[red] größe [/x]/0.jpg" in printed(console)


def test_a_class_without_an_image_is_named(
    parts: tuple[PhotoImages, PhotoImages], console: Console
) -> None:
    for path in parts[0].paths[3:5]:
        damage(path, "empty")
    assert read(parts, console).skipped == 2  # one image is enough to train
    damage(parts[0].paths[5], "empty")
    with pytest.raises(ValueError, match=r"cub, training: .* 1 readable .*: train b \(0\)"):
        read(parts, console)


def test_a_test_class_of_one_image_is_named(
    parts: tuple[PhotoImages, PhotoImages], console: Console
) -> None:
    damage(parts[1].paths[0], "empty")
    assert read(parts, console).skipped == 1
    damage(parts[1].paths[1], "empty")
    with pytest.raises(ValueError, match=r"cub, test: .* at least 2 readable .*: test a \(1\)"):
        read(parts, console)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_does_not_wait_for_what_is_queued(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def slow(path: Path, *, small: bool) -> None:
        seen.append(path)
        if len(seen) == 50:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.001)

    monkeypatch.setattr(readable, "read_rgb", slow)
    paths = [tmp_path / str(i) for i in range(100_000)]  # minutes
    with pytest.raises(KeyboardInterrupt):
        unreadable(paths, threads=2, console=console, label="reading")
    assert 50 <= len(seen) < len(paths)


def test_a_full_decode_agrees_that_the_image_is_whole(tmp_path: Path) -> None:
    """At any cut: what the quick check lets through, training can decode."""
    whole = write_image(tmp_path / "whole.jpg", 1, SIZE).read_bytes()
    path = tmp_path / "cut.jpg"
    verdicts = set()
    for end in [*range(600, len(whole), 97), *range(len(whole) - 20, len(whole) + 1)]:
        path.write_bytes(whole[:end])
        quick = bool(unreadable([path], threads=1, console=Console(quiet=True), label=""))
        try:
            read_rgb(path)
            full = False
        except OSError:
            full = True
        assert quick == full, end
        verdicts.add(quick)
    assert verdicts == {True, False}
