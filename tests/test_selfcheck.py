"""`python -m pfml_triton`: what it finds, and that it finds what is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pfml_triton import PFMLLoss, module, selfcheck, serving, torch_backend
from pfml_triton import __main__ as command
from pfml_triton.kernels import launch
from pfml_triton.selfcheck import kernels, loss, machine
from pfml_triton.selfcheck.result import Check, Comparison, Log, Report
from pfml_triton.selfcheck.text import next_steps, text

CPU = torch.device("cpu")
KEYS = {
    "format", "passed", "verdict", "versions", "devices", "tuning", "checks", "timings", "warnings",
    "not_checked", "next", "seconds",
}  # fmt: skip


def called(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as its users call it: without the interpreter that the tests have."""
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "pfml_triton", *arguments],
        capture_output=True, text=True, check=False, env=own | environment,
    )  # fmt: skip


@pytest.mark.slow
def test_json_of_this_machine() -> None:
    ran = called("--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout)
    assert set(found) == KEYS
    assert found["format"] == 1
    assert found["passed"] is True
    assert found["verdict"].startswith("PASSED")
    names = {check["name"] for check in found["checks"]}
    assert {f"kernel: {kernel.name}" for kernel in kernels.KERNELS.values()} <= names
    assert {check["dtype"] for check in found["checks"] if check["name"] == "loss"} == {
        "float32", "bfloat16", "float16", "float64"
    }  # fmt: skip
    assert all(check["passed"] for check in found["checks"])
    if not torch.cuda.is_available():
        assert {check["how"] for check in found["checks"]} == {"torch", "compiler", "interpreter"}
        assert any("on a GPU" in gap["what"] for gap in found["not_checked"])
        assert all(timing["backend"] == "torch" for timing in found["timings"])


def test_a_device_that_is_not_there() -> None:
    for name in ("cuda:99", "tpu", "meta"):
        with pytest.raises(SystemExit) as exited:
            command.main(["--device", name])
        assert exited.value.code == 2


def report_of(*checks: Check, **about: Any) -> Report:
    versions = dict.fromkeys(machine.versions(), "1")
    device = {
        "device": "cpu", "name": "A chip", "capability": "any", "memory_bytes": None,
        "multiprocessors": None, "backend": "torch", "reason": "Triton is missing",
    }  # fmt: skip
    tuning = {"file": None, "found": False, "usable_entries": 0, "faults": []}
    return Report(versions, [device | about], tuning, checks=list(checks))


GOOD = Check(
    "cpu", "torch", "loss", "the loss", "the truth", "float32", 64, 100, True, 1e-7, 1e-6, "", 0.1
)
BAD = Check(
    "cpu", "torch", "loss", "the loss", "the truth", "float16", 64, 100, False, 0.1, 1e-6,
    "value: got 2, expected 1", 0.1,
)  # fmt: skip


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(("checks", "status"), [((GOOD,), 0), ((GOOD, BAD), 1)])
def test_exit_status(
    checks: tuple[Check, ...],
    status: int,
    as_json: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "run", lambda _: report_of(*checks))
    assert command.main(["--json"] if as_json else []) == status
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out)["passed"] is (status == 0)
    else:
        assert ("FAILED" in out.splitlines()[-1]) is (status == 1)
        if status:
            assert "failed (float16, D = 64, N = 100): value: got 2, expected 1" in out


def test_report_of_a_gpu() -> None:
    gpu = {
        "device": "cuda:0", "name": "NVIDIA H100", "capability": "9.0", "memory_bytes": 80 << 30,
        "multiprocessors": 132, "backend": "triton", "reason": "it is a GPU",
    }  # fmt: skip
    check = Check(
        "cuda:0", "gpu", "loss", "the loss", "the truth", "float32", 64, 9, True, None, None, "", 1
    )
    out = text(report_of(check, **gpu))
    assert "cuda:0: NVIDIA H100 (9.0), 80 GiB, 132 multiprocessors" in out
    assert "Triton kernels, running on cuda:0 (NVIDIA H100)" in out
    assert "PASSED: all 1 checks. The Triton kernels compute what they should on" in out
    assert max(len(line) for line in out.splitlines()) <= 100


def test_progress_names_every_kernel_of_every_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, a line a case, the names as the kernels come."""
    case = kernels.Case(torch.float32, 20, 40, of_loss=True)
    monkeypatch.setattr(kernels, "on_gpu", lambda: [case, case])
    monkeypatch.setattr(loss, "check", lambda *_: None)
    selfcheck._check_gpu(Log(report_of(), CPU, "gpu"))
    out, err = capsys.readouterr()
    assert (
        "kernels of case 2 of 2 (float32, D = 20, N = 40): pack filter forces total pull back\n"
        in err
    )
    assert not out


def test_a_missing_c_compiler_is_the_next_step() -> None:
    report = report_of()
    log = Log(report, CPU, "gpu")

    def build(_: Any) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC")

    log.run("kernel: pack", "packs", "the truth", build)
    log.run("kernel: filter", "filters", "the truth", build)
    steps = next_steps(report)
    assert steps[0].startswith("Triton needs a C compiler to launch kernels, got none: install gcc")
    assert steps[0].endswith("Then run `python -m pfml_triton` again.")
    assert not [step for step in steps if "Report what failed" in step]


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the torch backend is left, and the report says so."""
    monkeypatch.setattr(serving, "missing", "Triton cannot be imported here")
    monkeypatch.setattr(selfcheck.timing, "check", lambda *_: None)
    monkeypatch.setattr(loss, "RUNS", 2)
    report = selfcheck.run([CPU])
    assert report.passed, [check.detail for check in report.failed]
    assert {check.how for check in report.checks} == {"torch"}
    out = text(report)
    assert "the torch backend serves there, because Triton cannot be imported here" in out
    assert "the Triton kernels, in any way" in out
    assert "The Triton kernels were not checked." in out


def checked(backend: str, n: int = 40) -> dict[str, Check]:
    """The checks of a whole loss, by name."""
    report = Report({}, [], {})
    loss.check(Log(report, CPU, "torch"), backend, [torch.float32], [20], n)
    return {check.name: check for check in report.checks}


def test_the_torch_backend_passes() -> None:
    found = checked("torch")
    assert len(found) == 6
    assert all(check.passed for check in found.values())


def interpreted_graph(step: Callable[[], list[Tensor]], device: torch.device) -> Any:
    """Stands in for `loss._captured`: a replay makes the step again."""
    for _ in range(3):
        step()
    captured = [t.clone() for t in step()]

    def replay() -> None:
        for t, found in zip(captured, step(), strict=True):
            t.copy_(found)

    return replay, captured


@pytest.mark.parametrize("training", [False, True])
def test_a_captured_step_is_compared(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_captured", interpreted_graph)
    monkeypatch.setattr(module, "turn_basis", lambda *_: None)  # as while a graph is captured
    updated: list[Tensor] = []
    monkeypatch.setattr(PFMLLoss, "update_sketch", lambda _, x: updated.append(x), raising=False)
    comparison = Comparison()
    loss._graph(training, "torch", CPU, 20, 40, comparison)
    assert not comparison.fault
    assert len(updated) == (2 if training else 0)


def test_a_graph_that_turns_the_sketch_or_repeats_old_results_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "_captured", interpreted_graph)
    monkeypatch.setattr(module, "turn_basis", lambda basis, *_: basis.mul_(0.5))
    monkeypatch.setattr(PFMLLoss, "update_sketch", lambda *_: None, raising=False)
    comparison = Comparison()
    loss._graph(True, "torch", CPU, 20, 40, comparison)
    assert comparison.fault.startswith("replay 1: basis of the sketch")
    monkeypatch.setattr(loss, "_captured", lambda step, _: (lambda: None, step()))
    comparison = Comparison()
    loss._graph(False, "torch", CPU, 20, 40, comparison)
    assert comparison.fault.startswith("replay 1: value")


def broken(function: Any, change: Any) -> Any:
    """A function whose results are changed."""
    return lambda *args, **kwargs: change(function(*args, **kwargs))


@pytest.mark.parametrize(
    ("name", "change", "finds"),
    [
        ("pull_back", lambda gs: tuple(g if g is None else g * 1.0001 for g in gs), "loss"),
        ("total", lambda vt: (vt[0] * 1.0001, vt[1]), "loss"),
        ("total", lambda vt: (vt[0], vt[1] + 1), "loss"),
        ("total", lambda vt: (vt[0].nan_to_num(0), vt[1].nan_to_num(0)), "not a number"),
        ("total", lambda vt: (vt[0] + torch.rand(()) * 1e-3, vt[1]), "repeatable"),
        ("field_terms", lambda terms: terms._replace(grad=terms.grad * 1.001), "near points"),
    ],
)
def test_what_is_broken_is_found(
    name: str, change: Any, finds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, name, broken(getattr(torch_backend, name), change))
    found = checked("torch")
    assert not found[finds].passed
    assert found[finds].detail


def test_an_exception_is_the_failure_of_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch_backend, "pull_back", fail)
    found = checked("torch")
    assert found["loss"].detail == "RuntimeError: no such thing"
    assert not found["loss"].passed


def kernels_checked(begun: Callable[[str], None] = lambda name: None) -> dict[str, Check]:
    report = Report({}, [], {})
    log = Log(report, CPU, "interpreter")
    case = kernels.Case(torch.float32, 20, 40, of_loss=True, shares_lists=True)
    kernels.check(log, case, begun)
    return {check.name.removeprefix("kernel: "): check for check in report.checks}


def test_every_kernel_passes_in_the_interpreter() -> None:
    begun: list[str] = []
    found = kernels_checked(begun.append)
    assert begun == list(found)
    assert set(found) == {kernel.name for kernel in kernels.KERNELS.values()}
    assert all(check.passed for check in found.values()), found


WRITES = {  # an argument that the kernel writes, of each
    "pack": "coarse", "filter": "near", "count": "count", "plan": "extra", "force": "grad",
    "join": "energy", "total": "totals", "pull_back": "x_grad",
}  # fmt: skip


@pytest.mark.parametrize("kernel", WRITES)
def test_a_broken_kernel_is_named(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something in what it has written is changed: it fails, and those before it do not."""
    run = kernels.Launch.run

    def spoiled(one: Any) -> None:
        run(one)
        if one.kernel.__name__ == f"_{kernel}_kernel":
            out = one.args[f"{WRITES[kernel]}_ptr"]
            if kernel == "filter":
                out.zero_()  # as if no tile were near
            else:
                out.view(-1)[0] += 3

    monkeypatch.setattr(kernels.Launch, "run", spoiled)
    found = kernels_checked()
    name = kernels.KERNELS[f"_{kernel}_kernel"].name
    assert not found[name].passed, found
    order = list(found)
    assert all(found[before].passed for before in order[: order.index(name)])


def test_who_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.served_by(CPU)[0] == "torch"
    device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    for obstacle, backend in ((None, "triton"), ("too old", "torch")):
        monkeypatch.setattr(launch, "obstacle", lambda _, found=obstacle: found)
        monkeypatch.setattr(launch, "INTERPRETED", False)
        served, why = machine.served_by(device)
        assert served == backend
        assert (obstacle or "it is a GPU") in why
