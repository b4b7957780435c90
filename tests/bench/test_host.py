"""The host's part of a step: launches are counted, and every microsecond is in one part."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.host import MOST_LAUNCHES, PARTS, _Clock, run
from bench.settings import HostSettings
from tests.compiled import host_part


def test_a_row_is_appended(compiler: ProcessPoolExecutor, tmp_path: Path) -> None:
    for _ in range(2):
        compiler.submit(host_part, 20, tmp_path).result()
    rows = [json.loads(line) for line in (tmp_path / "host.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["launches"] == len(row["kernels"].split()) <= MOST_LAUNCHES
        assert "_force_kernel" in row["kernels"]
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["without_launcher_p50_us"] < row["p50_us"]
        parts = [row[f"{name.replace(' ', '_')}_us"] for name in PARTS]
        assert all(part > 0 for part in parts)
        assert sum(parts) < 3 * row["p50_us"]


def test_own_time_leaves_out_what_is_called() -> None:
    clock, ticks = _Clock(), iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.host.time.perf_counter", lambda: float(next(ticks)))
        inner = clock.timed(lambda: None, "sort")  # 1 tick

        def middle() -> None:
            inner()
            inner()

        parts = clock.parts(clock.timed(middle, "buffers"))
    # 0 step, 1 middle, 2-3 and 4-5 inner, 6, 7: of middle's 5 ticks 2 are inner's.
    assert parts["sort"] == 2
    assert parts["buffers"] == 3
    assert parts["module"] == 2
    assert sum(parts.values()) == 7


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size must be one of cub, .*, got 'dog'"):
        run(HostSettings(size="dog"), tmp_path)
    with pytest.raises(ValueError, match="repeats must be at least 10, got 9"):
        run(HostSettings(repeats=9), tmp_path)
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        run(HostSettings(), tmp_path)
    with pytest.raises(SystemExit):
        main(["host", "--size", "dog"])
