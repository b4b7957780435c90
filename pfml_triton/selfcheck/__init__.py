"""`python -m pfml_triton`: does the loss compute on this machine what it should?

On a GPU that the Triton kernels serve, they are checked where they run. Without one they run in
Triton's interpreter, in a process of its own, and are compiled for a GPU that is not here. The
torch backend is checked in any case, for the kernels are held against it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial

import torch

from .. import serving
from . import loss, machine, timing
from .result import Check, Gap, Log, Report, tell

_FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
_PATIENCE = 600  # seconds for the process of the interpreter
_NO_GPU = "no GPU that the kernels serve was checked"


def default_devices() -> list[torch.device]:
    """Every GPU that PyTorch finds, or the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]


def run(devices: list[torch.device]) -> Report:
    """Check `devices`, each "cpu" or a GPU with its index. Progress goes to stderr."""
    started = time.perf_counter()
    report = Report(machine.versions(), machine.devices(devices), machine.tuning())
    served = [
        torch.device(d["device"]) for d in report.devices if d["backend"] == "triton"
    ]  # fmt: skip
    interpreter = None if served else _start_interpreter(report)
    for device in devices:
        tell(f"{device}: torch backend")
        log = Log(report, device, "torch")
        loss.check(log, "torch", _FLOATS, [64, 100, 512], 160)
    for device in served:
        with torch.cuda.device(device):
            _check_gpu(Log(report, device, "gpu"))
    if not served:
        _check_compiler(report)
        _finish_interpreter(interpreter, report)
        _note_what_a_gpu_would_show(report)
    for device in devices:
        backend = "triton" if device in served else "torch"
        tell(f"{device}: time")
        log = Log(report, device, "gpu" if device in served else "torch")
        timing.check(log, backend, [1600, 8005] if device.type == "cuda" else [1600])
    report.seconds = time.perf_counter() - started
    return report


def _check_gpu(log: Log) -> None:
    from . import kernels

    tell(f"{log.device}: Triton kernels. The first time they compile, which takes a minute or two.")
    cases = kernels.on_gpu()
    for number, case in enumerate(cases, 1):
        tell(f"{log.device}: kernels of case {number} of {len(cases)} ({case}):", end="")
        kernels.check(log, case, lambda kernel: tell(f" {kernel}", end=""))
        tell("")
    tell(f"{log.device}: the whole loss")
    loss.check(log, "triton", _FLOATS[:3], [64, 100, 512], 600)


def in_interpreter() -> Report:
    """The kernels in Triton's interpreter, in a process with TRITON_INTERPRET=1."""
    from . import kernels

    report = Report({}, [], {})
    log = Log(report, torch.device("cpu"), "interpreter")
    for case in kernels.in_interpreter():
        kernels.check(log, case)
    loss.check(log, "triton", _FLOATS[:3], [32], 40)
    return report


def _start_interpreter(report: Report) -> subprocess.Popen[str] | None:
    """A process in which the kernels run on the CPU; None, and a note, where that cannot be."""
    why = None
    if serving.missing is not None:
        why = serving.missing
    elif importlib.util.find_spec("numpy") is None:
        why = "Triton's interpreter, which could run them on the CPU, needs NumPy"
    if why is not None:
        report.not_checked.append(Gap("the Triton kernels, in any way", why))
        return None
    tell("cpu: Triton kernels in the interpreter, in a process of its own")
    # Triton reads these when it is imported. Its default of the second differs between releases.
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pfml_triton.selfcheck.interpreted"],
        stdout=subprocess.PIPE, env=environment, text=True,
    )  # fmt: skip


def _finish_interpreter(process: subprocess.Popen[str] | None, report: Report) -> None:
    """Add what the process has found."""
    if process is None:
        return
    try:
        out, _ = process.communicate(timeout=_PATIENCE)
        found = json.loads(out)
    except (subprocess.TimeoutExpired, ValueError) as error:
        process.kill()
        fault = f"its process ended with status {process.wait()}, and no result: {error}"
        report.checks.append(
            Check("cpu", "interpreter", "all kernels", "in Triton's interpreter", "a result", None,
                  None, None, False, None, None, fault, 0.0)
        )  # fmt: skip
        return
    report.checks += [Check(**check) for check in found["checks"]]
    report.not_checked += [Gap(**gap) for gap in found["not_checked"]]
    report.warnings += [text for text in found["warnings"] if text not in report.warnings]


def as_found(report: Report) -> str:
    """What the process of the interpreter prints, for `_finish_interpreter`."""
    return json.dumps(asdict(report))


def _check_compiler(report: Report) -> None:
    if serving.missing is not None:
        return
    from ..kernels import launch

    if launch.INTERPRETED:
        why = "TRITON_INTERPRET is set, and Triton's compiler is off"
        report.not_checked.append(Gap("whether this Triton can compile the kernels", why))
        return
    from . import compiler

    tell(f"Triton's compiler: every kernel for {' '.join(reversed(compiler.target()))}")
    log = Log(report, torch.device("cpu"), "compiler")
    log.run(
        "launches",
        "what a loss would launch can be listed",
        "no error",
        lambda _: compiler.check(log),
    )


def _note_what_a_gpu_would_show(report: Report) -> None:
    note = partial(Gap, why=_NO_GPU)
    report.not_checked += [
        note("anything on a GPU: no kernel has run on one"),
        note("the time of the kernels, and CUDA-graph capture"),
    ]
