import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as command_line
from bench import figures
from bench.recipes import LOSSES
from bench.results import append_row
from bench.retrieval import protocol
from bench.settings import RetrievalSettings
from tests.bench.retrieval import synthetic

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["retrieval", "speed", "plot", "gpu", "host", "roofline", "figure"]),
        (
            ["retrieval", "--help"],
            ["glyphs", "resnet50", "contrastive", "--label-noise", "{auto,cpu,cuda}", "--out"],
        ),
        (["report", "--help"], ["--runs", "--data", "--out"]),
        (["speed", "--help"], ["--sizes", "faces-100k", "100,512", "--slow", "{auto,cpu,cuda}"]),
        (
            ["gpu", "--help"],
            ["--minutes", "racecheck", "--rehearse", "the machine in any case", "--out"],
        ),
        (["plot", "--help"], ["growth", "--rows", "--out"]),
        (
            ["roofline", "--help"],
            ["--arch", "sm_100 (B200)", "faces-100k", "--explain", "--validate"],
        ),
        (["figure", "--help"], ["--out"]),
    ],
)
def test_help(arguments: list[str], words: list[str]) -> None:
    result = bench(*arguments)
    assert result.returncode == 0
    assert not [word for word in words if word not in result.stdout]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND"]),
        (["nothing"], ["'nothing'", "retrieval", "figure"]),
        (["retrieval", "--device", "tpu"], ["'tpu'", "auto", "cpu", "cuda"]),
        (["retrieval", "--epochs", "many"], ["--epochs", "'many'"]),
        (["retrieval", "--losses", "softmax"], ["'softmax'", "pfml", "all"]),
        (["retrieval", "--set", "alpha"], ["NAME=VALUE", "'alpha'"]),
        (["speed", "--sizes", "huge"], ["'huge'", "cub", "vit-sop", "faces-100k", "collapsed"]),
        (["speed", "--providers", "x"], ["'x'", "pfml-triton", "keops", "proxy-anchor"]),
        (["plot", "pie", "--out", "x.png"], ["'pie'", "speed", "growth"]),
        (["figure"], ["--out"]),
    ],
)
def test_wrong_usage_names_the_choices(arguments: list[str], words: list[str]) -> None:
    result = bench(*arguments)
    assert result.returncode == 2
    assert not [word for word in words if word not in result.stderr]


def test_a_wrong_value_is_an_error_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command_line.main(["retrieval", "--epochs", "0", "--out", str(out)]) == 2
    assert "epochs must be a whole number from 1 on, got 0" in capsys.readouterr().err
    assert not out.exists()


def test_figure_writes_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "toy.png"
    assert command_line.main(["figure", "--out", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_picture_format_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["figure", "--out", str(tmp_path / "toy.nothing")]) == 2
    assert "png" in capsys.readouterr().err


def test_a_report_needs_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    assert command_line.main(["report", "--runs", str(tmp_path), "--out", str(out)]) == 2
    assert "results.jsonl" in capsys.readouterr().err
    assert not out.exists()


def test_a_report_takes_the_images_of_one_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("glyphs", "cub", "sop"):
        append_row(tmp_path / "results.jsonl", synthetic.row(dataset=name, run=name))
    arguments = ["report", "--runs", str(tmp_path), "--data", "x", "--out", str(tmp_path / "y")]
    assert command_line.main(arguments) == 2
    assert "--data is the folder of one data set" in capsys.readouterr().err


def test_a_setting_is_varied_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["retrieval", "--set", "lr=1", "--set", "alpha=2", "lr=2"]) == 2
    assert "--set takes a name once, got lr, alpha, lr" in capsys.readouterr().err


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(protocol, "run", lambda settings, out: seen.append((settings, out)))
    options = "--preset cub-resnet50 --losses pfml triplet --seeds 0 1 --label-noise 0 0.2"
    options += " --set alpha=0,1.5 clip=None optimizer=adamw --split validation --epochs 3"
    options += " --data data --weights w.pt --strict --workers 2 --restart --device cpu --threads 1"
    assert command_line.main(["retrieval", *options.split(), "--out", str(tmp_path)]) == 0
    expected = RetrievalSettings(
        preset="cub-resnet50", losses=("pfml", "triplet"), seeds=(0, 1), label_noise=(0.0, 0.2),
        variations={"alpha": (0, 1.5), "clip": (None,), "optimizer": ("adamw",)},
        split="validation", epochs=3, data=Path("data"), weights="w.pt", strict=True,
        workers=2, restart=True, device="cpu", threads=1,
    )  # fmt: skip
    assert seen == [(expected, tmp_path)]
    command_line.main(["retrieval", "--losses", "all"])
    assert seen[1][0] == RetrievalSettings(losses=LOSSES)


def test_interrupt_exits_cleanly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "class_field_figure", interrupted)
    assert command_line.main(["figure", "--out", "unwritten.png"]) == command_line.INTERRUPTED
    assert "Interrupted" in capsys.readouterr().err
