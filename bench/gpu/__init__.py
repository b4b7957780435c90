"""The first minutes on a GPU: does the loss run there, is it right, and how fast is it?

`run` is the experiment behind ``python -m bench gpu``. Phases come in the order of what they teach,
each in processes of its own, so that a hang, a crash or a device that is lost ends one phase and
no more. Every row is appended to ``rows.jsonl`` as soon as it is known. At the end, or when it is
interrupted, the run leaves one page of Markdown and its rows, named after the device. It needs
torch, triton and numpy.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.page import failures, latest, markdown, slug, summary
from bench.gpu.phases import PHASES, Phase, Task
from bench.results import append_row, read_rows
from bench.settings import GPU_PHASES, GpuSettings

Row = dict[str, Any]

ROOT = Path(__file__).parents[2]
ROWS, LOG = "rows.jsonl", "log.txt"
GOODBYE = 3.0  # seconds from SIGTERM to SIGKILL
_LOOK = 0.05  # seconds between two looks at the processes
_CORES = os.cpu_count() or 1


def run(settings: GpuSettings, out: Path) -> list[Row]:
    """Run the phases within the minutes, and leave a page and its rows in `out`.

    A second run into the same folder adds to the rows; the page has the last of each thing.

    Returns:
        The last row of each thing.

    Raises:
        ValueError: a setting is out of range, or there is no GPU.
        OSError: the folder cannot be written.
        KeyboardInterrupt: by Ctrl-C or SIGTERM, after processes are ended and the page is written.
    """
    check(settings)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / ROWS).open("a").close()  # that it cannot be written is better known now
    if "first" in settings.phases:  # what a user waits for who has compiled nothing yet
        shutil.rmtree(out / "cache", ignore_errors=True)
    clock = Budget(60 * settings.minutes)
    chosen = [name for name in PHASES if name in settings.phases]
    if not any(row["name"] == "machine" for row in read_rows(out / ROWS)):
        chosen = ["machine", *(name for name in chosen if name != "machine")]
    try:
        with _terminated_is_interrupted():
            for name in chosen:
                run_phase(name, PHASES[name], clock, out, settings.rehearse)
    finally:
        rows = latest(read_rows(out / ROWS))
        written = write(rows, out)
        print(f"\n{summary(rows)}\n\nAll output of the phases is in {out / LOG}.")
        print(f"The page and its rows are {' and '.join(map(str, written))}: they are made to be "
              "committed, under bench/results/.", flush=True)  # fmt: skip
    return rows


def check(settings: GpuSettings) -> None:
    """ValueError for a setting that is out of range, or without a GPU."""
    if not settings.minutes > 0:
        raise ValueError(f"minutes must be more than 0, got {settings.minutes:g}")
    if not settings.phases or not set(settings.phases) <= set(GPU_PHASES):
        known = ", ".join(GPU_PHASES)
        raise ValueError(f"phases must be some of {known}, got {' '.join(settings.phases)!r}")
    if not settings.rehearse and not torch.cuda.is_available():
        raise ValueError(
            f"python -m bench gpu needs a GPU that PyTorch can use, got none (torch "
            f"{torch.__version__}, built for CUDA {torch.version.cuda}); --rehearse runs every "
            "phase without one"
        )


def is_broken(rows: Sequence[Row]) -> bool:
    """Whether a check or a phase failed."""
    return bool(failures(rows))


def write(rows: Sequence[Row], out: Path) -> tuple[Path, Path]:
    """Write the page and its rows, and return where they are."""
    name = slug(rows)
    written = out / f"{name}.md", out / f"{name}.jsonl"
    written[0].write_text(markdown(rows), encoding="utf-8")
    written[1].unlink(missing_ok=True)
    for row in rows:
        append_row(written[1], row)
    return written


@dataclass
class Budget:
    """Seconds of a run."""

    seconds: float

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


def run_phase(name: str, phase: Phase, clock: Budget, out: Path, rehearses: bool) -> None:
    """Run the tasks of a phase in as much of the time left as it may have, and append a row that
    tells how it went: "done", "failed", "timed out", "interrupted" or "skipped"."""
    most = min(phase.share * clock.seconds, clock.left)
    if clock.left < phase.least:
        _tell(name, out, clock, "skipped", 0.0, f"{max(clock.left, 0):.0f} s were left, and it "
              f"wants {phase.least:.0f}")  # fmt: skip
        return
    print(f"{name}: begins, {most:.0f} s at most, {clock.left:.0f} s left", flush=True)
    began, status, faults = time.monotonic(), "done", list[str]()
    beginning = _size(out / LOG)
    try:
        for stage in phase.stages:
            faults += run_stage(name, stage, began + most, out, rehearses)
        if faults:
            status = "failed"
    except TimeoutError:
        status = "timed out"
        faults.append(f"stopped after {most:.0f} s")
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        if faults:
            faults.append(f"its last line: {_last_line(out / LOG, beginning)}")
        seconds = time.monotonic() - began
        _tell(name, out, clock, status, seconds, "; ".join(faults))


def run_stage(
    phase: str, tasks: Sequence[Task], deadline: float, out: Path, rehearses: bool
) -> list[str]:
    """Run tasks side by side, one a core, each in a process group of its own.

    Returns:
        What ended otherwise than with status 0.

    Raises:
        TimeoutError: the deadline has come. What still ran has been killed, as for all errors.
    """
    waiting, running, faults = list(tasks), dict[subprocess.Popen[bytes], Task](), list[str]()
    try:
        while waiting or running:
            while waiting and len(running) < _CORES:
                task = waiting.pop(0)
                running[_start(phase, task, out, rehearses)] = task
            for process in [p for p in running if p.poll() is not None]:
                task = running.pop(process)
                _kill(process)  # what it has left running
                if process.returncode != 0:
                    faults.append(f"{' '.join(task)} ended with status {process.returncode}")
            if running and time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(_LOOK)
    finally:
        for process in running:
            _end(process)
    return faults


def command_of(task: Task, out: Path, rehearses: bool) -> list[str]:
    """The process of a task."""
    command = [sys.executable, "-m", "bench.gpu.phases", *task, "--out", str(out)]
    return command + ["--rehearse"] * rehearses


def _start(phase: str, task: Task, out: Path, rehearses: bool) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    for name in ("TRITON_INTERPRET", "PFML_TRITON_AUTOTUNE"):
        environment.pop(name, None)
    environment |= {
        "PFML_TRITON_GPU_PHASE": phase,
        "PFML_TRITON_TUNING": "",  # the shipped tile shapes
        "TRITON_CACHE_DIR": str(out / "cache" / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(out / "cache" / "inductor"),
        "PYTHONUNBUFFERED": "1",
    }
    if rehearses and task[0] != "model":  # which reads machine code
        environment["TRITON_INTERPRET"] = "1"
    with (out / LOG).open("ab") as log:
        log.write(f"\n==== {phase}: {' '.join(task)}\n".encode())
        log.flush()
        return subprocess.Popen(
            command_of(task, out, rehearses), cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with its group, gently first."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GOODBYE)
    _kill(process)
    process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does: with its processes, and with a page."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(phase: str, out: Path, clock: Budget, status: str, seconds: float, message: str) -> None:
    row = {"bench": "gpu", "phase": phase, "name": "phase", "status": status, "seconds": seconds}
    append_row(out / ROWS, row | {"message": message})
    because = f" ({message})" if message else ""
    print(f"{phase}: {status} after {seconds:.0f} s, {max(clock.left, 0):.0f} s left{because}",
          flush=True)  # fmt: skip


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _last_line(path: Path, beginning: int) -> str:
    """Of what a phase has printed."""
    with path.open("rb") as log:
        log.seek(beginning)
        lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip()[:120] for line in reversed(lines) if line.strip()), "none")
