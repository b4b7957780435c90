import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bench.retrieval import report
from bench.retrieval.report import data_sets, environment, write_report
from tests.bench.retrieval.synthetic import dots, row, rows, write


class Page(HTMLParser):
    """What a page consists of; complains about elements that do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.links: list[dict[str, Any]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        {"img": self.images, "a": self.links}.get(tag, []).append(dict(attrs))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A report on everything, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder / "runs", rows())
    console = quiet()
    path = write_report(folder / "runs", folder / "new" / "report", dots(), console=console)
    return path, console.file.getvalue()  # type: ignore[attr-defined]


def test_the_page_holds_every_part(whole: tuple[Path, str]) -> None:
    path, printed = whole
    page = Page(path)
    assert path.name == "report.html"
    pictures = {p.name for p in path.parent.glob("*.png")}
    assert {image["src"] for image in page.images} == pictures
    assert {p.removeprefix("dots-cnn-") for p in pictures} == {
        "learning.png", "ablations-test.png", "distances.png", "learned-fields.png", "map.png",
        "sheet.png", "toy-fields.png",
    }  # fmt: skip
    assert {p.name for p in path.parent.iterdir()} == pictures | {"report.html"}
    for image in page.images:
        assert len(image["alt"]) > 20
        assert (path.parent / image["src"]).read_bytes().startswith(b"\x89PNG")
    assert "89.0 ± 1.0" in page.text
    assert "89.0 ± 1.0" in printed
    assert "This makes it" not in page.text  # nothing is missing
    assert "28 finished runs in results.jsonl, measured on A Processor" in page.text
    assert "shown by" not in page.text  # no preset is of these
    anchors = {link["href"] for link in page.links if link["href"].startswith("#")}
    assert anchors == {"#dots-cnn", "#paper"}
    assert "Published, other data sets" in page.text


def test_no_address_leads_out_of_the_folder(whole: tuple[Path, str]) -> None:
    text = whole[0].read_text(encoding="utf-8")
    assert not re.findall(r"https?://|url\(|@import|src=[\"']/", text)


def test_missing_parts_say_which_command_makes_them(tmp_path: Path) -> None:
    results = [row("triplet", seed=seed, dataset="glyphs") for seed in range(2)]
    write(tmp_path / "runs", results)
    (tmp_path / "runs" / "log.jsonl").unlink()
    page = Page(write_report(tmp_path / "runs", tmp_path / "out", console=quiet()))
    for words in (
        "No run with label noise has finished. This makes it: python -m bench retrieval --preset "
        f"glyphs --losses all --seeds 0 1 2 --label-noise 0.2 --epochs 4 --out {tmp_path / 'runs'}",
        "log.jsonl holds no evaluation of a run",
        "No run overrides one of these alone", "No run overrides a setting",
        "No run of a loss with proxies has left embeddings.npz",
        "No run of PFML has left embeddings.npz",
        "The images were not given: python -m bench report --data FOLDER",
    ):  # fmt: skip
        assert words in " ".join(page.text.split())
    assert {image["src"] for image in page.images} == {
        "toy-fields.png",
        "glyphs-cnn-map.png",
    }


def test_rows_of_validation_classes_are_studied_and_not_compared(tmp_path: Path) -> None:
    results = [row(split="validation"), row(split="validation", variant="alpha=1.0")]
    write(tmp_path / "runs", results)
    page = Page(write_report(tmp_path / "runs", tmp_path / "out", console=quiet()))
    assert "dots, cnn, validation classes: PFML and its variants" in page.text
    assert "No run with right labels has finished" in page.text
    assert "dots-cnn-ablations-validation.png" in {image["src"] for image in page.images}


def test_every_data_set_has_a_chapter(tmp_path: Path) -> None:
    names = {"a": "resnet_50", "b": "resnet/50"}
    other = [row("triplet", dataset="cub", network=n, run=run) for run, n in names.items()]
    write(tmp_path / "runs", [row(), *other])
    assert data_sets(tmp_path / "runs") == ["cub", "dots"]
    page = Page(write_report(tmp_path / "runs", tmp_path / "out", dots(), console=quiet()))
    for title in ("CUB-200-2011, resnet_50", "CUB-200-2011, resnet/50", "dots, cnn"):
        assert title in page.text
    sources = {image["src"] for image in page.images}
    assert {"cub-resnet_50-map.png", "cub-resnet_50_-map.png"} < sources
    assert [s for s in sources if s.endswith("sheet.png")] == ["dots-cnn-sheet.png"]


def damage_arrays(runs: Path) -> None:
    path = runs / row()["run"] / "embeddings.npz"
    path.write_bytes(path.read_bytes()[:500])


def contradict(runs: Path) -> None:
    write(runs, [row(seed=7, lr=0.5)])


def forget_rows(runs: Path) -> None:
    (runs / "results.jsonl").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_arrays, r"embeddings\.npz is damaged"),
        (contradict, "would be averaged, but differ in lr"),
        (forget_rows, "holds no finished run"),
    ],
)
def test_an_error_leaves_the_older_report(tmp_path: Path, spoil: Any, message: str) -> None:
    runs, out = write(tmp_path / "runs", [row(), row("triplet")]), tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("older")
    (out / "mine.txt").write_text("mine")
    spoil(runs)
    with pytest.raises(ValueError, match=message):
        write_report(runs, out, console=quiet())
    assert {p.name: p.read_text() for p in out.iterdir()} == {
        "report.html": "older", "mine.txt": "mine",
    }  # fmt: skip


def test_a_full_disk_leaves_the_older_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, out = write(tmp_path / "runs", [row("triplet")]), tmp_path / "out"
    write_report(runs, out, console=quiet())
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(runs, out, console=quiet())
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_the_page_comes_after_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = report.os.replace

    def watched(source: Path, target: Path) -> None:
        assert source.parent.parent == target.parent  # one file system: the move is atomic
        moved.append(target.name)
        replace(source, target)

    monkeypatch.setattr(report.os, "replace", watched)
    runs = write(tmp_path / "runs", [row("triplet")])
    write_report(runs, tmp_path / "out", console=quiet())
    assert moved[-1] == "report.html"
    assert {*moved[:-1]} == {p.name for p in (tmp_path / "out").glob("*.png")}


def test_images_that_no_run_is_of(tmp_path: Path) -> None:
    write(tmp_path / "runs", [row()])
    with pytest.raises(ValueError, match="are of dots, not squares"):
        write_report(tmp_path / "runs", tmp_path / "out", dots()._replace(name="squares"))
    other = dots()._replace(test=dots().test.take(np.arange(30) > 0))
    with pytest.raises(ValueError, match="the 29 test images given are not the 30"):
        write_report(tmp_path / "runs", tmp_path / "out", other, console=quiet())


def test_the_environment_lists_what_differs() -> None:
    where = environment([row(), row(commit="def", torch="2.14", time="2026-02-03T00:00:00+00:00")])
    assert where == (
        "2 finished runs in results.jsonl, measured on A Processor; CPU threads 1; PyTorch 2.13.0, "
        "2.14; commit abc, def; 2026-01-02 to 2026-02-03."
    )
    assert "measured on A GPU, cpu;" in environment([row(device="A GPU"), row()])
