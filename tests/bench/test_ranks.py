"""`python -m bench ranks`, and the plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.console import Console

from bench import plan, ranks
from bench.__main__ import main
from bench.results import read_rows
from bench.settings import RanksSettings


@pytest.mark.slow
@pytest.mark.usefixtures("loopback")
def test_rows(tmp_path: Path) -> None:
    rows = ranks.run(RanksSettings(sizes=("cub",), ranks=(1, 3)), tmp_path, Console(quiet=True))
    assert len(read_rows(tmp_path / "ranks.jsonl")) == len(rows) == 8
    one, alone, *others = rows
    assert one["forward_bytes"] == alone["forward_bytes"] == 0
    for row in rows:
        assert row["added_bytes"] > 0
    state, of_classes = 16 * 512 * 100 * 15, 4 * 512 * 15  # bytes: of all, and of a class
    for three, classes in ((others[:3], (100, 100, 100)), (others[3:], (34, 34, 32))):
        assert [row["rows"] for row in three] == [33 + 34 * 15, 33 + 34 * 15, 34 + 32 * 15]
        assert [row["state_bytes"] for row in three] == [state * c // 100 for c in classes]
        for row in three:
            # Of the two others, padded to the largest: batches, and the gradient of proxies; under
            # fully_shard also the proxies, and their gradient once more.
            is_sharded = row["design"] == "sharded"
            forward, backward = 2 * 4 * 512 * 34, 2 * 34 * of_classes
            forward += is_sharded * backward
            backward += is_sharded * backward
            assert forward < row["forward_bytes"] < 1.01 * forward + 1000
            assert backward < row["backward_bytes"] < 1.01 * backward
            assert (
                row["forward_calls"] == 4 + is_sharded
            )  # sizes, points, whether all could, totals
            assert row["backward_calls"] == 2 + is_sharded
            # one filters half of its tiles
            assert 1 / 3 < row["operations"] / one["operations"] < 0.6


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (RanksSettings(sizes=("cup",)), "size must be one of .*, got 'cup'"),
        (RanksSettings(ranks=(2, 0)), r"ranks must be at least 1, got \[2, 0\]"),
    ],
)
def test_bad_settings(settings: RanksSettings, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        ranks.run(settings, tmp_path)


def test_plan_of_a_small_field() -> None:
    """By hand: 80 classes and 8 batches of 512, at a depth of 512."""
    need = plan.Need(80, 8)
    assert need.points == 80 + 4096
    assert need.rows == 10 + 512
    assert need.state == 80 * 512 * 16
    assert need.sharded_state == 10 * 512 * 16 + 80 * 512 * 4
    assert need.wire == (4176 - 522) * 2048
    assert need.wire_of_sketches == (4176 - 522) * 128
    assert need.bitmap == 522 * 4176 // 2048
    assert need.gathered == 4176 * (4096 + 1024 + 256 + 28)


def test_the_plan_stands_in_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ranks", "--plan"]) == 0
    table = capsys.readouterr().out.strip()
    document = Path(__file__).parents[2].joinpath("bench", "SCALE.md").read_text("utf-8")
    assert table in document
    assert len(re.findall(r"^\| 1", table, re.M)) == 8
