import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import __main__ as command_line
from bench import energies, pruning
from bench.clouds import make_cloud
from bench.settings import PruningSettings

SETTINGS = PruningSettings(
    providers=("pfml", "pfml dense", "eager"), repeats=2, depth=32, device="cpu",
    small_points=64, large_points=160, worst_points=64, sop_classes=30, sop_batch=8,
)  # fmt: skip


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "pruning.jsonl").read_text().splitlines()]


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "peak_apart", lambda *_: (3 << 20, 2 << 20))


@pytest.mark.usefixtures("no_processes")
def test_run_appends_a_row_for_each_cloud_and_provider(tmp_path: Path) -> None:
    with (tmp_path / "printed").open("w") as file:
        rows = pruning.run(SETTINGS, tmp_path, Console(file=file, width=80))
    found = written(tmp_path)
    assert len(found) == len(rows)
    assert all(line.items() >= row.items() for line, row in zip(found, rows, strict=True))
    by = {(row["cloud"], row["provider"]): row for row in found}
    dense = ("small", "sop", "one class", "collapsed")
    expected = {(cloud, provider) for cloud in dense for provider in ("pfml", "pfml dense")}
    expected |= {(cloud, "eager") for cloud in ("small", "sop", "large")}
    assert by.keys() == expected | {("large", "pfml"), ("large", "pfml dense")}
    assert {(row["cloud"], row["n"]) for row in found} == {
        ("small", 64), ("sop", 68), ("large", 160), ("one class", 64), ("collapsed", 64)
    }  # fmt: skip
    assert "--slow" in by.pop(("large", "pfml dense"))["status"]
    for row in by.values():
        assert row["status"] == "measured"
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["gradient_error"] <= row["tolerance"]
        assert row["product_operations"] > 0
        assert row["dense_operations"] == 4 * row["n"] ** 2 * 32
        assert {"commit", "torch", "threads", "seed"} <= row.keys()
    assert by["small", "pfml"]["ratio_to_pfml"] == 1
    assert by["large", "pfml"]["growth_exponent"] is not None
    assert len({tuple(row) for row in found}) == 1  # tidy: the same columns in the same order
    printed = (tmp_path / "printed").read_text()
    for words in ("collapsed 64", "pfml dense", "share", "grows as N^", "(--slow)", "below 1.15"):
        assert words in printed


@pytest.mark.usefixtures("no_processes")
def test_slow_measures_the_large_cloud_without_pruning(tmp_path: Path) -> None:
    settings = replace(SETTINGS, sizes=("large",), providers=("pfml dense",), slow=True)
    (row,) = pruning.run(settings, tmp_path, Console(quiet=True))
    assert row["p50_ms"] > 0
    assert (row["ratio_to_pfml"], row["growth_exponent"]) == (None, None)


@pytest.mark.usefixtures("no_processes")
def test_what_does_not_fit_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "available_bytes", lambda device: 32 * 64**2 - 1)
    settings = replace(SETTINGS, sizes=("small",))
    rows = {row["provider"]: row for row in pruning.run(settings, tmp_path, Console(quiet=True))}
    assert rows["eager"]["status"].startswith("does not fit: needs")
    assert rows["eager"]["p50_ms"] is None
    assert rows["pfml"]["p50_ms"] > 0
    assert len(written(tmp_path)) == 3


@pytest.mark.usefixtures("no_processes")
def test_an_interrupt_keeps_the_clouds_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(name: str, settings: PruningSettings) -> Any:
        if name == "sop":
            raise KeyboardInterrupt
        return make_cloud(name, settings)

    monkeypatch.setattr(pruning, "make_cloud", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruning.run(SETTINGS, tmp_path, Console(quiet=True))
    assert [row["cloud"] for row in written(tmp_path)] == 3 * ["small"]


def wrong(error: float) -> Callable[[str], energies.Energy]:
    """Providers of which eager's energy and gradient are off by a share of them."""

    def energy_of(provider: str) -> energies.Energy:
        energy = energies.energy_of(provider)
        off = 1 + error if provider == "eager" else 1.0
        return lambda points, labels: energy(points, labels) * off

    return energy_of


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("providers", [("eager",), ("pfml", "eager"), SETTINGS.providers])
@pytest.mark.parametrize("error", [1e-2, float("nan")])
def test_a_wrong_result_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, providers: tuple[str, ...], error: float
) -> None:
    monkeypatch.setattr(pruning, "energy_of", wrong(error))
    settings = replace(SETTINGS, sizes=("small",), providers=providers)
    with pytest.raises(ValueError, match="eager is wrong on 64 points, so nothing is timed"):
        pruning.run(settings, tmp_path, Console(quiet=True))
    assert not (tmp_path / "pruning.jsonl").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read in /proc")
def test_peak_memory_comes_from_a_process_of_its_own() -> None:
    ballast = torch.ones(256 << 20)  # 1 GiB that the other process does not have
    peak, extra = pruning.peak_apart("small", "eager", replace(SETTINGS, small_points=1000))
    assert 12 * 1000**2 < extra < 100 * 1000**2
    assert extra < peak < 4 * len(ballast)


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(OSError, match="memory of eager failed: ValueError: repeats must be"):
        pruning.peak_apart("small", "eager", replace(SETTINGS, repeats=0))


def test_without_its_memory_a_provider_is_still_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> Any:
        raise OSError("it was killed")

    monkeypatch.setattr(pruning, "peak_apart", killed)
    with (tmp_path / "printed").open("w") as file:
        settings = replace(SETTINGS, sizes=("small",))
        rows = pruning.run(settings, tmp_path, Console(file=file, width=80))
    assert {(row["peak_bytes"], row["p50_ms"] > 0) for row in rows} == {(None, True)}
    assert "it was killed" in (tmp_path / "printed").read_text()


def test_growth_exponent_is_that_of_the_times() -> None:
    small = {"cloud": "small", "provider": "pfml", "n": 10, "p50_ms": 3.0}
    large = {"cloud": "large", "provider": "pfml", "n": 1000, "p50_ms": 3000.0}
    assert pruning.growth_exponent([small, large]) == pytest.approx(1.5)
    assert pruning.growth_exponent([large]) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": ()}, "sizes must be some of small, sop, large, worst"),
        ({"providers": ("keops",)}, "providers must be some of pfml, .*keops"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"depth": 2}, "depth must be at least 3, got 2"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"small_points": 1}, "small_points must be at least 8, got 1"),
        ({"device": "tpu"}, "auto, cpu, cuda"),
    ],
)
def test_run_refuses_before_it_writes(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pruning.run(replace(SETTINGS, **changed), tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(pruning, "run", lambda settings, out: seen.append((settings, out)))
    options = "--sizes small worst --repeats 3 --depth 64 --seed 4 --device cpu --threads 1 --slow"
    options = [*options.split(), "--providers", "pfml", "pfml dense", "--out", str(tmp_path)]
    assert command_line.main(["pruning", *options]) == 0
    expected = PruningSettings(("small", "worst"), ("pfml", "pfml dense"), 3, 64, 4, "cpu", True, 1)
    assert seen == [(expected, tmp_path)]
    assert command_line.main(["pruning"]) == 0
    assert seen[1] == (PruningSettings(), Path("runs"))
