"""Tests on this GPU, or the self-check where there are none; and compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.gpu.phases import FOLDER
from bench.gpu.rig import Rig

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "gpu"
SANITIZER = "compute-sanitizer"
_BESIDE_NVCC = "/usr/local/cuda/bin"
_PRINTED = 20  # findings of a sanitizer
_FOUND = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


def correctness(rig: Rig) -> None:
    """`python -m pytest -m gpu`, a row for each test as it ends; the self-check where the tests or
    pytest are missing."""
    if find_spec("pytest") is None or not TESTS.is_dir():
        self_check(rig)
    elif rig.rehearses:
        run_tests(rig, "tests/test_potential.py")
    else:
        run_tests(rig, "-m", "gpu", str(TESTS.relative_to(ROOT)))


def run_tests(rig: Rig, *arguments: str) -> None:
    """Run tests as a user does, whatever plugins are installed; bench.gpu.reporter writes rows."""
    options = "addopts=--import-mode=importlib --strict-markers"  # pyproject.toml wants xdist too
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-c", str(ROOT / "pyproject.toml")]
    command += ["-p", "no:randomly", "-p", "no:cacheprovider", "-p", "bench.gpu.reporter"]
    environment = os.environ | {FOLDER: str(rig.out)}
    status = subprocess.run(
        [*command, "-o", options, *arguments], cwd=ROOT, env=environment
    ).returncode
    if status not in (0, 1):  # of tests that pass, and that fail
        rig.row("test", test=" ".join(arguments), outcome="error", seconds=None, passed=False,
                message=f"pytest ended with status {status}")  # fmt: skip


def self_check(rig: Rig) -> None:
    """`python -m pfml_triton`, a row for each of its checks."""
    from pfml_triton.selfcheck import default_devices, run

    for check in run([torch.device("cpu")] if rig.rehearses else default_devices()).checks:
        case = (check.how, check.name, check.what, check.dtype, check.depth, check.points)
        rig.row("test", test=f"self-check: {' '.join(str(x) for x in case if x is not None)}",
                outcome="passed" if check.passed else "failed", passed=check.passed,
                seconds=check.seconds, message=check.detail)  # fmt: skip


def sanitize(rig: Rig, tool: str) -> None:
    """One step under compute-sanitizer: memory that is not its own, or a race in shared memory."""
    program = shutil.which(SANITIZER) or shutil.which(SANITIZER, path=_BESIDE_NVCC)
    if program is None:
        rig.row("sanitizer", tool=tool, outcome="skipped", errors=None,
                message=f"{SANITIZER} is not installed")  # fmt: skip
        return
    step = [sys.executable, "-m", "bench.gpu.phases", "once", "--out", str(rig.out)]
    # Every tensor in memory of its own, so that a read past its end is seen.
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", str(_PRINTED), *step]
        + ["--rehearse"] * rig.rehearses,
        cwd=ROOT, env=alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(result.stdout, flush=True)
    summary = _FOUND.search(result.stdout)
    errors = int(summary[1] or summary[2]) if summary else None
    lines = [line.strip("= ") for line in result.stdout.splitlines() if line.startswith("=====")]
    rig.row("sanitizer", tool=tool, errors=errors, passed=result.returncode == 0,
            outcome="passed" if result.returncode == 0 else f"status {result.returncode}",
            message="; ".join(lines[1:4])[:300] if result.returncode else "")  # fmt: skip
