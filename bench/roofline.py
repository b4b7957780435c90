"""The modelled time of one step on a GPU that is not here, from its machine code.

Nothing in it is measured. Launches, machine code, tiles and pairs are counted (counting.py,
machine.py, workloads.py); rates are published or assumed (chips.py); estimate.py has the rule that
makes seconds of them, and validation.py says how far off it is on kernels of published speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench import aot
from bench.chips import CHIPS
from bench.counting import Work
from bench.estimate import estimate
from bench.workloads import name_of, parts_of, read


@dataclass(frozen=True)
class Prediction:
    """What one launch is modelled to take. Seconds are infinite where it does not fit."""

    name: str
    seconds: float  # point estimate
    low: float
    high: float
    limit: str
    registers: int
    stack_bytes: int
    spills_in_loops: int
    shared_bytes: int
    resident: int  # programs that a multiprocessor holds
    fits: bool


def predict(launches: Sequence[aot.Launch], arch: str, work: Work) -> list[Prediction]:
    """The modelled time of each launch on a chip, in order, for the work of a cloud.

    Args:
        launches: of `aot.record`, in a process without TRITON_INTERPRET.
        arch: one of `CHIPS`.
        work: of the cloud whose sizes the launches have.

    A launch that cannot be compiled, or wants more shared memory than a program may have, gets
    `fits=False` and infinite seconds.

    Raises:
        ValueError: there is no model of that chip.
    """
    check_arch(arch)
    return [_predict(launch, arch, work) for launch in launches]


def check_arch(arch: str) -> None:
    if arch not in CHIPS:
        raise ValueError(
            f"arch must be one of {', '.join(CHIPS)}, got {arch!r}: the model reads the machine "
            "code of NVIDIA's chips"
        )


def _predict(launch: aot.Launch, arch: str, work: Work) -> Prediction:
    name, never = name_of(launch), math.inf
    try:
        kernel = read(launch, arch, CHIPS[arch])
    except Exception as error:  # whatever Triton raises for what it cannot compile
        why = f"not compiled: {type(error).__name__}"
        return Prediction(name, never, never, never, why, 0, 0, 0, 0, 0, False)
    m = kernel.machine
    facts = m.registers, m.stack_bytes, len(m.spills_in_loops), m.shared_bytes, kernel.resident
    if kernel.resident == 0:
        return Prediction(name, never, never, never, "does not fit", *facts, False)
    e = estimate(kernel, CHIPS[arch], parts_of(kernel, work))
    return Prediction(name, e.seconds, e.low, e.high, e.limit, *facts, True)
