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
from pathlib import Path
from typing import Any

import torch

from bench.gpu.page import failures, latest, markdown, slug, summary
from bench.gpu.phases import PHASE, PHASES, ROWS, Phase, Task
from bench.results import append_row, read_rows
from bench.settings import GPU_PHASES, GpuSettings

Row = dict[str, Any]
_Process = subprocess.Popen[bytes]

ROOT = Path(__file__).parents[2]
LOG = "log.txt"
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
    phases = _Phases(settings, out)
    try:
        with _terminated_is_interrupted():
            for name, phase in PHASES.items():
                if name in settings.phases or name == "machine":  # rows belong to a machine
                    phases.run(name, phase)
    finally:
        rows = latest(read_rows(out / ROWS))
        written = write(rows, out)
        print(f"\n{summary(rows)}\n\nAll output of the phases is in {out / LOG}.")
        print(f"The page and its rows are {' and '.join(map(str, written))}."
              + " They are made to be committed, under bench/results/." * (not settings.rehearse),
              flush=True)  # fmt: skip
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


def command_of(task: Task, out: Path, rehearses: bool) -> list[str]:
    """The process of a task."""
    command = [sys.executable, "-m", "bench.gpu.phases", *task, "--out", str(out)]
    return command + ["--rehearse"] * rehearses


class _Phases:
    """Runs phases within the minutes of the settings, from now on."""

    def __init__(self, settings: GpuSettings, out: Path) -> None:
        self.rehearses, self.out = settings.rehearse, out
        self.seconds = 60 * settings.minutes
        self.end = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        return max(self.end - time.monotonic(), 0.0)

    def run(self, name: str, phase: Phase) -> None:
        """Run the tasks of a phase, and append a row that tells how it went: "done", "failed",
        "timed out", "interrupted", or "skipped" where too little time is left."""
        most = min(phase.share * self.seconds, self.left)
        if self.left < phase.least:
            why = f"{self.left:.0f} s were left, and it wants {phase.least:.0f}"
            self.tell(name, "skipped", 0.0, why)
            return
        print(f"{name}: begins, {most:.0f} s at most, {self.left:.0f} s left", flush=True)
        log, status, faults = _size(self.out / LOG), "done", list[str]()
        began = time.monotonic()
        try:
            for stage in phase.stages:
                faults += self.run_stage(name, stage, began + most)
            status = "failed" if faults else "done"
        except TimeoutError:
            status = "timed out"
            faults.append(f"stopped after {most:.0f} s")
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            if faults:
                faults.append(f"its last line: {_last_line(self.out / LOG, log)}")
            self.tell(name, status, time.monotonic() - began, "; ".join(faults))

    def run_stage(self, phase: str, tasks: Sequence[Task], deadline: float) -> list[str]:
        """Run tasks side by side, one a core, each in a process group of its own.

        Returns:
            What ended otherwise than with status 0.

        Raises:
            TimeoutError: the deadline has come. What still ran is killed, as for every exception.
        """
        waiting, running, faults = list(tasks), dict[_Process, Task](), list[str]()
        try:
            while waiting or running:
                while waiting and len(running) < _CORES:
                    task = waiting.pop(0)
                    running[self.start(phase, task)] = task
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

    def start(self, phase: str, task: Task) -> _Process:
        """Start a task; what it prints goes to the log."""
        environment = dict(os.environ)
        for name in ("TRITON_INTERPRET", "PFML_TRITON_AUTOTUNE"):
            environment.pop(name, None)
        environment |= {
            PHASE: phase,
            "PFML_TRITON_TUNING": "",  # the shipped tile shapes
            "TRITON_CACHE_DIR": str(self.out / "cache" / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.out / "cache" / "inductor"),
            "PYTHONUNBUFFERED": "1",
        }
        if self.rehearses and task[0] != "model":  # which reads machine code
            environment["TRITON_INTERPRET"] = "1"
        with (self.out / LOG).open("ab") as log:
            log.write(f"\n==== {phase}: {' '.join(task)}\n".encode())
            log.flush()
            return subprocess.Popen(
                command_of(task, self.out, self.rehearses), cwd=ROOT, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def tell(self, phase: str, status: str, seconds: float, message: str) -> None:
        """How a phase went, as a row and on the console."""
        row: Row = {"bench": "gpu", "phase": phase, "name": "phase", "status": status}
        append_row(self.out / ROWS, row | {"seconds": seconds, "message": message})
        because = f" ({message})" if message else ""
        print(f"{phase}: {status} after {seconds:.0f} s, {self.left:.0f} s left{because}",
              flush=True)  # fmt: skip


def _end(process: _Process) -> None:
    """End a process with its group, gently first."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GOODBYE)
    _kill(process)
    process.wait()


def _kill(process: _Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """Let SIGTERM, and a terminal that is closed, end the run as Ctrl-C does: with its processes,
    and with a page."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ending = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _last_line(path: Path, beginning: int) -> str:
    """Of what a phase has printed."""
    with path.open("rb") as log:
        log.seek(beginning)
        lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip()[:120] for line in reversed(lines) if line.strip()), "none")
