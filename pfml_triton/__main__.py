"""`python -m pfml_triton`: check this machine. What is checked, pfml_triton/selfcheck says.

With --json, one object on stdout, with these keys:

    format       1
    passed       did all that was checked pass?
    verdict      that in one line
    versions     {pfml_triton, python, platform, torch, triton, cuda, hip, driver}, null where none
    devices      [{device, name, capability, memory_bytes, multiprocessors, backend, reason}]: who
                 serves there, "triton" or "torch", and why
    tuning       {file, found, usable_entries, faults} of the tuning file
    checks       [{device, how, name, what, against, dtype, depth, points, passed, error, allowed,
                 detail, seconds}]: how is "gpu", "interpreter", "compiler" or "torch"; error is the
                 worst one as a share of the largest entry, null where equality was asked for
    timings      [{device, backend, points, depth, dtype, repeats, loss_ms, eager_ms}]: medians of
                 forward and backward, and of plain PyTorch (null if it does not fit)
    warnings     [text] that the package raised
    not_checked  [{what, why}]
    next         [text], what to do
    seconds      that all of it took
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from .selfcheck import default_devices, run
from .selfcheck.text import text


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print the report, and return the exit status: 0 if all passed, 1 if not."""
    parser = argparse.ArgumentParser(
        "python -m pfml_triton",
        description="Check that the PFML loss computes on this machine what it should: every "
        "Triton kernel, the whole loss with its gradients, that runs repeat, and how long they "
        "take. About half a minute on a GPU, and up to two more the first time, while the kernels "
        "compile; a minute without a GPU.",
        epilog="Exit status: 0 if everything that was checked passed, 1 if something failed, 2 if "
        "an argument is wrong. Progress goes to stderr, the report to stdout.",
    )
    parser.add_argument(
        "--device",
        type=_device,
        help="check only this one, cpu or cuda:INDEX (default: every GPU, or else the CPU)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object in place of the report"
    )
    chosen = parser.parse_args(arguments)
    report = run(default_devices() if chosen.device is None else [chosen.device])
    print(json.dumps(report.as_json(), indent=1) if chosen.json else text(report))
    return 0 if report.passed else 1


def _device(name: str) -> torch.device:
    """A device of this machine; argparse tells what is wrong with others."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is not None and device.type == "cuda" and (device.index or 0) < count:
        return torch.device("cuda", device.index or 0)
    if device is None or device.type != "cpu":
        there = ["cpu", *(f"cuda:{i}" for i in range(count))]
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(there)}, got {name!r}")
    return torch.device("cpu")


if __name__ == "__main__":
    sys.exit(main())
