"""What the self-check finds: comparisons, the checks they make, and the report of all."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import serving

FORMAT = 1  # of the JSON


@dataclass
class Check:
    """One thing that was compared, and how it went."""

    device: str  # "cuda:0", "cpu"
    how: str  # one of HOW
    name: str  # "kernel: pack", "loss"
    what: str  # in words
    against: str  # in words
    dtype: str | None  # of the points
    depth: int | None  # D
    points: int | None  # N
    passed: bool
    error: float | None  # the worst one, as a share of the largest entry; None: nothing to measure
    allowed: float | None
    detail: str  # where the worst error was, or why it failed
    seconds: float


# What served while a check ran, in words.
HOW = {
    "gpu": "Triton kernels, running on the GPU",
    "interpreter": "Triton kernels, in Triton's interpreter on the CPU",
    "compiler": "Triton's compiler",
    "torch": "torch backend",
}


@dataclass
class Timing:
    """Median milliseconds of forward and backward of the whole loss, and of plain PyTorch."""

    device: str
    backend: str  # "triton" or "torch"
    points: int  # N
    depth: int  # D
    dtype: str
    repeats: int
    loss_ms: float
    eager_ms: float | None  # None if its N x N matrices do not fit


@dataclass
class Gap:
    """What could not be checked here."""

    what: str
    why: str


@dataclass
class Report:
    """All that was found. `as_json` is what --json prints."""

    versions: dict[str, str | None]
    devices: list[dict[str, Any]]
    tuning: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    not_checked: list[Gap] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        return not self.failed

    def as_json(self) -> dict[str, Any]:
        from .text import next_steps, verdict

        return {
            "format": FORMAT,
            "passed": self.passed,
            "verdict": verdict(self),
            **asdict(self),
            "next": next_steps(self),
        }


class Comparison:
    """Collects what is compared in one check, and keeps the worst of it."""

    def __init__(self) -> None:
        self.error: float | None = None
        self.allowed: float | None = None
        self.where = ""
        self.fault = ""

    def near(self, what: str, ours: Tensor, true: Tensor, allowed: float) -> None:
        """|ours - true| <= allowed * the largest entry of |true|, in float64."""
        if ours.shape != true.shape:
            self._fail(f"{what} has shape {list(ours.shape)}, expected {list(true.shape)}")
            return
        if true.numel() == 0:
            return
        ours, true = ours.detach().double().flatten(), true.detach().double().flatten()
        same_infinity = ours.isinf() & (ours == true)
        scale = true.abs().masked_fill(same_infinity, 0).max().clamp_min(1e-300)
        errors = ((ours - true).abs() / scale).masked_fill(same_infinity, 0)
        errors = errors.nan_to_num(math.inf, math.inf)
        worst = int(errors.argmax())
        error = float(errors[worst])
        where = f"{what}: got {float(ours[worst]):.9g}, expected {float(true[worst]):.9g}"
        if (
            self.error is None
            or self.allowed is None
            or error / allowed > self.error / self.allowed
        ):
            self.error, self.allowed, self.where = error, allowed, where
        if not error <= allowed:
            self._fail(f"{where}, error {error:.1e} where {allowed:.1e} is allowed")

    def same(self, what: str, ours: Tensor, true: Tensor) -> None:
        """Equal to the bit, or the same numbers in another dtype."""
        if ours.shape != true.shape:
            self._fail(f"{what} has shape {list(ours.shape)}, expected {list(true.shape)}")
            return
        differ = int((ours != true.to(ours.dtype)).sum())
        if differ:
            first = int((ours != true.to(ours.dtype)).flatten().int().argmax())
            self._fail(
                f"{what}: {differ} of {ours.numel()} differ, the first with "
                f"{ours.flatten()[first].item()} where {true.flatten()[first].item()} is expected"
            )

    def holds(self, what: str, condition: bool | Tensor) -> None:
        """A statement about the result."""
        if not bool(condition):
            self._fail(f"not so: {what}")

    def _fail(self, fault: str) -> None:
        self.fault = self.fault or fault


class Log:
    """Runs checks of one device, whatever they do, and writes into a report what they found."""

    def __init__(self, report: Report, device: torch.device, how: str) -> None:
        self.report, self.device, self.how = report, device, how
        self.lost = False  # the device: after a fault, every call to it fails

    def run(
        self,
        name: str,
        what: str,
        against: str,
        body: Callable[[Comparison], None],
        *,
        dtype: torch.dtype | None = None,
        depth: int | None = None,
        points: int | None = None,
    ) -> Exception | None:
        """Make a check. An exception in it is its failure, and is returned."""
        if self.lost:
            return None
        comparison, raised, started = Comparison(), None, time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                body(comparison)
            except Exception as error:
                raised = error
                comparison.fault = serving.needed(error) or f"{type(error).__name__}: {error}"
        self._warned(caught)
        self.report.checks.append(
            Check(
                str(self.device), self.how, name, what, against,
                None if dtype is None else str(dtype).removeprefix("torch."), depth, points,
                not comparison.fault, _finite(comparison.error), comparison.allowed,
                comparison.fault or comparison.where, time.perf_counter() - started,
            )
        )  # fmt: skip
        if raised is not None and not self._answers():
            self.lost = True
            why = f"{self.device} answers no more after the fault in {name}"
            self.report.not_checked.append(Gap(f"the rest of the checks on {self.device}", why))
        return raised

    def skip(self, what: str, why: str) -> None:
        """Tell what is not checked, once."""
        gap = Gap(what, why)
        if gap not in self.report.not_checked:
            self.report.not_checked.append(gap)

    def _warned(self, caught: list[warnings.WarningMessage]) -> None:
        for one in caught:
            text = f"{one.category.__name__}: {one.message}"
            # Of NumPy, where the interpreter meets an infinity.
            of_interpreter = one.category is RuntimeWarning and "interpreter" in one.filename
            if not of_interpreter and text not in self.report.warnings:
                self.report.warnings.append(text)

    def _answers(self) -> bool:
        try:
            torch.zeros(1, device=self.device).item()
        except Exception:
            return False
        return True


def _finite(error: float | None) -> float | None:
    """JSON has no infinity: an error that is not finite is the failure's words only."""
    return error if error is not None and math.isfinite(error) else None


def tell(line: str, end: str = "\n") -> None:
    """Progress, on stderr: stdout is the report's."""
    print(line, file=sys.stderr, end=end, flush=True)
