import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import __main__ as command_line
from bench import plots
from bench.settings import MODES, SIZES
from bench.speed import custom_size


def row(size: str, provider: str, mode: str, ms: float | None, **changed: Any) -> dict[str, Any]:
    shape = SIZES.get(size) or custom_size(int(size[1:]), 512, None)
    found = {"bench": "speed", "size": size, "kind": shape.kind, "n": shape.n, "d": shape.depth}
    found |= {"classes": shape.classes, "proxies": shape.proxies, "provider": provider}
    found |= {"mode": mode, "p50_ms": ms, "status": "measured", "dtype": "float32"}
    found |= {"device": "cpu", "cpu": "A Processor", "threads": 2, "torch": "2.13.0"}
    return found | {"time": "2026-01-02T03:04:05+00:00", "commit": "abc"} | changed


ROWS = [
    row("collapsed", "pfml", "forward+backward", 2000.0),
    row("cub", "pfml", "forward+backward", 3.0),
    row("cub", "pfml", "forward+backward", 4.0, time="2026-01-03T03:04:05+00:00"),
    row("cub", "pfml", "forward", 2.0),
    row("cub", "eager", "forward+backward", None, status="does not fit: needs 9 GiB, 1 are there"),
    row("cub", "pfml-triton", "forward+backward", None, status="needs a GPU, and this is the cpu"),
    row("cub", "triplet", "forward+backward", 0.5),
    {"bench": "retrieval"},
]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "speed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_bars_are_the_latest_rows(tmp_path: Path, drawn: list[Figure]) -> None:
    out = tmp_path / "new" / "speed.png"
    path = write(tmp_path, ROWS)
    assert command_line.main(["plot", "speed", "--rows", str(path), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    cub, collapsed = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in (cub, collapsed)] == ["cub", "collapsed"]
    assert [label.get_text() for label in cub.get_yticklabels()] == ["pfml", "eager", "triplet"]
    assert texts(cub) == ["4 ms", "2 ms", "does not fit: 9 GiB", "500 µs"]
    ends = [bar.get_x() + bar.get_width() for bar in cub.patches]
    assert ends == pytest.approx([4.0, 2.0, 0.5])
    assert cub.get_xscale() == "log"
    caption = drawn[0].get_supxlabel()
    for words in ("Measured: A Processor, 2 threads", "float32", "2026-01-02 to 2026-01-03", "abc"):
        assert words in caption


def test_rows_of_another_machine_are_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [row("cub", "pfml", "forward", 9.0, device="A GPU"), *ROWS]
    plots.speed_figure(write(tmp_path, [*rows, row("sop", "pfml", "forward", 5.0, threads=1)]),
                       tmp_path / "speed.png")  # fmt: skip
    (axes,) = drawn[0].axes
    assert texts(axes) == ["5 ms"]
    assert axes.get_title(loc="left") == "sop"


def test_growth_joins_sizes_that_differ_in_classes(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [
        row(f"n{n}", provider, mode, n * scale)
        for n in (8000, 2000) for provider, scale in (("pfml", 0.01), ("eager", 0.011))
        for mode in MODES
    ]  # fmt: skip
    plots.growth_figure(write(tmp_path, [*ROWS, *rows]), tmp_path / "growth.png")
    (axes,) = drawn[0].axes
    linear, quadratic, *curves = (line.get_xydata().tolist() for line in axes.lines)
    assert curves == [[[2000, 20.0], [8000, 80.0]], [[2000, 22.0], [8000, 88.0]]]
    assert linear == [[2000, 20.0], [8000, pytest.approx(80.0)]]
    assert quadratic == [[2000, 20.0], [8000, pytest.approx(320.0)]]
    assert texts(axes) == ["pfml", "eager"]
    low, high = (text.xy[1] for text in axes.texts)
    assert high > 1.1 * low  # moved apart, to be read


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("speed", [], "holds no measured row"),
        ("speed", [ROWS[4]], "holds no measured row"),
        ("growth", ROWS, "two sizes that differ in their classes only"),
        ("growth", [*ROWS, row("sop", "pfml", "forward+backward", 1.0)], "two sizes"),
    ],
)
def test_rows_that_are_not_enough_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, rows: Any, message: str
) -> None:
    out, path = tmp_path / "x.png", write(tmp_path, rows)
    assert command_line.main(["plot", kind, "--rows", str(path), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_no_rows_at_all_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.jsonl"
    assert command_line.main(["plot", "speed", "--rows", str(path), "--out", "x.png"]) == 2
    assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0.0123, "12 µs"), (0.99951, "1 ms"), (3.14, "3.1 ms"), (999.4, "999 ms"), (38_000, "38 s"),
     (1234e3, "1,234 s")],
)  # fmt: skip
def test_durations_have_a_unit_of_their_size(ms: float, text: str) -> None:
    assert plots.duration(ms) == text
