import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console

from bench import __main__ as command_line
from bench import tune
from bench.roofline import Prediction
from bench.settings import Size, TuneSettings
from pfml_triton.kernels import search, tuning
from pfml_triton.kernels.config import tiles_for

SMALL = {"cub": Size(10, 10, 2), "sop": Size(10, 100, 11)}  # in two buckets


def prediction(us: float, spills: int = 0, fits: bool = True) -> Prediction:
    seconds = us * 1e-6 if fits else float("inf")
    return Prediction(
        "force", seconds, seconds / 2, seconds * 2, "latency", 99, 0, spills, 1024, 2, fits
    )


def fake_predict(launches: Any, arch: str, work: Any) -> list[Prediction]:
    """More warps are faster, but those of 16 spill, and a strip of 8 does not fit."""
    (made,) = launches
    warps = made.options["num_warps"]
    return [prediction(100 / warps, int(warps == 16), made.args.get("STRIP") != 8)]


def printed_ranking(settings: TuneSettings, out: Path) -> tuple[list[dict[str, Any]], str]:
    """`tune.run` in a process that can compile, the machine code not read."""
    with (
        mock.patch.object(tune, "predict", fake_predict),
        mock.patch.object(tune, "SIZES", SMALL),
        (out / "printed").open("w") as file,
    ):
        rows = tune.run(settings, out, Console(file=file, width=80))
    return rows, (out / "printed").read_text()


def test_the_static_ranking(compiler: ProcessPoolExecutor, tmp_path: Path) -> None:
    settings = TuneSettings(("cub", "sop"), (64,), ("float16",), static=True, arch="sm_90")
    ranking = compiler.submit(printed_ranking, settings, tmp_path)
    rows, printed = ranking.result()
    path = tmp_path / "tune.jsonl"
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [w.items() >= row.items() for w, row in zip(written, rows, strict=True)]
    facts = {"bench": "tune", "modelled": True, "arch": "sm_90", "d": 64, "dtype": "float16"}
    assert all(row.items() >= facts.items() for row in written)
    assert not [v for row in written for v in row.values() if isinstance(v, dict | list)]  # flat
    for name, size in SMALL.items():
        for kernel in search.KERNELS:
            some = [row for row in rows if (row["size"], row["kernel"]) == (name, kernel)]
            assert [row["rank"] for row in some] == list(range(1, len(some) + 1))
            assert some[0]["n"] == size.n
            assert (some[0]["spills_in_loops"], some[0]["fits"]) == (0, True)
            usable = [row["fits"] and not row["spills_in_loops"] for row in some]
            assert usable == sorted(usable, reverse=True)
            assert sum(row["is_shipped"] for row in some) == 1
            times = [row["modelled_us"] for row, use in zip(some, usable, strict=True) if use]
            assert times == sorted(times)
    for words in ("modelled", "Modelled, not measured", "The shipped one is number", "H100"):
        assert words in printed
    assert "…" not in printed  # it fits 80 columns
    compiler.submit(printed_ranking, settings, tmp_path).result()
    again = path.read_text().splitlines()
    assert [json.loads(line) for line in again[: len(written)]] == written
    assert len(again) == 2 * len(written)


def configs(number: int) -> list[Any]:
    return search.space("_force_kernel", tiles_for(64), 64)[:number]


def test_what_spills_or_does_not_fit_is_ranked_last() -> None:
    fast = configs(9)
    predictions = [prediction(1, spills=3), *(prediction(9 - i) for i in range(7)), prediction(50)]
    predictions[2] = prediction(0, fits=False)
    with (
        mock.patch.object(tune, "predict", side_effect=[[p] for p in predictions]),
        mock.patch.object(tune.aot, "record"),
        mock.patch.object(tune.aot.Launch, "compile", create=True),
    ):
        ranked = tune.rank("_force_kernel", tiles_for(64), fast, lambda tiles: None, "sm_90", None)
    assert [r.config for r in ranked[-2:]] == [fast[0], fast[2]]
    assert ranked[0].config == fast[7]


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine whose GPU is the interpreter: the second of three configurations is the fastest."""
    times = iter([3.0, 1.0, 2.0] * 100)

    def do_bench(launched: Callable[[], None], quantiles: Any) -> list[float]:
        return [next(times)] * 3

    timed, space = search.tune, search.space
    monkeypatch.setattr(tune, "DEVICE", "cpu")
    monkeypatch.setattr(tune, "SIZES", SMALL)
    monkeypatch.setattr(search, "space", lambda *args: space(*args)[:3])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning, "device_name", lambda x: "A GPU")
    monkeypatch.setattr(search, "tune", lambda *a, **k: timed(*a, **k, do_bench=do_bench))
    monkeypatch.setenv(tuning.FILE_VARIABLE, str(tmp_path / "tuning.json"))
    tuning.forget()
    yield tmp_path / "tuning.json"
    tuning.forget()


def test_a_gpu_is_tuned_and_the_file_serves(
    gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TuneSettings(depths=(16,), sizes=("cub",))
    advanced: list[Any] = []
    monkeypatch.setattr(tune.Progress, "advance", lambda _, task: advanced.append(task))
    with (tmp_path / "printed").open("w") as file:
        rows = tune.run(settings, tmp_path, Console(file=file, width=300))
    printed = (tmp_path / "printed").read_text()
    written = [json.loads(line) for line in (tmp_path / "tune.jsonl").read_text().splitlines()]
    assert [row["modelled"] for row in written] == [False] * 9
    assert len(advanced) == 9  # configurations
    assert all(w.items() >= row.items() for w, row in zip(written, rows, strict=True))
    for kernel in search.KERNELS:
        best, _, shipped = (row for row in rows if row["kernel"] == kernel)
        assert (best["p50_ms"], best["rank"], best["is_shipped"]) == (1.0, 1, False)
        assert (shipped["p50_ms"], shipped["is_shipped"]) == (3.0, True)
        assert shipped["above_best"] == pytest.approx(2.0)
    assert printed.count("gain 200%") == 3
    assert f"Saved to {gpu}" in printed
    (entry,) = json.loads(gpu.read_text())["entries"]
    assert (entry["ms"], entry["shipped_ms"]) == (3.0, 9.0)
    x = torch.empty(30, 16)
    served = tuning.tuned_fields(tuning.tiles_here(x))
    assert served == entry["tiles"] != tuning.tuned_fields(tuning.shipped_tiles(x, 30))


def test_what_cannot_be_saved_is_printed(
    gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(tuning.FILE_VARIABLE, str(tmp_path / "file" / "tuning.json"))
    (tmp_path / "file").write_text("in the way of the folder")
    monkeypatch.setattr(tune, "check_file", lambda path: None)
    monkeypatch.setattr(search, "KERNELS", {"_pack_kernel": search.KERNELS["_pack_kernel"]})
    arguments = ["tune", "--sizes", "cub", "--depths", "16", "--out", str(tmp_path)]
    monkeypatch.setattr(command_line, "SIZES", SMALL)
    assert command_line.main(arguments) == 2
    out, err = capsys.readouterr()
    assert f"tuning file {tmp_path / 'file' / 'tuning.json'} could not be written" in err
    saved = json.loads(out[out.index("{\n") : out.rindex("}") + 1])
    ours, faults = tuning.usable(saved)
    assert (len(ours), faults) == (1, [])
    assert len((tmp_path / "tune.jsonl").read_text().splitlines()) == 3


def test_a_file_that_cannot_be_read_stops_before_anything_is_timed(
    gpu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.write_text("{")
    assert command_line.main(["tune", "--out", str(tmp_path / "runs")]) == 2
    err = capsys.readouterr().err
    assert str(gpu) in err
    assert "left as it is" in err
    assert gpu.read_text() == "{"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (TuneSettings(), ["no GPU", "--static", "sm_90"]),
        (TuneSettings(static=True), ["arch", "sm_90", "sm_80", "None"]),
        (TuneSettings(static=True, arch="sm_10"), ["sm_90", "sm_10"]),
        (TuneSettings(arch="sm_90"), ["static"]),
        (TuneSettings(sizes=("huge",)), ["cub", "huge"]),
        (TuneSettings(dtypes=("int8",)), ["float32", "int8"]),
        (TuneSettings(depths=(0,)), ["1..16000", "(0,)"]),
        (TuneSettings(depths=()), ["depths", "()"]),
    ],
)
def test_wrong_settings_are_told(settings: TuneSettings, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        tune.run(settings, tmp_path)
    assert not [word for word in words if word not in str(error.value)]
    assert not list(tmp_path.iterdir())


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the command takes away
    monkeypatch.setattr(tune, "run", lambda settings, out: seen.append((settings, out)))
    options = "--sizes cars --depths 64 32 --dtypes float16 bfloat16 --static --arch sm_80"
    options += f" --file {tmp_path / 'file'} --seed 4 --out {tmp_path}"
    assert command_line.main(["tune", *options.split()]) == 0
    expected = TuneSettings(
        ("cars",), (64, 32), ("float16", "bfloat16"), True, "sm_80", tmp_path / "file", 4
    )
    assert seen == [(expected, tmp_path)]


def shipped_ranking(arch: str, size: str, depth: int) -> dict[str, tuple[float, int]]:
    """How far what is shipped of each kernel is above the best, and the spills of the best."""
    with mock.patch.object(tune, "append_row"):
        settings = TuneSettings((size,), (depth,), static=True, arch=arch)
        rows = tune.run(settings, Path("unwritten"), Console(quiet=True))
    shipped = {row["kernel"]: row["above_best"] for row in rows if row["is_shipped"]}
    spills = {row["kernel"]: row["spills_in_loops"] for row in rows if row["rank"] == 1}
    return {kernel: (shipped[kernel], spills[kernel]) for kernel in shipped}


@pytest.mark.exhaustive
@pytest.mark.parametrize("depth", [128, 384, 512])
@pytest.mark.parametrize("size", ["cub", "sop"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_what_is_shipped_is_near_the_best_and_the_best_does_not_spill(
    compiler: ProcessPoolExecutor, arch: str, size: str, depth: int
) -> None:
    for kernel, (above, spills) in (
        compiler.submit(shipped_ranking, arch, size, depth).result().items()
    ):
        assert above <= 0.15, f"{kernel}: {above:.0%} above the best"
        assert spills == 0, kernel
