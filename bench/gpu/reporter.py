"""A plugin of pytest that appends a row for each test as it ends: `-p bench.gpu.reporter`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.gpu.phases import FOLDER
from bench.gpu.rig import Rig


def pytest_runtest_logstart(nodeid: str) -> None:
    print(f"\n{nodeid}", flush=True)  # the last line of the log, if the process dies with it


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return  # set-up and tear-down count where they fail or skip
    told = report.longrepr
    if isinstance(told, tuple):  # path, line and reason of what is skipped
        told = told[-1]
    crash = getattr(told, "reprcrash", None)
    message = str(crash.message if crash else told or "")[:300]
    passed = {"passed": True, "failed": False}.get(report.outcome)
    Rig(Path(os.environ[FOLDER]), "correctness").row(
        "test", test=report.nodeid, outcome=report.outcome, passed=passed,
        seconds=report.duration, message=message,
    )  # fmt: skip
