import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from bench import __main__ as command_line
from bench import parity, providers, speed
from bench.clouds import Cloud, make_cloud
from bench.costs import Workload
from bench.providers import PROVIDERS, Provider
from bench.settings import SIZES, Size, SpeedSettings

SETTINGS = SpeedSettings(
    sizes=("cub",), providers=("pfml", "pfml-triton", "eager", "contrastive"), repeats=2,
    device="cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes, few repeats, and no process of its own for the memory."""
    monkeypatch.setitem(SIZES, "cub", Size(20, 20, 4, depth=32))
    monkeypatch.setitem(SIZES, "collapsed", Size(20, 15, 4, depth=32, kind="collapsed"))
    monkeypatch.setattr(speed, "MOST_REPEATS", 3)
    peaks = dict.fromkeys(("forward", "forward+backward"), (3 << 20, 2 << 20))
    monkeypatch.setattr(speed, "peaks_apart", lambda *_: peaks)


def written(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(x, parse_constant=pytest.fail)
        for x in (folder / "speed.jsonl").read_text().splitlines()
    ]


def run(settings: SpeedSettings, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows, and what was printed."""
    with (folder / "printed").open("w") as file:
        rows = speed.run(settings, folder, Console(file=file, width=80))
    return rows, (folder / "printed").read_text()


def test_a_row_for_each_size_provider_and_mode(tmp_path: Path) -> None:
    settings = replace(SETTINGS, sizes=("cub", "collapsed"), n=(600,), d=48, classes=125)
    rows, printed = run(settings, tmp_path)
    found = written(tmp_path)
    assert all(line.items() >= row.items() for line, row in zip(found, rows, strict=True))
    assert len({tuple(row) for row in found}) == 1  # tidy: the same columns in the same order
    by = {(row["size"], row["provider"], row["mode"]): row for row in found}
    names = ("cub", "collapsed", "n600-c125-d48")
    modes = ("forward", "forward+backward")
    assert by.keys() == {(s, p, m) for s in names for p in SETTINGS.providers for m in modes}
    for (size, provider, mode), row in by.items():
        assert row["n"] == {"cub": 100, "collapsed": 80}.get(size, 600)
        assert row["dense_operations"] == (2 if mode == "forward" else 4) * row["n"] ** 2 * row["d"]
        assert {"commit", "torch", "driver", "cpu", "threads", "seed", "load"} <= row.keys()
        if provider == "pfml-triton":
            assert row["status"] == "needs a GPU, and this is the cpu"
            assert (row["p50_ms"], row["first_ms"], row["peak_bytes"]) == (None, None, None)
            continue
        assert row["status"] == "measured"
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["first_ms"] > 0
        assert (row["repeats"], row["extra_bytes"]) == (3, 2 << 20)
        assert row["back_to_back_ms"] is row["host_ms"] is row["graph_ms"] is None  # of a GPU
        assert (row["active_share"] is not None) == (provider == "pfml")
        if provider == "contrastive":
            assert row["computes"].startswith("ContrastiveLoss")
            assert (row["parity_error"], row["tolerance"]) == (None, None)
            assert row["executed_operations"] is None
        else:
            assert row["parity_error"] <= row["tolerance"]
            assert row["energy_error"] <= row["tolerance"]
            assert row["executed_operations"] > 0
    eager = by["cub", "eager", "forward"]
    assert eager["executed_operations"] == eager["dense_operations"]
    for words in ("collapsed: N = 80", "pfml-triton (everywhere): needs a GPU", "Wrote 24 rows"):
        assert words in printed
    assert not speed.is_broken(found)


def test_a_second_run_appends(tmp_path: Path) -> None:
    settings = replace(SETTINGS, providers=("eager",), modes=("forward",))
    for count in (1, 2):
        run(settings, tmp_path)
        assert [row["mode"] for row in written(tmp_path)] == count * ["forward"]


def test_what_does_not_fit_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "available_bytes", lambda device: 32 * 100**2 - 1)
    rows, _ = run(SETTINGS, tmp_path)
    by = {row["provider"]: row for row in rows}
    assert by["eager"]["status"].startswith("does not fit: needs")
    assert by["eager"]["p50_ms"] is None
    assert by["pfml"]["p50_ms"] > 0
    assert len(written(tmp_path)) == 8


def failing(error: Exception, after: int) -> Callable[[Cloud], nn.Module]:
    """Builds a loss of which some calls fail."""

    class Failing(providers.PlainLoss):
        calls = 0

        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > after:
                raise error
            return super().forward(embeddings, labels)

    return lambda cloud: Failing(cloud, providers.gram_loss)


@pytest.mark.parametrize("after", [0, 3])  # at once, and in the course of the timing
@pytest.mark.parametrize(
    ("error", "status", "broken"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory: OutOf", False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: Run", False),
        (NotImplementedError("not for 'Half'"), "cannot run: NotImplementedError: not", False),
        (RuntimeError("no compiler\nand more"), "failed: RuntimeError: no compiler", True),
    ],
)
def test_a_failure_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, broken: bool,
    after: int,
) -> None:  # fmt: skip
    monkeypatch.setitem(PROVIDERS, "eager", Provider(build=failing(error, after), tolerance=1e-4))
    rows, printed = run(SETTINGS, tmp_path)
    by = {row["provider"]: row for row in rows}
    assert by["eager"]["status"].startswith(status)
    assert "more" not in by["eager"]["status"]
    assert by["eager"]["p50_ms"] is None
    assert by["pfml"]["p50_ms"] > 0
    assert by["contrastive"]["p50_ms"] > 0
    assert "eager (cub): " + status in printed
    assert speed.is_broken(written(tmp_path)) is broken


def wrong(by: float, *, forward: bool) -> Callable[[Cloud], nn.Module]:
    """Builds a loss that is off by a share of itself, without gradients or with."""

    def function(*inputs: Tensor) -> Tensor:
        off = by if torch.is_grad_enabled() != forward else 0.0
        return providers.gram_loss(*inputs) * (1 + off)

    return lambda cloud: providers.PlainLoss(cloud, function)


@pytest.mark.parametrize("most", [100, 99])  # with an energy to compare with, and without
@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("by", [1e-2, float("nan")])
def test_a_wrong_result_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: float, forward: bool, most: int
) -> None:
    build = wrong(by, forward=forward)
    monkeypatch.setitem(PROVIDERS, "eager", Provider(build=build, tolerance=1e-4))
    monkeypatch.setattr(parity, "MOST_POINTS", most)
    rows, _ = run(replace(SETTINGS, providers=("eager", "pfml")), tmp_path)
    for row in rows:
        if row["provider"] == "eager":
            assert row["status"].startswith("wrong: the gradient is off by ")
            assert row["tolerance"] == 1e-4
            errors = [row["parity_error"], row["energy_error"]]
            if by == by:
                assert max(error or 0 for error in errors) > 1e-4
            else:
                assert None in errors  # JSON has no NaN
                assert "nan" in row["status"]
            assert (row["p50_ms"], row["first_ms"], row["peak_bytes"]) == (None, None, None)
        else:
            assert row["p50_ms"] > 0
    assert len(written(tmp_path)) == 4
    assert speed.is_broken(rows)


def test_rows_that_cannot_be_written_are_an_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "measure", lambda *_: pytest.fail("measured in vain"))
    (tmp_path / "file").touch()
    assert command_line.main(["speed", "--out", str(tmp_path / "file")]) == 2
    (tmp_path / "speed.jsonl").mkdir()
    assert command_line.main(["speed", "--out", str(tmp_path)]) == 2
    assert "speed.jsonl" in capsys.readouterr().err


def test_an_interrupt_keeps_the_sizes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(size: Size, seed: int) -> Cloud:
        if size.kind == "collapsed":
            raise KeyboardInterrupt
        return make_cloud(size, seed)

    monkeypatch.setattr(speed, "make_cloud", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(replace(SETTINGS, sizes=("cub", "collapsed", "sop")), tmp_path)
    assert {row["size"] for row in written(tmp_path)} == {"cub"}
    assert "Interrupted at collapsed. 8 rows are in" in (tmp_path / "printed").read_text()


def test_without_its_memory_a_provider_is_still_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> Any:
        raise OSError("it was killed")

    monkeypatch.setattr(speed, "peaks_apart", killed)
    rows, printed = run(replace(SETTINGS, providers=("pfml",)), tmp_path)
    assert {(row["peak_bytes"], row["p50_ms"] > 0) for row in rows} == {(None, True)}
    assert "it was killed" in printed


def test_embeddings_of_half_precision(tmp_path: Path) -> None:
    providers = ("pfml", "contrastive")  # of which the second has no bfloat16 on a CPU
    rows, _ = run(replace(SETTINGS, dtype="bfloat16", providers=providers), tmp_path)
    by = {row["provider"]: row for row in rows}
    assert by["pfml"]["dtype"] == "bfloat16"
    assert 1e-5 < by["pfml"]["parity_error"] <= by["pfml"]["tolerance"] < 5e-3
    assert by["contrastive"]["status"].startswith(("cannot run", "measured"))
    assert not speed.is_broken(rows)


def test_every_copy_is_warm_before_a_time_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(providers.PlainLoss):
        calls = 0

        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(embeddings, labels)

    built: list[Counted] = []

    def build(cloud: Cloud) -> nn.Module:
        built.append(Counted(cloud, providers.gram_loss))
        return built[-1]

    monkeypatch.setitem(PROVIDERS, "eager", Provider(build=build, tolerance=1e-4))
    monkeypatch.setattr(speed, "cache_bytes", lambda device: 4 * 100 * 32 * 4)
    called: list[list[int]] = []
    monkeypatch.setattr(
        speed, "time_in_turn", lambda *_: called.append([copy.calls for copy in built])
    )
    run(replace(SETTINGS, providers=("eager",)), tmp_path)
    assert len(built) == 5
    assert called == [[2] * 5]  # in either mode


def test_quick_calls_are_repeated_and_slow_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Taking:
        def __init__(self, ms: float) -> None:
            self.ms, self.order = ms, order

        def call(self, mode: str) -> tuple[None, float]:
            self.order.append((self.ms, mode))
            return None, self.ms

        def clear(self) -> None:
            pass

    order: list[tuple[float, str]] = []
    monkeypatch.setattr(speed, "MOST_REPEATS", 20)
    works = {"quick": Taking(1.0), "middling": Taking(100.0), "slow": Taking(9000.0)}
    table = {name: {"forward": {"status": "measured"}} for name in works}
    speed.time_in_turn(works, table, 2, lambda what: None)
    repeats = {name: rows["forward"]["repeats"] for name, rows in table.items()}
    assert repeats == {"quick": 20, "middling": 5, "slow": 2}
    assert [ms for ms, _ in order[:6]] == 2 * [1.0, 100.0, 9000.0]
    assert table["slow"]["forward"]["p50_ms"] == 9000.0


def test_a_busy_device_has_times_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(PROVIDERS["pfml"].build, make_cloud(SIZES["cub"], 0), copies=2)
    cpu = torch.device("cpu")
    found = speed.busy_times(work, "forward+backward", 2, cpu)
    assert found["graph_ms"] is None
    assert min(found["back_to_back_ms"], found["host_ms"]) > 0

    def refused(*_: Any) -> float:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(speed, "graph_us", lambda *_: 2500.0)
    assert speed.busy_times(work, "forward", 2, cpu)["graph_ms"] == 2.5
    monkeypatch.setattr(speed, "graph_us", refused)
    assert speed.busy_times(work, "forward", 2, cpu)["graph_ms"] is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((8000, 512, None), Size(100, 1975, 4, 512)),
        ((8000, 64, 2000), Size(2000, 2000, 3, 64)),
        ((1000, 64, 7), Size(104, 7, 128, 64)),
        ((50, 64, None), Size(50, 12, 0, 64)),
        ((3, 64, None), Size(3, 1, 0, 64)),
    ],
)
def test_custom_sizes_have_as_many_points_as_asked(
    given: tuple[int, int, int | None], expected: Size
) -> None:
    assert speed.custom_size(*given) == expected
    assert expected.n == given[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": ()}, "sizes must be some of cub, cars, sop"),
        ({"sizes": ("huge",)}, "sizes must be some of cub, .*huge"),
        ({"providers": ("xformers",)}, "providers must be some of pfml, .*xformers"),
        ({"modes": ("backward",)}, "modes must be some of forward, forward.backward, got"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"n": (0,)}, "n must be at least 1, got 0"),
        ({"n": (10,), "d": 2}, "d must be at least 3, got 2"),
        ({"n": (10,), "classes": 11}, "classes must be in 1..n = 10, got 11"),
        ({"device": "tpu"}, "auto, cpu, cuda"),
    ],
)
def test_run_refuses_before_it_writes(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        speed.run(replace(SETTINGS, **changed), tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[SpeedSettings, Path]] = []
    rows = [{"status": "measured"}]
    monkeypatch.setattr(speed, "run", lambda settings, out: seen.append((settings, out)) or rows)
    options = "--sizes cub sop --n 500 900 --d 64 --classes 20 --mode forward --dtype bfloat16"
    options += " --repeats 4 --seed 5 --device cpu --threads 1 --slow --providers pfml keops"
    assert command_line.main(["speed", *options.split(), "--out", str(tmp_path)]) == 0
    expected = SpeedSettings(
        ("cub", "sop"), (500, 900), 64, 20, ("pfml", "keops"), ("forward",), "bfloat16", 4, 5,
        "cpu", True, 1,
    )  # fmt: skip
    assert seen == [(expected, tmp_path)]
    assert command_line.main(["speed"]) == 0
    assert seen[1] == (SpeedSettings(), Path("runs"))
    assert command_line.main(["speed", "--n", "500"]) == 0
    assert (seen[2][0].sizes, seen[2][0].n) == ((), (500,))
    rows[0]["status"] = "wrong: by much"
    assert command_line.main(["speed"]) == 1
