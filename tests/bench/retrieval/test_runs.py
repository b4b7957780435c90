from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.results import append_row
from bench.retrieval.runs import read_arrays, read_curves, read_results
from tests.bench.retrieval.synthetic import arrays, row, write


def test_what_was_written_is_read(tmp_path: Path) -> None:
    results = [row(), row("triplet")]
    write(tmp_path, results)
    assert read_results(tmp_path) == results
    found = read_arrays(tmp_path, results[1]["run"])
    assert found is not None
    for name, array in arrays("triplet", 0).items():
        np.testing.assert_array_equal(getattr(found, name), array)
    assert found.proxies.shape == (6, 0, 8)


def test_an_epoch_run_twice_counts_once(tmp_path: Path) -> None:
    write(tmp_path, [row()])
    run = row()["run"]
    again = {"event": "evaluation", "run": run, "epoch": 2, "r1": 0.25}
    append_row(tmp_path / "log.jsonl", again)
    append_row(tmp_path / "log.jsonl", {"event": "interrupted"})
    curve = read_curves(tmp_path)[run]
    assert curve == pytest.approx({1: 0.225, 2: 0.25, 3: 0.675, 4: 0.9})


def test_a_run_that_was_begun_anew_has_its_last_curve(tmp_path: Path) -> None:
    write(tmp_path, [row()])
    run = row()["run"]
    append_row(tmp_path / "log.jsonl", {"event": "start", "run": run, "epoch": 0})
    append_row(tmp_path / "log.jsonl", {"event": "evaluation", "run": run, "epoch": 1, "r1": 0.5})
    assert read_curves(tmp_path)[run] == {1: 0.5}


def test_nothing_there(tmp_path: Path) -> None:
    assert read_curves(tmp_path) == {}
    assert read_arrays(tmp_path, "x") is None
    for text in (None, ""):
        if text is not None:
            (tmp_path / "results.jsonl").write_text(text)
        with pytest.raises(ValueError, match="no finished run: python -m bench retrieval"):
            read_results(tmp_path)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    write(tmp_path, [row()])
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"run": "half')
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2 is not JSON"):
        read_results(tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 400, -30])
def test_damaged_arrays_are_named(tmp_path: Path, keep: int) -> None:
    write(tmp_path, [row()])
    path = tmp_path / row()["run"] / "embeddings.npz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"embeddings\.npz is damaged"):
        read_arrays(tmp_path, row()["run"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": None}, "is damaged .*train is not a file"),
        ({"train": np.zeros((3, 8), np.float32)}, r"train must be \[30, 8\], got \[3, 8\]"),
        ({"proxies": np.zeros((6, 3, 7), np.float32)}, r"proxies must be \[6, 3, 8\]"),
        ({"proxies": np.zeros((18, 8), np.float32)}, r"proxies must be"),
        ({"test": np.full((30, 8), np.nan, np.float32)}, "test holds NaN or infinity"),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    contents = {k: v for k, v in (arrays("pfml", 0) | change).items() if v is not None}
    (tmp_path / "x").mkdir()
    np.savez(tmp_path / "x" / "embeddings.npz", **contents)
    with pytest.raises(ValueError, match=message):
        read_arrays(tmp_path, "x")
