"""The first minutes on a GPU, rehearsed without one: every phase, its process, and the page."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import clocks, gpu
from bench.__main__ import INTERRUPTED, main
from bench.gpu import checks, page, phases, slack, steps, stress, tune
from bench.gpu.phases import Phase
from bench.gpu.rig import Rig
from bench.results import append_row, read_rows
from bench.settings import GPU_PHASES, GpuSettings
from tests.compiled import modelled_step

Row = dict[str, Any]


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """Of a rehearsal with few repeats."""
    monkeypatch.setattr(clocks, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(steps, "TIMED", ("cub", "sop"))
    monkeypatch.setattr(slack, "BLOCKS", {"filter": (128, 256, 64, 4)})
    return Rig(tmp_path, "rehearsed", rehearses=True)


def rows_of(rig: Rig, name: str) -> list[Row]:
    return [row for row in read_rows(rig.out / gpu.ROWS) if row["name"] == name]


def test_the_machine_says_what_it_is(rig: Rig) -> None:
    steps.machine(rig)
    (row,) = rows_of(rig, "machine")
    assert (row["bench"], row["phase"], row["rehearsal"]) == ("gpu", "rehearsed", True)
    assert row["torch"] == torch.__version__
    assert min(row["copy_tb_s"], row["bf16_tflop_s"], row["cores"]) > 0


def test_the_first_step_is_checked(rig: Rig) -> None:
    steps.first(rig, "cub")
    single, brain = rows_of(rig, "first step")
    assert (single["dtype"], brain["dtype"]) == ("float32", "bfloat16")
    assert single["gradient_error"] < 1e-5 < brain["gradient_error"] < 4e-3
    assert single["passed"]
    assert brain["passed"]
    assert single["first_s"] > 0


def test_steps_and_their_kernels_are_timed(rig: Rig) -> None:
    steps.steps(rig)
    found = rows_of(rig, "step")
    expected = [(size, dtype) for dtype in ("float32", "bfloat16") for size in ("cub", "sop")]
    assert [(row["size"], row["dtype"]) for row in found] == expected
    for row in found:
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["host_us"] > 0
        assert row["graph_us"] is None
        assert row["passed"]
        assert row["peak_bytes"] > row["extra_bytes"]
    launched = [row["kernel"] for row in rows_of(rig, "kernel") if row["size"] == "cub"]
    assert launched[0] == "_pack_kernel"
    assert launched[-1] == "_pull_back_kernel"
    assert [row["part"] for row in rows_of(rig, "part")] == 2 * ["sort", "turn of the basis"]
    assert (rig.out / "trace-cub.json.gz").stat().st_size > 0


def test_peers_are_the_same_energy(rig: Rig) -> None:
    steps.peers(rig)
    found = {(row["provider"], row["precision"]): row for row in rows_of(rig, "step")}
    assert found.keys() == {("pfml", "float32"), ("eager", "float32"), ("eager", "tf32")}
    assert all(row["gradient_error"] < 1e-4 for row in found.values())
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [(torch.OutOfMemoryError("CUDA out of memory."), True), (RuntimeError("no\nmore"), False)],
)
def test_what_fails_is_a_row_and_the_next_is_measured(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, error: Exception, out_of_memory: bool
) -> None:
    def failing(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(steps, "gram_loss", failing)
    rig.phase = "peers"
    steps.peers(rig)
    ours, *failed = rows_of(rig, "step")[1:]
    assert ours["p50_us"] > 0
    assert {row["out_of_memory"] for row in failed} == {out_of_memory}
    assert failed[0]["error"] in ("OutOfMemoryError: CUDA out of memory.", "RuntimeError: no")
    assert bool(page.failures(failed)) is not out_of_memory  # which is a result of a peer
    assert ("out of memory" if out_of_memory else "failed") in page.markdown(failed)


def test_kernels_are_modelled(compiler: ProcessPoolExecutor, tmp_path: Path) -> None:
    compiler.submit(modelled_step, tmp_path).result()
    found = read_rows(tmp_path / gpu.ROWS)
    assert {"_pack_kernel", "_filter_kernel", "_force_kernel"} < {row["kernel"] for row in found}
    for row in found:
        assert row["arch"] == "sm_90"
        assert 0 < row["low_us"] <= row["us"] <= row["high_us"]


def test_a_chip_without_a_model_is_told(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "CHIPS", {"sm_80": None})
    steps.model(rig, "cub")
    assert [row["arch"] for row in rows_of(rig, "no model")] == ["sm_90"]
    assert "There is no model of sm_90: there are of sm_80." in page.markdown(
        rows_of(rig, "no model")
    )


def test_pack_and_filter_repeat_within_their_bounds(rig: Rig) -> None:
    stress.stress(rig)
    bounds, races = rows_of(rig, "bounds"), rows_of(rig, "race")
    assert [row["dtype"] for row in bounds] == ["float32", "bfloat16"]
    assert all(row["passed"] and 0 < row["sketch_error"] <= 1 for row in bounds)
    assert [row["repeats"] for row in races] == 2 * [2, 4]
    assert all(row["passed"] for row in races)


def test_other_bits_are_found(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    near_tiles, calls = stress.launch.near_tiles, []

    def wrong(*clouds: Any) -> torch.Tensor:
        calls.append(1)
        near = near_tiles(*clouds)
        return near ^ 1 if len(calls) % 2 else near

    monkeypatch.setattr(stress.launch, "near_tiles", wrong)
    stress.stress(rig)
    assert rows_of(rig, "bounds")[0]["wrong_bits"] > 0
    race = rows_of(rig, "race")[1]
    assert [race[f"{name}_calls"] for name in ("coarse", "left", "near")] == [0, 0, 2]
    assert not race["passed"]
    assert {row["name"] for row in page.failures(read_rows(rig.out / gpu.ROWS))} == {
        "bounds", "race",
    }  # fmt: skip


def test_errors_of_products_are_within_the_slack(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    slack.slack(rig)
    found = rows_of(rig, "slack")
    assert [row["kind"] for row in found] == list(slack.KINDS)
    assert all(0 <= row["product"] <= 1 and row["passed"] for row in found)
    x, y = slack.points("normal", 64, rig.device)
    exact = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: exact(a, b) * (1 + 2e-5))
    assert slack.shares("filter", x, y)["sketch"] > 1  # of a product that is off by more


def test_tuning_is_kept_beside_the_rows(rig: Rig) -> None:
    tune.compiled(rig, "cub", "0/6")
    for _ in range(2):
        tune.tune(rig, "cub")
    found = rows_of(rig, "tuned")
    assert [row["kernel"] for row in found] == 2 * ["_filter_kernel", "_force_kernel"]
    assert all(row["timed"] == row["configurations"] == 2 for row in found)
    entries = tune.tuning.parse(rig.out / tune.FILE)["entries"]
    assert [entry["device"] for entry in entries] == ["cpu"]
    assert "| cub | _force_kernel |" in page.markdown(found)


def test_tuning_ends_with_its_time() -> None:
    clock = tune.Clock(0.0, lambda call, quantiles: [call()] * 3)
    tiles = tune.tuning.tiles_for(96)
    assert len(clock.space("_force_kernel", tiles, 128)) > 5
    assert len(clock.space("_pack_kernel", tiles, 128)) == 1
    assert clock(lambda: 2.0) == [2.0, 2.0, 2.0]  # the shipped one
    time.sleep(1e-3)
    assert clock(pytest.fail) == [float("inf")] * 3
    clock.space("_filter_kernel", tiles, 128)
    assert clock(lambda: 3.0) == [3.0, 3.0, 3.0]


def test_tests_are_rows_as_they_end(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "test_few.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='no GPU')\n"
        "def test_skipped(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no set-up')\n"
        "def test_broken(broken): pass\n"
        "def test_dead(): import os; os._exit(7)\n"
    )
    checks.run_tests(rig, str(tmp_path / "test_few.py"))
    *found, ended = rows_of(rig, "test")
    names = [row["test"].partition("::")[2] for row in found]
    assert names == ["test_right", "test_wrong", "test_skipped", "test_broken"]
    assert [row["passed"] for row in found] == [True, False, None, False]
    assert "one is not two" in found[1]["message"]
    assert ended["message"] == "pytest ended with status 7"
    assert "Tests: 1 passed, 2 failed, 1 skipped, 1 error." in page.markdown([*found, ended])


def test_without_tests_there_is_the_self_check(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from pfml_triton import selfcheck
    from pfml_triton.selfcheck.result import Check, Report

    right = Check("cpu", "torch", "loss", "gradient", "float64", "float32", 96, 40, True, 1e-7,
                  1e-5, "", 0.5)  # fmt: skip
    report = Report({}, [], {}, [right])
    monkeypatch.setattr(selfcheck, "run", lambda devices: report)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    checks.correctness(rig)
    (row,) = rows_of(rig, "test")
    assert row["test"] == "self-check: torch loss gradient float32 96 40"
    assert (row["outcome"], row["passed"]) == ("passed", True)


def sanitizer(folder: Path, script: str) -> None:
    """A program in place of compute-sanitizer."""
    program = folder / checks.SANITIZER
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "passed", "errors", "message"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", True, 0, ""),
        ("echo '========= RACECHECK SUMMARY: 0 hazards displayed'", True, 0, ""),
        ("echo '========= COMPUTE-SANITIZER\n========= Invalid read of 4 bytes\n"
         "========= ERROR SUMMARY: 3 errors'; exit 9", False, 3, "Invalid read of 4 bytes"),
        ("exit 1", False, None, ""),
    ],
)  # fmt: skip
def test_what_a_sanitizer_says(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, passed: bool,
    errors: int | None, message: str,
) -> None:  # fmt: skip
    sanitizer(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    checks.sanitize(rig, "memcheck")
    (row,) = rows_of(rig, "sanitizer")
    assert (row["tool"], row["passed"], row["errors"]) == ("memcheck", passed, errors)
    assert message in row["message"]


def test_a_sanitizer_may_be_missing(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(checks, "_BESIDE_NVCC", str(tmp_path))
    checks.sanitize(rig, "racecheck")
    (row,) = rows_of(rig, "sanitizer")
    assert (row["outcome"], row["message"]) == ("skipped", "compute-sanitizer is not installed")
    assert not page.failures([row])


# Processes of phases, in which other programs stand for the tasks.

WRITES = "from pathlib import Path; from bench.results import append_row; "
WRITES += f"append_row(Path('{gpu.ROWS}'), dict(bench='gpu', phase='steps', name='part', size='cub'"
WRITES += ", part='sort', us=1.0, host_us=1.0)); "
MACHINE = {
    "bench": "gpu", "phase": "machine", "name": "machine", "time": "2026-01-02T03:04:05",
    "commit": "abc", "python": "3.12.1", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0",
    "driver": "580.1", "cores": 16, "cpu": "Xeon", "copy_tb_s": 2.9, "bf16_tflop_s": 650.0,
    "rehearsal": False, "device": "NVIDIA H100 80GB HBM3",
}  # fmt: skip


@pytest.fixture
def replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets Python code run in place of tasks, by phase; a machine is known."""
    append_row(tmp_path / gpu.ROWS, MACHINE)
    code = {}

    def command(task: phases.Task, out: Path, rehearses: bool) -> list[str]:
        paths = f"import sys, os; sys.path.insert(0, {str(gpu.ROOT)!r}); os.chdir({str(out)!r}); "
        return [sys.executable, "-c", paths + code[task[0]]]

    def replace(share: float = 1.0, **codes: str) -> None:
        code.update(codes)
        table = {name: Phase(share, 1, (((name,),),)) for name in codes}
        monkeypatch.setattr(gpu, "PHASES", table)

    monkeypatch.setattr(gpu, "command_of", command)
    return replace


def ran(out: Path, minutes: float = 1.0) -> list[Row]:
    return gpu.run(GpuSettings(minutes, tuple(gpu.PHASES), rehearse=True), out)


def statuses(rows: list[Row]) -> dict[str, str]:
    return {row["phase"]: row["status"] for row in rows if row["name"] == "phase"}


def test_phases_that_fail_or_hang_end_alone(
    tmp_path: Path, replaced: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu, "GOODBYE", 0.5)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    child = "import subprocess; p = subprocess.Popen(['sleep', '60']); "
    hangs = WRITES + child + "print(p.pid, file=open('pid', 'w'), flush=True); " + stubborn
    replaced(
        0.08,  # of a minute
        first="print('so far so good'); raise SystemExit(3)",
        stress=hangs + "time.sleep(60)",
        steps="pass",
    )
    rows = ran(tmp_path)
    assert statuses(rows) == {"first": "failed", "stress": "timed out", "steps": "done"}
    by = {row["phase"]: row for row in rows if row["name"] == "phase"}
    assert by["first"]["message"] == "first ended with status 3; its last line: so far so good"
    assert by["stress"]["message"].startswith("stopped after 5 s")
    assert [row["part"] for row in rows if row["name"] == "part"] == ["sort"]  # kept
    assert is_gone(int((tmp_path / "pid").read_text()))  # with its whole group
    assert gpu.is_broken(rows)
    assert not gpu.is_broken([row for row in rows if row["phase"] != "first"])
    printed = capsys.readouterr().out
    assert "stress: begins, 5 s at most, " in printed
    assert "stress: timed out after " in printed
    assert str(tmp_path / "nvidia-h100-80gb-hbm3.md") in printed
    assert printed.rstrip().endswith(f"{tmp_path / 'nvidia-h100-80gb-hbm3.jsonl'}.")


def is_gone(pid: int) -> bool:
    """A zombie counts: who has to reap it is not this process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_keeps_the_rows_and_writes_the_page(
    tmp_path: Path, replaced: Callable[..., None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    interrupts = "import signal, time; print(os.getpid(), file=open('pid', 'w'), flush=True); "
    interrupts += f"os.kill(os.getppid(), signal.{name}); time.sleep(60)"
    replaced(steps=WRITES + interrupts, peers="pass")
    run, before = gpu.run, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        gpu, "run", lambda settings, out: run(GpuSettings(1, settings.phases, True), out)
    )
    options = ["gpu", "--phases", "steps", "peers", "--out", str(tmp_path)]
    assert main(options) == INTERRUPTED
    rows = read_rows(tmp_path / gpu.ROWS)
    assert statuses(rows) == {"steps": "interrupted"}
    assert is_gone(int((tmp_path / "pid").read_text()))
    text = (tmp_path / "nvidia-h100-80gb-hbm3.md").read_text()
    assert "| cub | sort | 1 | 1 |" in text
    assert "interrupted" in text
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_finds_no_time_left_is_skipped(
    tmp_path: Path, replaced: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced(1.0, first="import time; time.sleep(60)", steps="pass")
    rows = ran(tmp_path, minutes=0.04)  # 2.4 s
    assert statuses(rows) == {"first": "timed out", "steps": "skipped"}
    assert "0 s were left, and it wants 1" in rows[-1]["message"]
    assert not gpu.is_broken(rows)


def test_a_second_run_adds_to_the_page(tmp_path: Path, replaced: Callable[..., None]) -> None:
    replaced(steps=WRITES)
    ran(tmp_path)
    lost = {"name": "kernels", "error": "RuntimeError: lost", "out_of_memory": False}
    ended = {"name": "phase", "status": "failed", "seconds": 1.0, "message": "lost"}
    for row in (lost, ended):
        append_row(tmp_path / gpu.ROWS, {"phase": "steps"} | row)
    assert len(page.failures(page.latest(read_rows(tmp_path / gpu.ROWS)))) == 2
    replaced(steps=WRITES.replace("us=1.0", "us=2.5"), peers="pass")
    rows = ran(tmp_path)
    assert statuses(rows) == {"steps": "done", "peers": "done"}
    assert not gpu.is_broken(rows)  # what failed has run again
    assert [row["us"] for row in rows if row["name"] == "part"] == [2.5]
    assert read_rows(tmp_path / "nvidia-h100-80gb-hbm3.jsonl") == rows


def test_rows_of_another_device_are_left_out() -> None:
    rehearsal = MACHINE | {"device": "cpu", "rehearsal": True}
    part = {"phase": "steps", "name": "part", "size": "cub", "part": "sort", "us": 1.0}
    assert page.latest([rehearsal, part, MACHINE]) == [MACHINE]
    assert page.latest([MACHINE, part, MACHINE]) == [MACHINE, part]
    assert page.latest([MACHINE, rehearsal, part]) == [rehearsal, part]
    assert page.latest([part]) == [part]


def test_tasks_of_a_stage_run_side_by_side(
    tmp_path: Path, replaced: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    meets = (
        "import time\nopen('{0}', 'w').close()\nwhile not os.path.exists('{1}'): time.sleep(0.01)"
    )
    replaced(left=meets.format("a", "b"), right=meets.format("b", "a"))
    monkeypatch.setattr(gpu, "PHASES", {"first": Phase(1.0, 1, ((("left",), ("right",)),))})
    monkeypatch.setattr(gpu, "_CORES", 2)
    assert statuses(ran(tmp_path, 0.3)) == {"first": "done"}


def test_the_phases_are_those_of_the_command_line() -> None:
    assert tuple(phases.PHASES) == GPU_PHASES
    known = phases._functions()
    for phase in phases.PHASES.values():
        assert 0 < phase.share < 1
        assert all(task[0] in known for stage in phase.stages for task in stage)


# The page.

REAL = [
    MACHINE,
    {"phase": "first", "name": "first step", "size": "cub", "dtype": "float32", "first_s": 9.4,
     "second_s": 0.0021, "gradient_error": 3e-7, "energy_error": 1e-8, "passed": True},
    {"phase": "first", "name": "model", "size": "cub", "kernel": "_force_kernel", "us": 40.0,
     "low_us": 30.0, "high_us": 60.0, "limit": "latency", "arch": "sm_90"},
    {"phase": "correctness", "name": "test", "test": "tests/gpu/test_loss.py::test_a",
     "outcome": "passed", "passed": True, "seconds": 0.5, "message": ""},
    {"phase": "correctness", "name": "test", "test": "tests/gpu/test_loss.py::test_b",
     "outcome": "failed", "passed": False, "seconds": 0.5, "message": "assert 1 | 2\nmore"},
    {"phase": "stress", "name": "race", "size": "cub", "dtype": "float32", "repeats": 5000,
     "coarse_calls": 0, "left_calls": 0, "right_calls": 0, "near_calls": 0, "most_entries": 0,
     "passed": True},
    *({"phase": phase, "name": "step", "provider": provider, "size": "cub", "dtype": "float32",
       "precision": "float32", "p20_us": us - 1, "p50_us": us, "p80_us": us + 1, "host_us": 140.0,
       "graph_us": graph, "extra_bytes": 3 << 20, "gradient_error": 3e-7, "passed": True}
      for phase, provider, us, graph in (("steps", "pfml", 150.0, 90.0),
                                         ("peers", "pfml", 160.0, 90.0),
                                         ("peers", "eager", 800.0, 700.0))),
    {"phase": "peers", "name": "step", "provider": "eager", "size": "faces-100k",
     "dtype": "float32", "precision": "tf32", "error": "OutOfMemoryError: CUDA",
     "out_of_memory": True},
    {"phase": "steps", "name": "kernel", "size": "cub", "kernel": "_force_kernel", "us": 52.0,
     "again_us": 50.0, "programs": "100 x 1"},
    {"phase": "memcheck", "name": "sanitizer", "tool": "memcheck", "outcome": "passed",
     "errors": 0, "passed": True, "message": ""},
    {"phase": "steps", "name": "phase", "status": "done", "seconds": 61.2, "message": ""},
]  # fmt: skip


def test_the_page_of_a_real_gpu() -> None:
    text = page.markdown(REAL)
    assert text.startswith(
        "# NVIDIA H100 80GB HBM3\n\n`python -m bench gpu`, 2026-01-02, commit abc"
    )
    assert "A copy reaches 2.9 TB/s, a product of bfloat16 matrices 650 TFLOP/s." in text
    assert "rehearsal" not in text
    for line in (
        "| cub | float32 | pfml | float32 | 150 | 140 | 90 | 0.938 | 3 | 3e-07 |",
        "| cub | float32 | eager | float32 | 800 | 140 | 700 | 5 | 3 | 3e-07 |",
        "| faces-100k | float32 | eager | tf32 | out of memory |  |  |  |  |  |",
        "| cub | _force_kernel | 52 | 50 | 40 | 30 | 60 | latency | 1.25 |",
        "| cub | float32 | 9.4 | 0.0021 | 3e-07 | 1e-08 |",
        "| cub | float32 | 5000 | 0 | 0 | 0 |",
        "| memcheck | passed | 0 |  |",
        "| steps | done | 61 |  |",
        "- correctness, test tests/gpu/test_loss.py::test_b: assert 1 | 2 more",
    ):
        assert f"\n{line}\n" in text
    assert "Tests: 1 passed, 1 failed. Other checks that passed: 6. **Failed: 1.**" in text


def test_every_table_of_the_page_is_well_formed() -> None:
    tables = re.findall(r"(?:^\|.*\|\n)+", page.markdown(REAL), re.M)
    assert len(tables) == 7
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_the_summary_ends_with_the_verdict_and_is_short() -> None:
    failed = [
        row | {"test": f"test_{i}", "message": 400 * "x"}
        for i, row in enumerate(40 * [REAL[4]])
    ]  # fmt: skip
    text = page.summary([*REAL, *failed])
    assert len(text) < 10_000
    assert text.endswith("- and 26 more, which the page has")
    assert page.summary([MACHINE]).endswith("Nothing failed.")


def test_a_page_without_a_machine_says_so() -> None:
    text = page.markdown(REAL[1:])
    assert text.startswith("# Unknown device\n\nThe phase `machine` left no row")
    assert page.slug(REAL[1:]) == "unknown-device"


# The command.


def test_without_a_gpu_there_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 2
    assert (
        "python -m bench gpu needs a GPU that PyTorch can use, got none" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (GpuSettings(0.0), "minutes must be more than 0, got 0"),
        (GpuSettings(float("nan")), "minutes must be more than 0, got nan"),
        (GpuSettings(phases=("first", "last")), "phases must be some of machine, .*'first last'"),
        (GpuSettings(phases=()), "phases must be some of machine, first"),
    ],
)
def test_wrong_settings(tmp_path: Path, settings: GpuSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpu.run(settings, tmp_path)


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gpu", "--phases", "last"])
    assert ended.value.code == 2
    assert main(["gpu", "--minutes", "-1", "--rehearse", "--out", str(tmp_path)]) == 2
    assert "minutes must be more than 0, got -1" in capsys.readouterr().err


def test_options_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[GpuSettings, Path]] = []
    rows: list[Row] = []
    monkeypatch.setattr(gpu, "run", lambda *given: seen.append(given) or rows)
    options = ["--minutes", "3", "--phases", "steps", "first", "--rehearse", "--out", str(tmp_path)]
    assert main(["gpu", *options]) == 0
    assert main(["gpu"]) == 0
    rows.append({"name": "phase", "status": "failed"})
    assert main(["gpu"]) == 1
    assert seen[0] == (GpuSettings(3.0, ("steps", "first"), True), tmp_path)
    assert seen[1] == (GpuSettings(), Path("runs/gpu"))


def test_it_needs_torch_triton_and_numpy_alone(tmp_path: Path) -> None:
    absent = ("rich", "matplotlib", "pytorch_metric_learning", "pytest", "sklearn", "scipy", "PIL")
    code = f"import sys; sys.modules |= dict.fromkeys({absent})\n"
    code += "from bench.gpu import phases, run; import bench.__main__; phases._functions()"
    subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, check=True)


@pytest.mark.slow
def test_a_rehearsal_of_all_phases(tmp_path: Path) -> None:
    assert main(["gpu", "--rehearse", "--minutes", "20", "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "rehearsal.jsonl")
    assert statuses(rows) == dict.fromkeys(GPU_PHASES, "done")
    assert "Its numbers mean nothing" in (tmp_path / "rehearsal.md").read_text()
